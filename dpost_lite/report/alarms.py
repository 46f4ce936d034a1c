"""Alarms: what looks wrong in a finished stage, in plain words, with the recipe key to change.

The thresholds are our own; the papers give none.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil, exp, lgamma, log, log1p
from pathlib import Path
from typing import Any

from dpost_lite.methods import METHODS
from dpost_lite.problems.comparing import compare
from dpost_lite.problems.gate import Yields
from dpost_lite.problems.records import from_dict
from dpost_lite.report import health, results
from dpost_lite.report.health import DpoStats, PairStats, SampleStats
from dpost_lite.runs.folder import read_json
from dpost_lite.runs.journal import read_events, steps_by_stage
from dpost_lite.runs.stage_names import StageName

MAX_UNFINISHED = 0.01  # fraction of rationales that hit the token limit
MAX_REPETITIVE = 0.02  # fraction of rationales that repeat themselves
MAX_FAILED = 0.3  # of the blocks of code
MAX_DRIFT = 0.25  # relative change of the mean length of finished rationales
MIN_STEPS = 0.25  # fraction of dpo.max_steps for which there are pairs
MAX_DROP_NATS = 5.0  # drop of the chosen rationales' log-probability relative to the reference
MIN_SEPARATION_NATS = 0.3  # by which DPO should separate chosen and rejected rationales
WEAKER_DPO = "lower dpo.learning_rate or raise dpo.beta"
MORE_SFT = "raise sft.epochs or sft.learning_rate"


def watch(run: Path, emit: Callable[..., None]) -> Callable[[dict[str, Any]], None]:
    """Return a listener that checks each finished stage of the folder `run` and emits its alarms as events.

    Failures are reported as notices: a reporting failure must not abort a run.
    """

    def check(event: dict[str, Any]) -> None:
        if event["kind"] != "stage_finished":
            return
        try:
            found = alarms(run, event["stage"])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            emit("notice", text=f"{event['stage']}: alarms could not be checked ({reason}); please report this bug")
            return
        for text in found:
            emit("alarm", stage=event["stage"], text=text)

    return check


def alarms(run: Path, stage: str) -> list[str]:
    """Return the alarms of a finished stage of a run."""
    name = StageName.parse(stage)
    if name is None or name.kind not in ("score", "samples-pairs", "samples-labels", "pairs", "dpo", "gate"):
        return []
    recipe = results.recipe_of(run)
    if name.kind == "score":
        return dev_alarms(run, name.policy, recipe)
    if name.kind in ("samples-pairs", "samples-labels"):
        dpo = str(name.beside("dpo"))
        by_dpo = dpo in read_json(run / stage / "done.json")["inputs"] and not is_idle(_dpo_stats(run, dpo))
        folder = run / str(_drawn_before(run, name, by_dpo=by_dpo))
        earlier = health.sample_stats(folder) if (folder / "done.json").is_file() else None
        return sample_alarms(health.sample_stats(run / stage), earlier, recipe, by_dpo=by_dpo)
    if name.kind == "pairs":
        return pair_alarms(health.pair_stats(run / stage), recipe)
    metrics = read_json(run / stage / "done.json")["metrics"]
    if name.kind == "gate":
        return gate_alarms(from_dict(Yields, metrics), is_kept=metrics["goes_on_with"] == "dpo")
    ended = {name: metrics.get(name, False) for name in ("ended_early", "restored")}
    return dpo_alarms(_dpo_stats(run, stage), recipe["dpo"], **ended)


def _drawn_before(run: Path, name: StageName, *, by_dpo: bool) -> StageName:
    """Return the stage whose samples show what changed: before DPO, or one round earlier by the same kind of policy."""
    if by_dpo:
        return name.beside("samples-pairs")
    earlier = replace(name, round=name.round - 1)
    for_pairs = earlier.beside("samples-pairs")  # by an SFT policy, as those of a round that goes on without DPO
    return for_pairs if (run / str(for_pairs)).is_dir() else earlier


def _dpo_stats(run: Path, stage: str) -> DpoStats | None:
    return health.dpo_stats(steps_by_stage(read_events(run)).get(stage, ()))


def sample_alarms(
    now: SampleStats, before: SampleStats | None, recipe: Mapping[str, Any], *, by_dpo: bool
) -> list[str]:
    """Alarms of a sampling stage. `before` are the samples to compare with: the policy's before DPO, if DPO changed it
    (`by_dpo`), else those of an SFT policy in the previous round.
    """
    found = []
    before_dpo = before if by_dpo else None
    if _exceeds(MAX_UNFINISHED, now.unfinished, now.num_rationales):
        key = "raise sampling.max_new_tokens"
        if now.repetitive >= now.unfinished / 2:
            key = MORE_SFT
        if before_dpo and now.unfinished > 2 * before_dpo.unfinished:
            key = WEAKER_DPO
        limit = recipe["sampling"]["max_new_tokens"]
        found.append(f"{now.unfinished:.1%} of the rationales hit the limit of {limit} tokens: {key}")
    if _exceeds(MAX_REPETITIVE, now.repetitive, now.num_rationales):
        key = WEAKER_DPO if before_dpo and now.repetitive > before_dpo.repetitive else MORE_SFT
        found.append(f"{now.repetitive:.1%} of the rationales repeat themselves: {key}")
    num_blocks = now.calculated + now.left_to_model if recipe.get("solutions") == "code" else 0
    if num_blocks and now.left_to_model > MAX_FAILED * num_blocks:
        found.append(
            f"{now.left_to_model / num_blocks:.1%} of the blocks of code failed: raise sft.epochs, or if they need a "
            "module such as sympy, set code.sandbox=sandlock"
        )
    if before and before.tokens and now.tokens and abs(now.tokens / before.tokens - 1) > MAX_DRIFT:
        key = "lower sft.epochs"
        if by_dpo:
            key = WEAKER_DPO
            if recipe["dpo"]["loss"] != "sigmoid_norm":
                key += ", or set dpo.loss=sigmoid_norm, which normalises by length"
        cause = "DPO" if by_dpo else "this round"
        found.append(f"{cause} changed the mean rationale from {before.tokens:.0f} to {now.tokens:.0f} tokens: {key}")
    return found


def _exceeds(limit: float, share: float, number: int) -> bool:
    """Whether chance gives so large a `share` of `number` in less than 5 % of cases, if `limit` is the true one."""

    def log_probability(count: int) -> float:
        ways = lgamma(number + 1) - lgamma(count + 1) - lgamma(number - count + 1)
        return ways + count * log(limit) + (number - count) * log1p(-limit)

    return sum(exp(log_probability(count)) for count in range(round(share * number))) > 0.95


def pair_alarms(now: PairStats, recipe: Mapping[str, Any]) -> list[str]:
    """Alarms of a round's pairs."""
    dpo = recipe["dpo"]
    steps = ceil(ceil(now.num_pairs / dpo["batch_size"]) * dpo["epochs"])
    if not now.num_pairs or steps >= MIN_STEPS * dpo["max_steps"]:
        return []  # with no pairs, DPO is skipped with a notice
    more = "raise sampling.samples_for_pairs"
    if now.num_stepwise and recipe["rests"]["cut"] != "every":
        more = f"set rests.cut=every, {more}"
    return [
        f"{now.num_pairs} pairs are enough for {steps} of dpo.max_steps={dpo['max_steps']}: {more}, raise dpo.epochs, "
        "or lower dpo.batch_size"
    ]


