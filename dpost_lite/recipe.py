"""The schema of a recipe: every setting of a run, with the paper's defaults (DPO-ST, Table 5 and released code, Llama
columns) where one GPU allows it.

A recipe file lists only what differs from these defaults. Where they depart from the paper: recipes/README.md. The two
that matter most are learning rates, since the paper fine-tunes all weights at 2e-5 / 3e-7, which would hardly move a
LoRA adapter; and the gate after DPO (`dpo.gate`).

Precedence: defaults < recipe file < `key=value` on the command line. Reading and overriding: recipe_files.py.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from dpost_lite.methods import METHODS, MethodName
from dpost_lite.sandbox.base import Limits, SandboxName

ComputeType = Literal["auto", "bfloat16", "float32"]
Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]


def _split(value: Any) -> Any:
    """Accept a comma-separated string as well as a list."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelRecipe(_Section):
    """The base model."""

    name: str = "smollm2-135m-instruct"
    """A folder, a hub id (owner/name), or smollm2-135m-instruct, which comes with the demo extra."""
    precision: Literal["4bit", "16bit", "full"] = "4bit"
    """4bit: LoRA on a 4-bit NormalFloat base (QLoRA); 16bit: LoRA on a 16-bit base; full: all weights in float32, as in
    the papers.
    """
    compute_dtype: ComputeType = "auto"
    """The type for matrix products and sampling weights. auto takes bfloat16 where the hardware supports it (float16 on
    older GPUs), else float32. Full-weight training always uses float32.
    """
    backend: Literal["auto", "unsloth", "plain"] = "auto"
    """What trains LoRA: unsloth, or plain transformers and peft; auto takes unsloth where it can run."""
    prompt: Literal["auto", "chat", "plain"] = "auto"
    """The model's own chat template, or plain "Question: … Answer:"; auto takes the chat template if there is one."""


class DataRecipe(_Section):
    """Where problems come from."""

    train: str = "gsm8k"
    """gsm8k, synthetic, or a .jsonl/.json/.csv/.parquet file."""
    test: str | None = None
    """gsm8k, multiarith, asdiv, svamp, math500, synthetic, or a file; unset, the test set of the training source (for
    a file, a tenth of it, or the dev part of data.split_file).
    """
    also_test: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Further test sets, each as for data.test, on which the base and every policy are scored too; they change neither
    the training nor the choice of the best round.
    """
    data_dir: Path | None = None
    """A folder with the named sets as files, read instead of the hub."""
    split_file: Path | None = None
    """A JSON file with the lists `train` and `dev` of 0-based row numbers; unset, the split follows a fixed rule."""
    dev_size: int | None = Field(None, ge=0)
    """Problems held out of train to pick the best round; unset, 768 of gsm8k (as in the paper) or a tenth of a file."""
    limit: int | None = Field(None, ge=1)
    """Use at most this many problems each of train, dev and test."""
    test_limit: int | None = Field(None, ge=1)
    """Use at most this many problems of each test set."""
    num_labelled: int | None = Field(None, ge=1)
    """How many problems keep their rationale for the warm-up (the first that have one); unset, all."""

    _split_sets = field_validator("also_test", mode="before")(_split)

    @field_validator("also_test")
    @classmethod
    def _tested_once(cls, sources: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Refuse a set that is named twice, or is tested on anyway."""
        key = "data.test" if info.data.get("test") else "data.train"
        named = {_as_path(info.data.get("test") or info.data.get("train", "")): key}
        for source in sources:
            if (path := _as_path(source)) in named:
                raise ValueError(f"{source} is already named by {named[path]}; leave it out here")
            named[path] = "this list"
        return sources


def _as_path(source: str) -> str:
    """One spelling for all that name the same file."""
    return os.path.abspath(os.path.expanduser(source))


class SyntheticRecipe(_Section):
    """The built-in word problems, used where data.train or a test set is `synthetic`."""

    num_train: int = Field(400, ge=1)
    num_dev: int = Field(0, ge=0)
    num_test: int = Field(200, ge=1)
    min_steps: int = Field(1, ge=1, le=4)
    """Minimum reasoning steps of a problem."""
    max_steps: int = Field(4, ge=1, le=4)
    """Maximum reasoning steps of a problem."""


