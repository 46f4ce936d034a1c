"""The command `solve`: solve word problems with an exported model."""

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from dpost_lite.cli.options import Debug, choice, lines_of_stdin

if TYPE_CHECKING:
    from dpost_lite.problems.tools import Tools
    from dpost_lite.recipe import Recipe


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
    from dpost_lite.evaluation.exported import file_to_solve_with
    from dpost_lite.local.request import Piece, Request
    from dpost_lite.local.solver_process import SolverProcess
    from dpost_lite.report.terminal import printable

    with_calculator = choice("--calculator", calculator, {"on": True, "off": False})
    file, recipe = file_to_solve_with(source)
    tools = tools_of(recipe, allow_code=allow_code)
    if not with_calculator:
        tools = replace(tools, calculator=None)
    with SolverProcess(file, tools=tools, max_new_tokens=recipe.sampling.max_new_tokens) as solver:
        for index, text in enumerate([question] if question is not None else lines_of_stdin()):
            answer_seed = secrets.randbits(32) if seed is None else seed + index
            request = Request.of(text, temperature=temperature, seed=answer_seed)
            for event in solver.stream(request):
                if isinstance(event, Piece):
                    typer.echo(printable(event.text), nl=False)
            typer.echo("\n" if question is None else "")


def tools_of(recipe: "Recipe", *, allow_code: bool) -> "Tools":
    """Return what the solutions of a recipe use; prints a note if --allow-code is missing or has no effect."""
    from dpost_lite.problems.tools import Tools

    tools = replace(Tools.from_recipe(recipe), runs_code=allow_code)
    if tools.code is None and allow_code:
        typer.echo("note: this model writes no code, so --allow-code has no effect", err=True)
    if tools.code is not None and not allow_code:
        typer.echo("note: this model writes code, which is run only with --allow-code", err=True)
    return tools
