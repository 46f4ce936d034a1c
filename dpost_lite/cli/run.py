"""The command `run`: one run, or several methods and seeds side by side."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpost_lite.cli.options import (
    GPU_MEM,
    Data,
    DataDir,
    Debug,
    Limit,
    Model,
    Offline,
    Precision,
    RecipeName,
    remember_restart,
)
from dpost_lite.cli.resolve import Asked, resolve
from dpost_lite.errors import DeliveryError, DpostError, RecipeError, of_disk
from dpost_lite.methods import METHODS

if TYPE_CHECKING:
    from dpost_lite.pipeline.run import Outcome
    from dpost_lite.problems.records import Score

STOPPING = "stopping after the step at hand, which is kept; Ctrl-C again stops at once"


def run(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Any recipe key, such as dpo.beta=0.2.")
    ] = None,
    recipe: RecipeName = None,
    data: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder. [default: runs/RECIPE or DATA]")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Another seed gives another run.")] = None,
    limit: Limit = None,
    rounds: Annotated[int | None, typer.Option(metavar="N", min=1, help="Most rounds of self-training.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(METHODS),
            help="; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
            + "; several, as dpo-st,st, are compared with equal sampling.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Repeat with N seeds; gives mean and spread.")
    ] = None,
    gpu_mem: Annotated[str | None, GPU_MEM] = None,
    precision: Precision = None,
    restart_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE",
            callback=remember_restart,
            help="Put this stage, or several with commas, and all that was made from it, aside; make them again.",
        ),
    ] = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Train a model on its own right answers, score each round, and write a GGUF file.

    The same command given again goes on where it stopped: a finished stage is never run twice. Ctrl-C stops after the
    step at hand; a second one at once.
    """
    from dpost_lite.evaluation.baselines import methods_of
    from dpost_lite.planner.device import hide_gpu

    methods = methods_of(method) if method else []
    if restart_from and (len(methods) > 1 or (seeds or 1) > 1):
        raise RecipeError("--restart-from goes with one run: name its folder as --out, one --method and its --seed")
    if gpu_mem == "cpu":
        hide_gpu()
    folder, runs = resolve(
        settings, recipe=recipe, gpu_mem=gpu_mem, to_run=True, methods=methods, num_seeds=seeds or 1, out=out,
        data=data, data_dir=data_dir, limit=limit, model=model, seed=seed, rounds=rounds, precision=precision,
    )  # fmt: skip
    if len(runs) == 1:
        outcome = _train(runs[0], restart_from)
        _tell(folder, outcome)
        if outcome.failure is not None:
            raise _late(outcome.failure)
        return
    if (folder / "run.json").exists():
        raise RecipeError(f"--out: {folder} holds a single run; name another folder for several methods or seeds")
    _train_several(runs)


def _train(asked: Asked, restart_from: list[str] | None = None) -> "Outcome":
    """Run a recipe in its folder under the live view, and leave a manifest."""
    from rich.console import Console

    from dpost_lite.pipeline.preflight import preflight
    from dpost_lite.pipeline.run import execute
    from dpost_lite.planner.plan import estimate
    from dpost_lite.planner.recorder import planned_stages
    from dpost_lite.report.terminal import TerminalView
    from dpost_lite.runs.folder import Run
    from dpost_lite.runs.manifest import NAME, write_manifest
    from dpost_lite.system.interrupt import graceful

    folder, recipe = asked.path, asked.recipe
    if asked.plan is not None:
        kept = f"kept as the run began: {', '.join(asked.kept)}\n" if asked.kept else ""
        typer.echo(f"{asked.plan}\n{kept}")
    model_dir = preflight(recipe, folder)  # a mistake shall not leave a folder behind
    made = asked.plan or estimate(recipe)
    with TerminalView(Console(), stages=[str(name) for name in planned_stages(recipe)]) as view:
        opened = Run.create(folder, recipe, listeners=(view,), planned_for=asked.gpu_mem)
        with opened.locked(), graceful(lambda: opened.emit("notice", text=STOPPING)):
            if restart_from:
                opened.emit("notice", text=f"put aside: {', '.join(opened.restart_from(restart_from))}")
            outcome = execute(recipe, opened, made)
    if outcome.failure is None and not (folder / NAME).is_file():
        try:
            write_manifest(opened, recipe, model_dir, sys.argv)
        except OSError as error:  # what came out is told all the same
            if (failure := of_disk(error)) is None:
                raise
            return replace(outcome, failure=failure)
    return outcome


def _tell(folder: Path, outcome: "Outcome") -> None:
    """Print what came out of one run, and what to do with it."""
    from rich.console import Console

    from dpost_lite.report import results, summary
    from dpost_lite.report.terminal import plain
    from dpost_lite.runs.folder import read_json
    from dpost_lite.runs.stage_names import policy_of

    console = Console()
    console.print("", summary.score_table(outcome.scores), "")
    gained = results.gain(folder, policy_of(outcome.best))
    for text in (summary.verdict(*gained) if gained else "", summary.fallen(outcome.dev_scores)):
        if text:
            console.print(plain(text), soft_wrap=True)
    for solved in read_json(outcome.solved.path / "solved.json") if outcome.solved else ():
        console.print(summary.solved_problem(solved), soft_wrap=True)
    file = outcome.export.path / outcome.export.metrics["file"] if outcome.export else None
    console.print(summary.whereabouts(folder, best=outcome.best, file=file), soft_wrap=True)


def _late(failure: DpostError) -> DeliveryError:
    again = "" if "same command" in str(failure) else ", and the same command repeats only what failed"
    return DeliveryError(f"{failure}; all else is done{again}")


def _train_several(runs: list[Asked]) -> None:
    """Run each in its own folder, and print the methods side by side."""
    from rich.console import Console

    from dpost_lite.evaluation.baselines import differences, train_all
    from dpost_lite.report import summary
    from dpost_lite.report.terminal import plain
    from dpost_lite.runs.stage_names import policy_of

    console, by_path = Console(), {asked.path: asked for asked in runs}
    failures: dict[Path, DpostError] = {}

    def train(path: Path) -> "Score":
        recipe = by_path[path].recipe
        console.print(plain(f"\n{recipe.method}, seed {recipe.seed}, in {path}", "bold"), soft_wrap=True)
        outcome = _train(by_path[path])
        if outcome.failure is not None:
            failures[path] = outcome.failure
        name = policy_of(outcome.best)
        return next(score for score in outcome.scores if score.name == name)

    trained = list(train_all([(asked.path, asked.recipe) for asked in runs], train))
    console.print("", summary.methods_table([(run.method, run.seed, run.score) for run in trained]), "")
    for a, b, compared in differences(trained):
        console.print(plain(summary.method_difference(a, b, compared)), soft_wrap=True)
    for path, failure in failures.items():
        console.print(plain(f"{path}: no file ({failure})"), soft_wrap=True)
    if failures:
        raise _late(next(iter(failures.values())))