class LoraRecipe(_Section):
    """The LoRA adapter that is trained instead of the weights."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class SftRecipe(_Section):
    """Supervised fine-tuning (SFT); every round starts from the base."""

    learning_rate: float = Field(2e-4, gt=0)
    epochs: float = Field(2, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimiser steps, in the warm-up and in every round; unset, after `sft.epochs`."""
    batch_size: int = Field(128, ge=1)
    """Rationales per optimiser step."""
    micro_batch_size: int = Field(8, ge=1)
    """Rationales per forward pass; gradients are accumulated over the batch."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where the cosine schedule ends, as a fraction of the peak."""
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int = Field(640, ge=16)
    """Tokens of prompt and rationale (T5: of either); longer examples are dropped and counted."""
    calculated_in_loss: bool = True
    """Train on the tokens that the calculator writes as well as on the model's own."""


class DpoRecipe(_Section):
    """Direct preference optimisation (DPO) of the SFT policy, which is also the frozen reference."""

    learning_rate: float = Field(2e-5, gt=0)
    max_steps: int = Field(100, ge=1)
    """Stop after this many optimiser steps or `dpo.epochs`, whichever comes first."""
    epochs: float = Field(1, gt=0)
    """Passes over the pairs, at most."""
    max_logp_drop: float | None = Field(None, gt=0)
    """Stop after a step whose chosen or rejected rationales have, on average, a log-probability of more than this many
    nats below the reference's, and go back to the weights before the last step that had not; unset, never.
    """
    batch_size: int = Field(128, ge=1)
    micro_batch_size: int = Field(4, ge=1)
    beta: float = Field(0.1, gt=0)
    loss: str = "sigmoid"
    """Any loss_type of trl's DPOConfig: sigmoid, hinge, ipo, robust, sigmoid_norm …"""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of an added negative log-likelihood term on the chosen rationale."""
    gate: float = Field(0.05, ge=0, le=1)
    """Share of a round's draws that is spent on comparing the policies before and after DPO, on at least 64 problems:
    the round goes on with the DPO policy only if it clearly draws more distinct right rationales. On top of the
    share, both also answer at most as many dev problems, for the report alone. `off` (0): no comparison on either, and
    always the DPO policy, as in the paper.
    """
    keep: Literal["better", "always"] = "better"
    """`always` compares the policies (`dpo.gate`) for the report alone: the round goes on with the DPO policy."""
    calculated_in_loss: bool = True
    """Count the tokens that the calculator writes in the log-probabilities that are compared."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int = Field(640, ge=16)
    """Tokens of prompt and longer rationale (T5: of either); longer pairs are dropped and counted."""

    @field_validator("gate", mode="before")
    @classmethod
    def _gate_on_or_off(cls, value: Any) -> Any:
        """Accept `on` and `off`, which YAML reads as booleans."""
        names = {"on": 0.05, "off": 0.0, True: 0.05, False: 0.0}
        return names.get(value, value) if isinstance(value, bool | str) else value


class SamplingRecipe(_Section):
    """How rationales are sampled."""

    samples_for_pairs: int = Field(5, ge=1)
    """Samples per question from the SFT policy, for preference pairs."""
    samples_for_labels: int = Field(3, ge=1)
    """K: samples per question from the DPO policy, for pseudo-labels (the paper's 3, 5 or 10)."""
    temperature: float = Field(0.7, gt=0)
    top_k: int | None = Field(None, ge=1)
    """Draw only from the k likeliest tokens (the papers' code: 50, the default of transformers); unset, from all."""
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(300, ge=8)
    weights: Literal["merged", "quantized"] = "merged"
    """Sample from merged 16-bit weights, or from the quantised base plus adapter: slower, in a third of the memory."""
    max_rows: int = Field(256, ge=1)
    """Maximum rationales decoded in one batch; fewer if memory is short."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory for the KV cache and logits; unset, a third of the RAM, or four fifths of what the model leaves free on a
    GPU.
    """


class PairsRecipe(_Section):
    """How graded rationales become preference pairs."""

    jaccard_threshold: float = Field(0.7, gt=0, le=1)
    """Two rationales whose token sets have a higher Jaccard index than this count as duplicates."""
    max_per_problem: int = Field(3, ge=1)
    equal_steps: bool = False
    """Prefer pairs whose rationales have equally many steps; among those, the least similar ones."""
    gold_first: bool = True
    """Put the gold rationale, if the problem has one, first among the chosen."""
    pool_rounds: bool = True
    """Also use the samples of all earlier SFT policies."""
    unfinished_rejected: bool = False
    """Count rationales that hit the token limit as wrong."""
    stepwise: float = Field(0.0, ge=0, le=1)
    """Share of the pairs that is step-controlled (SCDPO): right and wrong rests of a rationale after the same first
    steps. Ordinary pairs beyond the other share are dropped at random. Without effect on scdpo, dpo-equal and dpo.
    """


