"""The command `runs`: list and compare runs."""

from pathlib import Path
from typing import Annotated

import typer

from dpost_lite.cli.options import Debug


def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with runs.")] = Path("runs"),
    debug: Debug = False,
) -> None:
    """List the runs in a folder and compare those tested on the same problems."""
    from rich.console import Console

    from dpost_lite.report.listing import comparisons, find_runs, runs_table

    console = Console()
    found = find_runs(folder)
    console.print("", runs_table(found), "")
    for text in comparisons(found):
        console.print(text, soft_wrap=True)
