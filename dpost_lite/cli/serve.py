"""The command `serve`: OpenAI's interface and a page for an exported model."""

from contextlib import closing
from functools import partial
from typing import Annotated

import typer

from dpost_lite.cli.options import Debug
from dpost_lite.cli.solve import tools_of
from dpost_lite.errors import RecipeError


def serve(
    source: Annotated[str, typer.Argument(metavar="RUN|FILE.gguf", help="A finished run's folder, or a GGUF file.")],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="0.0.0.0 lets other machines ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: any free one.")] = 8000,
    parallel: Annotated[int, typer.Option(metavar="N", min=1, max=256, help="Answers written at the same time.")] = 8,
    queue: Annotated[int, typer.Option(metavar="N", min=0, help="Answers that may wait for their turn.")] = 64,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Longest answer. [default: that of the run, or 300]")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="Longest time for an answer.")] = 120.0,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar="DPOST_LITE_API_KEY", help="Answer only clients that send this key."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name of this machine; addresses are always accepted.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A site whose pages may ask (CORS), or *; none by default.")
    ] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Run the code in solutions, in a sandbox.")] = False,
    debug: Debug = False,
) -> None:
    """Serve an exported model: OpenAI's interface at /v1 with the calculator in the loop, and a page to ask in."""
    try:
        from dpost_lite.server import run
    except ModuleNotFoundError as error:
        raise RecipeError(f"serve needs {error.name}; install it with pip install 'dpost-lite[serve]'") from error
    from dpost_lite.evaluation.targets import file_to_solve_with
    from dpost_lite.local.solver_process import SolverProcess
    from dpost_lite.server.app import create_app
    from dpost_lite.server.async_solver import AsyncSolver
    from dpost_lite.server.gate import Access
    from dpost_lite.server.schema import Defaults

    file, recipe = file_to_solve_with(source)
    tools = tools_of(recipe, allow_code=allow_code)
    if api_key is not None and not api_key.strip():
        raise RecipeError("--api-key: the key is empty; give one, or leave the option out")
    limit = max_tokens or recipe.sampling.max_new_tokens
    open_process = partial(SolverProcess, file, tools=tools, max_new_tokens=limit, num_parallel=parallel)
    with (
        run.listen(host, port) as listening,
        closing(AsyncSolver(open_process, max_outstanding=parallel + queue, max_seconds=timeout)) as solver,
    ):
        app = create_app(
            solver,
            model=file.stem,
            tools="calculator" if tools.code is None else "code",
            defaults=Defaults(limit, recipe.sampling.temperature),
            access=Access(
                api_key,
                frozenset(name.lower() for name in allow_host or ()),
                tuple(url.rstrip("/").lower() for url in allow_origin or ()),
            ),
        )
        typer.echo(f"serving {file.stem} at {run.url_of(listening)} (Ctrl-C ends it)")
        if host not in ("127.0.0.1", "::1", "localhost") and api_key is None:
            typer.echo("note: other machines can ask too; --api-key KEY restricts that", err=True)
        run.serve(app, solver, listening)
