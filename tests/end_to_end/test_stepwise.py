"""A run with step-controlled pairs (SCDPO), on a tiny model that learns two-step rationales by heart."""

import json
from pathlib import Path

import pytest
from easy import NAMES, SETTINGS

pytest.importorskip("torch")

from typer.testing import CliRunner

from dpost_lite.cli.app import app
from dpost_lite.evaluation.targets import policies_of
from dpost_lite.models.loading import load_prompter
from dpost_lite.pipeline.run import execute
from dpost_lite.planner.recorder import planned_stages
from dpost_lite.problems.records import PreferencePair, Rest, read_jsonl
from dpost_lite.problems.steps import is_usable
from dpost_lite.recipe import ModelRecipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.report import health, results
from dpost_lite.runs.folder import Run, stages_done


def write_problems(path: Path) -> Path:
    rows = []
    for i, name in enumerate(NAMES * 2):
        left, right = (2, 2) if i % 3 else (2, 5)
        total = left + right
        answer = f"2\n{left}+{right}=<<{left}+{right}={total}>>{total}\n#### {total}"
        question = f"{name} {'in' if i < len(NAMES) else 'at'} {left} and {right}?"
        rows.append({"question": question, "answer": answer if i % 2 else str(total)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def start(base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stepwise")
    problems = write_problems(folder / "two.jsonl")

    def run(*overrides: str):
        settings = [
            f"model.name={base_dir}",
            f"data.train={problems}",
            "rounds=1",
            "pairs.stepwise=0.5",
            "dpo.gate=off",
        ]
        recipe = load_recipe(None, [*SETTINGS, *settings, "sft.epochs=24", "sampling.max_new_tokens=28", *overrides])
        events: list[dict] = []
        return recipe, folder / "run", execute(recipe, Run.create(folder / "run", recipe, (events.append,))), events

    return run


def pairs_of(run: Path) -> list[PreferencePair]:
    return list(read_jsonl(run / "round-1/pairs/pairs.jsonl", PreferencePair))


@pytest.fixture(scope="module")
def three_methods(base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scdpo")
    problems = write_problems(folder / "two.jsonl")
    command = [
        "run", "--method", "scdpo,dpo-equal,dpo", "--out", str(folder / "run"), "--data", str(problems), "--model",
        str(base_dir), *SETTINGS, "sft.epochs=24", "sampling.max_new_tokens=28", "pairs.max_per_problem=1", "seed=1",
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return command, result.stdout, folder / "run/seed-1"


def test_scdpo_beside_dpo_on_as_many_pairs(three_methods):
    """SCDPO takes all pairs of both kinds; data-equal DPO raises the limit per problem to have as many."""
    _, output, folder = three_methods
    scdpo, equal, dpo = (pairs_of(folder / name) for name in ("scdpo", "dpo-equal", "dpo"))
    assert [pair for pair in scdpo if not pair.prefix_ids] == dpo
    assert any(pair.prefix_ids for pair in scdpo)
    assert not any(pair.prefix_ids for pair in equal)
    assert len(dpo) < len(equal) <= len(scdpo)
    assert len({pair.problem_id for pair in equal}) < len(equal)
    assert "scdpo - dpo-equal" in output
    assert "scdpo - dpo:" in output
    for name in ("scdpo", "dpo-equal", "dpo"):
        run = Run.open(folder / name)
        done = [stage for stage, _ in stages_done(run.path)]
        assert sorted(done) == sorted(map(str, planned_stages(run.recipe)))
        assert not any("labels" in stage or "gate" in stage for stage in done)
        assert results.exported(run.path) == "round-1"
        assert policies_of(run)["round-1"] == run.path / "round-1/dpo"
    for shared in ("round-1/samples-pairs/rationales.jsonl", "sft-0/adapter_model.safetensors"):
        assert len({(folder / name / shared).stat().st_ino for name in ("scdpo", "dpo-equal", "dpo")}) == 1
    rests = "round-1/rests/rests.jsonl"
    assert (folder / "scdpo" / rests).stat().st_ino == (folder / "dpo-equal" / rests).stat().st_ino


def test_the_same_comparison_again_runs_no_stage(three_methods):
    command, _, _ = three_methods
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "started" not in result.stdout


def test_the_report_and_eval_of_an_scdpo_run(three_methods, tmp_path):
    _, _, folder = three_methods
    assert CliRunner().invoke(app, ["report", str(folder / "scdpo"), "--out", str(tmp_path / "page")]).exit_code == 0
    page = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert "Step-controlled DPO" in page
    assert "Self-training" not in page
    result = CliRunner().invoke(
        app, ["eval", str(folder / "scdpo"), "--calculator", "on", "--out", str(tmp_path / "evals")]
    )
    assert result.exit_code == 0, result.output
    assert {path.parent.name for path in (tmp_path / "evals").glob("*/answers.jsonl")} >= {"base", "sft-0", "round-1"}


def test_a_step_controlled_run_from_problems_to_file(start, base_dir):
    recipe, path, outcome, events = start()
    assert outcome.solved is not None
    started = [event["stage"] for event in events if event["kind"] == "stage_started"]
    assert started == list(map(str, planned_stages(recipe)))
    rests = list(read_jsonl(path / "round-1/rests/rests.jsonl", Rest))
    pairs = list(read_jsonl(path / "round-1/pairs/pairs.jsonl", PreferencePair))
    stepwise = [pair for pair in pairs if pair.prefix_ids]
    assert rests
    assert stepwise
    assert 2 * len(stepwise) >= len(pairs)
    prompter = load_prompter(base_dir, ModelRecipe(prompt="plain"))
    wrong = {(rest.problem_id, rest.kept_ids, rest.token_ids) for rest in rests if is_usable(rest)}
    for pair in stepwise:
        assert prompter.text(pair.prefix_ids).endswith("\n")
        assert (pair.problem_id, pair.prefix_ids, pair.rejected_ids) in wrong
        assert prompter.text(pair.chosen_ids) == pair.chosen
        assert prompter.text(pair.rejected_ids) == pair.rejected
    (round_1,) = health.rounds(path)
    assert round_1.rests.num_rests == len(rests)
    assert round_1.pairs.num_stepwise == len(stepwise)
    again = start()[3]
    assert not [event for event in again if event["kind"] == "stage_started"]
