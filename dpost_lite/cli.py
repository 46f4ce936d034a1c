"""The commands: arguments -> one call.

Only typer is imported up here: `--help` answers at once, and torch comes when a command needs it.
"""

import secrets
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from dpost_lite.cli_eval import eval_
from dpost_lite.cli_report import report, runs
from dpost_lite.cli_run import run
from dpost_lite.command import (
    GPU_MEM,
    Data,
    DataDir,
    Debug,
    Limit,
    Model,
    Offline,
    OneLineErrors,
    Policy,
    Precision,
    RecipeName,
    choice,
    default_recipe,
    file_size,
    lines_of_stdin,
    overrides,
    print_version,
    resolve,
)
from dpost_lite.errors import ExportError
from dpost_lite.machine import let_threads_sleep

app = typer.Typer(
    cls=OneLineErrors,
    help="A small language model teaches itself maths word problems, and goes home as a GGUF file.",
    epilog="Begin with `dpost-lite run`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line; the entry point of the package."""
    let_threads_sleep()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ✓ shows ?, a broken byte is no reason to stop
    app(prog_name="dpost-lite")


@app.callback()
def _app(
    debug: Debug = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Show the version.", show_default=False),
    ] = False,
) -> None:
    if not debug:
        warnings.simplefilter("ignore", FutureWarning)  # what libraries tell developers would break into the live view


app.command()(run)
app.command("eval")(eval_)
app.command()(report)
app.command()(runs)


@app.command()
def solve(
    source: Annotated[str, typer.Argument(metavar="RUN|FILE.gguf", help="A finished run's folder, or a GGUF file.")],
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="Without it, problems are read from standard input, one a line."),
    ] = None,
    calculator: Annotated[str, typer.Option(metavar="on|off", help="Let the calculator fill in <<3*4=.")] = "on",
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="Above 0, answers vary.")] = 0.0,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="With it, the same answers come again.")] = None,
    debug: Debug = False,
) -> None:
    """Solve word problems with an exported model, on this machine alone."""
    from dpost_lite.evaluate import finished_export
    from dpost_lite.local.solver_process import SolverProcess
    from dpost_lite.policies import calculator_of
    from dpost_lite.recipe import Recipe
    from dpost_lite.report.terminal import printable
    from dpost_lite.rundir import Run

    with_calculator = choice("--calculator", calculator, {"on": True, "off": False})
    file, recipe = Path(source), Recipe()
    if file.suffix != ".gguf":
        opened = Run.open(file)
        file, recipe = file / "export" / finished_export(opened)["file"], opened.recipe
    with SolverProcess(
        file,
        calculator=calculator_of(recipe) if with_calculator else None,
        max_new_tokens=recipe.sampling.max_new_tokens,
    ) as solver:
        for index, text in enumerate([question] if question is not None else lines_of_stdin()):
            drawn = secrets.randbits(32) if seed is None else seed + index
            for piece in solver.stream(text, temperature=temperature, seed=drawn):
                typer.echo(printable(piece), nl=False)
            typer.echo("\n" if question is None else "")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    quant: Annotated[str, typer.Option(metavar="q4_k_m|q5_k_m|q8_0|f16", help="How the weights are stored.")],
    policy: Policy = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file to write. [default: RUN/export/model-QUANT.gguf]")
    ] = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Write a run's best policy, or the one named, as a GGUF file."""
    from dpost_lite.evaluate import finished_export, policy_dir
    from dpost_lite.models import backends
    from dpost_lite.policies import export_gguf
    from dpost_lite.recipe import validate
    from dpost_lite.rundir import Run

    opened = Run.open(source)
    recipe = validate({**opened.recipe.model_dump(), "export": {"quant": quant.lower()}}, where="--quant")
    finished = {} if policy and out else finished_export(opened)
    adapter_dir = policy_dir(opened, policy or finished["policy"])
    name = "-".join(["model", *(policy.split("/") if policy else []), recipe.export.quant])
    file = out or source / "export" / f"{name}.gguf"
    if file.exists():
        typer.echo(f"{file} is there already ({file_size(file)}); remove it to have it written again")
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"--out: {file.parent} cannot be made ({error.strerror}); name another place") from error
    typer.echo(f"writing {file} …")
    export_gguf(recipe, backends.find(recipe.model.name), adapter_dir, file)
    typer.echo(f'{file_size(file)} written; next: dpost-lite solve {file} "…"')


@app.command()
def data(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A set or a file, as --data of run.")],
    data_dir: DataDir = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="train|test", help="Which part of a set. [default: train, where it can be trained on]"),
    ] = None,
    model: Model = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Show how problems are read: format, counts, three samples as they are trained on, refused rows."""
    from rich.console import Console

    from dpost_lite.reading import describe
    from dpost_lite.recipe import load_recipe

    if split is not None:
        choice("--split", split, {"train": None, "test": None})
    recipe = load_recipe(default_recipe(source), overrides(model=model, data_dir=data_dir))
    console = Console()
    for text in describe(source, recipe, split=split):
        console.print(text, soft_wrap=True)


@app.command()
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


@app.command("verify")
def verify_(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")], debug: Debug = False
) -> None:
    """Check the files of a finished run against its manifest; exit code 1 if one was changed or lost."""
    from dpost_lite.manifest import verify
    from dpost_lite.report.terminal import printable

    found = verify(source)
    for line in found or [f"{source}: every file is as the run left it"]:
        typer.echo(printable(line))
    if found:
        raise typer.Exit(1)


@app.command()
def doctor(debug: Debug = False) -> None:
    """Say what this machine has and what is missing for which feature; exit code 1 if something required is."""
    from rich.console import Console

    from dpost_lite.doctor import examine
    from dpost_lite.report.terminal import plain

    marks = {"ok": "✓", "note": "!", "missing": "✗"}
    states = set()
    for finding in examine():
        states.add(finding.state)
        Console().print(plain(f"{marks[finding.state]} {finding.topic:<18} {finding.value}"), soft_wrap=True)
    if "missing" in states:
        raise typer.Exit(1)
