"""A run whose solutions hold code, on a tiny model that learns small programs by heart: SCDPO, export, solve, eval."""

import json
import shutil
from pathlib import Path

import pytest
from easy import NAMES, SETTINGS

pytest.importorskip("torch")
pytest.importorskip("pydantic_monty")

from typer.testing import CliRunner

from dpost_lite.cli.app import app
from dpost_lite.errors import RunError
from dpost_lite.evaluation.targets import find_target
from dpost_lite.local.solver import recipe_of_file
from dpost_lite.models.loading import load_prompter
from dpost_lite.pipeline.run import execute
from dpost_lite.planner.recorder import planned_stages
from dpost_lite.problems.code_format import blocks, inserted_tokens
from dpost_lite.problems.records import LabelledRationale, PreferencePair, Rationale, Rest, read_jsonl
from dpost_lite.recipe_files import load_recipe
from dpost_lite.report import results
from dpost_lite.runs.folder import FORMAT_FILE, Run, read_json, stages_done
from dpost_lite.sandbox.choose import NOT_RUN

CODE = [
    "solutions=code", "calculator.enabled=false", "sft.epochs=60", "sft.batch_size=4", "sampling.max_new_tokens=150",
    "sampling.temperature=0.5", "rests.temperature=1.5", "rests.max_temperature=1.5",
]  # fmt: skip


def write_problems(path: Path) -> Path:
    """Problems of two numbers; the rationales of a few cannot become programs."""
    rows = []
    for i, name in enumerate(NAMES * 2):
        left, right = (2, 2) if i % 3 else (2, 5)
        total = left + right
        answer = f"So {left}+{right}=<<{left}+{right}={total}>>{total}\n#### {total}"
        question = f"{name} {'in' if i < len(NAMES) else 'at'} {left} and {right}?"
        rows.append({"question": question, "answer": answer if i % 2 else str(total)})
    for row in rows[1:5:2]:
        row["answer"] = "No sum here.\n" + row["answer"].split("\n")[-1]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    problems = write_problems(folder / "two.jsonl")
    settings = [f"model.name={base_dir}", f"data.train={problems}", "method=scdpo"]
    recipe = load_recipe(None, [*SETTINGS, *settings, *CODE])
    execute(recipe, Run.create(folder / "run", recipe, ()))
    return folder / "run"


def kinds(text: str) -> list[str]:
    return [block.kind for block in blocks(text)]


def test_rationales_became_programs(finished: Path) -> None:
    labels = list(read_jsonl(finished / "data/labels.jsonl", LabelledRationale))
    assert len(labels) > 3
    for label in labels:
        assert kinds(label.text) == ["text", "code", "output", "text"]
    assert read_json(finished / "data/done.json")["metrics"]["without_program"] in range(1, 3)


def test_all_stages_ran(finished: Path) -> None:
    run = Run.open(finished)
    assert sorted(stage for stage, _ in stages_done(finished)) == sorted(map(str, planned_stages(run.recipe)))
    assert results.scores(finished)[0].code


def test_what_was_inserted_is_what_the_code_printed(finished: Path) -> None:
    drawn = list(read_jsonl(finished / "round-1/samples-pairs/rationales.jsonl", Rationale))
    recipe = Run.open(finished).recipe
    text_of = load_prompter(Path(recipe.model.name), recipe.model).token_text()
    ran = [rationale for rationale in drawn if rationale.num_calculated]
    assert len(ran) > len(drawn) / 2
    for rationale in ran:
        found = inserted_tokens(rationale.token_ids, text_of)
        assert any(found)
        assert all(is_forced >= is_found for is_found, is_forced in zip(found, rationale.forced, strict=True))


def test_step_controlled_pairs_are_cut_between_blocks(finished: Path) -> None:
    rests = list(read_jsonl(finished / "round-1/rests/rests.jsonl", Rest))
    assert rests
    assert {tuple(kinds(rest.kept)) for rest in rests} == {("text",)}
    pairs = [p for p in read_jsonl(finished / "round-1/pairs/pairs.jsonl", PreferencePair) if p.prefix_ids]
    assert any(kinds(pair.prefix + pair.chosen) == ["text", "code", "output", "text"] for pair in pairs)


def test_the_file_says_that_it_writes_code(finished: Path) -> None:
    file = next((finished / "export").glob("*.gguf"))
    assert recipe_of_file(file).solutions == "code"
    assert "```output" in read_json(finished / "solved/solved.json")[0]["solution"]["text"]


@pytest.mark.parametrize("from_file", [False, True])
def test_solve_runs_code_only_if_allowed(finished: Path, from_file: bool) -> None:
    source = next((finished / "export").glob("*.gguf")) if from_file else finished
    asked = ["solve", str(source), "Ann in 2 and 2?"]
    without = CliRunner().invoke(app, asked)
    assert without.exit_code == 0, without.output
    assert NOT_RUN in without.stdout
    allowed = CliRunner().invoke(app, [*asked, "--allow-code"])
    assert allowed.exit_code == 0, allowed.output
    assert NOT_RUN not in allowed.stdout
    assert "```output\n4\n```" in allowed.stdout


def test_eval_runs_code_only_if_allowed(finished: Path, tmp_path: Path) -> None:
    command = ["eval", str(finished), "--policy", "sft-0", "--limit", "3", "--out"]
    without = CliRunner().invoke(app, [*command, str(tmp_path / "without")])
    allowed = CliRunner().invoke(app, [*command, str(tmp_path / "allowed"), "--allow-code"])
    assert (without.exit_code, allowed.exit_code) == (0, 0), allowed.output
    assert NOT_RUN in (tmp_path / "without/sft-0-off/answers.jsonl").read_text()
    assert NOT_RUN not in (tmp_path / "allowed/sft-0/answers.jsonl").read_text()


def test_an_adapter_says_so_too(finished: Path, tmp_path: Path) -> None:
    assert find_target(str(finished / "sft-0")).recipe.solutions == "code"
    shutil.copytree(finished / "sft-0", tmp_path / "copy")
    for damaged in ("{", "[1]"):
        (tmp_path / "copy" / FORMAT_FILE).write_text(damaged)
        with pytest.raises(RunError, match=r"dpost_lite\.json is damaged"):
            find_target(str(tmp_path / "copy"))
    (tmp_path / "copy" / FORMAT_FILE).unlink()
    assert find_target(str(tmp_path / "copy")).recipe.solutions == "text"
