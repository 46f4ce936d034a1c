"""Supervised fine-tuning on labelled rationales (DPO-ST, Algorithm 2, lines 1 and 8).

Always starts from the base model, never from an earlier policy, as in the paper. The loss covers only the rationale and
its stop token. Unlike the paper it trains a LoRA adapter on a 4-bit base, unless the recipe asks for all weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError
from dpost_lite.models import adapters
from dpost_lite.models.family import Row, family_of_model, labels_of
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

    Returns metrics of the training. Rationales whose prompt and answer together exceed `sft.max_length` tokens are left
    out and counted; for an encoder–decoder the limit holds for each side, as the paper's 500 does. Raises DataError if
    none is left. Tokens that `inserted` finds are left out of the loss.
    """
    family = family_of_model(policy)
    rows, lengths = [], []
    for item in labelled:
        prompt, answer = prompter.prompt_ids(item.question), item.token_ids
        if family.sequence_length(len(prompt), len(answer)) <= recipe.max_length:
            rows.append(family.sft_row(prompt, answer, labels_of(answer, inserted)))
            lengths.append(family.memory_length(len(prompt), len(answer)))
    if not rows:
        raise DataError(
            f"sft.max_length={recipe.max_length} leaves none of {len(labelled)} labelled rationales; raise it"
        )
    trainer = make_trainer(policy, prompter, rows, out, recipe, seed, report_to)
    log = train(trainer, lengths, progress, checkpoint_s)
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
    rows: list[Row],
    out: Path,
    recipe: SftRecipe,
    seed: int,
    report_to: Sequence[str] = (),
) -> Any:
    """Return a trainer on token ids, rows of `Family.sft_row`."""
    arguments = shared_arguments(recipe, policy, out, seed=seed, num_rows=len(rows), report_to=report_to)
    arguments["train_sampling_strategy"] = "group_by_length"
    return family_of_model(policy).sft_trainer(policy, prompter.tokenizer, rows, arguments)
