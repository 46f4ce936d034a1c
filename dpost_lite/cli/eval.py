"""The command `eval`: score a run or model, or compare two sets of saved answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpost_lite.cli.options import Data, DataDir, Debug, Limit, Offline, Policy, choice
from dpost_lite.errors import RecipeError, RunError

if TYPE_CHECKING:
    from dpost_lite.runs.folder import Run


def eval_(
    target: Annotated[
        str | None,
        typer.Argument(metavar="TARGET", help="A run's folder, a model, an adapter's folder, or a GGUF file."),
    ] = None,
    data: Data = None,
    data_dir: DataDir = None,
    limit: Limit = None,
    calculator: Annotated[
        str, typer.Option(metavar="on|off|both", help="Answer with the calculator, without it, or both ways.")
    ] = "both",
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Run the code in solutions, in a sandbox.")] = False,
    policy: Policy = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The base of an adapter. [default: the one it names]")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Also draw N samples per problem, for pass@k and maj@N.")
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="T", min=0.01, help="Temperature of those samples.")] = 0.7,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to save the answers. [default: evals/TARGET/DATA]")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Compare saved answers: two folders written by eval, or RUN/score/NAME."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="paper",
            help="Also show the paper's results on the same set; without --data, its Table 2 and a run's saved scores.",
        ),
    ] = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Score a run's base and every round, or a model, on unseen problems; or compare two models' answers.

    A run is scored on its own test problems unless --data is given; --data dev takes its dev problems.
    """
    from rich.console import Console

    from dpost_lite.evaluation import evaluate, papers, targets
    from dpost_lite.problems.records import Score
    from dpost_lite.report import summary
    from dpost_lite.report.terminal import TerminalView, plain

    if compare is not None:
        _compare(*compare)
        return
    if target is None:
        raise RunError("eval: give a run's folder, a model, an adapter or a GGUF file as TARGET; or --compare A B")
    modes = choice("--calculator", calculator, {"on": [True], "off": [False], "both": [True, False]})
    if against is not None:
        choice("--against", against, {"paper": None})
        if data is None and (run := targets.find_target(target).run):
            given = {"--policy": policy, "--limit": limit, "--samples": samples, "--out": out, "--model": model}
            if others := [name for name, value in given.items() if value is not None]:
                raise RecipeError(
                    f"{', '.join(others)}: --against paper without --data shows the run's own scores; leave it out, or "
                    "give --data"
                )
            _table_2(run)
            return
        if data not in papers.SETS:
            sets = ", ".join(papers.SETS)
            raise RecipeError(
                f"--against paper: the paper has results on {sets}; give one as --data, or a run's folder"
            )
    scored = targets.find_target(target, policy, base=model)
    if scored.recipe.solutions == "code" and not allow_code:
        typer.echo("note: this model writes code, which is run only with --allow-code", err=True)
    problems = targets.problems_for(scored, data, data_dir=data_dir, limit=limit)
    if out is not None and any(out.glob("*/answers.jsonl")):
        raise RunError(f"--out: {out} already contains answers; give another folder")
    folder = out or evaluate.new_folder(target, data)
    sampling = evaluate.Sampling(samples, temperature) if samples else None
    console = Console()
    with TerminalView(console) as view:
        scores = list(
            evaluate.evaluate(
                scored, problems, calculator=modes, runs_code=allow_code, out=folder, sampling=sampling, listener=view
            )
        )
    greedy = [score for score in scores if isinstance(score, Score)]
    console.print("", summary.score_table(greedy), "", summary.answers_table(greedy))
    if sampling:
        console.print("", summary.samples_table([s for s in scores if not isinstance(s, Score)]))
    if against is not None and data is not None:
        console.print("", papers.against_paper(data, greedy))
        text = papers.differs(targets.describe_target(scored), data, None if limit else len(problems))
        console.print(plain(f"\n{text}"), soft_wrap=True)
    saved = ", ".join(str(path.parent) for path in sorted(folder.glob("*/answers.jsonl")))
    console.print(plain(f"\nall answers are saved in {saved}"), soft_wrap=True)


def _table_2(run: "Run") -> None:
    """Print the paper's Table 2 and the run's own scores on its sets, as far as it has made them."""
    from rich.console import Console

    from dpost_lite.evaluation import papers, targets
    from dpost_lite.report import results
    from dpost_lite.report.terminal import plain

    data = run.recipe.data
    scores = {data.test or data.train: results.scores(run.path), **results.also_scores(run.path)}
    if missing := [name for name in papers.SETS if not scores.get(name)]:
        own = data.test or data.train
        key = f"data.also_test={','.join([*data.also_test, *(name for name in missing if name != own)])}"
        typer.echo(f"note: {run.path} has no scores on {', '.join(missing)}; repeat its command with {key}", err=True)
    ours = targets.describe_target(targets.Target(run.recipe, {}, run))
    Console().print("", papers.table_2(scores))
    Console().print(plain(f"\n{papers.differs(ours)}"), soft_wrap=True)


def _compare(a: Path, b: Path) -> None:
    """Print the comparison of two sets of saved answers."""
    from rich.console import Console

    from dpost_lite.evaluation.evaluate import saved_answers
    from dpost_lite.problems.comparing import compare
    from dpost_lite.report import summary

    first, second = ({answer.problem_id: answer for answer in saved_answers(path)} for path in (a, b))
    correct = ({i: answer.correct for i, answer in answers.items()} for answers in (first, second))
    both = {i: (first[i], second[i]) for i in first.keys() & second.keys()}
    for text in summary.comparison(str(a), str(b), compare(*correct), both):
        Console().print(text, soft_wrap=True)
