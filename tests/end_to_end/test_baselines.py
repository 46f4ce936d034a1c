"""Methods side by side: what they share is made once, sampling is equal, and the difference is paired."""

import json
import os

import pytest
from typer.testing import CliRunner

from dpost_lite.cli.app import app
from dpost_lite.errors import RecipeError
from dpost_lite.evaluation.baselines import FinishedRun, adopt, differences, methods_of, shared_stages, variants
from dpost_lite.problems.records import Score
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.folder import read_json

WARM_UP = shared_stages(Recipe(method="dpo-st"), Recipe(method="st"))


def test_two_methods_in_one_command(two_methods):
    folders = two_methods.folders
    for stage in ("data", "score/base", "sft-0", "score/sft-0"):
        ours, theirs = (folders[method] / stage / "done.json" for method in ("dpo-st", "st"))
        assert ours.stat().st_ino == theirs.stat().st_ino, stage  # made once, linked
    events = [json.loads(line) for line in (folders["st"] / "events.jsonl").read_text().splitlines()]
    started = [e["stage"] for e in events if e["kind"] == "stage_started"]
    assert started == ["round-1/samples-labels", "round-1/labels", "round-1/sft", "score/round-1", "export", "solved"]
    num_drawn = {
        method: sum(read_json(done)["metrics"]["rationales"] for done in folder.glob("round-1/samples-*/done.json"))
        for method, folder in folders.items()
    }
    assert num_drawn["dpo-st"] == num_drawn["st"] > 0
    table = [line.split() for line in two_methods.output.splitlines()]
    for method, folder in folders.items():
        best = read_json(folder / "export/done.json")["metrics"]["policy"].removesuffix("/sft")
        accuracy = read_json(folder / f"score/{best}/done.json")["metrics"]["test"]["strict"]
        assert any(row[:2] == [method, f"{accuracy:.1%}"] for row in table)
        assert (folder / "manifest.json").exists()
        assert "FROM ./model-q8_0.gguf" in (folder / "export" / "Modelfile").read_text()
        assert "- seed: 1" in (folder / "export" / "README.md").read_text()
    assert "dpo-st - st: " in two_methods.output
    again = CliRunner().invoke(app, two_methods.command)
    assert again.stdout.count("finished in") == 0
    assert again.stdout.splitlines()[-1] == two_methods.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "methods"), [("st", ["st"]), ("dpo-st,st,sft", ["dpo-st", "st", "sft"]), ("st, sft,st", ["st", "sft"])]
)
def test_methods_are_read(text, methods):
    assert [method.name for method in methods_of(text)] == methods


@pytest.mark.parametrize("text", ["dop", "", "st,,sft"])
def test_what_is_no_method_is_refused(text):
    with pytest.raises(RecipeError, match=r"--method: .*give one or more of dpo-st,st,sft"):
        methods_of(text)


def test_plain_self_training_draws_as_much_as_dpo_st():
    recipe = load_recipe(None, ["seed=3"])

    def made(methods, num_seeds):
        return {path: load_recipe(None, changes) for path, changes in variants(recipe, methods_of(methods), num_seeds)}

    runs = made("dpo-st,st,sft", 2)
    assert [str(path) for path in runs] == [
        f"seed-{seed}/{method}" for seed in (3, 4) for method in ("dpo-st", "st", "sft")
    ]
    for path, run in runs.items():
        assert (path.name, path.parent.name) == (run.method, f"seed-{run.seed}")
        number = run.sampling.samples_for_labels + (run.sampling.samples_for_pairs if run.method == "dpo-st" else 0)
        if run.method != "sft":
            assert number == recipe.sampling.samples_for_labels + recipe.sampling.samples_for_pairs
    alone = made("st,sft", 1)
    assert {run.sampling.samples_for_labels for run in alone.values()} == {recipe.sampling.samples_for_labels}


def test_what_is_there_already_is_not_replaced(tmp_path):
    for name, text in (("a", "first"), ("b", "second")):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "done.json").write_text(text)
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "a" / "sft-0").mkdir()  # not finished
    adopt(tmp_path / "a", tmp_path / "b", map(str, WARM_UP))
    assert (tmp_path / "b" / "data" / "done.json").read_text() == "second"
    assert not (tmp_path / "b" / "sft-0").exists()
    adopt(tmp_path / "a", tmp_path / "c", map(str, WARM_UP))
    assert os.listdir(tmp_path / "c" / "data") == ["done.json"]


def test_several_methods_do_not_go_into_a_single_run(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    result = CliRunner().invoke(app, ["run", "--method", "st,sft", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "contains a single run; give another folder" in result.stderr


@pytest.mark.parametrize("restarts", [True, False])
def test_a_restart_is_not_to_be_given_again(tmp_path, monkeypatch, restarts):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dpost_lite.cli.run._train", interrupted)
    option = ["--restart-from", "sft-0"] if restarts else []
    result = CliRunner().invoke(app, ["run", "--out", str(tmp_path / "run"), *option])
    assert result.exit_code == 130
    assert "run the same command to resume" in result.stderr
    assert ("without --restart-from" in result.stderr) == restarts


def test_every_other_method_is_held_against_the_first_seed_by_seed(tmp_path):
    trained = []
    for seed in (1, 2):
        for method, right in (("dpo-st", "12"), ("st", "1"), ("sft", "")):
            path = tmp_path / f"seed-{seed}" / method
            (path / "score/round-1").mkdir(parents=True)
            rows = [
                {"problem_id": i, "sample": 0, "text": "", "end": "stop", "predicted": i, "correct": i in right}
                for i in "1234"
            ]
            (path / "score/round-1/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            score = Score("round-1", 4, len(right) / 4, 0, 0, 1, 0, 0, 0)
            trained.append(FinishedRun(method, seed, path, score))
    found = [(a, b, [one.difference for one in compared]) for a, b, compared in differences(trained)]
    assert found == [("st", "dpo-st", [0.25, 0.25]), ("sft", "dpo-st", [0.5, 0.5])]
