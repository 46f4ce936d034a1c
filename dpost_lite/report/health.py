"""Health statistics of each round of self-training, computed from the run's files. Thresholds: alarms.py."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

from dpost_lite.problems.comparing import Comparison, compare
from dpost_lite.problems.dev_draws import DevDraws
from dpost_lite.problems.gate import Yields
from dpost_lite.problems.pairs import num_steps
from dpost_lite.problems.records import LabelledRationale, PreferencePair, Rationale, from_dict, read_jsonl
from dpost_lite.problems.steps import is_repetitive
from dpost_lite.runs.folder import stages_done
from dpost_lite.runs.journal import read_events, steps_by_stage
from dpost_lite.runs.stage_names import Kind, StageName, policy_name


@dataclass(frozen=True, slots=True)
class SampleStats:
    """Statistics of one sampling stage.

    Fractions of its problems: `all_right`, `all_wrong`, `mixed`; of its rationales: `right`, `unfinished`,
    `repetitive`. `tokens` and `steps_per_rationale` are means over finished rationales; `calculated` and
    `left_to_model` are expressions per rationale that the calculator did and did not complete, or blocks of code that
    ran and that failed.
    """

    num_rationales: int
    all_right: float
    all_wrong: float
    mixed: float
    right: float
    unfinished: float
    repetitive: float
    tokens: float
    steps_per_rationale: float
    calculated: float
    left_to_model: float

    @property
    def some_right(self) -> float:
        """Fraction of problems with a right rationale: pass@K for their K samples."""
        return 1 - self.all_wrong


@dataclass(frozen=True, slots=True)
class PairStats:
    """Statistics of a round's preference pairs; tokens are mean lengths, since DPO learns a length bias too."""

    num_pairs: int
    num_problems: int
    """Problems with at least one pair."""
    chosen_tokens: float
    rejected_tokens: float
    num_stepwise: int
    """Step-controlled pairs among them."""


@dataclass(frozen=True, slots=True)
class RestStats:
    """Statistics of the rests that were sampled again for step-controlled pairs.

    Fractions of all rests: `usable` (wrong, finished, not repeating themselves), `right`, `unfinished`, `repetitive`.
    """

    num_cuts: int
    num_rests: int
    usable: float
    right: float
    unfinished: float
    repetitive: float


@dataclass(frozen=True, slots=True)
class LabelStats:
    """Statistics of the SFT data: `new_per_problem` counts pseudo-labels that are new since the previous round,
    `num_dropped` right rationales dropped as near-duplicates or above the cap.
    """

    num_labels: int
    num_gold: int
    new_per_problem: float
    num_dropped: int


@dataclass(frozen=True, slots=True)
class DpoStats:
    """Effect of DPO on the policy, averaged over the last fifth of its steps.

    `chosen_change` and `rejected_change` are mean log π/π_ref of the two sides, in nats per rationale. `kl` is the mean
    of -log π/π_ref over both, a rough estimate of KL(π_ref ‖ π) that can be negative: the reference did not sample the
    gold rationales, and pairs are a biased selection of the others.
    """

    num_steps: int
    margin: float
    chosen_change: float
    rejected_change: float
    kl: float


@dataclass(frozen=True, slots=True)
class Round:
    """Statistics of one round; None for parts that are not done yet or not in the run's method."""

    number: int
    for_pairs: SampleStats | None
    rests: RestStats | None
    pairs: PairStats | None
    dpo: DpoStats | None
    gate: Yields | None
    before_dpo: SampleStats | None
    """What the SFT policy drew for the gate's problems."""
    after_dpo: SampleStats | None
    """What the DPO policy drew for them, with the same random numbers."""
    dpo_kept: bool | None
    """Whether the round went on with the DPO policy; None without a gate."""
    dpo_on_dev: Comparison | None
    """Greedy answers to the dev problems before and after DPO, if there are any."""
    dev_draws: DevDraws | None
    """What both policies drew for dev problems; None without any, or if the gate is of an older version."""
    for_labels: SampleStats | None
    labels: LabelStats | None
    dev: float | None
    """Strict accuracy on the dev problems, if there are any."""


def rounds(run: Path) -> list[Round]:
    """Return the statistics of every round that a run has started."""
    done = dict(stages_done(run))
    steps = steps_by_stage(read_events(run))
    names = [name for stage in done if (name := StageName.parse(stage))]
    numbers = sorted({name.round for name in names if name.round and not name.policy})
    return [_round(run, number, done, steps) for number in numbers]


