"""What commands share: an error that the user can mend is one line and exit code 2, options, and how they are read.

Only typer is imported up here: `--help` answers at once.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dpost_lite.errors import DpostError, RecipeError, nearest, of_disk

if TYPE_CHECKING:
    pass


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
