"""The trainers of encoder–decoders (T5), on transformers' Trainer: trl trains decoders alone.

The decoder reads its own answer shifted by one, tokens that are left out of the loss included; so its input is made
from the answer, not from the labels. Losses, weights of micro-batches and logged names are those of trl, to which
tests/test_seq2seq.py holds them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from dpost_lite.models.adapters import add_reference, reference
from dpost_lite.models.family import LEFT_OUT, labels_of
from dpost_lite.models.private_api import draw_by_length
from dpost_lite.problems.tools import Inserted
from dpost_lite.recipe import DpoRecipe

Rows = list[dict[str, Any]]
Batch = dict[str, torch.Tensor]
SIDES = ("chosen", "rejected")


def batch_of(items: Iterable[tuple[Sequence[int], Sequence[int], Sequence[int]]], config: Any) -> Batch:
    """Return a model's inputs and labels from (prompt ids, answer ids, labels) of each row, padded on the right.

    All are (rows, tokens); a label belongs to the logits at its own position.
    """
    prompts, answers, labels = zip(*items, strict=True)
    inputs = [(config.decoder_start_token_id, *answer[:-1]) for answer in answers]
    return {
        "input_ids": _padded(prompts, config.pad_token_id),
        "attention_mask": _padded([[1] * len(prompt) for prompt in prompts], 0),
        "decoder_input_ids": _padded(inputs, config.pad_token_id),
        "labels": _padded(labels, LEFT_OUT),
    }


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def label_logprobs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return log π of each label, in nats: (rows, tokens), 0 where it is left out; `logits` are of their positions."""
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=LEFT_OUT, reduction="none"
    )
    return -losses.view(labels.shape)


def forward(model: Any, batch: Batch) -> torch.Tensor:
    """Return `label_logprobs` of a model on a batch of `batch_of`."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    return label_logprobs(model(**inputs, use_cache=False).logits, batch["labels"])


def dpo_loss(
    logps: torch.Tensor, reference_logps: torch.Tensor, beta: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the mean of -log σ(margin) over pairs (Rafailov et al. 2023, equation 7), and trl's figures of each pair.

    Both arguments are sums of log π over an answer's tokens in nats, (2 · pairs): chosen answers, then rejected ones.
    """
    rewards = beta * (logps - reference_logps)
    chosen, rejected = rewards.chunk(2)
    margins = chosen - rejected
    figures = {
        "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(), "logps/chosen": logps.chunk(2)[0],
        "logps/rejected": logps.chunk(2)[1],
    }  # fmt: skip
    return -torch.nn.functional.logsigmoid(margins).mean(), figures


class _Trainer(Trainer):
    """A Trainer whose log has the means of `_metrics`, kept as in trl's trainers."""

    def __init__(self, policy: Any, tokenizer: Any, rows: Rows, arguments: dict[str, Any]) -> None:
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
        self._config = policy.config
        super().__init__(
            model=policy,
            args=TrainingArguments(**arguments, remove_unused_columns=False),
            train_dataset=Dataset.from_list(rows),
            data_collator=self.collate,
            processing_class=tokenizer,
        )

    def collate(self, rows: Rows) -> Batch:
        """Return the batch of some rows."""
        raise NotImplementedError

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the Trainer does, and the means since the last step."""
        found = self._metrics["train"]
        super().log({**logs, **{name: sum(values) / len(values) for name, values in found.items()}}, start_time)
        found.clear()


class SftTrainer(_Trainer):
    """Trains on rows of `EncoderDecoder.sft_row`: the loss is the mean over the labels of an optimiser step.

    In training mode the model drops out what its config says.
    """

    def __init__(self, policy: Any, tokenizer: Any, rows: Rows, arguments: dict[str, Any]) -> None:
        super().__init__(policy, tokenizer, rows, arguments)
        self.model_accepts_loss_kwargs = True  # count a step's labels, and do not divide by its micro-batches

    def collate(self, rows: Rows) -> Batch:
        """See `batch_of`."""
        return batch_of(((r["input_ids"], r["answer_ids"], r["labels"]) for r in rows), self._config)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a micro-batch's part of the step's loss."""
        count = inputs["labels"].ne(LEFT_OUT).sum() if num_items_in_batch is None else num_items_in_batch
        return -forward(model, inputs).sum() / count


