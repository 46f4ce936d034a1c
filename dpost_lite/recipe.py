"""Every setting of a run, in one schema; its defaults are the paper's (DPO-ST, Table 5 and released code, Llama
columns).

A recipe file holds only what differs from here. Learning rates are the one deliberate departure: the paper fine-tunes
all weights at 2e-5 / 3e-7, which would hardly move a LoRA adapter, so they have LoRA's own values.

Order of precedence: defaults < recipe file < `key=value` on the command line.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dpost_lite.methods import MethodName

ComputeType = Literal["auto", "bfloat16", "float32"]
Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelRecipe(_Section):
    """The base model."""

    name: str = "smollm2-135m-instruct"
    """A folder, a hub id (owner/name), or smollm2-135m-instruct, which the demo extra brings."""
    precision: Literal["4bit", "16bit", "full"] = "4bit"
    """What is trained: LoRA on a base in 4-bit NormalFloat (QLoRA), LoRA on one in 16 bit, or all weights in float32,
    as in the papers.
    """
    compute_dtype: ComputeType = "auto"
    """The type of products and of what is sampled from: bfloat16, float32, or auto: bfloat16 where the hardware
    multiplies it (float16 on older GPUs), else float32. Training all weights is always in float32.
    """
    backend: Literal["auto", "unsloth", "plain"] = "auto"
    """What LoRA trains with: unsloth, or transformers and peft alone; auto takes unsloth where it can run."""
    prompt: Literal["auto", "chat", "plain"] = "auto"
    """The model's own chat template, or "Question: … Answer:"; auto takes the chat template where there is one."""


class DataRecipe(_Section):
    """Where problems come from."""

    train: str = "gsm8k"
    """gsm8k, synthetic, or a .jsonl/.json/.csv/.parquet file."""
    test: str | None = None
    """gsm8k, multiarith, asdiv, svamp, synthetic, or a file; unset, the set that belongs to train (for a file: its
    dev part).
    """
    data_dir: Path | None = None
    """A folder with the named sets as files, instead of the hub."""
    split_file: Path | None = None
    """A JSON file with line numbers `train` and `dev`; unset, a fixed rule splits."""
    dev_size: int | None = Field(None, ge=0)
    """Problems held out of train, to choose the best round; unset, 768 of gsm8k (the paper's) or a tenth of a file."""
    limit: int | None = Field(None, ge=1)
    """At most this many problems of train, of dev and of test."""
    test_limit: int | None = Field(None, ge=1)
    """At most this many problems of test."""
    num_labelled: int | None = Field(None, ge=1)
    """How many problems show their rationale to the warm-up (the first ones that carry one); unset, all."""


class SyntheticRecipe(_Section):
    """The built-in word problems; used where data.train or data.test is `synthetic`."""

    num_train: int = Field(400, ge=1)
    num_dev: int = Field(0, ge=0)
    num_test: int = Field(200, ge=1)
    min_steps: int = Field(1, ge=1, le=4)
    """Fewest reasoning steps of a problem."""
    max_steps: int = Field(4, ge=1, le=4)
    """Most reasoning steps of a problem."""


class LoraRecipe(_Section):
    """The adapter that is trained in place of the weights."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class SftRecipe(_Section):
    """Supervised fine-tuning, from the base each round."""

    learning_rate: float = Field(2e-4, gt=0)
    epochs: float = Field(2, gt=0)
    batch_size: int = Field(128, ge=1)
    """Rationales per optimiser step."""
    micro_batch_size: int = Field(8, ge=1)
    """Rationales per forward; the rest of the batch is accumulated."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """The floor of the cosine schedule, as a share of the peak."""
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int = Field(640, ge=16)
    """Tokens of prompt and rationale; longer examples are left out and counted."""


class DpoRecipe(_Section):
    """Direct preference optimisation, from the SFT policy, which is also the frozen reference."""

    learning_rate: float = Field(2e-5, gt=0)
    max_steps: int = Field(100, ge=1)
    """Stop after this many optimiser steps, or after one pass over the pairs, whichever comes first."""
    batch_size: int = Field(128, ge=1)
    micro_batch_size: int = Field(4, ge=1)
    beta: float = Field(0.1, gt=0)
    loss: str = "sigmoid"
    """Any loss_type of trl's DPOConfig: sigmoid, hinge, ipo, robust, sigmoid_norm …"""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of an added negative log-likelihood term on the chosen rationale."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int = Field(640, ge=16)


