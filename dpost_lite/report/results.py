"""Read a run's results from its folder: scores, graded answers, and which policy was exported."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpost_lite.errors import DpostError
from dpost_lite.problems.comparing import Comparison, compare
from dpost_lite.problems.records import GradedAnswer, Problem, Score, from_dict, read_jsonl
from dpost_lite.runs.folder import Run, read_json
from dpost_lite.runs.stage_names import BASE, WARM_UP, StageName, is_round, policy_name, policy_of, rounds_in

DAMAGED = (DpostError, OSError, ValueError, KeyError, TypeError)  # what reading a damaged or incomplete run may raise


def recipe_of(run: Path) -> dict[str, Any]:
    """Return a run's recipe as nested values, with defaults for keys that an older version did not have."""
    return Run.open(run).recipe.model_dump(mode="json")


def scores(run: Path) -> list[Score]:
    """Return a run's scores on the test problems so far, in order: base, sft-0, round-1, round-2 …"""
    return list(_scores(run, "test"))


def dev_scores(run: Path) -> list[Score]:
    """Return the scores on the dev problems, without the base, which is never exported."""
    return [score for score in _scores(run, "dev") if score.name != BASE]


def also_sets(run: Path) -> list[str]:
    """Return the names of the run's further test sets."""
    record = run / str(StageName("data-also")) / "done.json"
    return list(read_json(record)["metrics"]) if record.is_file() else []


def also_scores(run: Path) -> dict[str, list[Score]]:
    """Return the scores on each further test set so far, in the order of `scores`."""
    return {name: list(_scores(run, name, also=True)) for name in also_sets(run)}


def right(run: Path, name: str, part: str = "test", *, also: bool = False) -> dict[str, bool]:
    """Return by problem id whether one policy's greedy answer was right, on test, dev or with `also` a further set."""
    answers = read_jsonl(run / str(StageName.score(name, also=also)) / f"{part}.jsonl", GradedAnswer)
    return {answer.problem_id: answer.correct for answer in answers}


def problems(run: Path) -> list[Problem]:
    """Return a run's test problems."""
    file = run / "data" / "test.jsonl"
    return list(read_jsonl(file, Problem)) if file.is_file() else []


def exported(run: Path) -> str | None:
    """Return the name of the exported policy (sft-0, round-1 …), or None if there is no export yet."""
    record = run / "export" / "done.json"
    return policy_of(read_json(record)["metrics"]["policy"]) if record.is_file() else None


def is_finished(run: Path) -> bool:
    """Whether a run's last command finished: it then writes a manifest, which any later stage removes."""
    return (run / "solved" / "done.json").is_file() and (run / "manifest.json").is_file()


def gain(run: Path, name: str | None = None) -> tuple[str, Comparison] | None:
    """Return the exported round (or `name`) and its paired comparison with sft-0; None if it is not a round."""
    name = name or exported(run)
    if name is None or not is_round(name):
        return None
    return name, compare(right(run, WARM_UP), right(run, name))


def also_gains(run: Path, name: str | None = None) -> dict[str, tuple[str, Comparison]]:
    """Return what `gain` does for each further test set on which both policies were scored."""
    name = name or exported(run)
    if name is None or not is_round(name):
        return {}
    return {
        part: (name, compare(right(run, WARM_UP, part, also=True), right(run, name, part, also=True)))
        for part, found in also_scores(run).items()
        if {WARM_UP, name} <= {score.name for score in found}
    }


def siblings(run: Path) -> Iterator[Path]:
    """Yield the finished runs in the same folder that differ only in method, as made by `run --method dpo-st,st`."""
    own = _without_method(recipe_of(run))
    for other in sorted(path.parent for path in run.resolve().parent.glob("*/run.json")):
        with contextlib.suppress(*DAMAGED):  # another run is damaged
            differs_in_method = other != run.resolve() and _without_method(recipe_of(other)) == own
            if differs_in_method and exported(other) and same_problems(run, other):
                yield other


def same_problems(a: Path, b: Path) -> bool:
    """Whether two runs were tested on the same problems."""
    return bool(problems(a)) and problems(a) == problems(b)


def _without_method(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without its method, the number of samples, which depends on it, and the further test sets."""
    sampling = {key: value for key, value in recipe["sampling"].items() if key != "samples_for_labels"}
    data = {key: value for key, value in recipe["data"].items() if key != "also_test"}
    return {**recipe, "method": None, "sampling": sampling, "data": data}


def _scores(run: Path, part: str, *, also: bool = False) -> Iterator[Score]:
    """Yield the scores of all scored policies in order."""
    for name in [BASE, WARM_UP, *map(policy_name, rounds_in(run / "score"))]:
        record = run / str(StageName.score(name, also=also)) / "done.json"
        metrics = read_json(record)["metrics"] if record.is_file() else {}
        if part in metrics:
            yield from_dict(Score, metrics[part])