def _round(
    run: Path, number: int, done: Mapping[str, Any], steps: Mapping[str, Sequence[Mapping[str, float]]]
) -> Round:
    def of(kind: Kind, count: Callable[[str], Any]) -> Any:
        name = str(StageName(kind, number))
        return count(name) if name in done else None

    return Round(
        number=number,
        for_pairs=of("samples-pairs", lambda name: sample_stats(run / name)),
        rests=of("rests", lambda name: rest_stats(done[name]["metrics"])),
        pairs=of("pairs", lambda name: pair_stats(run / name)),
        dpo=of("dpo", lambda name: dpo_stats(steps.get(name, ()))),
        gate=of("gate", lambda name: from_dict(Yields, done[name]["metrics"])),
        before_dpo=of("gate", lambda name: sample_stats(run / name, "before.jsonl")),
        after_dpo=of("gate", lambda name: sample_stats(run / name, "after.jsonl")),
        dpo_kept=of("gate", lambda name: done[name]["metrics"]["goes_on_with"] == "dpo"),
        dpo_on_dev=of("gate", lambda name: dev_comparison(run, number)),
        dev_draws=of("gate", lambda name: _dev_draws(done[name]["metrics"])),
        for_labels=of("samples-labels", lambda name: sample_stats(run / name)),
        labels=of("labels", lambda name: label_stats(run, number, done)),
        dev=done.get(str(StageName.score(policy_name(number))), {}).get("metrics", {}).get("dev", {}).get("strict"),
    )


def sample_stats(stage: Path, name: str = "rationales.jsonl") -> SampleStats:
    """Return the statistics of a file in a sampling stage's folder. Cached, since large ones take seconds to read."""
    file = stage / name
    return _sample_stats(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _sample_stats(file: Path, _changed: int) -> SampleStats:
    right_of: dict[str, list[bool]] = defaultdict(list)
    tokens: list[int] = []
    steps: list[int] = []
    num = num_repetitive = num_calculated = num_left = 0
    for rationale in read_jsonl(file, Rationale):
        num += 1
        right_of[rationale.problem_id].append(rationale.correct)
        if rationale.end == "stop":
            tokens.append(len(rationale.token_ids))
            steps.append(num_steps(rationale.text))
        num_repetitive += is_repetitive(rationale.token_ids)
        num_calculated += rationale.num_calculated
        num_left += rationale.num_refused
    all_right = _mean(all(right) for right in right_of.values())
    all_wrong = _mean(not any(right) for right in right_of.values())
    return SampleStats(
        num_rationales=num,
        all_right=all_right,
        all_wrong=all_wrong,
        mixed=1 - all_right - all_wrong,
        right=sum(map(sum, right_of.values())) / max(1, num),
        unfinished=(num - len(tokens)) / max(1, num),
        repetitive=num_repetitive / max(1, num),
        tokens=_mean(tokens),
        steps_per_rationale=_mean(steps),
        calculated=num_calculated / max(1, num),
        left_to_model=num_left / max(1, num),
    )


def pair_stats(stage: Path) -> PairStats:
    """Return the statistics of a round's preference pairs, given their folder."""
    pairs = list(read_jsonl(stage / "pairs.jsonl", PreferencePair))
    return PairStats(
        num_pairs=len(pairs),
        num_problems=len({pair.problem_id for pair in pairs}),
        chosen_tokens=_mean(len(pair.chosen_ids) for pair in pairs),
        rejected_tokens=_mean(len(pair.rejected_ids) for pair in pairs),
        num_stepwise=sum(bool(pair.prefix_ids) for pair in pairs),
    )


def rest_stats(metrics: Mapping[str, int]) -> RestStats:
    """Return the statistics of the rests of a round, given what their stage recorded."""
    number = max(1, metrics["rests"])
    shares = (metrics[name] / number for name in ("usable", "right", "unfinished", "repetitive"))
    return RestStats(metrics["cuts"], metrics["rests"], *shares)


def label_stats(run: Path, number: int, done: Mapping[str, Any]) -> LabelStats:
    """Return the statistics of a round's labels; `done` has the records of the run's finished stages by name."""
    stage = str(StageName("labels", number))
    before = run / str(StageName("labels", number - 1)) / "labels.jsonl"
    labels = list(read_jsonl(run / stage / "labels.jsonl", LabelledRationale))
    known = {(r.problem_id, r.text) for r in read_jsonl(before, LabelledRationale)} if before.is_file() else set()
    own = [label for label in labels if not label.is_gold]
    kinds: tuple[Kind, ...] = ("samples-labels", "samples-pairs", "rests")
    samples = [str(StageName(kind, i)) for kind in kinds for i in range(1, number + 1)]
    sources = [name for name in samples if name in done[stage]["inputs"] and name in done]
    num_right = sum(done[name]["metrics"]["right"] for name in sources)
    return LabelStats(
        num_labels=len(labels),
        num_gold=len(labels) - len(own),
        new_per_problem=sum((r.problem_id, r.text) not in known for r in own) / done["data"]["metrics"]["train"],
        num_dropped=num_right - len(own),
    )


def dev_comparison(run: Path, number: int) -> Comparison | None:
    """Compare the greedy answers to the dev problems before (a) and after (b) a round's DPO; None if there are none."""
    before = run / str(StageName.score(policy_name(number - 1))) / "dev.jsonl"
    after = run / str(StageName("gate", number)) / "dev.jsonl"
    if not (before.is_file() and after.is_file()):
        return None
    return compare(*({one.problem_id: one.correct for one in read_jsonl(file, Rationale)} for file in (before, after)))


def _dev_draws(metrics: Mapping[str, Any]) -> DevDraws | None:
    return DevDraws.from_metrics(metrics["dev_draws"]) if "dev_draws" in metrics else None


def dpo_stats(steps: Sequence[Mapping[str, float]]) -> DpoStats | None:
    """Return the statistics of a DPO training from its steps in the journal; None if there are none."""
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
