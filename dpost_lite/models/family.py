"""The two kinds of base models, decoder-only ones and encoder–decoders (T5): what differs lies behind `Family`."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from dpost_lite.errors import RecipeError
from dpost_lite.methods import METHODS
from dpost_lite.problems.prompts import EncoderDecoderPrompter, Prompter
from dpost_lite.problems.tools import Inserted
from dpost_lite.recipe import DpoRecipe, Recipe

Row = dict[str, Any]
"""A row of a data set: lists of token ids, by name."""

LEFT_OUT = -100
"""The label of a token that has no part in a loss: PyTorch's and trl's."""


def labels_of(answer: Sequence[int], inserted: Inserted | None) -> list[int]:
    """Return an answer's token ids, without those that `inserted` finds."""
    if inserted is None:
        return list(answer)
    return [LEFT_OUT if is_left_out else i for i, is_left_out in zip(answer, inserted(answer), strict=True)]


class Family(ABC):
    """One kind of model: how it is loaded, and the rows and trainers of SFT and DPO."""

    auto_class: ClassVar[str]
    """The name of transformers' class that loads it."""
    task_type: ClassVar[str]
    """The name of peft's task."""
    prompter: ClassVar[type[Prompter]]
    losses: ClassVar[tuple[str, ...]]
    """What `dpo.loss` may be."""
    uses_float16: ClassVar[bool]
    """Whether it computes in float16 on a GPU without bfloat16."""

    @abstractmethod
    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError if a recipe asks for what this kind of model cannot do, `dpo.loss` aside."""

    @abstractmethod
    def sequence_length(self, num_prompt: int, num_answer: int) -> int:
        """Return the tokens of the longest sequence that the model reads: what `max_length` limits."""

    @abstractmethod
    def memory_length(self, num_prompt: int, num_answer: int) -> int:
        """Return a length by which rows can be compared for the memory that their training takes."""

    @abstractmethod
    def sft_row(self, prompt: Sequence[int], answer: Sequence[int], labels: Sequence[int]) -> Row:
        """Return a row for `sft_trainer`; `labels` are those of `labels_of`."""

    @abstractmethod
    def sft_trainer(self, policy: Any, tokenizer: Any, rows: list[Row], arguments: dict[str, Any]) -> Any:
        """Return a transformers Trainer; `arguments` are `training.shared_arguments` and more."""

    @abstractmethod
    def dpo_row(
        self, prompt: Sequence[int], prefix: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]
    ) -> Row:
        """Return a row for `dpo_trainer`; both answers continue `prefix`, which is not compared."""

    @abstractmethod
    def dpo_trainer(
        self,
        policy: Any,
        tokenizer: Any,
        rows: list[Row],
        arguments: dict[str, Any],
        recipe: DpoRecipe,
        inserted: Inserted | None,
    ) -> Any:
        """Return a transformers Trainer that logs as trl's DPOTrainer does.

        `policy` is a PeftModel whose adapter is named "default", or a plain model. Tokens that `inserted` finds are
        left out of the comparison.
        """


class DecoderOnly(Family):
    """Llama, Qwen and others: the answer continues the prompt. Trained with trl."""

    auto_class = "AutoModelForCausalLM"
    task_type = "CAUSAL_LM"
    prompter = Prompter
    losses = (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    )  # fmt: skip
    uses_float16 = True

    def check(self, recipe: Recipe) -> None:
        """It can do all that a recipe may ask for."""

    def sequence_length(self, num_prompt: int, num_answer: int) -> int:
        """Return the tokens of prompt and answer together."""
        return num_prompt + num_answer

    def memory_length(self, num_prompt: int, num_answer: int) -> int:
        """Return the tokens of prompt and answer together."""
        return num_prompt + num_answer

    def sft_row(self, prompt: Sequence[int], answer: Sequence[int], labels: Sequence[int]) -> Row:
        """See `Family`."""
        return {"input_ids": [*prompt, *answer], "labels": [LEFT_OUT] * len(prompt) + list(labels)}

    def sft_trainer(self, policy: Any, tokenizer: Any, rows: list[Row], arguments: dict[str, Any]) -> Any:
        """Return trl's SFTTrainer."""
        from dpost_lite.models.trl_trainers import sft_trainer

        return sft_trainer(policy, tokenizer, rows, arguments)

    def dpo_row(
        self, prompt: Sequence[int], prefix: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]
    ) -> Row:
        """See `Family`."""
        return {"prompt_ids": [*prompt, *prefix], "chosen_ids": list(chosen), "rejected_ids": list(rejected)}

    def dpo_trainer(
        self,
        policy: Any,
        tokenizer: Any,
        rows: list[Row],
        arguments: dict[str, Any],
        recipe: DpoRecipe,
        inserted: Inserted | None,
    ) -> Any:
        """Return trl's DPOTrainer."""
        from dpost_lite.models.trl_trainers import dpo_trainer

        return dpo_trainer(policy, tokenizer, rows, arguments, recipe, inserted)


