"""From the words of a command line to recipes, plans and folders, in one place for `plan` and `run`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpost_lite.methods import Method
    from dpost_lite.planner.plan import Plan
    from dpost_lite.recipe import Recipe
    from dpost_lite.runs.folder import Run


KEYS = {
    "data": "data.train", "data_dir": "data.data_dir", "limit": "data.limit", "model": "model.name", "seed": "seed",
    "rounds": "rounds", "method": "method", "precision": "model.precision",
}  # fmt: skip
"""What an option of the command line is called in a recipe."""


REHEARSAL = "rehearsal"  # the recipe of a bare `dpost-lite run`


def default_recipe(data: str | None, gpu_mem: str | None = None) -> str | None:
    """The recipe of a command that names none: the rehearsal for the built-in problems, and where neither data nor GPU
    memory is named; else the schema's defaults, the paper's constants.
    """
    if data is None:
        return REHEARSAL if gpu_mem in (None, "cpu") else None
    return REHEARSAL if data == "synthetic" else None


@dataclass(frozen=True, slots=True)
class Asked:
    """One run that a command line asks for, in the folder `path`. Without --gpu-mem there is no plan. `kept` is how the
    run was cut when it began, as far as the plan would choose otherwise today, as `key=value`.
    """

    path: Path
    recipe: "Recipe"
    plan: "Plan | None"
    gpu_mem: str | None = None
    kept: tuple[str, ...] = ()


def resolve(
    settings: list[str] | None,
    *,
    recipe: str | None,
    gpu_mem: str | None,
    to_run: bool,
    methods: "Sequence[Method]" = (),
    num_seeds: int = 1,
    out: Path | None = None,
    **options: Any,
) -> tuple[Path, list[Asked]]:
    """Return the folder that a command line asks for and the runs in it, one for each method and seed.

    `plan` and `run` read their words here, so that they mean the same to both. `to_run` needs the GPU to be there, and
    keeps to a run that the folder holds already: to its base, and, with the same --gpu-mem, to how it was cut to fit,
    whatever memory is free today.
    """
    from dpost_lite.evaluation.baselines import variants
    from dpost_lite.methods import METHODS
    from dpost_lite.planner.plan import plan_for, settings_of
    from dpost_lite.recipe_files import load_recipe

    given = [*overrides(method=methods[0].name if methods else None, **options), *(settings or [])]
    source = recipe or default_recipe(_train_data(given), gpu_mem)
    loaded = load_recipe(source, given)
    folder = out or Path("runs") / Path(source or loaded.data.train).stem
    changes: dict[Path, list[str]] = {Path(): []}
    if len(methods) > 1 or num_seeds > 1:
        changes = dict(variants(loaded, methods or [METHODS[loaded.method]], num_seeds))
    plans: list[Plan] = []
    kept: tuple[str, ...] = ()
    if gpu_mem is not None:
        recipes = [load_recipe(source, [*given, *changed]) for changed in changes.values()]
        begun = _begun(folder) if to_run else None
        plans = plan_for(recipes, gpu_mem, base=begun.recipe.model.name if begun else None, to_run=to_run)
        planned = settings_of(plans)
        if begun and begun.planned_for == gpu_mem:
            kept = tuple(_kept(begun.recipe, planned, given))
        given = [*planned, *kept, *given]
    return folder, [
        Asked(folder / path, load_recipe(source, [*given, *changed]), plan, gpu_mem, kept)
        for (path, changed), plan in zip_longest(changes.items(), plans)
    ]


def _train_data(given: list[str]) -> str | None:
    """Where the problems to train on come from, as the last of `key=value` names it."""
    from dpost_lite.recipe_files import set_keys

    values: dict[str, Any] = {}
    set_keys(values, given)
    data = values.get("data")
    return data.get("train") if isinstance(data, dict) else None


def _begun(folder: Path) -> "Run | None":
    """The run that a folder holds, or one of several; None where there is none yet."""
    from dpost_lite.runs.folder import Run

    files = (file for file in (folder / "run.json", *folder.glob("seed-*/*/run.json")) if file.is_file())
    first = next(files, None)
    return Run.open(first.parent) if first else None


def _kept(recipe: "Recipe", planned: list[str], given: list[str]) -> Iterator[str]:
    """Yield how a run was cut to fit, as far as it is planned otherwise now and the command does not say itself.

    A micro-batch is not kept beside a batch size that the command gives, which it may not divide.
    """
    from dpost_lite.recipe_files import set_keys

    values: dict[str, Any] = {}
    set_keys(values, planned)
    said: dict[str, Any] = {}
    set_keys(said, given)
    begun = recipe.model_dump()
    for section in ("sft", "dpo", "sampling"):
        of_user = said.get(section, {})
        for key, value in values.get(section, {}).items():
            is_free = key not in of_user and not (key == "micro_batch_size" and "batch_size" in of_user)
            if is_free and begun[section][key] != value:
                yield f"{section}.{key}={begun[section][key]}"


def overrides(**options: Any) -> list[str]:
    """Return the options that were given as `key=value`; text in quotes, since YAML would read `no` as false."""
    return [
        f"{KEYS[name]}={value if isinstance(value, int) else json.dumps(str(value), ensure_ascii=False)}"
        for name, value in options.items()
        if value is not None
    ]
