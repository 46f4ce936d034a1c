"""Supervised fine-tuning of an adapter on labelled rationales (DPO-ST, Algorithm 2, lines 1 and 9).

Starts from the base model every time, never from an earlier adapter, as the paper does. Loss on the rationale and its
stop token alone. Departs from the paper in training a LoRA adapter on a 4-bit base.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError
from dpost_lite.models import adapters
from dpost_lite.models.training import Progress, shared_arguments, train
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import LabelledRationale
from dpost_lite.recipe import LoraRecipe, SftRecipe


def train_sft(
    model: Any,
    prompter: Prompter,
    labelled: Sequence[LabelledRationale],
    out: Path,
    *,
    recipe: SftRecipe,
    lora: LoraRecipe,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Train a fresh adapter on `labelled` from the base `model` and save it in `out`; return figures of the training.

    Rationales whose prompt and answer exceed `sft.max_length` tokens are left out and counted.
    Raises DataError if none is left.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = []
    for item in labelled:
        prompt = prompter.prompt_ids(item.question)
        if len(prompt) + len(item.token_ids) <= recipe.max_length:
            rows.append(
                {"input_ids": [*prompt, *item.token_ids], "labels": [-100] * len(prompt) + list(item.token_ids)}
            )
    if not rows:
        raise DataError(
            f"sft.max_length={recipe.max_length} leaves none of {len(labelled)} labelled rationales; raise it"
        )
    arguments = shared_arguments(recipe, out, seed=seed, num_rows=len(rows))
    trainer = SFTTrainer(
        model=adapters.create(model, lora, seed=seed),
        args=SFTConfig(**arguments, packing=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=prompter.tokenizer,
    )
    log = train(trainer, progress)
    adapters.save(trainer.model, out)
    return {
        "num_rationales": len(rows),
        "num_too_long": len(labelled) - len(rows),
        "steps": len(log),
        "first_loss": log[0]["loss"],
        "last_loss": log[-1]["loss"],
    }
