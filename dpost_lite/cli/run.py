"""The command `run`: one run, or a comparison of several methods or seeds."""

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
from dpost_lite.cli.resolve import RunRequest, resolve
from dpost_lite.errors import DeliveryError, DpostError, RecipeError, of_disk
from dpost_lite.methods import METHODS

if TYPE_CHECKING:
    from dpost_lite.pipeline.run import Outcome
    from dpost_lite.problems.records import Score

STOPPING = "stopping after the current step, which is saved; press Ctrl-C again to stop immediately"


def run(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Any recipe key, for example dpo.beta=0.2.")
    ] = None,
    recipe: RecipeName = None,
    data: Data = None,
    data_dir: DataDir = None,
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder. [default: runs/RECIPE or runs/DATA]")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Random seed. [default: the recipe's]")] = None,
    limit: Limit = None,
    rounds: Annotated[int | None, typer.Option(metavar="N", min=1, help="Maximum rounds of self-training.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(METHODS),
            help="; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
            + "; several, such as dpo-st,st, are compared with equal numbers of samples.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Repeat with N seeds and report mean and spread.")
    ] = None,
    gpu_mem: Annotated[str | None, GPU_MEM] = None,
    precision: Precision = None,
    restart_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE",
            callback=remember_restart,
            help="Archive these stages (comma-separated) and everything made from them, and run them again.",
        ),
    ] = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Train a model on its own right answers, score each round, and export a GGUF file.

    Run the same command again to resume: finished stages are not repeated. Ctrl-C stops after the current step; a
    second Ctrl-C stops immediately. The first run on a GPU checks it for a minute or two (`doctor --gpu`).
    """
    from dpost_lite.evaluation.baselines import methods_of
    from dpost_lite.planner.device import hide_gpu

    methods = methods_of(method) if method else []
    if restart_from and (len(methods) > 1 or (seeds or 1) > 1):
        raise RecipeError("--restart-from works on one run: give its folder as --out, its --method and its --seed")
    if gpu_mem == "cpu":
        hide_gpu()
    folder, runs = resolve(
        settings, recipe=recipe, gpu_mem=gpu_mem, to_run=True, methods=methods, num_seeds=seeds or 1, out=out,
        data=data, data_dir=data_dir, limit=limit, model=model, seed=seed, rounds=rounds, precision=precision,
    )  # fmt: skip
    if len(runs) == 1:
        outcome = _train(runs[0], restart_from)
        _print_outcome(folder, outcome)
        if outcome.failure is not None:
            raise _delivery_error(outcome.failure)
        return
    if (folder / "run.json").exists():
        raise RecipeError(f"--out: {folder} contains a single run; give another folder for several methods or seeds")
    _train_several(runs)


def _train(request: RunRequest, restart_from: list[str] | None = None) -> "Outcome":
    """Run a recipe in its folder, show its progress, and write the manifest."""
    from rich.console import Console

    from dpost_lite.evaluation import publish
    from dpost_lite.pipeline.gpu_check import check_once
    from dpost_lite.pipeline.preflight import preflight
    from dpost_lite.pipeline.run import execute
    from dpost_lite.planner.plan import estimate
    from dpost_lite.planner.recorder import planned_stages
    from dpost_lite.report.terminal import TerminalView
    from dpost_lite.runs.folder import Run
    from dpost_lite.runs.manifest import NAME, write_manifest
    from dpost_lite.system.interrupt import graceful

    folder, recipe = request.path, request.recipe
    if request.plan is not None:
        kept = f"kept from the run's first start: {', '.join(request.kept)}\n" if request.kept else ""
        typer.echo(f"{request.plan}\n{kept}")
    check_once(typer.echo)
    model_dir = preflight(recipe, folder)  # before the folder is created, so that a mistake leaves none behind
    plan = request.plan or estimate(recipe)
    with TerminalView(Console(), stages=[str(name) for name in planned_stages(recipe)]) as view:
        opened = Run.create(folder, recipe, listeners=(view,), planned_for=request.gpu_mem)
        with opened.locked(), graceful(lambda: opened.emit("notice", text=STOPPING)):
            if restart_from:
                opened.emit("notice", text=f"archived: {', '.join(opened.restart_from(restart_from))}")
            outcome = execute(recipe, opened, plan)
    if outcome.failure is None and not (folder / NAME).is_file():
        try:
            write_manifest(opened, recipe, model_dir, sys.argv)
            publish.describe_run(folder)
        except (OSError, DpostError) as error:  # print the outcome first
            (folder / NAME).unlink(missing_ok=True)  # so that the same command comes here again
            if (failure := error if isinstance(error, DpostError) else of_disk(error)) is None:
                raise
            return replace(outcome, failure=failure)
    return outcome


def _print_outcome(folder: Path, outcome: "Outcome") -> None:
    """Print the scores of a run, its solved problems, and what to do next."""
    from rich.console import Console

    from dpost_lite.cli.proof import show_proof
    from dpost_lite.report import results, summary
    from dpost_lite.report.terminal import plain
    from dpost_lite.runs.folder import read_json
    from dpost_lite.runs.stage_names import policy_of

    console = Console()
    console.print("", summary.score_table(outcome.scores), "")
    gained, method = results.gain(folder, policy_of(outcome.best)), METHODS[results.recipe_of(folder)["method"]]
    dropped = summary.dev_drop(outcome.dev_scores) if method.has_rounds else ""
    for text in (summary.verdict(*gained, method) if gained else "", dropped):
        if text:
            console.print(plain(text), soft_wrap=True)
    gains = results.also_gains(folder, policy_of(outcome.best))
    for part, scores in outcome.also_scores.items():
        console.print("", summary.also_table(part, scores), "")
        if also_gained := gains.get(part):
            console.print(plain(summary.verdict(*also_gained, method, part=part)), soft_wrap=True)
    for solved in read_json(outcome.solved.path / "solved.json") if outcome.solved else ():
        console.print(summary.solved_problem(solved), soft_wrap=True)
    if outcome.export:
        show_proof(outcome.export.metrics)
    file = outcome.export.path / outcome.export.metrics["file"] if outcome.export else None
    console.print(summary.next_steps(folder, best=outcome.best, file=file), soft_wrap=True)


def _delivery_error(failure: DpostError) -> DeliveryError:
    retry = "" if "same command" in str(failure) else "; run the same command to retry it"
    return DeliveryError(f"{failure}; everything else is done{retry}")


def _train_several(runs: list[RunRequest]) -> None:
    """Run each in its own folder and compare the methods."""
    from rich.console import Console

    from dpost_lite.evaluation.baselines import differences, train_all
    from dpost_lite.problems.corpus import also_names
    from dpost_lite.report import summary
    from dpost_lite.report.terminal import plain
    from dpost_lite.runs.stage_names import policy_of

    console, by_path = Console(), {request.path: request for request in runs}
    failures: dict[Path, DpostError] = {}

    def train(path: Path) -> "Score":
        recipe = by_path[path].recipe
        console.print(plain(f"\n{recipe.method}, seed {recipe.seed}, in {path}", "bold"), soft_wrap=True)
        outcome = _train(by_path[path])
        if outcome.failure is not None:
            failures[path] = outcome.failure
        name = policy_of(outcome.best)
        return next(score for score in outcome.scores if score.name == name)

    finished = list(train_all([(request.path, request.recipe) for request in runs], train))
    for part in (None, *also_names(runs[0].recipe.data)):
        scores = [(run.method, run.seed, run.score_on(part)) for run in finished]
        console.print("", summary.methods_table(scores, part or "strict"), "")
        for a, b, compared in differences(finished, part):
            console.print(plain(summary.method_difference(a, b, compared)), soft_wrap=True)
    for path, failure in failures.items():
        console.print(plain(f"{path}: no GGUF file ({failure})"), soft_wrap=True)
    if failures:
        raise _delivery_error(next(iter(failures.values())))
