"""Turn the arguments of `plan` and `run` into recipes, plans and folders, so that they mean the same to both."""

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
"""Command-line option -> recipe key."""

REHEARSAL = "rehearsal"  # the recipe of `dpost-lite run` without arguments


def default_recipe(data: str | None, gpu_mem: str | None = None) -> str | None:
    """Return the recipe of a command without --recipe: rehearsal for the built-in problems, or if neither data nor GPU
    memory is given; else None, the schema's defaults (the paper's settings).
    """
    if data is None:
        return REHEARSAL if gpu_mem in (None, "cpu") else None
    return REHEARSAL if data == "synthetic" else None


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One run requested by a command line, in the folder `path`; `plan` is None without --gpu-mem.

    `kept` lists, as `key=value`, the settings chosen when the run started that differ from what the plan would choose
    now.
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
) -> tuple[Path, list[RunRequest]]:
    """Return the output folder of a command line and the runs in it, one per method and seed.

    With `to_run`, the GPU must be present, and a run that the folder already contains keeps its base model and, with
    the same --gpu-mem, the settings its plan chose, regardless of the memory that is free now. Raises RecipeError for
    unknown keys or bad values, ModelError or RecipeError if no plan fits.
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
        existing = _existing_run(folder) if to_run else None
        plans = plan_for(recipes, gpu_mem, base=existing.recipe.model.name if existing else None, to_run=to_run)
        planned = settings_of(plans)
        if existing and existing.planned_for == gpu_mem:
            kept = tuple(_kept(existing.recipe, planned, given))
        given = [*planned, *kept, *given]
    return folder, [
        RunRequest(folder / path, load_recipe(source, [*given, *changed]), plan, gpu_mem, kept)
        for (path, changed), plan in zip_longest(changes.items(), plans)
    ]


def _train_data(given: list[str]) -> str | None:
    """Return the source of training problems set by `given`, if any; the last value wins."""
    from dpost_lite.recipe_files import set_keys

    values: dict[str, Any] = {}
    set_keys(values, given)
    data = values.get("data")
    return data.get("train") if isinstance(data, dict) else None


def _existing_run(folder: Path) -> "Run | None":
    """Return the run in a folder, or the first of several; None if there is none."""
    from dpost_lite.runs.folder import Run

    files = (file for file in (folder / "run.json", *folder.glob("seed-*/*/run.json")) if file.is_file())
    first = next(files, None)
    return Run.open(first.parent) if first else None


def _kept(recipe: "Recipe", planned: list[str], given: list[str]) -> Iterator[str]:
    """Yield an existing run's planned settings that differ from the new plan, unless the command line sets them.

    A micro-batch size is not kept if the command line sets the batch size, which it might not divide.
    """
    from dpost_lite.recipe_files import set_keys

    values: dict[str, Any] = {}
    set_keys(values, planned)
    explicit: dict[str, Any] = {}
    set_keys(explicit, given)
    before = recipe.model_dump()
    for section in ("sft", "dpo", "sampling"):
        of_user = explicit.get(section, {})
        for key, value in values.get(section, {}).items():
            is_free = key not in of_user and not (key == "micro_batch_size" and "batch_size" in of_user)
            if is_free and before[section][key] != value:
                yield f"{section}.{key}={before[section][key]}"


def overrides(**options: Any) -> list[str]:
    """Return the options that are not None as `key=value`; text is quoted, since YAML would read `no` as false."""
    return [
        f"{KEYS[name]}={value if isinstance(value, int) else json.dumps(str(value), ensure_ascii=False)}"
        for name, value in options.items()
        if value is not None
    ]
