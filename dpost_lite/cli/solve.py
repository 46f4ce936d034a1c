"""The command `solve`: solve word problems with an exported model."""

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dpost_lite.cli.options import Debug, choice, lines_of_stdin


def solve(
    source: Annotated[str, typer.Argument(metavar="RUN|FILE.gguf", help="A finished run's folder, or a GGUF file.")],
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="A word problem. [default: read from standard input, one per line]"),
    ] = None,
    calculator: Annotated[str, typer.Option(metavar="on|off", help="Let the calculator complete <<3*4=.")] = "on",
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Run the code in solutions, in a sandbox.")] = False,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0: greedy decoding.")] = 0.0,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Make sampled answers reproducible.")] = None,
    debug: Debug = False,
) -> None:
    """Solve word problems with an exported model, locally."""
    from dpost_lite.evaluation.targets import finished_export, recipe_of_file
    from dpost_lite.local.request import Piece, Request
    from dpost_lite.local.solver_process import SolverProcess
    from dpost_lite.problems.tools import Tools
    from dpost_lite.report.terminal import printable
    from dpost_lite.runs.folder import Run

    with_calculator = choice("--calculator", calculator, {"on": True, "off": False})
    file = Path(source)
    if file.suffix == ".gguf":
        recipe = recipe_of_file(file)
    else:
        opened = Run.open(file)
        file, recipe = file / "export" / finished_export(opened)["file"], opened.recipe
    tools = replace(Tools.from_recipe(recipe), runs_code=allow_code)
    if not with_calculator:
        tools = replace(tools, calculator=None)
    if tools.code is None and allow_code:
        typer.echo("note: this model writes no code, so --allow-code has no effect", err=True)
    if tools.code is not None and not allow_code:
        typer.echo("note: this model writes code, which is run only with --allow-code", err=True)
    with SolverProcess(file, tools=tools, max_new_tokens=recipe.sampling.max_new_tokens) as solver:
        for index, text in enumerate([question] if question is not None else lines_of_stdin()):
            answer_seed = secrets.randbits(32) if seed is None else seed + index
            request = Request.of(text, temperature=temperature, seed=answer_seed)
            for event in solver.stream(request):
                if isinstance(event, Piece):
                    typer.echo(printable(event.text), nl=False)
            typer.echo("\n" if question is None else "")
