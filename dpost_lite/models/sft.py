"""Supervised fine-tuning on labelled rationales (DPO-ST, Algorithm 2, lines 1 and 8).

Always starts from the base model, never from an earlier policy, as in the paper. The loss covers only the rationale and
its stop token. Unlike the paper it trains a LoRA adapter on a 4-bit base, unless the recipe asks for all weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError
from dpost_lite.models import adapters
from dpost_lite.models.training import Progress, shared_arguments, train
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import LabelledRationale
from dpost_lite.problems.tools import Inserted
from dpost_lite.recipe import SftRecipe


def train_sft(
    policy: Any,
    prompter: Prompter,
    labelled: Sequence[LabelledRationale],
    out: Path,
    *,
    recipe: SftRecipe,
    seed: int,
    progress: Progress,
    checkpoint_s: float,
    report_to: Sequence[str] = (),
    inserted: Inserted | None = None,
) -> dict[str, Any]:
    """Train `policy`, the base with a fresh adapter or all of the base, on `labelled` and save it in `out`.

    Returns metrics of the training. Rationales whose prompt and answer exceed `sft.max_length` tokens are left out and
    counted. Raises DataError if none is left. Tokens that `inserted` finds are left out of the loss.
    """
    rows = []
    for item in labelled:
        prompt = prompter.prompt_ids(item.question)
        if len(prompt) + len(item.token_ids) <= recipe.max_length:
            left_out = inserted(item.token_ids) if inserted else [False] * len(item.token_ids)
            labels = [-100 if is_left_out else i for i, is_left_out in zip(item.token_ids, left_out, strict=True)]
            rows.append({"input_ids": [*prompt, *item.token_ids], "labels": [-100] * len(prompt) + labels})
    if not rows:
        raise DataError(
            f"sft.max_length={recipe.max_length} leaves none of {len(labelled)} labelled rationales; raise it"
        )
    trainer = make_trainer(policy, prompter, rows, out, recipe, seed, report_to)
    log = train(trainer, [len(row["input_ids"]) for row in rows], progress, checkpoint_s)
    adapters.save(trainer.model, prompter.tokenizer, out)
    return {
        "num_rationales": len(rows),
        "num_too_long": len(labelled) - len(rows),
        "steps": len(log),
        "first_loss": log[0]["loss"],
        "last_loss": log[-1]["loss"],
    }


def make_trainer(
    policy: Any,
    prompter: Prompter,
    rows: list[dict[str, list[int]]],
    out: Path,
    recipe: SftRecipe,
    seed: int,
    report_to: Sequence[str] = (),
) -> Any:
    """Return an SFTTrainer on token ids."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = shared_arguments(recipe, policy, out, seed=seed, num_rows=len(rows), report_to=report_to)
    return SFTTrainer(
        model=policy,
        args=SFTConfig(**arguments, train_sampling_strategy="group_by_length", packing=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=prompter.tokenizer,
    )
