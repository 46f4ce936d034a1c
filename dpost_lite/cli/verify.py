"""The command `verify`: check the files of a finished run."""

from pathlib import Path
from typing import Annotated

import typer

from dpost_lite.cli.options import Debug


def verify(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")], debug: Debug = False
) -> None:
    """Check the files of a finished run against its manifest.

    The exit code is 1 if a file was changed or is missing.
    """
    from dpost_lite.report.terminal import printable
    from dpost_lite.runs import manifest

    found = manifest.verify(source)
    for line in found or [f"{source}: all files match the manifest"]:
        typer.echo(printable(line))
    if found:
        raise typer.Exit(1)
