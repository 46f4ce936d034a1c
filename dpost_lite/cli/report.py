"""The command `report`: write the HTML report of a run."""

from pathlib import Path
from typing import Annotated

import typer

from dpost_lite.cli.options import Debug


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, finished or not.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to write. [default: RUN/report]")] = None,
    baseline: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN",
            help="Another run on the same test problems to compare with; may be repeated. "
            "[default: the other runs of the same `run --method a,b`]",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a report of a run: one HTML file, and its figures as PNG files."""
    from dpost_lite.report.page import write_report
    from dpost_lite.runs.folder import Run

    files = write_report(Run.open(run).path, out or run / "report", baseline or None)
    typer.echo(f"wrote {files[0]} and {len(files) - 1} figures next to it")
