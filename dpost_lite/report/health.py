"""Whether a round of self-training is in good health, from the files that it leaves anyway, and alarms where it is not.

Every alarm says what was seen, and which key of the recipe to change. Its limits are ours; neither paper gives any.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, sqrt
from pathlib import Path
from statistics import mean
from typing import Any

from dpost_lite.problems.records import LabelledRationale, PreferencePair, Rationale, read_jsonl
from dpost_lite.report.journal import read_events, steps_by_stage
from dpost_lite.rundir import read_json, stages_done

MAX_UNFINISHED = 0.01  # share of rationales that ran into the token limit
MAX_REPETITIVE = 0.02  # share of rationales that go round in circles
NGRAM = 4
MIN_DISTINCT = 0.5  # share of a rationale's 4-grams that differ, below which it repeats itself
MAX_DRIFT = 0.25  # change of the mean length of finished rationales
MIN_STEPS = 0.25  # share of dpo.max_steps that the pairs are enough for
MAX_FALL_NATS = 5.0  # of the chosen rationales' log-probability, against the reference


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one sampling stage drew. Shares are of its problems: `all_right`, `all_wrong`, `mixed`; or of its
    rationales: `right`, `unfinished`, `repetitive`. `tokens` is the mean length of the finished ones, `calculated` and
    `refused` the calculator's uses for each rationale.
    """

    stage: str
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
class Paired:
    """Preference pairs of a round. Tokens are mean lengths of either side: DPO learns their bias too."""

    stage: str
    num_pairs: int
    per_problem: float
    """Of the problems that gave any."""
    chosen_tokens: float
    rejected_tokens: float


@dataclass(frozen=True, slots=True)
class Labelled:
    """What SFT trains on: `new_per_problem` counts pseudo-labels that no earlier round had, `num_dropped` right ones
    that were left out as near-repeats, or above the cap.
    """

    stage: str
    num_labels: int
    num_gold: int
    new_per_problem: float
    num_dropped: int


@dataclass(frozen=True, slots=True)
class Preferred:
    """What DPO did to the policy, over its last fifth of steps, in nats for each rationale.

    `chosen_change` and `rejected_change` are log π/π_ref of the two sides. `kl` is KL(π_ref ‖ π) as the rationales of
    the pairs show it, which the reference drew: the mean of -log π/π_ref over both sides. Right and wrong ones weigh
    the same there, whatever share the model draws, so it may fall below 0.
    """

    stage: str
    num_steps: int
    margin: float
    chosen_change: float
    rejected_change: float
    kl: float


@dataclass(frozen=True, slots=True)
class Round:
    """The health of one round; what it has not come to yet, or its method leaves out, is None."""

    number: int
    for_pairs: Drawn | None
    pairs: Paired | None
    dpo: Preferred | None
    for_labels: Drawn | None
    labels: Labelled | None
    dev: float | None
    """Accuracy on the dev problems, if there are any."""


def rounds(run: Path) -> list[Round]:
    """Return the health of every round that a run has begun."""
    done = dict(stages_done(run))
    steps = steps_by_stage(read_events(run))
    numbers = sorted({int(name.split("/")[0].removeprefix("round-")) for name in done if name.startswith("round-")})
    return [_round(run, number, done, steps) for number in numbers]


def _round(
    run: Path, number: int, done: Mapping[str, Any], steps: Mapping[str, Sequence[Mapping[str, float]]]
) -> Round:
    def of(part: str, read: Callable[[str], Any]) -> Any:
        name = f"round-{number}/{part}"
        return read(name) if name in done else None

    return Round(
        number=number,
        for_pairs=of("samples-pairs", lambda name: drawn(run, name)),
        pairs=of("pairs", lambda name: paired(run, name)),
        dpo=of("dpo", lambda name: preferred(name, steps.get(name, ()))),
        for_labels=of("samples-labels", lambda name: drawn(run, name)),
        labels=of("labels", lambda name: labelled(run, name, done[name])),
        dev=done.get(f"score/round-{number}", {}).get("metrics", {}).get("dev", {}).get("strict"),
    )


