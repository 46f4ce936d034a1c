"""Direct preference optimisation of a policy (Rafailov et al. 2023; DPO-ST, Algorithm 2, line 4).

Starts from the SFT policy, which is also the reference. With an adapter, "adapter off" would make the *base* the
reference, so trl gets an already wrapped model and freezes a second copy of the adapter. At step 0, policy and
reference are the same: the loss is ln 2 and all rewards are 0. (On a quantised base trl rounds the policy to bfloat16
but not the copy; that is undone here, or the first rewards would be this noise.) If all weights are trained, the
reference's log-probabilities are computed before the first step instead.

Trains on token ids: the sampler's ids are kept, including those of an answer that the token limit cut off.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError, RecipeError, nearest
from dpost_lite.models import adapters, credit
from dpost_lite.models.private_api import token_dpo_trainer
from dpost_lite.models.training import Progress, shared_arguments, train
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import PreferencePair
from dpost_lite.problems.tools import Inserted
from dpost_lite.recipe import DpoRecipe

LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


# The fraction of preferences that these two losses assume to be wrong. exo_pair needs some (its paper's value); with
# none, robust would be the same as sigmoid.
_LABEL_SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1}


def check_loss(name: str) -> None:
    """Raise RecipeError unless trl knows the loss `name`."""
    if name not in LOSSES:
        raise RecipeError(f"dpo.loss: trl knows no loss '{name}'{nearest(name, LOSSES)}; known: {', '.join(LOSSES)}")


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
    Pairs longer than `dpo.max_length` tokens are left out and counted. Raises DataError if none is left. Tokens that
    `inserted` finds are left out of the log-probabilities that are compared, and so are the first steps that the two
    sides of a step-controlled pair share (SCDPO, section 3.3).
    """
    rows, trained = [], []
    for pair in pairs:
        prompt = [*prompter.prompt_ids(pair.question), *pair.prefix_ids]
        if len(prompt) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= recipe.max_length:
            trained.append(pair)
            rows.append(
                {"prompt_ids": prompt, "chosen_ids": list(pair.chosen_ids), "rejected_ids": list(pair.rejected_ids)}
            )
    if not rows:
        raise DataError(f"dpo.max_length={recipe.max_length} leaves none of {len(pairs)} preference pairs; raise it")
    trainer = make_trainer(policy, prompter, rows, out, recipe, seed, report_to, inserted)
    lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
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
    rows: list[dict[str, list[int]]],
    out: Path,
    recipe: DpoRecipe,
    seed: int,
    report_to: Sequence[str] = (),
    inserted: Inserted | None = None,
) -> Any:
    """Return a DPOTrainer on token ids. `policy` is a PeftModel whose adapter is named "default", or a plain model."""
    from datasets import Dataset
    from trl import DPOConfig

    arguments = shared_arguments(recipe, policy, out, seed=seed, num_rows=len(rows), report_to=report_to)
    is_adapter = hasattr(policy, "peft_config")
    losses, weights = [recipe.loss], [1.0]
    if recipe.nll_weight:
        losses, weights = [*losses, "sft"], [*weights, recipe.nll_weight]
    config = DPOConfig(
        **arguments,
        beta=recipe.beta,
        loss_type=losses,
        loss_weights=weights,
        label_smoothing=_LABEL_SMOOTHING.get(recipe.loss, 0.0),
        disable_dropout=True,
        precompute_ref_log_probs=not is_adapter,  # a second copy of all weights would not fit
    )
    trainer = token_dpo_trainer()(
        model=policy,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=prompter.tokenizer,
        data_collator=None if inserted is None else _without_inserted(inserted, prompter.tokenizer),
    )
    if is_adapter:
        _start_at_reference(trainer.model)
    return trainer


def _without_inserted(inserted: Inserted, tokenizer: Any) -> Any:
    """Return trl's collator of preference pairs, with the tokens that `inserted` finds masked as the prompt is."""
    import torch
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Collator(DataCollatorForPreference):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            answers = [(one["prompt_ids"], one[side]) for side in ("chosen_ids", "rejected_ids") for one in examples]
            for mask, (prompt, answer) in zip(batch["completion_mask"], answers, strict=True):
                mask[len(prompt) : len(prompt) + len(answer)][torch.tensor(inserted(answer))] = 0
            return batch

    return Collator(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _start_at_reference(policy: Any) -> None:
    """Copy the frozen adapter "ref" back over "default", float32 as it was before trl's cast."""
    for name, parameter in policy.named_parameters():
        if ".default." in name:
            parameter.data = policy.get_parameter(name.replace(".default.", ".ref.")).detach().clone()
