"""The command `doctor`: check this machine."""

import typer

from dpost_lite.cli.options import Debug


def doctor(debug: Debug = False) -> None:
    """Check this machine: packages, devices, memory, and what is missing for which feature.

    The exit code is 1 if something required is missing.
    """
    from rich.console import Console

    from dpost_lite.cli.diagnosis import examine
    from dpost_lite.report.terminal import plain

    marks = {"ok": "✓", "note": "!", "missing": "✗"}
    states = set()
    for finding in examine():
        states.add(finding.state)
        Console().print(plain(f"{marks[finding.state]} {finding.topic:<18} {finding.value}"), soft_wrap=True)
    if "missing" in states:
        raise typer.Exit(1)