def drawn(run: Path, stage: str) -> Drawn:
    """Count what a sampling stage drew."""
    right_of: dict[str, list[bool]] = defaultdict(list)
    rationales = list(read_jsonl(run / stage / "rationales.jsonl", Rationale))
    for rationale in rationales:
        right_of[rationale.problem_id].append(rationale.correct)
    finished = [len(r.token_ids) for r in rationales if r.end == "stop"]
    all_right = _share(all(right) for right in right_of.values())
    all_wrong = _share(not any(right) for right in right_of.values())
    return Drawn(
        stage=stage,
        num_rationales=len(rationales),
        all_right=all_right,
        all_wrong=all_wrong,
        mixed=1 - all_right - all_wrong,
        right=_share(r.correct for r in rationales),
        unfinished=_share(r.end == "limit" for r in rationales),
        repetitive=_share(is_repetitive(r.token_ids) for r in rationales),
        tokens=mean(finished) if finished else 0.0,
        calculated=mean(r.num_calculated for r in rationales),
        refused=mean(r.num_refused for r in rationales),
    )


def is_repetitive(token_ids: Sequence[int]) -> bool:
    """Whether fewer than half of a rationale's 4-grams differ: it says the same again and again."""
    ngrams = list(zip(*(token_ids[i:] for i in range(NGRAM)), strict=False))
    return bool(ngrams) and len(set(ngrams)) < MIN_DISTINCT * len(ngrams)


def paired(run: Path, stage: str) -> Paired:
    """Count a round's preference pairs."""
    pairs = list(read_jsonl(run / stage / "pairs.jsonl", PreferencePair))
    return Paired(
        stage=stage,
        num_pairs=len(pairs),
        per_problem=len(pairs) / max(1, len({pair.problem_id for pair in pairs})),
        chosen_tokens=_mean(len(pair.chosen_ids) for pair in pairs),
        rejected_tokens=_mean(len(pair.rejected_ids) for pair in pairs),
    )


def labelled(run: Path, stage: str, record: Mapping[str, Any]) -> Labelled:
    """Count what a round's labels are made of. `record` is the stage's own; its inputs name what was drawn for it."""
    labels = list(read_jsonl(run / stage / "labels.jsonl", LabelledRationale))
    number = int(stage.split("/")[0].removeprefix("round-"))
    before = run / f"round-{number - 1}" / "labels" / "labels.jsonl"
    known = {(r.problem_id, r.text) for r in read_jsonl(before, LabelledRationale)} if before.is_file() else set()
    own = [label for label in labels if not label.is_gold]
    sources = [name for name in record["inputs"] if name.endswith("/samples-labels")]
    num_right = sum(
        rationale.correct and rationale.end == "stop"
        for name in sources
        for rationale in read_jsonl(run / name / "rationales.jsonl", Rationale)
    )
    with (run / "data" / "train.jsonl").open(encoding="utf-8") as lines:
        num_problems = sum(1 for _ in lines)
    return Labelled(
        stage=stage,
        num_labels=len(labels),
        num_gold=len(labels) - len(own),
        new_per_problem=sum((label.problem_id, label.text) not in known for label in own) / num_problems,
        num_dropped=num_right - len(own),
    )