class EncoderDecoder(Family):
    """T5: the encoder reads the prompt, the decoder writes the answer. Trained with trainers of our own.

    It never computes in float16, whose range its activations exceed.
    """

    auto_class = "AutoModelForSeq2SeqLM"
    task_type = "SEQ_2_SEQ_LM"
    prompter = EncoderDecoderPrompter
    losses = ("sigmoid",)
    uses_float16 = False

    def check(self, recipe: Recipe) -> None:
        """Refuse a prompt template, and what needs more than one line: T5's vocabulary has no line feed."""
        if recipe.model.prompt != "auto":
            raise RecipeError(f"model.prompt={recipe.model.prompt}: T5 reads the bare question; leave it at auto")
        if recipe.solutions == "code":
            raise RecipeError(
                "solutions=code: T5's vocabulary has no line feed, so it cannot write code; leave it at text, or "
                "give a decoder-only model"
            )
        if METHODS[recipe.method].samples_rests(recipe.pairs.stepwise):
            key = f"--method {recipe.method}" if METHODS[recipe.method].pairs != "by share" else "pairs.stepwise"
            raise RecipeError(
                f"{key}: step-controlled pairs are cut between lines, and T5 writes one line; leave them out, or "
                "give a decoder-only model"
            )

    def sequence_length(self, num_prompt: int, num_answer: int) -> int:
        """Return the tokens of the longer side."""
        return max(num_prompt, num_answer)

    def memory_length(self, num_prompt: int, num_answer: int) -> int:
        """Count the answer's tokens several times: each has logits, which take most of the memory."""
        return num_prompt + 8 * num_answer

    def sft_row(self, prompt: Sequence[int], answer: Sequence[int], labels: Sequence[int]) -> Row:
        """See `Family`."""
        return {
            "input_ids": list(prompt), "answer_ids": list(answer), "labels": list(labels),
            "length": len(prompt) + len(answer),
        }  # fmt: skip

    def sft_trainer(self, policy: Any, tokenizer: Any, rows: list[Row], arguments: dict[str, Any]) -> Any:
        """See `Family`."""
        from dpost_lite.models.seq2seq_trainers import SftTrainer

        return SftTrainer(policy, tokenizer, rows, arguments)

    def dpo_row(
        self, prompt: Sequence[int], prefix: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]
    ) -> Row:
        """See `Family`."""
        return {
            "prompt_ids": list(prompt), "prefix_ids": list(prefix), "chosen_ids": list(chosen),
            "rejected_ids": list(rejected),
        }  # fmt: skip

    def dpo_trainer(
        self,
        policy: Any,
        tokenizer: Any,
        rows: list[Row],
        arguments: dict[str, Any],
        recipe: DpoRecipe,
        inserted: Inserted | None,
    ) -> Any:
        """See `Family`."""
        from dpost_lite.models.seq2seq_trainers import DpoTrainer

        return DpoTrainer(policy, tokenizer, rows, arguments, recipe, inserted)


DECODER_ONLY = DecoderOnly()
ENCODER_DECODER = EncoderDecoder()


def family_of(model_dir: Path) -> Family:
    """Return the kind of the model saved in a folder; decoder-only if its config.json does not say."""
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return DECODER_ONLY  # loading will say what is wrong
    return ENCODER_DECODER if config.get("is_encoder_decoder") else DECODER_ONLY


def family_of_model(model: Any) -> Family:
    """Return the kind of a transformers model."""
    return ENCODER_DECODER if model.config.is_encoder_decoder else DECODER_ONLY
