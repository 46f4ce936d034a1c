"""Direct preference optimisation of a policy (Rafailov et al. 2023; DPO-ST, Algorithm 2, line 4).

Starts from the SFT policy, which is also the reference. With an adapter, "adapter off" would make the *base* the
reference, so a second copy of the adapter is frozen. At step 0, policy and reference are the same: the loss is ln 2 and
all rewards are 0. If all weights are trained, the reference's log-probabilities are computed before the first step
instead.

Trains on token ids: the sampler's ids are kept, including those of an answer that the token limit cut off.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError, RecipeError, nearest
from dpost_lite.models import adapters, credit
from dpost_lite.models.family import DECODER_ONLY, Family, Row, family_of_model
from dpost_lite.models.training import Progress, shared_arguments, train
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import PreferencePair
from dpost_lite.problems.tools import Inserted
from dpost_lite.recipe import DpoRecipe

LOSSES = DECODER_ONLY.losses


def check_loss(name: str, family: Family = DECODER_ONLY) -> None:
    """Raise RecipeError unless trl knows the loss `name`, and a model of this kind can be trained with it."""
    if name not in LOSSES:
        raise RecipeError(f"dpo.loss: trl knows no loss '{name}'{nearest(name, LOSSES)}; known: {', '.join(LOSSES)}")
    if name not in family.losses:
        raise RecipeError(f"dpo.loss: {name} is for decoder-only models; for T5 use {' or '.join(family.losses)}")


def train_dpo(
    policy: Any,
    prompter: Prompter,
    pairs: Sequence[PreferencePair],
    out: Path,
    *,
    recipe: DpoRecipe,
    seed: int,
    progress: Progress,
    checkpoint_s: float,
    report_to: Sequence[str] = (),
    inserted: Inserted | None = None,
) -> dict[str, Any]:
    """Continue the SFT policy on `pairs` and save the result in `out`; return metrics of the training.

    For the report, `out` also gets the token rewards of a few rejected rationales, if the reference is at hand.
    Pairs longer than `dpo.max_length` tokens are left out and counted (of an encoder–decoder, those with a prompt or
    an answer that is). Raises DataError if none is left. Tokens that `inserted` finds are left out of the
    log-probabilities that are compared, and so are the first steps that the two sides of a step-controlled pair share
    (SCDPO, section 3.3).
    """
    family = family_of_model(policy)
    check_loss(recipe.loss, family)
    rows, lengths, trained = [], [], []
    for pair in pairs:
        prompt = prompter.prompt_ids(pair.question)
        num_answer = len(pair.prefix_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        if family.sequence_length(len(prompt), num_answer) <= recipe.max_length:
            trained.append(pair)
            lengths.append(family.memory_length(len(prompt), num_answer))
            rows.append(family.dpo_row(prompt, pair.prefix_ids, pair.chosen_ids, pair.rejected_ids))
    if not rows:
        raise DataError(f"dpo.max_length={recipe.max_length} leaves none of {len(pairs)} preference pairs; raise it")
    trainer = make_trainer(policy, prompter, rows, out, recipe, seed, report_to, inserted)
    num_planned, limit = trainer.args.max_steps, recipe.max_logp_drop
    log = train(
        trainer,
        lengths,
        progress,
        checkpoint_s,
        figures=lambda step: figures(step, recipe.beta),
        is_bad=None if limit is None else lambda found: has_dropped(found, limit),
    )
    adapters.save(trainer.model, prompter.tokenizer, out)
    failed = credit.save_rewards(
        trainer.model, prompter, trained, out / "rewards.jsonl", beta=recipe.beta, max_rows=recipe.micro_batch_size
    )
    return {
        "num_pairs": len(rows),
        "num_too_long": len(pairs) - len(rows),
        "steps": len(log),
        **({"ended_early": True, "restored": True} if len(log) < num_planned else {}),
        **({"rewards_failed": failed} if failed else {}),
        "first_loss": log[0]["loss"],
        "last_loss": log[-1]["loss"],
        "last_margin": log[-1].get("rewards/margins"),
        "last_accuracy": log[-1].get("rewards/accuracies"),
    }


def figures(step: Mapping[str, Any], beta: float) -> dict[str, float]:
    """Return the policy's metrics from an entry of trl's log: means over the step's pairs.

    `chosen` and `rejected` are log π(y|x) in nats, `chosen_change` and `rejected_change` how far that lies above the
    reference's: trl's rewards without their factor β. `margin` is the difference of the rewards, β included, and
    `accuracy` the share of pairs where it is above 0 (Rafailov et al. 2023).
    """
    names = {
        "rewards/accuracies": "accuracy", "rewards/margins": "margin", "logps/chosen": "chosen",
        "logps/rejected": "rejected", "rewards/chosen": "chosen_change", "rewards/rejected": "rejected_change",
    }  # fmt: skip
    return {
        name: step[key] / beta if name.endswith("_change") else step[key] for key, name in names.items() if key in step
    }


def has_dropped(found: Mapping[str, float], max_logp_drop: float) -> bool:
    """Whether a step's chosen or rejected rationales have lost more than `max_logp_drop` nats (`dpo.max_logp_drop`)."""
    return min(found["chosen_change"], found["rejected_change"]) < -max_logp_drop


def make_trainer(
    policy: Any,
    prompter: Prompter,
    rows: list[Row],
    out: Path,
    recipe: DpoRecipe,
    seed: int,
    report_to: Sequence[str] = (),
    inserted: Inserted | None = None,
) -> Any:
    """Return a trainer on token ids, rows of `Family.dpo_row`; see `Family.dpo_trainer`."""
    arguments = shared_arguments(recipe, policy, out, seed=seed, num_rows=len(rows), report_to=report_to)
    return family_of_model(policy).dpo_trainer(policy, prompter.tokenizer, rows, arguments, recipe, inserted)