class RestsRecipe(_Section):
    """How rests of right rationales are sampled again for step-controlled pairs (SCDPO, section 3.2)."""

    cut: Literal["random", "every", "least-certain"] = "random"
    """After which step the first right rationale of a problem is cut: one at random (the paper), every one in turn (its
    code), or the one before the step whose own tokens the policy finds least likely (neither).
    """
    temperature: float = Field(1.1, gt=0)
    """Temperature of the first sampled step."""
    temperature_increase: float = Field(0.05, ge=0)
    """Added for each further step (line)."""
    max_temperature: float = Field(1.4, gt=0)
    max_tries: int = Field(4, ge=1)
    """Rests sampled at most at a cut, until one is wrong."""


class LabelsRecipe(_Section):
    """How graded rationales become pseudo-labels."""

    duplicates: Literal["jaccard", "equations"] = "jaccard"
    """Which rationales of a problem count as duplicates: those with a Jaccard index above the threshold, or those with
    the same equations in the same order (as in RFT, Yuan et al. 2023).
    """
    jaccard_threshold: float = Field(0.7, gt=0, le=1)
    pool_rounds: bool = True
    """Also use the samples of all earlier rounds."""
    from_rests: bool = False
    """Also use the right rationales among those that were sampled again for step-controlled pairs."""
    from_pairs: bool = False
    """Also use the right rationales that were sampled for preference pairs (the paper does not)."""
    cap_percentile: int = Field(90, ge=1, le=100)
    """Cap the labels of a problem at this percentile of the labels per problem."""
    max_per_problem: int = Field(100, ge=1)

    @property
    def threshold(self) -> float | None:
        """The Jaccard threshold, or None to compare equations."""
        return self.jaccard_threshold if self.duplicates == "jaccard" else None


class CalculatorRecipe(_Section):
    """The calculator that completes `<<expression=`."""

    enabled: bool = True
    max_decimals: int = Field(6, ge=0, le=12)
    """Results with at most this many decimals are printed exactly."""
    rounded_decimals: int = Field(2, ge=0, le=12)
    """All other results are rounded to this many decimals."""


class CodeRecipe(_Section):
    """The code in solutions (`solutions=code`): what runs it, and the limits of each block (SCDPO, section 3.1)."""

    sandbox: SandboxName = "monty"
    """monty: an interpreter of its own, without sympy; sandlock, bubblewrap: the real Python with sympy, shut in by the
    Linux kernel.
    """
    seconds: float = Field(2.0, gt=0, le=60)
    memory_mib: int = Field(64, ge=16)
    output_chars: int = Field(400, ge=40)
    """Characters of what a block printed that enter the solution; the middle of longer outputs is cut out."""
    max_blocks: int = Field(8, ge=1)
    """Blocks of one solution that are run."""
    max_chars: int = Field(3000, ge=1)
    """Longer blocks are not run."""

    @property
    def limits(self) -> Limits:
        """What the sandbox enforces."""
        return Limits(self.seconds, self.memory_mib, self.output_chars)


