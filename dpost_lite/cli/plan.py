"""The command `plan`: estimate the memory and time of a run."""

import shlex
from typing import Annotated, Any

import typer

from dpost_lite.cli.options import GPU_MEM, Data, DataDir, Debug, Limit, Model, Offline, Precision, RecipeName
from dpost_lite.cli.resolve import resolve


def plan(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Any recipe key, for example sft.max_length=512.")
    ] = None,
    gpu_mem: Annotated[str, GPU_MEM] = "auto",
    recipe: RecipeName = None,
    data: Data = None,
    data_dir: DataDir = None,
    limit: Limit = None,
    model: Model = None,
    precision: Precision = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Estimate the memory and time of each stage of a run, and choose batch sizes to fit. No GPU is needed.

    Without --model, the largest open base model that fits is chosen.
    """
    from dataclasses import asdict

    from rich.console import Console

    from dpost_lite.planner.device import GIB
    from dpost_lite.report.summary import plan_table
    from dpost_lite.report.terminal import as_hours

    options: dict[str, Any] = {"data": data, "data_dir": data_dir, "limit": limit, "precision": precision}
    _, (request,) = resolve(settings, recipe=recipe, gpu_mem=gpu_mem, to_run=False, model=model, **options)
    made = request.plan
    assert made is not None  # --gpu-mem has a default
    typer.echo(made)
    Console().print("", plan_table([asdict(stage) for stage in made.stages], is_cpu=made.device.is_cpu))
    command = ["--gpu-mem", gpu_mem, *(["--recipe", recipe] if recipe else []), "--model", made.shape.name]
    for name, value in options.items():
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    device = made.device
    typer.echo(
        f"\npeak memory {made.largest.peak_bytes / GIB:.1f} of {device.memory_bytes / GIB:.1f} GiB\n"
        f"total time about {as_hours(made.seconds)}, estimated from {device.flops / 1e12:.3g} TFLOP/s and "
        f"{device.bandwidth / 1e9:.0f} GB/s ({device.rates_of})\n"
        f"next: dpost-lite run {shlex.join([*command, *(settings or [])])}"
    )
