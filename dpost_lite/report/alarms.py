"""Alarms: what looks wrong in a stage that has just ended, in plain words, and the key of the recipe to change.

The limits are ours; neither paper gives any.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from dpost_lite.problems.comparing import compare
from dpost_lite.report import health, results
from dpost_lite.report.health import DpoStats, DrawnStats, PairStats
from dpost_lite.runs.folder import read_json
from dpost_lite.runs.journal import read_events, steps_by_stage
from dpost_lite.runs.stage_names import StageName

MAX_UNFINISHED = 0.01  # share of rationales that ran into the token limit
MAX_REPETITIVE = 0.02  # share of rationales that say the same again and again
MAX_DRIFT = 0.25  # change of the mean length of finished rationales
MIN_STEPS = 0.25  # share of dpo.max_steps that the pairs are enough for
MAX_FALL_NATS = 5.0  # of the chosen rationales' log-probability, against the reference
MIN_APART_NATS = 1.0  # that DPO moves chosen and rejected rationales apart
CALMER_DPO = "lower dpo.learning_rate or raise dpo.beta"
MORE_SFT = "raise sft.epochs or sft.learning_rate"


def watch(run: Path, emit: Callable[..., None]) -> Callable[[dict[str, Any]], None]:
    """Return a listener that looks at every stage of the folder `run` as it ends, and emits its alarms as events.

    Where it cannot, it says so: a run of many hours does not end for a figure.
    """

    def look(event: dict[str, Any]) -> None:
        if event["kind"] != "stage_finished":
            return
        try:
            found = alarms(run, event["stage"])
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            emit(
                "notice", text=f"{event['stage']}: its health could not be told ({why}); the run goes on, please report"
            )
            return
        for text in found:
            emit("alarm", stage=event["stage"], text=text)

    return look


def alarms(run: Path, stage: str) -> list[str]:
    """Return what is alarming about a finished stage of a run."""
    name = StageName.parse(stage)
    if name is None:
        return []
    recipe = results.recipe_of(run)
    if name.kind == "score":
        return of_dev(run, name.policy, recipe)
    if name.kind in ("samples-pairs", "samples-labels"):
        dpo = str(name.beside("dpo"))
        by_dpo = dpo in read_json(run / stage / "done.json")["inputs"] and not is_idle(_dpo_stats(run, dpo))
        before = name.beside("samples-pairs") if by_dpo else replace(name, round=name.round - 1)
        folder = run / str(before)
        earlier = health.drawn(folder) if (folder / "done.json").is_file() else None
        return of_drawn(health.drawn(run / stage), earlier, recipe, by_dpo=by_dpo)
    if name.kind == "pairs":
        return of_pairs(health.paired(run / stage), recipe["dpo"])
    if name.kind == "dpo":
        return of_dpo(_dpo_stats(run, stage), recipe["dpo"])
    return []


def _dpo_stats(run: Path, stage: str) -> DpoStats | None:
    return health.preferred(steps_by_stage(read_events(run)).get(stage, ()))


def of_drawn(now: DrawnStats, before: DrawnStats | None, recipe: Mapping[str, Any], *, by_dpo: bool) -> list[str]:
    """Alarms of a sampling stage. `before` is what was drawn for the same end in the round before; if DPO changed the
    policy (`by_dpo`), what the policy before DPO drew.
    """
    found = []
    before_dpo = before if by_dpo else None
    if now.unfinished > MAX_UNFINISHED:
        key = "raise sampling.max_new_tokens"
        if now.repetitive >= now.unfinished / 2:
            key = MORE_SFT
        if before_dpo and now.unfinished > 2 * before_dpo.unfinished:
            key = CALMER_DPO
        limit = recipe["sampling"]["max_new_tokens"]
        found.append(f"{now.unfinished:.1%} of the rationales ran into the limit of {limit} tokens: {key}")
    if now.repetitive > MAX_REPETITIVE:
        key = CALMER_DPO if before_dpo and now.repetitive > before_dpo.repetitive else MORE_SFT
        found.append(f"{now.repetitive:.1%} of the rationales say the same again and again: {key}")
    if before and before.tokens and now.tokens and abs(now.tokens / before.tokens - 1) > MAX_DRIFT:
        key = "lower sft.epochs"
        if by_dpo:
            key = CALMER_DPO
            if recipe["dpo"]["loss"] != "sigmoid_norm":
                key += ", or set dpo.loss=sigmoid_norm, which leaves length out"
        cause = "DPO" if by_dpo else "this round"
        found.append(f"{cause} took finished rationales from {before.tokens:.0f} tokens to {now.tokens:.0f}: {key}")
    return found


def of_pairs(now: PairStats, dpo: Mapping[str, Any]) -> list[str]:
    """Alarms of a round's pairs; `dpo` is that part of the recipe."""
    steps = ceil(now.num_pairs / dpo["batch_size"])
    if not now.num_pairs or steps >= MIN_STEPS * dpo["max_steps"]:
        return []  # without any, DPO is left out and a notice says so
    return [
        f"{now.num_pairs} pairs make {steps} of dpo.max_steps={dpo['max_steps']}: raise sampling.samples_for_pairs or "
        "sampling.temperature, or lower dpo.batch_size"
    ]


def of_dpo(now: DpoStats | None, dpo: Mapping[str, Any]) -> list[str]:
    """Alarms of a DPO training; `dpo` is that part of the recipe."""
    if now is None:
        return []
    if now.chosen_change <= -MAX_FALL_NATS:
        key = f"{'raise' if dpo['nll_weight'] else 'set'} dpo.nll_weight"
        return [
            f"the log-probability of chosen rationales fell by {-now.chosen_change:.1f} nats, that of rejected ones "
            f"changed by {now.rejected_change:+.1f}: lower dpo.learning_rate or {key}"
        ]
    if is_idle(now):
        apart = max(0.0, now.chosen_change - now.rejected_change)
        return [
            f"DPO moved the log-probabilities of chosen and rejected rationales only {apart:.1f} nats apart: raise "
            "dpo.learning_rate or dpo.max_steps"
        ]
    return []


def is_idle(dpo: DpoStats | None) -> bool:
    """Whether a DPO training left the policy about where it was, so that it is to blame for nothing."""
    return dpo is not None and dpo.chosen_change - dpo.rejected_change < MIN_APART_NATS


def of_dev(run: Path, name: str, recipe: Mapping[str, Any]) -> list[str]:
    """Alarm if a round solves fewer dev problems than the best before it, beyond what the paired interval allows."""
    scores = results.dev_scores(run)
    names = [score.name for score in scores]
    if name not in names[1:]:
        return []
    now = names.index(name)
    best = max(scores[:now], key=lambda score: score.strict)
    compared = compare(*(results.right(run, each, "dev") for each in (best.name, name)))
    if compared.high >= 0:
        return []
    key = (
        "lower sft.epochs" if recipe["patience"] == 1 else "set patience=1 to stop where it falls, or lower sft.epochs"
    )
    return [f"accuracy on the dev problems fell from {compared.a:.1%} ({best.name}) to {compared.b:.1%}: {key}"]