def gate_alarms(found: Yields, *, is_kept: bool = False) -> list[str]:
    """Alarm if DPO clearly lowered what is drawn; `is_kept`: the round goes on with it all the same."""
    if found.high >= 0:
        return []
    return [
        f"DPO lowered the distinct right rationales for {found.num_problems} problems from "
        f"{found.distinct_right_before} to {found.distinct_right_after}, "
        f"{'and dpo.keep=always keeps it' if is_kept else 'so the round goes on without it'}: {WEAKER_DPO}"
    ]


def dpo_alarms(
    now: DpoStats | None, dpo: Mapping[str, Any], *, ended_early: bool = False, restored: bool = False
) -> list[str]:
    """Alarms of a DPO training; `dpo` is that section of the recipe.

    `ended_early`: it reached `dpo.max_logp_drop`; `restored`: it went back, which it did not in older versions.
    """
    if now is None:
        return []
    if ended_early:
        went_back = ", and went back to the last good weights" if restored else ""
        return [
            f"DPO was stopped after step {now.num_steps}{went_back}: its rationales had lost more than "
            f"dpo.max_logp_drop={dpo['max_logp_drop']:g} nats: {WEAKER_DPO}"
        ]
    if now.chosen_change <= -MAX_DROP_NATS:
        key = f"{'raise' if dpo['nll_weight'] else 'set'} dpo.nll_weight"
        return [
            f"the log-probability of chosen rationales dropped by {-now.chosen_change:.1f} nats (rejected: "
            f"{now.rejected_change:+.1f}): lower dpo.learning_rate or {key}"
        ]
    if is_idle(now):
        separation = max(0.0, now.chosen_change - now.rejected_change)
        return [
            f"DPO separated the log-probabilities of chosen and rejected rationales by only {separation:.1f} nats: "
            "raise dpo.learning_rate, dpo.epochs or dpo.max_steps"
        ]
    return []


def is_idle(dpo: DpoStats | None) -> bool:
    """Whether a DPO training hardly changed the policy, so that it cannot be the cause of an alarm."""
    return dpo is not None and dpo.chosen_change - dpo.rejected_change < MIN_SEPARATION_NATS


def dev_alarms(run: Path, name: str, recipe: Mapping[str, Any]) -> list[str]:
    """Alarm if a policy is worse on the dev problems than the best before it, with the paired interval below 0."""
    scores = results.dev_scores(run)
    names = [score.name for score in scores]
    if name not in names[1:]:
        return []
    now = names.index(name)
    best = max(scores[:now], key=lambda score: score.strict)
    compared = compare(*(results.right(run, each, "dev") for each in (best.name, name)))
    if compared.high >= 0:
        return []
    if not METHODS[recipe["method"]].has_rounds:
        return [f"dev accuracy dropped from {compared.a:.1%} ({best.name}) to {compared.b:.1%}: {WEAKER_DPO}"]
    key = "lower sft.epochs" if recipe["patience"] == 1 else "set patience=1 to stop at a drop, or lower sft.epochs"
    return [f"dev accuracy dropped from {compared.a:.1%} ({best.name}) to {compared.b:.1%}: {key}"]
