"""Tables and sentences printed by the command line: scores, gains, comparisons, plans, solved problems."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table
from rich.text import Text

from dpost_lite.methods import Method
from dpost_lite.problems.answers import is_right
from dpost_lite.problems.comparing import Comparison, interval_over_seeds, mean_difference
from dpost_lite.problems.records import GradedAnswer, SampledScore, Score
from dpost_lite.report.terminal import plain

NUM_COMPARED = 5  # problems shown per model of those it alone solves


def score_table(scores: Sequence[Score]) -> Table:
    """Return a table with one row per score, in percent; the 95 % Wilson interval is that of the strict accuracy."""
    table = table_of(_tool_of(scores), "strict", "95 %\ninterval", "flexible", "unfinished", "n")
    for score in scores:
        table.add_row(
            plain(score.name),
            _on_or_off(score),
            f"{score.strict:.1%}",
            interval(score),
            f"{score.flexible:.1%}",
            str(score.num_unfinished),
            str(score.num_problems),
        )
    return table


def also_table(part: str, scores: Sequence[Score]) -> Table:
    """Return a table of the scores on one further test set, which is named in its corner."""
    table = table_of("strict", "95 %\ninterval", "flexible", "n", first=part)
    for score in scores:
        figures = f"{score.strict:.1%}", interval(score), f"{score.flexible:.1%}", str(score.num_problems)
        table.add_row(plain(score.name), *figures)
    return table


def answers_table(scores: Sequence[Score]) -> Table:
    """Return a table of answer statistics: answers without a prediction, mean calculations and length."""
    tool = _tool_of(scores)
    counted = (
        ("blocks run\nper answer", "failed") if tool == "code" else ("calculations\nper answer", "left to\nthe model")
    )
    table = table_of(tool, "no readable\nanswer", *counted, "characters")
    for score in scores:
        table.add_row(
            plain(score.name),
            _on_or_off(score),
            str(score.num_unparsed),
            f"{score.num_calculated / score.num_problems:.1f}",
            f"{score.num_refused / score.num_problems:.1f}",
            f"{score.num_characters / score.num_problems:.0f}",
        )
    return table


def _tool_of(scores: Sequence[Score] | Sequence[SampledScore]) -> str:
    return "code" if any(score.code for score in scores) else "calculator"


def _on_or_off(score: Score | SampledScore) -> str:
    return "on" if score.calculator or score.code else "off"


def interval(score: Score) -> str:
    """Return the 95 % interval of the strict accuracy, in percent."""
    return f"{100 * score.low:.1f}–{score.high:.1%}"


def table_of(*columns: str, first: str = "") -> Table:
    """Return an empty table of numbers whose first column holds row names."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")  # long names may wrap, numbers may not
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def samples_table(scores: Sequence[SampledScore]) -> Table:
    """Return a table with one row per model: pass@k and the accuracy of the majority vote."""
    ks = sorted({k for score in scores for k in score.pass_at})
    majority = f"maj@{max(score.num_samples for score in scores)}"
    table = table_of(_tool_of(scores), *(f"pass@{k}" for k in ks), majority, "n")
    for score in scores:
        rates = [f"{score.pass_at[k]:.1%}" if k in score.pass_at else "" for k in ks]
        table.add_row(plain(score.name), _on_or_off(score), *rates, f"{score.majority:.1%}", str(score.num_problems))
    return table


def comparison(
    a: str, b: str, compared: Comparison, answers: Mapping[str, tuple[GradedAnswer, GradedAnswer]]
) -> Iterator[Text]:
    """Yield the comparison of two models named `a` and `b`, with some problems that only one of them solves.

    `answers` has the answers of both by problem id.
    """
    yield plain(f"A  {a}: {compared.a:.1%}\nB  {b}: {compared.b:.1%}", "bold")
    yield plain(
        f"on the same {compared.num_problems:,} problems: B - A = {100 * compared.difference:+.1f} points, "
        f"{_certainty(compared)}"
    )
    for name, ids in (("A", compared.only_a), ("B", compared.only_b)):
        yield plain(f"\nonly {name} solves {len(ids):,}", "bold")
        for problem_id in ids[:NUM_COMPARED]:
            first, second = answers[problem_id]
            yield plain(f"{problem_id}: {first.question or second.question}".rstrip(": "), "cyan")
            for label, given in (("A", first), ("B", second)):
                mark, colour = ("✓", "green") if given.correct else ("✗", "red")
                yield plain(f"  {label} {mark} {' | '.join(given.text.strip().splitlines())}", colour)


