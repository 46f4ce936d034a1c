"""The trainers of decoder-only models: trl's, on token ids."""

from typing import Any

from dpost_lite.models.private_api import draw_by_length, token_dpo_trainer
from dpost_lite.problems.tools import Inserted
from dpost_lite.recipe import DpoRecipe

Rows = list[dict[str, Any]]

NOTHING_CUT: dict[str, Any] = {"padding_free": False, "max_length": None}
"""Lengths were checked: nothing is truncated silently."""

# The fraction of preferences that these two losses assume to be wrong. exo_pair needs some (its paper's value); with
# none, robust would be the same as sigmoid.
_LABEL_SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1}


def sft_trainer(policy: Any, tokenizer: Any, rows: Rows, arguments: dict[str, Any]) -> Any:
    """Return an SFTTrainer on token ids."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=policy,
        args=SFTConfig(**arguments, **NOTHING_CUT, packing=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def dpo_trainer(
    policy: Any, tokenizer: Any, rows: Rows, arguments: dict[str, Any], recipe: DpoRecipe, inserted: Inserted | None
) -> Any:
    """Return a DPOTrainer on token ids. `policy` is a PeftModel whose adapter is named "default", or a plain model.

    On a quantised base trl rounds the policy to bfloat16 but not the reference; that is undone here, or the first
    rewards would be this noise.
    """
    from datasets import Dataset
    from trl import DPOConfig

    is_adapter = hasattr(policy, "peft_config")
    losses, weights = [recipe.loss], [1.0]
    if recipe.nll_weight:
        losses, weights = [*losses, "sft"], [*weights, recipe.nll_weight]
    config = DPOConfig(
        **arguments,
        **NOTHING_CUT,
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
        processing_class=tokenizer,
        data_collator=None if inserted is None else _without_inserted(inserted, tokenizer),
    )
    draw_by_length(trainer, [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows])
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