class ExportRecipe(_Section):
    """The exported GGUF file."""

    quant: Literal["auto", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16"] = "q4_k_m"
    """auto: the smallest file whose dev accuracy is within `export.max_loss` of 16 bit; takes a while."""
    max_loss: float = Field(1.0, ge=0, le=100)
    """Points of dev accuracy that export.quant=auto may lose against 16 bit."""
    merge: Literal["auto", "dequantized", "original"] = "auto"
    """The base that an adapter trained on a 4-bit one is merged onto: that base dequantised, or the original 16-bit
    weights; auto takes the one with more right dev answers, without dev problems the former.
    """


class Recipe(_Section):
    """All settings of a run."""

    method: MethodName = "dpo-st"
    """dpo-st (Algorithm 2), st (Algorithm 1: plain self-training), sft (warm-up only); of SCDPO's paper, DPO of the
    warm-up alone: dpo, scdpo (step-controlled pairs too), dpo-equal (as many ordinary pairs as scdpo).
    """
    solutions: Literal["text", "code"] = "text"
    """text: as GSM8K's, with the calculator; code: text, Python code and what it printed, without the calculator
    (SCDPO). For code, annotated rationales of the data become small programs.
    """
    rounds: int = Field(3, ge=1)
    """Maximum rounds of self-training."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many rounds without better dev accuracy; unset, run all rounds."""
    seed: int = Field(42, ge=0)
    checkpoint_s: float = Field(60, ge=0)
    """Seconds between training checkpoints; longer if writing them would take more than 1 % of the time."""
    report_to: tuple[Tracker, ...] = ()
    """Also report training metrics to these trackers, as transformers does: tensorboard, trackio, wandb, mlflow."""
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    synthetic: SyntheticRecipe = SyntheticRecipe()
    lora: LoraRecipe = LoraRecipe()
    sft: SftRecipe = SftRecipe()
    sampling: SamplingRecipe = SamplingRecipe()
    pairs: PairsRecipe = PairsRecipe()
    rests: RestsRecipe = RestsRecipe()
    dpo: DpoRecipe = DpoRecipe()
    labels: LabelsRecipe = LabelsRecipe()
    calculator: CalculatorRecipe = CalculatorRecipe()
    code: CodeRecipe = CodeRecipe()
    export: ExportRecipe = ExportRecipe()

    _split_trackers = field_validator("report_to", mode="before")(_split)

    @model_validator(mode="after")
    def _steps_in_order(self) -> "Recipe":
        if self.synthetic.min_steps > self.synthetic.max_steps:
            raise ValueError("synthetic.min_steps is larger than synthetic.max_steps")
        return self

    @model_validator(mode="after")
    def _rests_are_possible(self) -> "Recipe":
        if self.rests.temperature > self.rests.max_temperature:
            raise ValueError("rests.temperature is larger than rests.max_temperature; raise the latter")
        if self.labels.from_rests and not self.pairs.stepwise:
            raise ValueError("labels.from_rests=true needs pairs.stepwise above 0")
        return self

    @model_validator(mode="after")
    def _steps_to_cut(self) -> "Recipe":
        method, share = METHODS[self.method], self.pairs.stepwise
        if self.data.train == "synthetic" and self.synthetic.max_steps == 1 and method.samples_rests(share):
            key = f"pairs.stepwise={share:g}" if method.has_rounds else f"method={method.name}"
            raise ValueError(f"{key} needs problems of two steps or more; set synthetic.max_steps=2")
        return self

    @model_validator(mode="after")
    def _dev_for_auto(self) -> "Recipe":
        size = self.synthetic.num_dev if self.data.train == "synthetic" else self.data.dev_size
        if self.export.quant == "auto" and size == 0:
            key = "synthetic.num_dev" if self.data.train == "synthetic" else "data.dev_size"
            raise ValueError(f"export.quant=auto needs dev problems; set {key}=100, or name a type such as q4_k_m")
        return self

    @model_validator(mode="after")
    def _code_or_calculator(self) -> "Recipe":
        if self.solutions == "code" and self.calculator.enabled:
            raise ValueError("solutions=code has no calculator; set calculator.enabled=false")
        return self

    @model_validator(mode="after")
    def _calculator_to_leave_out(self) -> "Recipe":
        for name, section in (("sft", self.sft), ("dpo", self.dpo)):
            if not section.calculated_in_loss and not self.calculator.enabled:
                raise ValueError(f"{name}.calculated_in_loss=false needs calculator.enabled=true")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "Recipe":
        for name, section in (("sft", self.sft), ("dpo", self.dpo)):
            if section.batch_size > section.micro_batch_size and section.batch_size % section.micro_batch_size:
                raise ValueError(
                    f"{name}.batch_size={section.batch_size} is not a multiple of "
                    f"{name}.micro_batch_size={section.micro_batch_size}; change one of the two"
                )
        return self


def solution_format(recipe: Recipe) -> dict[str, str]:
    """Return what a model's files say of how its solutions are written: nothing for text."""
    return {"solutions": "code", "sandbox": recipe.code.sandbox} if recipe.solutions == "code" else {}


def with_format(values: Mapping[str, Any]) -> Recipe:
    """Return the defaults for a model whose files say `values`: those of `solution_format`, and others."""
    if values.get("solutions") != "code":
        return Recipe()
    known = get_args(SandboxName)
    name = values.get("sandbox")
    code = CodeRecipe(sandbox=name if name in known else "monty")
    return Recipe(solutions="code", calculator=CalculatorRecipe(enabled=False), code=code)
