"""What the command line says when the work is done: the table of scores, whether there was a gain, solved problems."""

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from dpost_lite.problems.grading import same_number
from dpost_lite.problems.records import Score
from dpost_lite.report.terminal import plain


def score_table(scores: Sequence[Score]) -> Table:
    """Return one row per score, in percent. The interval is the 95 % Wilson interval of the strict accuracy."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")  # a long name may take two lines, figures never
    for column in ("calculator", "strict", "95 %\ninterval", "flexible", "unfinished", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for score in scores:
        table.add_row(
            plain(score.name),
            "on" if score.calculator else "off",
            f"{score.strict:.1%}",
            f"{100 * score.low:.1f}–{score.high:.1%}",
            f"{score.flexible:.1%}",
            str(score.num_unfinished),
            str(score.num_problems),
        )
    return table


def verdict(scores: Sequence[Score]) -> str:
    """Say in one sentence what the last round changed against the warm-up (sft-0), and how sure that is.

    The standard error is that of the difference of two independent shares. Both models answer the same problems, so it
    errs on the side of caution.
    """
    warm_up = next((score for score in scores if score.name == "sft-0"), None)
    last = scores[-1]
    if warm_up is None or not last.name.startswith("round-"):
        return ""
    gain = 100 * (last.strict - warm_up.strict)
    error = 100 * sqrt(sum(s.strict * (1 - s.strict) / s.num_problems for s in (warm_up, last)))
    figures = f"{last.name} is at {last.strict:.1%}, sft-0 at {warm_up.strict:.1%}"
    if gain <= 0:
        return f"Self-training did not help: {figures}."
    if last.low <= warm_up.high:
        return (
            f"Self-training gained {gain:.1f} points ({figures}), but the intervals overlap (one standard error is "
            f"{error:.1f} points): this may be chance, so test on more problems or repeat with other seeds."
        )
    return f"Self-training gained {gain:.1f} points ({figures}; one standard error is {error:.1f} points)."


def fallen(dev_scores: Sequence[Score]) -> str:
    """Say so if accuracy on the dev problems fell after its best round, which is the one that was exported.

    `dev_scores` are of the policies, without the base, in order.
    """
    if not dev_scores:
        return ""
    last, best = dev_scores[-1], max(dev_scores, key=lambda score: score.strict)
    if last.strict >= best.strict:
        return ""
    return (
        f"On the dev problems accuracy fell from {best.strict:.1%} of {best.name} to {last.strict:.1%} of {last.name}: "
        f"{best.name} is the one that was exported."
    )


def plan_table(stages: Sequence[Mapping[str, Any]], *, is_cpu: bool = False) -> Table:
    """Return a plan's sizes in GiB: a row per part, the peak of the GPU (or RAM), RAM and disk; a column per stage.

    Below them millions of tokens and hours.
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
    """Return one entry of a run's solved.json as text: question, the model's rationale, and ✓ or ✗ with the answer."""
    solution = solved["solution"]
    number = solution["strict"] if solution["end"] == "stop" else None  # an unfinished answer is never right
    is_right = number is not None and same_number(number, solved["answer"])
    known = f"the answer is {solved['answer']}{', this one was cut off' if solution['end'] == 'limit' else ''}"
    return Text.assemble(
        plain(f"\n{solved['question']}\n", "bold"),
        plain(f"{solution['text'].strip()}\n"),
        plain(f"✓ {known}", "green") if is_right else plain(f"✗ {known}", "red"),
    )


def whereabouts(folder: Path, *, best: str, file: Path) -> Text:
    """Say what a finished run left where, and what to try next. `best` is the stage of the exported policy."""
    return plain(
        f"""
written
  {file} ({file.stat().st_size / 2**20:,.0f} MiB), made from {best}
  {folder / best}, its {"LoRA adapter" if (folder / best / "adapter_config.json").is_file() else "weights"}
  {folder / "score"}, every graded answer; {folder / "events.jsonl"}, the journal

next
  dpost-lite solve {folder} "…"
  dpost-lite eval {folder}
  dpost-lite export {folder} --quant q8_0"""
    )
