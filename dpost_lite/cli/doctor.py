"""The command `doctor`: what this machine has, and what is missing."""

import typer

from dpost_lite.cli.options import Debug


def doctor(debug: Debug = False) -> None:
    """Say what this machine has and what is missing for which feature; exit code 1 if something required is."""
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