def verdict(name: str, compared: Comparison, method: Method, *, part: str | None = None) -> str:
    """Return a sentence on the gain of round `name` over the warm-up (sft-0) by `method`, and its significance.

    `compared` is the paired comparison with sft-0 as a, on the test problems or a further test set, `part`.
    """
    subject = method.title[0].upper() + method.title[1:] if part is None else f"On {part}, {method.title}"
    gain = 100 * compared.difference
    figures = f"{name} is at {compared.b:.1%}, sft-0 at {compared.a:.1%}; {_certainty(compared)}"
    if gain <= 0:
        return f"{subject} did not help ({figures})."
    if compared.low <= 0 or compared.p >= 0.05:  # the bootstrap interval is too short if few problems differ
        return (
            f"{subject} gained {gain:.1f} points ({figures}). This may be chance: test on more problems, or repeat "
            "with --seeds 3."
        )
    return f"{subject} gained {gain:.1f} points ({figures})."


def dev_drop(dev_scores: Sequence[Score]) -> str:
    """Return a sentence if dev accuracy dropped after its best policy, which is the one exported, else "".

    `dev_scores` are those of the policies, without the base, in order.
    """
    if not dev_scores:
        return ""
    last, best = dev_scores[-1], max(dev_scores, key=lambda score: score.strict)
    if last.strict >= best.strict:
        return ""
    return (
        f"Dev accuracy dropped from {best.strict:.1%} ({best.name}) to {last.strict:.1%} ({last.name}); "
        f"{best.name} is the best policy."
    )


def methods_table(runs: Sequence[tuple[str, int, Score]], first: str = "strict") -> Table:
    """Return a table with one row per method: the best policy's test accuracy for each seed, mean and spread.

    `first` is the text in its corner.
    """
    seeds = sorted({seed for _, seed, _ in runs})
    extra = ["mean", "standard\ndeviation"] if len(seeds) > 1 else ["95 %\ninterval"]
    table = table_of(*(f"seed {seed}" for seed in seeds), *extra, "n", first=first)
    for method in dict.fromkeys(name for name, _, _ in runs):
        scores = {seed: score for name, seed, score in runs if name == method}
        rates = [score.strict for score in scores.values()]
        one = next(iter(scores.values()))
        spread = [interval(one)]
        if len(seeds) > 1:
            spread = [f"{mean(rates):.1%}", f"{100 * stdev(rates):.1f}" if len(rates) > 1 else ""]
        cells = [f"{scores[seed].strict:.1%}" if seed in scores else "" for seed in seeds]
        table.add_row(method, *cells, *spread, str(one.num_problems))
    return table


def method_difference(a: str, b: str, compared: Sequence[Comparison]) -> str:
    """Return a sentence on how many points method `b` is better than `a`, given a comparison for each seed.

    Seeds share their test problems, so they do not make a larger test set: the mean comes with each seed's own test.
    """
    if len(compared) == 1:
        (one,) = compared
        return f"{b} - {a}: {100 * one.difference:+.1f} points, {_certainty(one)}"
    mean_points, low, high = (100 * value for value in mean_difference(compared))
    lowest, highest = (100 * value for value in interval_over_seeds(compared))
    each = ", ".join(f"{100 * one.difference:+.1f} (p = {one.p:.2g})" for one in compared)
    return (
        f"{b} - {a}: {mean_points:+.1f} points on average over {len(compared)} seeds, 95 % interval {lowest:+.1f} to "
        f"{highest:+.1f} (for other seeds, Student's t) or {low:+.1f} to {high:+.1f} (for these seeds, bootstrap over "
        f"problems); by seed {each}, p by McNemar's exact test"
    )


