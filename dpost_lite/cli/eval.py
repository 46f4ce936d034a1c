"""The command `eval`: score what can answer, or compare two sets of kept answers."""

from pathlib import Path
from typing import Annotated

import typer

from dpost_lite.cli.options import Data, DataDir, Debug, Limit, Offline, Policy, choice
from dpost_lite.errors import RecipeError, RunError


def eval_(
    target: Annotated[
        str | None,
        typer.Argument(metavar="TARGET", help="A run's folder, a model, an adapter's folder, or a GGUF file."),
    ] = None,
    data: Data = None,
    data_dir: DataDir = None,
    limit: Limit = None,
    calculator: Annotated[
        str, typer.Option(metavar="on|off|both", help="Answer with it, without, or both ways.")
    ] = "both",
    policy: Policy = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The base of an adapter. [default: as it says]")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Also draw N samples per problem: pass@k and maj@N.")
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="T", min=0.01, help="Of those samples.")] = 0.7,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where answers are kept. [default: evals/TARGET/DATA]")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Compare kept answers of two models, in folders of eval or RUN/score/NAME."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="paper", help="Show the paper's figures on the same set beside ours.")
    ] = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Score a run's base and every round, or a model, on unseen problems; or compare two models' answers.

    A run is scored on its own test problems unless --data says otherwise.
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
        raise RunError("eval: name a run's folder, a model, an adapter or a GGUF file; or give --compare A B")
    modes = choice("--calculator", calculator, {"on": [True], "off": [False], "both": [True, False]})
    if against is not None:
        choice("--against", against, {"paper": None})
        if data not in papers.SETS:
            raise RecipeError(f"--against paper: the paper has figures on {', '.join(papers.SETS)}; give one as --data")
    scored = targets.find_target(target, policy, base=model)
    problems = targets.problems_for(scored, data, data_dir=data_dir, limit=limit)
    if out is not None and any(out.glob("*/answers.jsonl")):
        raise RunError(f"--out: {out} holds answers already; name another folder")
    folder = out or evaluate.new_folder(target, data)
    sampling = evaluate.Sampling(samples, temperature) if samples else None
    console = Console()
    with TerminalView(console) as view:
        given = evaluate.evaluate(scored, problems, calculator=modes, out=folder, sampling=sampling, listener=view)
        scores = list(given)
    greedy = [score for score in scores if isinstance(score, Score)]
    console.print("", summary.score_table(greedy), "", summary.answers_table(greedy))
    if sampling:
        console.print("", summary.samples_table([s for s in scores if not isinstance(s, Score)]))
    if against is not None and data is not None:
        console.print("", papers.against_paper(data, greedy))
        console.print(plain(f"\n{papers.DIFFERS.format(ours=targets.describe(scored))}"), soft_wrap=True)
    kept = ", ".join(str(path.parent) for path in sorted(folder.glob("*/answers.jsonl")))
    console.print(plain(f"\nevery answer is kept in {kept}"), soft_wrap=True)


def _compare(a: Path, b: Path) -> None:
    """Print how two sets of kept answers differ."""
    from rich.console import Console

    from dpost_lite.evaluation.evaluate import kept_answers
    from dpost_lite.problems.comparing import compare
    from dpost_lite.report import summary

    first, second = ({answer.problem_id: answer for answer in kept_answers(path)} for path in (a, b))
    rights = ({i: answer.correct for i, answer in kept.items()} for kept in (first, second))
    both = {i: (first[i], second[i]) for i in first.keys() & second.keys()}
    for text in summary.comparison(str(a), str(b), compare(*rights), both):
        Console().print(text, soft_wrap=True)
