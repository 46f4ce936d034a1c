"""The health of a round of self-training, counted from the files that it leaves anyway. What is alarming: alarms.py."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

from dpost_lite.problems.records import LabelledRationale, PreferencePair, Rationale, read_jsonl
from dpost_lite.runs.folder import stages_done
from dpost_lite.runs.journal import read_events, steps_by_stage
from dpost_lite.runs.stage_names import Kind, StageName, policy_name

NGRAM = 4
MIN_DISTINCT = 0.5  # share of a rationale's 4-grams that differ, below which it repeats itself


@dataclass(frozen=True, slots=True)
class DrawnStats:
    """What one sampling stage drew. Shares are of its problems: `all_right`, `all_wrong`, `mixed`; or of its
    rationales: `right`, `unfinished`, `repetitive`. `tokens` is the mean length of the finished ones, `calculated` and
    `refused` the calculator's uses for each rationale.
    """

    num_rationales: int
    all_right: float
    all_wrong: float
    mixed: float
    right: float
    unfinished: float
    repetitive: float
    tokens: float
    calculated: float
    refused: float


@dataclass(frozen=True, slots=True)
class PairStats:
    """Preference pairs of a round. Tokens are mean lengths of either side: DPO learns their bias too."""

    num_pairs: int
    num_problems: int
    """That gave any."""
    chosen_tokens: float
    rejected_tokens: float


@dataclass(frozen=True, slots=True)
class LabelStats:
    """What SFT trains on: `new_per_problem` counts pseudo-labels that the round before did not have, `num_dropped`
    right rationales that were left out as near-repeats, or above the cap.
    """

    num_labels: int
    num_gold: int
    new_per_problem: float
    num_dropped: int


@dataclass(frozen=True, slots=True)
class DpoStats:
    """What DPO did to the policy, over its last fifth of steps.

    `chosen_change` and `rejected_change` are the means of log π/π_ref of the two sides, in nats for each rationale;
    `kl` is the mean of -log π/π_ref over both. That is KL(π_ref ‖ π) as far as the reference drew the pairs: gold
    rationales it did not draw, and of the others pairs are a selection, so it is a rough figure that may fall below 0.
    """

    num_steps: int
    margin: float
    chosen_change: float
    rejected_change: float
    kl: float


@dataclass(frozen=True, slots=True)
class Round:
    """The health of one round; what it has not come to yet, or its method leaves out, is None."""

    number: int
    for_pairs: DrawnStats | None
    pairs: PairStats | None
    dpo: DpoStats | None
    for_labels: DrawnStats | None
    labels: LabelStats | None
    dev: float | None
    """Accuracy on the dev problems, if there are any."""


def rounds(run: Path) -> list[Round]:
    """Return the health of every round that a run has begun."""
    done = dict(stages_done(run))
    steps = steps_by_stage(read_events(run))
    names = [name for stage in done if (name := StageName.parse(stage))]
    numbers = sorted({name.round for name in names if name.round and name.kind != "score"})
    return [_round(run, number, done, steps) for number in numbers]


def _round(
    run: Path, number: int, done: Mapping[str, Any], steps: Mapping[str, Sequence[Mapping[str, float]]]
) -> Round:
    def of(kind: Kind, count: Callable[[str], Any]) -> Any:
        name = str(StageName(kind, number))
        return count(name) if name in done else None

    return Round(
        number=number,
        for_pairs=of("samples-pairs", lambda name: drawn(run / name)),
        pairs=of("pairs", lambda name: paired(run / name)),
        dpo=of("dpo", lambda name: preferred(steps.get(name, ()))),
        for_labels=of("samples-labels", lambda name: drawn(run / name)),
        labels=of("labels", lambda name: labelled(run, number, done)),
        dev=done.get(str(StageName.score(policy_name(number))), {}).get("metrics", {}).get("dev", {}).get("strict"),
    )


def drawn(stage: Path) -> DrawnStats:
    """Count what a sampling stage drew; `stage` is its folder. Tens of thousands of rationales take seconds, once."""
    file = stage / "rationales.jsonl"
    return _drawn(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _drawn(file: Path, _changed: int) -> DrawnStats:
    right_of: dict[str, list[bool]] = defaultdict(list)
    tokens: list[int] = []
    num = num_repetitive = num_calculated = num_refused = 0
    for rationale in read_jsonl(file, Rationale):
        num += 1
        right_of[rationale.problem_id].append(rationale.correct)
        if rationale.end == "stop":
            tokens.append(len(rationale.token_ids))
        num_repetitive += is_repetitive(rationale.token_ids)
        num_calculated += rationale.num_calculated
        num_refused += rationale.num_refused
    all_right = _mean(all(right) for right in right_of.values())
    all_wrong = _mean(not any(right) for right in right_of.values())
    return DrawnStats(
        num_rationales=num,
        all_right=all_right,
        all_wrong=all_wrong,
        mixed=1 - all_right - all_wrong,
        right=sum(map(sum, right_of.values())) / max(1, num),
        unfinished=(num - len(tokens)) / max(1, num),
        repetitive=num_repetitive / max(1, num),
        tokens=_mean(tokens),
        calculated=num_calculated / max(1, num),
        refused=num_refused / max(1, num),
    )


def is_repetitive(token_ids: Sequence[int]) -> bool:
    """Whether fewer than half of a rationale's 4-grams differ: it says the same again and again."""
    ngrams = list(zip(*(token_ids[i:] for i in range(NGRAM)), strict=False))
    return bool(ngrams) and len(set(ngrams)) < MIN_DISTINCT * len(ngrams)


def paired(stage: Path) -> PairStats:
    """Count a round's preference pairs; `stage` is their folder."""
    pairs = list(read_jsonl(stage / "pairs.jsonl", PreferencePair))
    return PairStats(
        num_pairs=len(pairs),
        num_problems=len({pair.problem_id for pair in pairs}),
        chosen_tokens=_mean(len(pair.chosen_ids) for pair in pairs),
        rejected_tokens=_mean(len(pair.rejected_ids) for pair in pairs),
    )


def labelled(run: Path, number: int, done: Mapping[str, Any]) -> LabelStats:
    """Count what a round's labels are made of. `done` holds the records of a run's stages, by name."""
    stage = str(StageName("labels", number))
    before = run / str(StageName("labels", number - 1)) / "labels.jsonl"
    labels = list(read_jsonl(run / stage / "labels.jsonl", LabelledRationale))
    known = {(r.problem_id, r.text) for r in read_jsonl(before, LabelledRationale)} if before.is_file() else set()
    own = [label for label in labels if not label.is_gold]
    sources = [name for name in done[stage]["inputs"] if name.endswith("/samples-labels") and name in done]
    num_right = sum(done[name]["metrics"]["right"] for name in sources)
    return LabelStats(
        num_labels=len(labels),
        num_gold=len(labels) - len(own),
        new_per_problem=sum((r.problem_id, r.text) not in known for r in own) / done["data"]["metrics"]["train"],
        num_dropped=num_right - len(own),
    )


def preferred(steps: Sequence[Mapping[str, float]]) -> DpoStats | None:
    """Say what DPO did, from its steps in the journal; None where the journal holds none."""
    last = [step for step in steps[-max(1, len(steps) // 5) :] if "chosen_change" in step]
    if not last:
        return None
    chosen, rejected, margin = (
        _mean(step[name] for step in last) for name in ("chosen_change", "rejected_change", "margin")
    )
    return DpoStats(len(steps), margin, chosen, rejected, -(chosen + rejected) / 2)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return mean(listed) if listed else 0.0
