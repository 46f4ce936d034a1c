"""Evaluation of models, adapters and GGUF files on a tiny random model: the same answers, kept, scored and compared."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from run_folder import RunFolder
from typer.testing import CliRunner

from dpost_lite.cli.app import app
from dpost_lite.errors import ModelError, RunError
from dpost_lite.evaluation import papers
from dpost_lite.evaluation.evaluate import Sampling, evaluate, new_folder, saved_answers
from dpost_lite.evaluation.targets import find_target
from dpost_lite.pipeline.export import export_gguf
from dpost_lite.problems.records import GradedAnswer, Problem, Score, file_name
from dpost_lite.recipe_files import load_recipe

PROBLEMS = [Problem(str(i), f"Ann has {i} boxes and buys {i} more. How many?", str(2 * i)) for i in range(4)]


@pytest.fixture
def scored(tmp_path):
    """A function: (target, **options) -> its scores; answers are kept in tmp_path/out."""

    def run(target, *, calculator=(True,), sampling=None):
        small = target.recipe.sampling.model_copy(update={"max_new_tokens": 12})
        recipe = target.recipe.model_copy(update={"sampling": small})
        target = type(target)(recipe, target.policies, target.run)
        given = evaluate(
            target,
            PROBLEMS,
            calculator=calculator,
            out=tmp_path / "out",
            sampling=sampling,
            listener=lambda event: None,
        )
        return list(given)

    return run


def test_every_answer_is_kept_with_its_question(scored, base_dir, tmp_path):
    scores = scored(find_target(str(base_dir)), calculator=(True, False), sampling=Sampling(3, 0.7))
    assert [(type(score).__name__, score.calculator) for score in scores] == [
        ("Score", True), ("SampledScore", True), ("Score", False), ("SampledScore", False),
    ]  # fmt: skip
    assert isinstance(scores[0], Score)
    name = file_name(str(base_dir))
    for folder in (tmp_path / "out" / name, tmp_path / "out" / f"{name}-off"):
        answers = saved_answers(folder)
        assert [(a.problem_id, a.question, a.answer) for a in answers] == [
            (p.id, p.question, p.answer) for p in PROBLEMS
        ]
        samples = saved_answers(folder / "samples.jsonl")
        assert [(s.problem_id, s.sample) for s in samples] == [(p.id, k) for p in PROBLEMS for k in range(3)]
        assert len({s.text for s in samples if s.problem_id == "1"}) > 1
    assert scores[0].num_unparsed == sum(a.predicted is None for a in saved_answers(tmp_path / "out" / name))
    assert scores[0].num_characters == sum(len(a.text) for a in saved_answers(tmp_path / "out" / name))


def test_an_adapter_is_scored_on_the_base_that_it_names(scored, base_dir, policy_dir, tmp_path):
    target = find_target(str(policy_dir))
    assert target.recipe.model.name == str(base_dir)
    assert scored(target)[0].name == policy_dir.name
    adapted = saved_answers(tmp_path / "out" / policy_dir.name)
    scored(find_target(str(base_dir)))
    plain = saved_answers(tmp_path / "out" / file_name(str(base_dir)))
    assert [a.text for a in adapted] != [a.text for a in plain]
    assert find_target(str(policy_dir), base="other/base").recipe.model.name == "other/base"


def test_an_adapter_that_names_no_base_asks_for_one(policy_dir, tmp_path):
    nameless = Path(shutil.copytree(policy_dir, tmp_path / "nameless"))
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="names no base; give one with --model"):
        find_target(str(nameless))


def test_a_gguf_file_answers_like_the_weights_it_was_made_from(scored, base_dir, tmp_path):
    recipe = load_recipe(None, ["model.precision=16bit", "export.quant=f16"])
    file = export_gguf(recipe, base_dir, None, tmp_path / "tiny.gguf").file
    scored(find_target(str(file)))
    target = find_target(str(base_dir))
    in_float32 = {"model": target.recipe.model.model_copy(update={"compute_dtype": "float32"})}
    scored(replace(target, recipe=target.recipe.model_copy(update=in_float32)))
    ours = saved_answers(tmp_path / "out" / file_name(str(base_dir)))
    theirs = saved_answers(tmp_path / "out" / "tiny.gguf")
    assert [(a.text, a.end, a.predicted) for a in theirs] == [(a.text, a.end, a.predicted) for a in ours]


def test_answers_are_never_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = new_folder("runs/x/seed-1/st", "own/mine.jsonl")
    assert first == Path("evals/runs-x-seed-1-st/mine")
    first.mkdir(parents=True)
    second = new_folder("runs/x/seed-1/st", "own/mine.jsonl")
    assert second == Path("evals/runs-x-seed-1-st/mine-2")
    assert new_folder("..", None) == Path("evals/model/test")
    assert new_folder("C:\\models\\base", None) == Path("evals/C-models-base/test")


# The command


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def kept(tmp_path):
    """Two folders of kept answers: a solves 1 and 2, b solves 2, 3 and 4."""
    for name, right in (("a", "12"), ("b", "234")):
        (tmp_path / name).mkdir()
        rows = [
            GradedAnswer(i, 0, f"<<1+1=2>>\x1b[1m[bold]\n#### {i}", "stop", i, i in right, question=f"Question {i}?")
            for i in "1234"
        ]
        lines = [json.dumps({field: getattr(row, field) for field in row.__dataclass_fields__}) + "\n" for row in rows]
        (tmp_path / name / "answers.jsonl").write_text("".join(lines))
    return tmp_path


def test_two_models_are_compared_problem_by_problem(kept):
    result = command("eval", "--compare", kept / "a", kept / "b")
    assert result.exit_code == 0, result.output
    assert "a: 50.0%" in result.stdout
    assert "b: 75.0%" in result.stdout
    assert "on the same 4 problems: B - A = +25.0 points, 95 % interval -50.0 to +100.0" in result.stdout
    assert "McNemar p = 1" in result.stdout
    assert "only A solves 1" in result.stdout
    assert "only B solves 2" in result.stdout
    assert "1: Question 1?\n  A ✓ <<1+1=2>>�[1m[bold] | #### 1\n  B ✗" in result.stdout  # no markup, no escapes


def test_mistakes_are_one_line(kept, monkeypatch):
    monkeypatch.chdir(kept)
    os.mkdir("empty")
    for arguments, says in (
        (["eval"], "give a run's folder, a model"),
        (["eval", "--compare", "a", "empty"], "--compare: empty contains no answers itself"),
        (
            ["eval", "x/y", "--data", "synthetic", "--against", "paper"],
            "--against paper: the paper has results on gsm8k",
        ),
        (["eval", "x/y", "--against", "paper"], "give one as --data"),
        (["eval", "x/y", "--data", "gsm8k", "--against", "papers"], "--against: papers (did you mean 'paper'?)"),
    ):
        result = command(*arguments)
        assert result.exit_code == 2, arguments
        assert says in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_file_of_something_else_is_no_answers(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(RunError, match="is not a file of answers"):
        saved_answers(tmp_path)


def test_sets_that_differ_from_the_papers_are_named():
    assert papers.differs("one model", "asdiv", 2095).endswith(
        "The paper's asdiv has 2,096 problems, ours 2,095: repeated ones removed."
    )
    assert papers.differs("one model", "asdiv", None) == papers.DIFFERS.format(ours="one model")  # --limit
    assert papers.differs("one model", "gsm8k", 1319) == papers.DIFFERS.format(ours="one model")


def test_all_of_table_2_beside_a_run(tmp_path):
    """From the run's own scores; a set on which it has none is left empty, with the way to fill it."""
    folder = RunFolder(tmp_path)
    folder.recipe("data.also_test=svamp,multiarith")
    folder.stage("data-also", metrics={"svamp": 4, "multiarith": 8})
    for place, name in enumerate(("base", "sft-0"), start=1):
        score = Score(name, 8, place / 8, 0, 0, 0, 0, 0, 0)
        folder.stage(f"score/{name}", metrics={"test": asdict(score)})
        also = {"svamp": asdict(replace(score, strict=place / 4)), "multiarith": asdict(replace(score, strict=0.9))}
        folder.stage(f"score-also/{name}", metrics=also)
    result = command("eval", tmp_path, "--against", "paper")
    assert result.exit_code == 0, result.output
    assert "no scores on asdiv; repeat its command with data.also_test=svamp,multiarith,asdiv" in result.stderr
    rows = {tuple(line.split()) for line in result.stdout.splitlines()}
    assert ("source", "gsm8k", "multiarith", "asdiv", "svamp") in rows
    assert ("base", "ours", "12.5%", "90.0%", "25.0%") in rows
    assert ("sft-0", "ours", "25.0%", "90.0%", "50.0%") in rows
    assert ("Flan-T5-Base", "DPO-ST", "Table", "2", "27.2%", "74.3%", "29.2%", "22.6%") in rows
    assert len([row for row in rows if "Table" in row]) == 6
    assert "not comparable" in result.stdout