class DpoTrainer(_Trainer):
    """Trains on rows of `EncoderDecoder.dpo_row`, without dropout.

    The reference is a frozen copy "ref" of the adapter; if all weights are trained, its log-probabilities are computed
    here, before the first step (a policy that goes on is loaded as it was before it too).
    """

    def __init__(
        self,
        policy: Any,
        tokenizer: Any,
        rows: Rows,
        arguments: dict[str, Any],
        recipe: DpoRecipe,
        inserted: Inserted | None,
    ) -> None:
        self._recipe, self._inserted, self._config = recipe, inserted, policy.config
        self._has_adapter = hasattr(policy, "peft_config")
        switch_off_dropout(policy)
        if self._has_adapter:
            add_reference(policy)
        else:
            rows = self._with_reference(policy, rows, arguments["per_device_train_batch_size"])
        super().__init__(policy, tokenizer, rows, arguments)
        self.model_accepts_loss_kwargs = False  # a step's loss is the mean of its micro-batches'
        draw_by_length(self, [num_tokens(row) for row in rows])

    def _with_reference(self, policy: Any, rows: Rows, micro_batch_size: int) -> Rows:
        """Add the log-probabilities of both answers to the rows."""
        found: list[list[float]] = []
        for start in range(0, len(rows), micro_batch_size):
            batch = self.collate(rows[start : start + micro_batch_size])
            with torch.no_grad():
                logps = forward(policy, {name: values.to(policy.device) for name, values in batch.items()}).sum(-1)
            found.extend(torch.stack(logps.chunk(2), dim=1).tolist())
        return [{**row, "reference_logps": both} for row, both in zip(rows, found, strict=True)]

    def collate(self, rows: Rows) -> Batch:
        """Return `batch_of` the chosen answers, then the rejected ones, and `reference_logps` (2 · pairs) if known."""
        items = []
        for side in SIDES:
            for row in rows:
                prefix, own = row["prefix_ids"], row[f"{side}_ids"]
                labels = [LEFT_OUT] * len(prefix) + labels_of(own, self._inserted)
                items.append((row["prompt_ids"], [*prefix, *own], labels))
        batch = batch_of(items, self._config)
        if "reference_logps" in rows[0]:
            batch["reference_logps"] = torch.tensor([row["reference_logps"] for row in rows]).T.flatten()
        return batch

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of a micro-batch's pairs, and add to the figures that are logged."""
        batch = dict(inputs)
        if self._has_adapter:
            with torch.no_grad(), reference(model):
                reference_logps = forward(model, batch).sum(-1)
        else:
            reference_logps = batch.pop("reference_logps")
        per_token = forward(model, batch)
        loss, figures = dpo_loss(per_token.sum(-1), reference_logps, self._recipe.beta)
        if self._recipe.nll_weight:
            num_chosen = batch["labels"].chunk(2)[0].ne(LEFT_OUT).sum()
            loss = loss - self._recipe.nll_weight * per_token.chunk(2)[0].sum() / num_chosen
        for name, values in figures.items():
            self._metrics["train"][name].append(values.detach().mean().item())
        return loss


def num_tokens(row: dict[str, Any]) -> int:
    """Return the tokens of a row of `EncoderDecoder.dpo_row`, with its longer answer."""
    return len(row["prompt_ids"]) + len(row["prefix_ids"]) + max(len(row[f"{side}_ids"]) for side in SIDES)


def switch_off_dropout(model: Any) -> None:
    """Set all dropout rates to 0, those that attention layers hold as plain numbers too, as T5's do."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
