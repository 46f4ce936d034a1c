"""List the runs below a folder and compare the best with the others (`dpost-lite runs`)."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dpost_lite.errors import RunError
from dpost_lite.problems.comparing import compare
from dpost_lite.problems.records import Problem, Score
from dpost_lite.report import results, summary
from dpost_lite.report.terminal import as_time, plain
from dpost_lite.runs.folder import stages_begun, stages_done
from dpost_lite.runs.stage_names import WARM_UP

MAX_DEPTH = 3  # OUT/seed-N/METHOD below the folder of all runs


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run in the list: its settings, state, seconds of work, and test scores (`best`: of the exported policy).

    `also` has (warm_up, best) on each further test set.
    """

    path: Path
    name: str
    method: str
    model: str
    seed: int
    state: str
    seconds: float
    warm_up: Score | None
    best: Score | None
    also: dict[str, tuple[Score | None, Score | None]] = field(default_factory=dict)


def find_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in `folder` (which may itself be a run), ordered by path.

    Raises RunError if there are none.
    """
    found = sorted(path.parent for depth in range(MAX_DEPTH + 1) for path in folder.glob(f"{'*/' * depth}run.json"))
    runs = []
    for path in found:
        with contextlib.suppress(*results.DAMAGED):  # a damaged run must not hide the others
            runs.append(_summarize(path, path.relative_to(folder).as_posix() if path != folder else path.name))
    if not runs:
        raise RunError(f"{folder} contains no runs; give a folder with runs, or start one with `dpost-lite run`")
    return runs


def _summarize(path: Path, name: str) -> RunSummary:
    recipe, done = results.recipe_of(path), dict(stages_done(path))
    begun = [stage for stage, _ in stages_begun(path)]
    best = results.exported(path)
    warm_up, of_best = _ends(results.scores(path), best)
    state = "finished" if results.is_finished(path) else f"in {begun[0]}" if begun else "not finished"
    return RunSummary(
        path=path, name=name, method=recipe["method"], model=Path(recipe["model"]["name"]).name, seed=recipe["seed"],
        state=state, seconds=sum(record["seconds"] for record in done.values()), warm_up=warm_up, best=of_best,
        also={part: _ends(scores, best) for part, scores in results.also_scores(path).items()},
    )  # fmt: skip


def _ends(scores: Sequence[Score], best: str | None) -> tuple[Score | None, Score | None]:
    """Return the scores of the warm-up and of the exported policy."""
    by_name = {score.name: score for score in scores}
    return by_name.get(WARM_UP), by_name.get(best or "")


def runs_table(runs: Sequence[RunSummary]) -> Table:
    """Return a table with one row per run; accuracies are strict, on the run's own test problems.

    The rows below a run are its further test sets.
    """
    table = summary.table_of("method", "sft-0", "best", "95 %\ninterval", "n", "time")
    table.add_column("state", overflow="fold")
    for run in runs:
        figures = [run.method, *_figures(run.warm_up, run.best), as_time(run.seconds), run.state]
        table.add_row(plain(f"{run.name}\n  {run.model}\n  seed {run.seed}"), *(plain(figure) for figure in figures))
        for part, scores in run.also.items():
            table.add_row(plain(f"  {part}"), "", *_figures(*scores))
    return table


def _figures(warm_up: Score | None, best: Score | None) -> list[str]:
    first = f"{warm_up.strict:.1%}" if warm_up else ""
    return [first, *([f"{best.strict:.1%}", summary.interval(best), str(best.num_problems)] if best else [""] * 3)]


def comparisons(runs: Sequence[RunSummary]) -> Iterator[Text]:
    """Yield the lead of the most accurate finished run over each other run tested on the same problems."""
    groups: dict[tuple[Problem, ...], list[tuple[Score, RunSummary]]] = {}
    for run in runs:
        with contextlib.suppress(*results.DAMAGED):
            if run.best and (problems := tuple(results.problems(run.path))):
                groups.setdefault(problems, []).append((run.best, run))
    for group in groups.values():
        best, first = max(group, key=lambda scored: scored[0].strict)
        for score, other in group:
            if other is not first:
                compared = compare(results.right(other.path, score.name), results.right(first.path, best.name))
                yield plain(summary.method_difference(other.name, first.name, [compared]))
