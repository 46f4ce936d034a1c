"""Further test sets, added to a run that was trained without them: scored, printed and reported."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dpost_lite.cli.app import app
from dpost_lite.problems.records import GradedAnswer, read_jsonl
from dpost_lite.report import results
from dpost_lite.runs.folder import read_json

POLICIES = ("base", "sft-0", "round-1")


@pytest.fixture(scope="module")
def scored(two_methods, tmp_path_factory) -> tuple[Path, Result, list[str]]:
    """The run with its further test sets, what the command said, and the command."""
    folder = tmp_path_factory.mktemp("also")
    shutil.copytree(two_methods.folders["st"], folder / "run")
    shutil.rmtree(folder / "run" / "report", ignore_errors=True)
    files = []
    for place, number in (("a", 5), ("b", 3)):
        (folder / place).mkdir()
        files.append(folder / place / "hard.jsonl")
        rows = [{"question": f"Zoe {place} {i} and 2?", "answer": str(i + 2)} for i in range(number)]
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*two_methods.command, "sampling.samples_for_labels=7", f"data.also_test={files[0]},{files[1]}"]
    command[command.index("--method") + 1] = "st"
    command[command.index("--out") + 1] = str(folder / "run")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return folder / "run", result, command


def test_only_the_further_sets_are_scored(scored) -> None:
    run, result, command = scored
    finished = re.findall(r"^(\S+): finished in", result.stdout, re.MULTILINE)
    assert finished == ["data-also", *(f"score-also/{name}" for name in POLICIES)]
    assert read_json(run / "data-also" / "done.json")["metrics"] == {"hard": 5, "hard-2": 3}
    assert not list(run.rglob("*-before-*"))
    assert CliRunner().invoke(app, ["verify", str(run)]).exit_code == 0
    read_from = read_json(run / "manifest.json")["data"]
    assert {Path(path).name for path in read_from} == {"mine.jsonl", "hard.jsonl"}
    assert len(read_from) == 3
    again = CliRunner().invoke(app, command)
    assert "finished in" not in again.stdout
    assert again.stdout.partition("strict")[2] == result.stdout.partition("strict")[2]


def test_every_policy_has_its_accuracy_on_each_set(scored) -> None:
    run, result, _ = scored
    tables = {line.split()[0]: i for i, line in enumerate(result.stdout.splitlines()) if " strict " in line}
    assert {"hard", "hard-2"} <= tables.keys()
    assert list(results.also_scores(run)) == ["hard", "hard-2"]
    for part, scores in results.also_scores(run).items():
        assert [score.name for score in scores] == list(POLICIES)
        for row, score in enumerate(scores, tables[part] + 1):
            answers = list(read_jsonl(run / "score-also" / score.name / f"{part}.jsonl", GradedAnswer))
            assert score.num_problems == len(answers) == {"hard": 5, "hard-2": 3}[part]
            assert score.strict == sum(answer.correct for answer in answers) / len(answers)
            figures = result.stdout.splitlines()[row].split()
            assert (figures[0], figures[1], figures[-1]) == (score.name, f"{score.strict:.1%}", str(len(answers)))


def test_the_report_and_the_list_of_runs_show_them(scored) -> None:
    run, result, _ = scored
    shown = CliRunner().invoke(app, ["report", str(run)])
    assert shown.exit_code == 0, shown.output
    source = (run / "report" / "index.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", "", source))
    assert "<h3>hard</h3>" in source
    assert "test, 5 hard, 3 hard-2;" in text
    gains = results.also_gains(run)
    assert list(gains) == (["hard", "hard-2"] if results.exported(run) == "round-1" else [])
    for part in ("hard", "hard-2"):
        sentence = f"On {part}, self-training "
        assert (sentence in text) == (sentence in result.stdout) == (part in gains)
    listed = CliRunner().invoke(app, ["runs", str(run)]).stdout
    for part, number in (("hard", 5), ("hard-2", 3)):
        (row,) = (line.split() for line in listed.splitlines() if line.split()[:1] == [part])
        assert row[-1] == str(number)


def test_a_run_without_them_says_nothing_of_them(two_methods) -> None:
    assert "score-also" not in two_methods.output
    assert results.also_scores(two_methods.folders["st"]) == {}
    assert results.also_gains(two_methods.folders["st"]) == {}
