"""What commands share: one-line errors with exit codes, common options, and small helpers."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dpost_lite.errors import DpostError, RecipeError, nearest, of_disk


class OneLineErrors(TyperGroup):
    """Turns a DpostError, a full disk or Ctrl-C into one line on stderr; exit code 2 (DeliveryError: 3) or 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DpostError as error:
            if ctx.meta.get("debug"):
                raise
            _print_error(_with_restart_hint(ctx, str(error)))
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if (disk_error := of_disk(error)) is None or ctx.meta.get("debug"):
                raise
            _print_error(_with_restart_hint(ctx, str(disk_error)))
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            resumable = _with_restart_hint(ctx, "interrupted; run the same command to resume")
            _print_error(resumable if ctx.invoked_subcommand == "run" else "interrupted")
            raise typer.Exit(130) from interrupt


def _with_restart_hint(ctx: Any, message: str) -> str:
    """After --restart-from, add to advice to repeat the same command that this option should be left out."""
    if not (ctx.meta.get("restarts") and "same command" in message):
        return message
    return f"{message} (without --restart-from, which would restart the stage again)"


def _print_error(message: str) -> None:
    from dpost_lite.report.terminal import printable

    typer.echo(f"dpost-lite: {printable(' '.join(message.split()))}", err=True)


def print_version(asked: bool) -> None:
    if asked:
        from dpost_lite import __version__

        typer.echo(f"dpost-lite {__version__}")
        raise typer.Exit


def _remember_debug(ctx: typer.Context, asked: bool) -> bool:
    if asked:
        ctx.meta["debug"] = True  # shared by the app and its commands
    return asked


def remember_restart(ctx: typer.Context, given: list[str] | None) -> list[str]:
    """Return the stages given with --restart-from, which takes commas and may be repeated."""
    stages = [name.strip() for text in given or [] for name in text.split(",")]
    ctx.meta["restarts"] = bool(stages)
    return stages


def _go_offline(asked: bool) -> bool:
    if asked:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the libraries are imported
    return asked


# Options shared by several commands.
Offline = Annotated[
    bool, typer.Option("--offline", callback=_go_offline, is_eager=True, help="Do not access the network.")
]
Debug = Annotated[bool, typer.Option("--debug", callback=_remember_debug, help="Show tracebacks of errors.")]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="gsm8k, synthetic, or a .jsonl/.json/.csv/.parquet file; for tests also multiarith, asdiv, svamp, "
        "math500.",
    ),
]
DataDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Read named sets from files in this folder instead of the hub.")
]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="Use at most N problems of each part.")]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="A folder, a hub id (owner/name), or smollm2-135m-instruct.")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="A recipe by name, or a .yaml file. [default: rehearsal with --data synthetic, or with neither --data "
        "nor --gpu-mem SIZE; else the paper's settings]",
    ),
]
Policy = Annotated[
    str | None, typer.Option(metavar="NAME", help="base, sft-0, round-1 …, or a stage such as round-1/dpo.")
]
Precision = Annotated[
    str | None,
    typer.Option(metavar="4bit|16bit|full", help="Train LoRA on a 4-bit base, LoRA on a 16-bit base, or all weights."),
]
GPU_MEM = typer.Option(
    metavar="SIZE",
    help="Fit the run into this much GPU memory: 24GB, 24GiB, auto (all that is free); or cpu to use RAM.",
)


def choice(option: str, given: str, choices: dict[str, Any]) -> Any:
    """Return the value of the choice `given`. Raises RecipeError that lists the choices for any other."""
    if given not in choices:
        raise RecipeError(f"{option}: {given}{nearest(given, list(choices))}; give {', '.join(choices)}")
    return choices[given]


def file_size(file: Path) -> str:
    return f"{file.stat().st_size / 2**20:,.0f} MiB"
