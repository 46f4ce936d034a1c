"""Direct preference optimisation of a policy (Rafailov et al. 2023; DPO-ST, Algorithm 2, line 4).

Starts from the SFT policy, which is also the reference. Given a plain model and a LoRA config, trl would use the *base*
as the reference by switching the adapter off. It is given a PeftModel instead, and then keeps a frozen copy of the
adapter. At step 0 policy and reference are equal: the loss is ln 2 and all rewards are 0. (On a quantised base, trl
rounds the policy to bfloat16 but not the copy; that is undone here, or the first rewards would be rounding noise.) When
all weights are trained, the reference's log-probabilities are computed before the first step instead.

Trains on token ids. trl's DPOTrainer tokenises text and appends a stop token to each answer; `_prepare_dataset` is
overridden to leave the sampler's ids alone, an answer cut off by the token limit included.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError, RecipeError, nearest
from dpost_lite.models import adapters
from dpost_lite.models.training import Progress, shared_arguments, train
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import PreferencePair
from dpost_lite.recipe import DpoRecipe

LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip

# The share of preferences that these two losses assume to be wrong. exo_pair requires a positive value (this is its
# paper's); with 0, robust would equal sigmoid.
_LABEL_SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1}


def check_loss(name: str) -> None:
    """Raise RecipeError unless `name` is a loss of trl."""
    if name not in LOSSES:
        raise RecipeError(f"dpo.loss: trl has no loss '{name}'{nearest(name, LOSSES)}; known: {', '.join(LOSSES)}")


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
) -> dict[str, Any]:
    """Train the SFT policy (see `adapters.load_for_dpo`) on `pairs`, save it in `out`, and return the stage's metrics.

    Pairs of which a side exceeds `dpo.max_length` tokens with its prompt are skipped and counted. `checkpoint_s` is the
    time between checkpoints in seconds.

    Raises DataError if no pair is left, and ModelError if training diverges.
    """
    rows = []
    for pair in pairs:
        prompt = list(prompter.prompt_ids(pair.question))
        if len(prompt) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= recipe.max_length:
            rows.append(
                {"prompt_ids": prompt, "chosen_ids": list(pair.chosen_ids), "rejected_ids": list(pair.rejected_ids)}
            )
    if not rows:
        raise DataError(f"dpo.max_length={recipe.max_length} is below the length of all {len(pairs)} preference pairs; raise it")
    trainer = make_trainer(policy, prompter, rows, out, recipe, seed, report_to)
    lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    log = train(trainer, lengths, progress, checkpoint_s, extra_metrics=lambda entry: policy_metrics(entry, recipe.beta))
    adapters.save(trainer.model, prompter.tokenizer, out)
    return {
        "num_pairs": len(rows),
        "num_too_long": len(pairs) - len(rows),
        "steps": len(log),
        "first_loss": log[0]["loss"],
        "last_loss": log[-1]["loss"],
        "last_margin": log[-1].get("rewards/margins"),
        "last_accuracy": log[-1].get("rewards/accuracies"),
    }


def policy_metrics(entry: Mapping[str, Any], beta: float) -> dict[str, float]:
    """Return the metrics of the policy in one entry of trl's log: means over the step's pairs.

    `chosen` and `rejected` are log π(y|x) in nats. `chosen_change` and `rejected_change` are log π(y|x) - log π_ref(y|x)
    in nats: trl's rewards without the factor β. `margin` is the difference of the two rewards, with β, and `accuracy`
    the share of pairs with a positive margin (Rafailov et al. 2023, section 4).
    """
    names = {
        "rewards/accuracies": "accuracy", "rewards/margins": "margin", "logps/chosen": "chosen",
        "logps/rejected": "rejected", "rewards/chosen": "chosen_change", "rewards/rejected": "rejected_change",
    }  # fmt: skip
    return {
        name: entry[key] / beta if name.endswith("_change") else entry[key]
        for key, name in names.items()
        if key in entry
    }


def make_trainer(
    policy: Any,
    prompter: Prompter,
    rows: list[dict[str, list[int]]],
    out: Path,
    recipe: DpoRecipe,
    seed: int,
    report_to: Sequence[str] = (),
) -> Any:
    """Return a DPOTrainer for rows of prompt_ids, chosen_ids and rejected_ids.

    `policy` is a PeftModel whose adapter is named "default", or a plain model of which all weights are trained.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class TokenDPOTrainer(DPOTrainer):
        """Takes the columns prompt_ids, chosen_ids and rejected_ids as they are."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    arguments = shared_arguments(recipe, policy, out, seed=seed, num_rows=len(rows), report_to=report_to)
    arguments["train_sampling_strategy"] = "random"  # grouping by length needs one length per row; a pair has two
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
        precompute_ref_log_probs=not is_adapter,  # a second copy of all weights would not fit in memory
    )
    trainer = TokenDPOTrainer(
        model=policy, args=config, train_dataset=Dataset.from_list(rows), processing_class=prompter.tokenizer
    )
    if is_adapter:
        _start_at_reference(trainer.model)
    return trainer


def _start_at_reference(policy: Any) -> None:
    """Copy the frozen adapter "ref" back over "default", float32 as it was before trl's cast."""
    for name, parameter in policy.named_parameters():
        if ".default." in name:
            parameter.data = policy.get_parameter(name.replace(".default.", ".ref.")).detach().clone()
