"""The command `plan`: what each stage takes of memory and time."""

import shlex
from typing import Annotated, Any

import typer

from dpost_lite.cli.options import GPU_MEM, Data, DataDir, Debug, Limit, Model, Offline, Precision, RecipeName
from dpost_lite.cli.resolve import resolve


def plan(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Any recipe key, such as sft.max_length=512.")
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
    """Say what each stage of a run would take of memory and time, and how it would be cut to fit; no GPU is needed.

    Without --model, the largest open base model that fits is picked.
    """
    from dataclasses import asdict

    from rich.console import Console

    from dpost_lite.planner.device import GIB
    from dpost_lite.report.summary import plan_table
    from dpost_lite.report.terminal import as_hours

    options: dict[str, Any] = {"data": data, "data_dir": data_dir, "limit": limit, "precision": precision}
    _, (asked,) = resolve(settings, recipe=recipe, gpu_mem=gpu_mem, to_run=False, model=model, **options)
    made = asked.plan
    assert made is not None  # --gpu-mem has a default
    typer.echo(made)
    Console().print("", plan_table([asdict(stage) for stage in made.stages], is_cpu=made.device.is_cpu))
    again = ["--gpu-mem", gpu_mem, *(["--recipe", recipe] if recipe else []), "--model", made.shape.name]
    for name, value in options.items():
        again += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    device = made.device
    typer.echo(
        f"\npeak {made.largest.peak_bytes / GIB:.1f} of {device.memory_bytes / GIB:.1f} GiB, counted from the model's "
        f"shape; about {as_hours(made.seconds)} in all,\nestimated from {device.flops / 1e12:.3g} TFLOP/s and "
        f"{device.bandwidth / 1e9:.0f} GB/s ({device.rates_of})\n"
        f"next: dpost-lite run {shlex.join([*again, *(settings or [])])}"
    )
