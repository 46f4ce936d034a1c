"""What a run's folder says of its policies: scores, graded answers, and which of them was exported."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from dpost_lite.problems.comparing import Comparison, compare
from dpost_lite.problems.records import Answered, Problem, Score, from_dict, read_jsonl
from dpost_lite.rundir import read_json


def recipe_of(run: Path) -> dict[str, Any]:
    """Return a run's recipe as nested values."""
    return read_json(run / "run.json")["recipe"]


def scores(run: Path, part: Literal["test", "dev"] = "test") -> list[Score]:
    """Return the scores that a run has so far, in order: base, sft-0, round-1, round-2 …"""
    records = ((name, run / "score" / name / "done.json") for name in _names(run))
    metrics = [read_json(record)["metrics"] for _, record in records if record.is_file()]
    return [from_dict(Score, each[part]) for each in metrics if part in each]


def right(run: Path, name: str) -> dict[str, bool]:
    """Return whether one policy's greedy answer to each test problem was right, by the problem's id."""
    answers = read_jsonl(run / "score" / name / "test.jsonl", Answered)
    return {answer.problem_id: answer.correct for answer in answers}


def questions(run: Path) -> dict[str, Problem]:
    """Return a run's test problems by their ids."""
    return {problem.id: problem for problem in read_jsonl(run / "data" / "test.jsonl", Problem)}


def best(run: Path) -> str:
    """Return the name of the policy that a run exported, or of the last it scored where it has come to no export."""
    record = run / "export" / "done.json"
    if record.is_file():
        return read_json(record)["metrics"]["policy"].removesuffix("/sft")
    scored = scores(run)
    return scored[-1].name if scored else ""


def gain(run: Path) -> tuple[str, Comparison] | None:
    """Return the last round's name and its paired comparison with sft-0; None where a run has not scored both."""
    names = [score.name for score in scores(run)]
    if "sft-0" not in names or not names[-1].startswith("round-"):
        return None
    return names[-1], compare(right(run, "sft-0"), right(run, names[-1]))


def same_problems(a: Path, b: Path) -> bool:
    """Whether two runs were tested on the same problems."""
    files = [run / "data" / "test.jsonl" for run in (a, b)]
    if not all(file.is_file() for file in files):
        return False
    first, second = ([(p.id, p.question) for p in read_jsonl(file, Problem)] for file in files)
    return first == second


def siblings(run: Path) -> Iterator[Path]:
    """Yield the runs beside this one with the same seed and test problems, as `run --method dpo-st,st` leaves them."""
    own = recipe_of(run)
    for other in sorted(path.parent for path in run.resolve().parent.glob("*/run.json")):
        recipe = recipe_of(other)
        is_baseline = recipe["seed"] == own["seed"] and recipe["method"] != own["method"]
        if is_baseline and scores(other) and same_problems(run, other):
            yield other


def _names(run: Path) -> list[str]:
    """Names of policies in their order, of which not all need be scored."""
    numbers = sorted(
        int(number)
        for folder in (run / "score").glob("round-*")
        if (number := folder.name.removeprefix("round-")).isdigit()
    )
    return ["base", "sft-0", *(f"round-{number}" for number in numbers)]
