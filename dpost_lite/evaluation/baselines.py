"""Several methods, or seeds, in one command: the paper's claim, DPO-ST over plain self-training, on one's own data.

Each method has a run folder of its own below the given one, OUT/seed-N/METHOD. What they have in common, data and
warm-up, is made once and linked into the others: `Run.stage` finds it, with the same fingerprint. Plain self-training
draws for its labels what DPO-ST draws for pairs and labels together, so that neither wins by drawing more.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from dpost_lite.errors import RecipeError, nearest
from dpost_lite.problems.comparing import Comparison, compare
from dpost_lite.problems.records import Score
from dpost_lite.recipe import Method, Recipe
from dpost_lite.report import results

METHODS: tuple[Method, ...] = get_args(Method)
SHARED = ("data", "score/base", "sft-0", "score/sft-0")


@dataclass(frozen=True, slots=True)
class Trained:
    """One run that came to its end: its method, seed and folder, and the test score of its best policy."""

    method: str
    seed: int
    path: Path
    score: Score

    def right(self) -> dict[str, bool]:
        """Whether the best policy solved each test problem, by its id."""
        return results.right(self.path, self.score.name)


def methods_of(text: str) -> list[Method]:
    """Read `dpo-st,st,sft`. Raises RecipeError for a method that is none."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            raise RecipeError(f"--method: {name}{nearest(name, METHODS)}; give one or more of {','.join(METHODS)}")
    return [method for name in dict.fromkeys(names) for method in METHODS if method == name]


def variants(recipe: Recipe, methods: Sequence[Method], num_seeds: int) -> Iterator[tuple[Path, list[str]]]:
    """Yield each run's folder, relative to the given one, and what it changes in the recipe, as `key=value`; equal
    sampling for all methods.
    """
    sampling = recipe.sampling
    for seed in range(recipe.seed, recipe.seed + num_seeds):
        for method in methods:
            changes = [f"method={method}", f"seed={seed}"]
            if method == "st" and "dpo-st" in methods:
                changes.append(
                    f"sampling.samples_for_labels={sampling.samples_for_labels + sampling.samples_for_pairs}"
                )
            yield Path(f"seed-{seed}") / method, changes


def train_all(runs: Sequence[tuple[Path, Recipe]], train: Callable[[Path], Score]) -> Iterator[Trained]:
    """Do `train(folder)`, which returns the best policy's test score, for each run's folder; share what is the same."""
    finished: dict[int, Path] = {}
    for path, recipe in runs:
        if recipe.seed in finished:
            adopt(finished[recipe.seed], path)
        yield Trained(recipe.method, recipe.seed, path, train(path))
        finished.setdefault(recipe.seed, path)


def adopt(source: Path, target: Path) -> None:
    """Link the shared stages of a finished run into another's folder, where they are not there yet."""
    if not (target / "run.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "run.json", target / "run.json")  # Run.create keeps to folders of runs; rewritten there
    for stage in SHARED:
        if (source / stage / "done.json").exists() and not (target / stage).exists():
            partial = target / f"{stage}.linked"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / stage, partial, copy_function=_link)
            partial.rename(target / stage)


def differences(trained: Sequence[Trained]) -> Iterator[tuple[str, str, list[Comparison]]]:
    """Yield (a, b, the comparison of each seed) for the first method against every other."""
    by_method: dict[str, dict[int, Trained]] = {}
    for run in trained:
        by_method.setdefault(run.method, {})[run.seed] = run
    first, *others = by_method
    for other in others:
        seeds = by_method[first].keys() & by_method[other].keys()
        pairs = [(by_method[other][seed].right(), by_method[first][seed].right()) for seed in sorted(seeds)]
        yield other, first, [compare(a, b) for a, b in pairs]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
