"""The command `doctor`: check this machine."""

from typing import Annotated

import typer

from dpost_lite.cli.options import Debug


def doctor(
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu",
            help="Test that this GPU computes what it should, for a minute or two: fused attention, CUDA graphs, the "
            "sampler, 4-bit layers, unsloth, the memory cap and the planned memory. What fails is switched off here. "
            "The first `run` does the same; this tests again.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Check this machine: packages, devices, memory, and what is missing for which feature.

    The exit code is 1 if something required is missing or, with --gpu, if something computes wrong.
    """
    if gpu:
        _check_gpu()
        return
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


def _check_gpu() -> None:
    from dpost_lite.errors import ModelError
    from dpost_lite.pipeline.gpu_check import CHECKS, line, run_checks
    from dpost_lite.system import gpu_record
    from dpost_lite.system.machine import version

    if (name := gpu_record.device_name()) is None:
        raise ModelError(
            f"--gpu: PyTorch {version('torch')} finds no CUDA GPU here; install the card's driver and PyTorch for "
            "CUDA, or use the CPU, which needs no check"
        )
    typer.echo(f"Checking {name}, a minute or two:")
    states = set()
    for result in run_checks(CHECKS):
        states.add(result.state)
        typer.echo(line(result))
    if "failed" in states:
        raise typer.Exit(1)
