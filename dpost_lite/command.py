"""What all commands share: an error that the user can mend is one line and exit code 2, and options that recur.

Only typer is imported up here: `--help` answers at once.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dpost_lite.errors import DpostError


class OneLineErrors(TyperGroup):
    """Turns errors of errors.py and Ctrl-C into one line on stderr, and exit codes 2 and 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DpostError as error:
            if ctx.meta.get("debug"):
                raise
            _fail(str(error))
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            _fail("interrupted; the same command goes on" if ctx.invoked_subcommand == "run" else "interrupted")
            raise typer.Exit(130) from interrupt


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


# Options that more than one command takes.
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
Policy = Annotated[
    str | None, typer.Option(metavar="NAME", help="base, sft-0, round-1 …, or a stage such as round-1/dpo.")
]
GPU_MEM = typer.Option(
    metavar="SIZE", help="Fit the run into this much GPU memory: 24GB, 24GiB, or auto (what is free)."
)