def _certainty(compared: Comparison) -> str:
    return (
        f"95 % interval {100 * compared.low:+.1f} to {100 * compared.high:+.1f} by paired bootstrap, McNemar p = "
        f"{compared.p:.2g}"
    )


def plan_table(stages: Sequence[Mapping[str, Any]], *, is_cpu: bool = False) -> Table:
    """Return a plan as a table with one column per stage.

    Rows: memory by part, peak of the GPU (or RAM), RAM and disk, all in GiB; then millions of tokens, and hours.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("GiB")
    for stage in stages:
        table.add_column(stage["name"], justify="right", no_wrap=True)
    names = dict.fromkeys(name for stage in stages for name in stage["parts"] if name != "reserve")
    for name in [*names, "reserve"]:
        sizes = [stage["parts"].get(name) for stage in stages]
        table.add_row(name, *("" if size is None else f"{size / 2**30:.2f}" for size in sizes))
    peak = "RAM peak" if is_cpu else "GPU peak"
    table.add_row(peak, *(f"{sum(stage['parts'].values()) / 2**30:.2f}" for stage in stages), style="bold")
    if not is_cpu:
        table.add_row("RAM", *(f"{stage['ram_bytes'] / 2**30:.2f}" for stage in stages))
    table.add_row("disk", *(f"{stage['disk_bytes'] / 2**30:.2f}" for stage in stages))
    table.add_row("million tokens", *(f"{stage['total']['tokens'] / 1e6:.3g}" for stage in stages), end_section=True)
    table.add_row("hours", *(f"{stage['total']['seconds'] / 3600:.2g}" for stage in stages))
    return table


def solved_problem(solved: Mapping[str, Any]) -> Text:
    """Format one entry of a run's solved.json: question, the model's rationale, ✓ or ✗, and the right answer."""
    solution = solved["solution"]
    right = is_right(solution["strict"], solution["end"], solved["answer"])
    known = f"the answer is {solved['answer']}{' (output was cut off)' if solution['end'] == 'limit' else ''}"
    return Text.assemble(
        plain(f"\n{solved['question']}\n", "bold"),
        plain(f"{solution['text'].strip()}\n"),
        plain(f"✓ {known}", "green") if right else plain(f"✗ {known}", "red"),
    )


def next_steps(folder: Path, *, best: str, file: Path | None) -> Text:
    """List what a run wrote, and the commands to try next. `best` is the stage of the best policy; `file` is its GGUF
    file, or None if it could not be made.
    """
    is_adapter = (folder / best / "adapter_config.json").is_file()
    exported = [f"{file}: the model ({file.stat().st_size / 2**20:,.0f} MiB), exported from {best}"] if file else []
    if file and (card := file.with_name("README.md")).is_file():
        where = "and beside it a Modelfile for Ollama" if any(file.parent.glob("*Modelfile")) else "and where it runs"
        exported.append(f"{card}: its model card, {where}")
    solve = [f'dpost-lite solve {folder} "…"'] if file else []
    written = [
        *exported,
        f"{folder / best}: {'its' if file else 'the best'} {'LoRA adapter' if is_adapter else 'weights'}",
        f"{folder / 'score'}: every graded answer",
        *([f"{also}: those on the further test sets"] if (also := folder / "score-also").is_dir() else []),
        f"{folder / 'events.jsonl'}: the journal",
    ]
    following = [
        *solve,
        f"dpost-lite report {folder}",
        f"dpost-lite eval {folder}",
        *([f"dpost-lite export {folder} --quant q8_0"] if file else []),
    ]
    return plain("\n  ".join(["\nwritten", *written]) + "\n" + "\n  ".join(["\nnext", *following]))
