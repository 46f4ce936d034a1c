"""The runs below a folder, a line for each, and how far the best is from the others: the command `runs`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dpost_lite.errors import RunError
from dpost_lite.problems.comparing import compare
from dpost_lite.problems.records import Score
from dpost_lite.report import results, summary
from dpost_lite.report.terminal import as_time, plain
from dpost_lite.rundir import stages_begun, stages_done

MAX_DEPTH = 3  # OUT/seed-N/METHOD below the folder of all runs


@dataclass(frozen=True, slots=True)
class Listed:
    """One run: where it is, what it does, how far it has come; `warm_up` and `best` are test scores, if it has any."""

    path: Path
    name: str
    method: str
    model: str
    seed: int
    state: str
    seconds: float
    warm_up: Score | None
    best: Score | None


def find_runs(folder: Path) -> list[Listed]:
    """Return the runs in a folder, or the one that it is, in the order of their paths.

    Raises RunError if there is none.
    """
    depths = ("run.json", *("/".join(["*"] * depth + ["run.json"]) for depth in range(1, MAX_DEPTH + 1)))
    found = sorted({path.parent for depth in depths for path in folder.glob(depth)})
    if not found:
        raise RunError(f"{folder} holds no run; name a folder that `dpost-lite run` wrote into, or begin with it")
    return [_listed(path, path.relative_to(folder).as_posix() if path != folder else path.name) for path in found]


def _listed(path: Path, name: str) -> Listed:
    recipe, done = results.recipe_of(path), dict(stages_done(path))
    begun = [stage for stage, _ in stages_begun(path)]
    state = "finished" if "solved" in done else f"stopped in\n{begun[0]}" if begun else "not finished"
    scores = {score.name: score for score in results.scores(path)}
    return Listed(
        path=path, name=name, method=recipe["method"], model=Path(recipe["model"]["name"]).name, seed=recipe["seed"],
        state=state, seconds=sum(record["seconds"] for record in done.values()), warm_up=scores.get("sft-0"),
        best=scores.get(results.best(path)),
    )  # fmt: skip


def runs_table(runs: Sequence[Listed]) -> Table:
    """Return one row per run, its accuracies strict and on its own test problems."""
    table = summary.table_of("method", "sft-0", "best", "95 %\ninterval", "n", "time")
    table.add_column("state", overflow="fold")
    for run in runs:
        best = (
            [f"{run.best.strict:.1%}", summary.interval(run.best), str(run.best.num_problems)] if run.best else [""] * 3
        )
        warm_up = f"{run.warm_up.strict:.1%}" if run.warm_up else ""
        figures = [run.method, warm_up, *best, as_time(run.seconds), run.state]
        table.add_row(plain(f"{run.name}\n  {run.model}\n  seed {run.seed}"), *(plain(figure) for figure in figures))
    return table


def comparisons(runs: Sequence[Listed]) -> Iterator[Text]:
    """Yield how far the most accurate run is ahead of each other that was tested on the same problems."""
    scored = [run for run in runs if run.best]
    if len(scored) < 2:
        return
    first = max(scored, key=lambda run: run.best.strict if run.best else 0.0)
    for other in scored:
        if other is not first and results.same_problems(first.path, other.path):
            compared = compare(*(results.right(run.path, results.best(run.path)) for run in (other, first)))
            yield plain(summary.method_difference(other.name, first.name, [compared]))