def preferred(stage: str, steps: Sequence[Mapping[str, float]]) -> Preferred | None:
    """Say what DPO did, from its steps in the journal; None where the journal holds none."""
    last = [step for step in steps[-max(1, len(steps) // 5) :] if "chosen_change" in step]
    if not last:
        return None
    chosen, rejected = (mean(step[name] for step in last) for name in ("chosen_change", "rejected_change"))
    return Preferred(
        stage, len(steps), mean(step["margin"] for step in last), chosen, rejected, -(chosen + rejected) / 2
    )


def alarms(run: Path, stage: str) -> list[str]:
    """Return what is alarming about a finished stage of a run, each with the key to change."""
    record = read_json(run / stage / "done.json")
    head, _, part = stage.partition("/")
    if part in ("samples-pairs", "samples-labels"):
        return of_drawn(drawn(run, stage), record["settings"], _drawn_before(run, stage))
    if part == "pairs":
        dpo = read_json(run / "run.json")["recipe"]["dpo"]
        return of_pairs(paired(run, stage), dpo)
    if part == "dpo":
        return of_dpo(preferred(stage, steps_by_stage(read_events(run)).get(stage, ())))
    if head == "score":
        return of_dev(_dev_scores(run, until=part))
    return []


def of_drawn(now: Drawn, settings: Mapping[str, Any], before: Drawn | None) -> list[str]:
    """Alarms of a sampling stage; `before` is the one before it."""
    found = []
    after_dpo = before is not None and before.stage.endswith("samples-pairs")
    if now.unfinished > MAX_UNFINISHED:
        limit = settings["sampling"]["max_new_tokens"]
        found.append(
            f"{now.unfinished:.1%} of the rationales ran into the limit of {limit} tokens: raise "
            "sampling.max_new_tokens, or sft.epochs if they ramble"
        )
    if now.repetitive > MAX_REPETITIVE:
        key = (
            "lower dpo.learning_rate or raise dpo.beta"
            if after_dpo
            else "lower sampling.temperature or raise sft.epochs"
        )
        found.append(f"{now.repetitive:.1%} of the rationales say the same again and again: {key}")
    if before and before.tokens and abs(now.tokens / before.tokens - 1) > MAX_DRIFT:
        key = (
            "lower dpo.learning_rate, or set dpo.loss=sigmoid_norm, which leaves length out"
            if after_dpo
            else "lower sft.epochs"
        )
        found.append(
            f"finished rationales went from {before.tokens:.0f} tokens ({before.stage}) to {now.tokens:.0f}: {key}"
        )
    return found


def of_pairs(now: Paired, dpo: Mapping[str, Any]) -> list[str]:
    """Alarms of a round's pairs; `dpo` is that part of the recipe."""
    steps = ceil(now.num_pairs / dpo["batch_size"])
    if not now.num_pairs or steps >= MIN_STEPS * dpo["max_steps"]:
        return []  # without any, DPO is left out and a notice says so
    return [
        f"{now.num_pairs} pairs make {steps} of dpo.max_steps={dpo['max_steps']}: raise sampling.samples_for_pairs or "
        "sampling.temperature, or lower dpo.batch_size"
    ]


def of_dpo(now: Preferred | None) -> list[str]:
    """Alarms of a DPO training."""
    if now is None or now.chosen_change > -MAX_FALL_NATS:
        return []
    return [
        f"the log-probability of chosen rationales fell by {-now.chosen_change:.1f} nats, of rejected ones by "
        f"{-now.rejected_change:.1f}: lower dpo.learning_rate or set dpo.nll_weight"
    ]


def of_dev(scores: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Alarm if dev accuracy fell by more than a standard error against the round before; `scores` in order."""
    if len(scores) < 2:
        return []
    (before, was), (_, now) = scores[-2:]
    error = sqrt(sum(s["strict"] * (1 - s["strict"]) / s["num_problems"] for s in (was, now)))
    if was["strict"] - now["strict"] <= error:
        return []
    return [
        f"accuracy on the dev problems fell from {was['strict']:.1%} ({before}) to {now['strict']:.1%}: set patience=1 "
        "to stop where it falls, or lower sft.epochs"
    ]


def watch(run: Path, emit: Callable[..., None]) -> Callable[[dict[str, Any]], None]:
    """Return a listener that looks at every stage of the folder `run` as it ends, and emits its alarms as events."""

    def look(event: dict[str, Any]) -> None:
        if event["kind"] == "stage_finished":
            for text in alarms(run, event["stage"]):
                emit("alarm", stage=event["stage"], text=text)

    return look


def _drawn_before(run: Path, stage: str) -> Drawn | None:
    """The sampling stage before this one, if there is one."""
    stages = sorted(
        (name for name, _ in stages_done(run) if name.partition("/")[2].startswith("samples-")),
        key=lambda name: (int(name.split("/")[0].removeprefix("round-")), name.endswith("labels")),
    )
    before = next((earlier for earlier, later in pairwise(stages) if later == stage), None)
    return drawn(run, before) if before else None


def _dev_scores(run: Path, until: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, score) of the policies on dev, in order, up to the one named."""
    done = dict(stages_done(run))
    names = ["sft-0", *(f"round-{number}" for number in range(1, len(done)))]
    found = [(name, done.get(f"score/{name}", {}).get("metrics", {}).get("dev")) for name in names]
    return [(name, dev) for name, dev in found[: names.index(until) + 1 if until in names else 0] if dev]


def _share(flags: Iterable[bool]) -> float:
    listed = list(flags)
    return sum(listed) / len(listed) if listed else 0.0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return mean(listed) if listed else 0.0
