"""What commands share: an error that the user can mend is one line and exit code 2, options, and how they are read.

Only typer is imported up here: `--help` answers at once.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dpost_lite.errors import DpostError, RecipeError, nearest, of_disk

if TYPE_CHECKING:
    from dpost_lite.planner.plan import Plan
    from dpost_lite.recipe import Method, Recipe
    from dpost_lite.rundir import Run

KEYS = {
    "data": "data.train", "data_dir": "data.data_dir", "limit": "data.limit", "model": "model.name", "seed": "seed",
    "rounds": "rounds", "method": "method", "precision": "model.precision",
}  # fmt: skip
"""What an option of the command line is called in a recipe."""

REHEARSAL = "rehearsal"  # the recipe of a bare `dpost-lite run`


class OneLineErrors(TyperGroup):
    """Turns errors of errors.py and Ctrl-C into one line on stderr, and exit codes 2 (3 for DeliveryError) and 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DpostError as error:
            if ctx.meta.get("debug"):
                raise
            _fail(_once(ctx, str(error)))
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if (told := of_disk(error)) is None or ctx.meta.get("debug"):
                raise
            _fail(_once(ctx, str(told)))
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            _fail(
                _once(ctx, "interrupted; the same command goes on")
                if ctx.invoked_subcommand == "run"
                else "interrupted"
            )
            raise typer.Exit(130) from interrupt


def _once(ctx: Any, message: str) -> str:
    """Add to a message that advises to give the same command again that --restart-from has had its effect."""
    if not (ctx.meta.get("restarts") and "same command" in message):
        return message
    return f"{message} (leave out --restart-from, or the stage is made anew once more)"


def _fail(message: str) -> None:
    from dpost_lite.report.terminal import printable

    typer.echo(f"dpost-lite: {printable(' '.join(message.split()))}", err=True)


def print_version(asked: bool) -> None:
    if asked:
        from dpost_lite import __version__

        typer.echo(f"dpost-lite {__version__}")
        raise typer.Exit


def _remember_debug(ctx: typer.Context, asked: bool) -> bool:
    if asked:
        ctx.meta["debug"] = True  # shared by the app and its command
    return asked


def remember_restart(ctx: typer.Context, given: list[str] | None) -> list[str]:
    """Return the stages of --restart-from, each by itself: it takes commas, and may be given more than once."""
    stages = [name.strip() for text in given or [] for name in text.split(",")]
    ctx.meta["restarts"] = bool(stages)
    return stages


def _go_offline(asked: bool) -> bool:
    if asked:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when their library is imported
    return asked


# Options that more than one command takes.
Offline = Annotated[
    bool, typer.Option("--offline", callback=_go_offline, is_eager=True, help="Use only what is on this machine.")
]
Debug = Annotated[bool, typer.Option("--debug", callback=_remember_debug, help="Show the traceback of an error.")]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE", help="gsm8k, multiarith, asdiv, svamp, synthetic, or a .jsonl/.json/.csv/.parquet file."
    ),
]
DataDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="A folder with the named sets as files, instead of the hub.")
]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="Use at most this many problems of each part.")]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="A folder, a hub id (owner/name), or smollm2-135m-instruct.")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="A recipe by name, or a .yaml file. [default: the paper's constants; rehearsal with --data synthetic, and "
        "where neither --data nor a GPU size is given]",
    ),
]
Policy = Annotated[
    str | None, typer.Option(metavar="NAME", help="base, sft-0, round-1 …, or a stage such as round-1/dpo.")
]
Precision = Annotated[
    str | None,
    typer.Option(
        metavar="4bit|16bit|full", help="What is trained: LoRA on a 4-bit base, LoRA on 16 bit, or all weights."
    ),
]
GPU_MEM = typer.Option(
    metavar="SIZE", help="Fit the run into this much GPU memory: 24GB, 24GiB, auto (what is free); or cpu: into RAM."
)


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
    from dpost_lite.baselines import variants
    from dpost_lite.planner.plan import plan_for, settings_of
    from dpost_lite.recipe import load_recipe

    given = [*overrides(method=methods[0] if methods else None, **options), *(settings or [])]
    source = recipe or default_recipe(_train_data(given), gpu_mem)
    loaded = load_recipe(source, given)
    folder = out or Path("runs") / Path(source or loaded.data.train).stem
    changes: dict[Path, list[str]] = {Path(): []}
    if len(methods) > 1 or num_seeds > 1:
        changes = dict(variants(loaded, methods or [loaded.method], num_seeds))
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
    from dpost_lite.recipe import set_keys

    values: dict[str, Any] = {}
    set_keys(values, given)
    data = values.get("data")
    return data.get("train") if isinstance(data, dict) else None


def _begun(folder: Path) -> "Run | None":
    """The run that a folder holds, or one of several; None where there is none yet."""
    from dpost_lite.rundir import Run

    files = (file for file in (folder / "run.json", *folder.glob("seed-*/*/run.json")) if file.is_file())
    first = next(files, None)
    return Run.open(first.parent) if first else None


def _kept(recipe: "Recipe", planned: list[str], given: list[str]) -> Iterator[str]:
    """Yield how a run was cut to fit, as far as it is planned otherwise now and the command does not say itself.

    A micro-batch is not kept beside a batch size that the command gives, which it may not divide.
    """
    from dpost_lite.recipe import set_keys

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


def choice(option: str, given: str, choices: dict[str, Any]) -> Any:
    if given not in choices:
        raise RecipeError(f"{option}: {given}{nearest(given, list(choices))}; give {', '.join(choices)}")
    return choices[given]


def lines_of_stdin() -> Iterator[str]:
    if sys.stdin.isatty():
        typer.echo("one problem a line, Ctrl-D to end", err=True)
    return (line.strip() for line in sys.stdin if line.strip())


def file_size(file: Path) -> str:
    return f"{file.stat().st_size / 2**20:,.0f} MiB"
