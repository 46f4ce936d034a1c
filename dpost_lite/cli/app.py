"""The command-line application.

To keep `--help` fast, command modules import only typer and light modules at the top, and the rest when they run.
"""

import sys
import warnings
from typing import Annotated

import typer

from dpost_lite.cli.data import data
from dpost_lite.cli.doctor import doctor
from dpost_lite.cli.eval import eval_
from dpost_lite.cli.export import export
from dpost_lite.cli.options import Debug, OneLineErrors, print_version
from dpost_lite.cli.plan import plan
from dpost_lite.cli.report import report
from dpost_lite.cli.run import run
from dpost_lite.cli.runs import runs
from dpost_lite.cli.serve import serve
from dpost_lite.cli.solve import solve
from dpost_lite.cli.verify import verify
from dpost_lite.system.machine import let_threads_sleep

app = typer.Typer(
    cls=OneLineErrors,
    help="Self-train a small language model on maths word problems and export it as a GGUF file.",
    epilog="Start with `dpost-lite run`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the `dpost-lite` command."""
    let_threads_sleep()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # show ? for characters the terminal cannot encode
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
        warnings.simplefilter("ignore", FutureWarning)  # warnings for developers would garble the live view


for command, summary in (  # in the order of --help
    (run, "Self-train a model, score each round and export a GGUF file."),
    (eval_, "Score a run or a model, or compare two models' answers."),
    (report, "Write a run's HTML report and its figures."),
    (runs, "List and compare the runs in a folder."),
    (solve, "Solve word problems with an exported model."),
    (serve, "Serve an exported model: OpenAI's interface and a page."),
    (export, "Export a policy of a run as a GGUF file."),
    (data, "Show how problems are read from a set or file."),
    (plan, "Estimate the memory and time of a run."),
    (verify, "Check a run's files against its manifest."),
    (doctor, "Check this machine and list what is missing."),
):
    app.command(command.__name__.rstrip("_"), short_help=summary)(command)
