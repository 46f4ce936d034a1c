"""The accuracies published by DPO-ST's authors, to show next to ours, and how the setups differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from dpost_lite.problems.records import Score
from dpost_lite.report.summary import interval, table_of
from dpost_lite.report.terminal import plain

SETS = ("gsm8k", "multiarith", "asdiv", "svamp")
NUM_PROBLEMS = {"multiarith": 600, "asdiv": 2096}
"""Problems in the paper's sets where ours have fewer: questions that repeat within a set count once here."""
DIFFERS = (
    "The paper fine-tunes all weights of Flan-T5 and Llama bases (250 million to 8 billion parameters, 8 GPUs) and "
    "decodes greedily with its calculator, at most 300 tokens. Ours: {ours}. Results on different bases are not "
    "comparable."
)


@dataclass(frozen=True, slots=True)
class Published:
    """Published accuracies in percent by data set; `source` is the paper's table."""

    name: str
    accuracies: Mapping[str, float]
    source: str


def _table_2(name: str, *accuracies: float) -> Published:
    return Published(name, dict(zip(SETS, accuracies, strict=True)), "Table 2")


PUBLISHED = (
    _table_2("Flan-T5-Base SFT", 18.1, 54.2, 26.2, 19.5),
    _table_2("Flan-T5-Base ST", 25.9, 73.8, 28.2, 24.2),
    _table_2("Flan-T5-Base DPO-ST", 27.2, 74.3, 29.2, 22.6),
    _table_2("Flan-T5-Large SFT", 30.8, 77.2, 38.1, 33.6),
    _table_2("Flan-T5-Large ST", 35.6, 86.2, 42.5, 34.8),
    _table_2("Flan-T5-Large DPO-ST, K=3", 37.4, 89.0, 42.8, 36.8),
    Published("Flan-T5-Large DPO-ST, K=10", {"gsm8k": 40.0}, "Table 3"),
    Published("Llama-1-7b SFT + calculator", {"gsm8k": 40.0}, "Table 4"),
    Published("Llama-1-7b DPO-ST", {"gsm8k": 44.7}, "Table 4"),
    Published("Llama-2-7b SFT + calculator", {"gsm8k": 45.1}, "Table 4"),
    Published("Llama-2-7b DPO-ST", {"gsm8k": 54.7}, "Table 4"),
    Published("Llama-3-8b SFT + calculator", {"gsm8k": 61.0}, "Table 4"),
    Published("Llama-3-8b DPO-ST", {"gsm8k": 68.8}, "Table 4"),
)


def against_paper(data: str, scores: list[Score]) -> Table:
    """Return a table of our scores on the set `data`, followed by the published ones, which have no interval."""
    table = table_of(data, "95 %\ninterval", "source")
    for score in scores:
        name = f"{score.name}, calculator {'on' if score.calculator else 'off'}"
        table.add_row(plain(name), f"{score.strict:.1%}", interval(score), f"ours, n = {score.num_problems}")
    for row in published(data):
        table.add_row(row.name, f"{row.accuracies[data]:.1f}%", "none", f"DPO-ST, {row.source}")
    return table


def table_2(scores: Mapping[str, Sequence[Score]]) -> Table:
    """Return the paper's Table 2 below a run's own scores, which are by set; sets without any are left empty.

    The last of our rows has the numbers of problems.
    """
    table = table_of("source", *SETS)
    names = dict.fromkeys(score.name for part in SETS for score in scores.get(part, ()))
    for name in names:
        found = {part: score.strict for part in SETS for score in scores.get(part, ()) if score.name == name}
        table.add_row(plain(name), "ours", *(f"{found[part]:.1%}" if part in found else "" for part in SETS))
    numbers = {part: scores[part][0].num_problems for part in SETS if scores.get(part)}
    table.add_row("problems", "ours", *(f"{numbers[part]:,}" if part in numbers else "" for part in SETS))
    for row in PUBLISHED:
        if row.source == "Table 2":
            table.add_row(row.name, "Table 2", *(f"{row.accuracies[part]:.1f}%" for part in SETS))
    return table


def differs(ours: str, data: str | None = None, num_problems: int | None = None) -> str:
    """Return a sentence or two on how the setups differ. `num_problems` of the set were used; None if only a part."""
    text = DIFFERS.format(ours=ours)
    if data in NUM_PROBLEMS and num_problems is not None:
        text += (
            f" The paper's {data} has {NUM_PROBLEMS[data]:,} problems, ours {num_problems:,}: repeated ones removed."
        )
    return text


def published(data: str) -> Iterator[Published]:
    """Yield the published results that include an accuracy on `data`."""
    return (row for row in PUBLISHED if data in row.accuracies)
