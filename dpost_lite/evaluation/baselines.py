"""Compare several methods or seeds in one command: is DPO-ST better than plain self-training on one's own data?

Each run has its own folder, OUT/seed-N/METHOD. What the methods of a seed have in common (data and warm-up) is made
once and linked into the other folders, where `Run.stage` finds it by its fingerprint.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpost_lite.errors import RecipeError, nearest
from dpost_lite.methods import METHODS, Method
from dpost_lite.planner.recorder import planned_stages
from dpost_lite.problems.comparing import Comparison, compare
from dpost_lite.problems.records import Score
from dpost_lite.recipe import Recipe
from dpost_lite.report import results
from dpost_lite.runs.stage_names import StageName


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A finished run: its method, seed and folder, and the test score of its best policy."""

    method: str
    seed: int
    path: Path
    score: Score

    def right(self, part: str | None = None) -> dict[str, bool]:
        """Return whether the best policy solved each problem of test, or of a further test set, by its id."""
        return results.right(self.path, self.score.name, part or "test", also=part is not None)

    def score_on(self, part: str | None) -> Score:
        """Return the best policy's score on test, or on a further test set."""
        if part is None:
            return self.score
        return next(score for score in results.also_scores(self.path)[part] if score.name == self.score.name)


def methods_of(text: str) -> list[Method]:
    """Read `dpo-st,st,sft`. Raises RecipeError for an unknown method."""
    methods = dict[str, Method]()
    for name in (name.strip() for name in text.split(",")):
        known: dict[str, Method] = {method.name: method for method in METHODS.values()}
        if (found := known.get(name)) is None:
            raise RecipeError(f"--method: {name}{nearest(name, list(known))}; give one or more of {','.join(known)}")
        methods[name] = found
    return list(methods.values())


def variants(recipe: Recipe, methods: Sequence[Method], num_seeds: int) -> Iterator[tuple[Path, list[str]]]:
    """Yield each run's folder, relative to the given one, and its changes to the recipe as `key=value`."""
    sampling = recipe.sampling
    for seed in range(recipe.seed, recipe.seed + num_seeds):
        for method in methods:
            number = method.num_samples_for_labels(
                sampling.samples_for_labels, sampling.samples_for_pairs, beside=methods
            )
            changes = [f"method={method.name}", f"seed={seed}"]
            if number != sampling.samples_for_labels:
                changes.append(f"sampling.samples_for_labels={number}")
            yield Path(f"seed-{seed}") / method.name, changes


def train_all(runs: Sequence[tuple[Path, Recipe]], train: Callable[[Path], Score]) -> Iterator[FinishedRun]:
    """Call `train(folder)`, which returns the best policy's test score, for each run; share the stages in common."""
    finished: list[tuple[Path, Recipe]] = []
    for path, recipe in runs:
        for source, other in finished:
            if other.seed == recipe.seed:
                adopt(source, path, map(str, shared_stages(other, recipe)))
        yield FinishedRun(recipe.method, recipe.seed, path, train(path))
        finished.append((path, recipe))


def shared_stages(a: Recipe, b: Recipe) -> list[StageName]:
    """Return the stages that two methods have in common: all up to the first that only one has, or the pairs if these
    are chosen in another way.
    """
    shared = []
    alike = METHODS[a.method].pairs == METHODS[b.method].pairs
    for first, second in zip(planned_stages(a), planned_stages(b), strict=False):
        if first != second or (first.kind == "pairs" and not alike):
            break
        shared.append(first)
    return shared


def adopt(source: Path, target: Path, stages: Iterable[str]) -> None:
    """Link finished stages of one run into another's folder, unless it has them already."""
    if not (target / "run.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "run.json", target / "run.json")  # marks a run's folder; Run.create rewrites it
    for stage in stages:
        if (source / stage / "done.json").exists() and not (target / stage).exists():
            partial = target / f"{stage}.linked"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / stage, partial, copy_function=_link)
            partial.rename(target / stage)


def differences(runs: Sequence[FinishedRun], part: str | None = None) -> Iterator[tuple[str, str, list[Comparison]]]:
    """Yield (a, b, the comparison of each seed) for the first method against every other.

    They are compared on the test problems, or on a further test set, `part`.
    """
    by_method: dict[str, dict[int, FinishedRun]] = {}
    for run in runs:
        by_method.setdefault(run.method, {})[run.seed] = run
    first, *others = by_method
    for other in others:
        seeds = by_method[first].keys() & by_method[other].keys()
        pairs = [(by_method[other][seed].right(part), by_method[first][seed].right(part)) for seed in sorted(seeds)]
        yield other, first, [compare(a, b) for a, b in pairs]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