class SamplingRecipe(_Section):
    """How rationales are drawn."""

    samples_for_pairs: int = Field(5, ge=1)
    """Samples per question from the SFT policy, for preference pairs."""
    samples_for_labels: int = Field(3, ge=1)
    """K: samples per question from the DPO policy, for pseudo-labels (the paper's 3, 5 or 10)."""
    temperature: float = Field(0.7, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(300, ge=8)
    weights: Literal["merged", "quantized"] = "merged"
    """Sample from merged 16-bit weights, or, slower and in a third of their memory, from the base with its adapter."""
    max_rows: int = Field(256, ge=1)
    """Rationales that are decoded side by side, if memory allows."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory for their cache and logits; by default a third of the RAM, or four fifths of what the
    model leaves of a GPU."""


class PairsRecipe(_Section):
    """From graded rationales to preference pairs."""

    jaccard_threshold: float = Field(0.7, gt=0, le=1)
    """Two rationales that share more of their token sets than this count as the same."""
    max_per_problem: int = Field(3, ge=1)
    gold_first: bool = True
    """Prepend the gold rationale, where a problem has one, as first chosen."""
    pool_rounds: bool = True
    """Use the samples of all earlier SFT policies too."""
    unfinished_rejected: bool = False
    """Let rationales that were cut off by the token limit count as wrong."""


class LabelsRecipe(_Section):
    """From graded rationales to pseudo-labels."""

    jaccard_threshold: float = Field(0.7, gt=0, le=1)
    pool_rounds: bool = True
    """Use the samples of all earlier DPO policies too."""
    cap_percentile: int = Field(90, ge=1, le=100)
    """A problem keeps at most this percentile of the labels per problem."""
    max_per_problem: int = Field(100, ge=1)


class CalculatorRecipe(_Section):
    """The calculator that completes `<<expression=`."""

    enabled: bool = True
    max_decimals: int = Field(6, ge=0, le=12)
    """A result that terminates within this many decimals is printed exactly."""
    rounded_decimals: int = Field(2, ge=0, le=12)
    """Any other result is rounded to this many."""


class ExportRecipe(_Section):
    """The file that the user takes home."""

    quant: Literal["q4_k_m", "q5_k_m", "q8_0", "f16"] = "q4_k_m"


class Recipe(_Section):
    """All settings of a run."""

    method: MethodName = "dpo-st"
    """dpo-st (Algorithm 2), st (Algorithm 1: plain self-training), or sft (the warm-up alone)."""
    rounds: int = Field(3, ge=1)
    """Most rounds of self-training."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many rounds without a better dev accuracy; unset, never."""
    seed: int = Field(42, ge=0)
    checkpoint_s: float = Field(60, ge=0)
    """Seconds between checkpoints inside a training; more where writing them would take above 1 % of the time."""
    report_to: tuple[Tracker, ...] = ()
    """Hand the trainings' metrics to these too, as transformers does: tensorboard, trackio, wandb, mlflow."""
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    synthetic: SyntheticRecipe = SyntheticRecipe()
    lora: LoraRecipe = LoraRecipe()
    sft: SftRecipe = SftRecipe()
    sampling: SamplingRecipe = SamplingRecipe()
    pairs: PairsRecipe = PairsRecipe()
    dpo: DpoRecipe = DpoRecipe()
    labels: LabelsRecipe = LabelsRecipe()
    calculator: CalculatorRecipe = CalculatorRecipe()
    export: ExportRecipe = ExportRecipe()

    @field_validator("report_to", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """One name, or several with commas, do as well as a list."""
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _steps_in_order(self) -> "Recipe":
        if self.synthetic.min_steps > self.synthetic.max_steps:
            raise ValueError("synthetic.min_steps is larger than synthetic.max_steps")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "Recipe":
        for name, section in (("sft", self.sft), ("dpo", self.dpo)):
            if section.batch_size > section.micro_batch_size and section.batch_size % section.micro_batch_size:
                raise ValueError(
                    f"{name}.batch_size={section.batch_size} is not a multiple of "
                    f"{name}.micro_batch_size={section.micro_batch_size}; change one of them"
                )
        return self
