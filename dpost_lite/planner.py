"""The planner: model shape, recipe and memory -> micro-batches, rows, and the peak of every stage, before it is run.

The recipe says what is learned; the plan says only how it is cut so that it fits: the effective batch never changes,
and neither do the samples. Sizes are counted from shapes, tensor by tensor, so planning needs neither weights nor a
GPU. What cannot be counted is reserved: the CUDA context, and a share for fragmentation.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dpost_lite.errors import ModelError, RecipeError
from dpost_lite.models import backends
from dpost_lite.models.shapes import BASES, ModelShape, read_shape
from dpost_lite.recipe import Recipe
from dpost_lite.sampling.request import MAX_PREFILL_TOKENS, max_prompts

GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight's code, its block's 8-bit scale, that one's own scale (QLoRA, 3)
CONTEXT_BYTES = 0.6 * GIB  # CUDA, cuBLAS and the kernels loaded
FRAGMENTATION = 0.06  # of what is allocated
MICRO_BATCHES = (16, 8, 4, 2, 1)
ROWS = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16)
MIN_ROWS = ROWS[-1]
MIN_MERGED_ROWS = 32  # below, 4-bit weights with many rows are the faster choice
PROMPT_TOKENS = 256  # the papers' limit; GSM8K's mean is about 100
GSM8K_PROBLEMS = 7_473  # of its training part
RATIONALE_BYTES = 2_000  # text, token ids and figures in JSON
PROCESS_BYTES = 2 * GIB  # Python, PyTorch and the libraries in RAM
EXPORT_SHARE = 2.3  # of the 16-bit weights on disk: they themselves, the f16 file, and the quantised one (0.3)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage. `parts` are bytes of the GPU by name, `choices` what was chosen, `settings` the recipe keys for it."""

    name: str
    parts: dict[str, float]
    choices: dict[str, int | str]
    settings: tuple[str, ...]
    ram_bytes: float
    disk_bytes: float

    @property
    def peak_bytes(self) -> float:
        """Most memory of the GPU that the stage takes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(f"{name} {value}" for name, value in self.choices.items())


@dataclass(frozen=True, slots=True)
class Plan:
    """How a recipe is cut for one model and size, as well as it goes; `fits` says whether that is enough."""

    shape: ModelShape
    budget_bytes: float
    stages: tuple[StagePlan, ...]

    @property
    def largest(self) -> StagePlan:
        """The stage that takes most of the GPU's memory."""
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    @property
    def fits(self) -> bool:
        """Whether every stage stays within the budget."""
        return self.largest.peak_bytes <= self.budget_bytes

    @property
    def samples_merged(self) -> bool:
        """Whether rationales are sampled from merged 16-bit weights."""
        return any(stage.choices.get("weights") == "merged" for stage in self.stages)

    def __str__(self) -> str:
        """The base and its licence, then what was chosen for each stage, a line each."""
        base, billions = BASES.get(self.shape.name), self.shape.num_parameters / 1e9
        licence = f", {base.licence}{', gated' if base.is_gated else ''}" if base else ""
        first = f"{self.shape.name}: {billions:.2f} B parameters, {2 * billions:.1f} GB in 16 bit{licence}"
        return "\n".join([first, *map(str, self.stages)])

    @property
    def settings(self) -> list[str]:
        """What makes a recipe run as planned, as `key=value`."""
        return [f'model.name="{self.shape.name}"', *(setting for stage in self.stages for setting in stage.settings)]


def parse_memory(text: str) -> float:
    """Return the bytes of a size such as 24GB (10⁹) or 24GiB (2³⁰). Raises RecipeError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|G|MB|MiB)\s*", text, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise RecipeError(f"--gpu-mem: '{text}' is no size; give one like 24GB or 24GiB, or auto")
    unit = {"gb": 1e9, "g": 1e9, "gib": GIB, "mb": 1e6, "mib": 2**20}[match[2].lower()]
    return float(match[1]) * unit


def plan_for(recipe: Recipe, size: str, *, base: str | None = None) -> Plan:
    """Plan `recipe` for a GPU of `size`, or for the memory that is free now if that is "auto".

    The model is the one that the recipe names, or else `base`, or else the largest open base that fits. Raises
    RecipeError for a bad size, and ModelError, with what would fit, if the model does not.
    """
    budget = free_memory() if size == "auto" else parse_memory(size)
    if "name" in recipe.model.model_fields_set:
        base = recipe.model.name
    return make_plan(recipe, find_shape(base), budget) if base else pick_base(recipe, budget)


def fit_to_gpu(recipe: Recipe, size: str, *, base: str | None = None) -> Plan:
    """Plan as `plan_for` does, and hold this process to the size. Raises RecipeError without a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise RecipeError(
            f"--gpu-mem {size}: this machine has no CUDA GPU; leave it out to run on the CPU, "
            "or see what a GPU would do with `dpost-lite plan --gpu-mem 24GB`"
        )
    plan = plan_for(recipe, size, base=base)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, plan.budget_bytes / total))
    return plan


def free_memory() -> float:
    """Return the bytes that are free now on the first GPU. Raises RecipeError without one."""
    import torch

    if not torch.cuda.is_available():
        raise RecipeError("--gpu-mem auto: this machine has no CUDA GPU; give a size to plan for, such as 24GB")
    return float(torch.cuda.mem_get_info(0)[0])


def find_shape(name: str) -> ModelShape:
    """Return the shape of a model as `model.name` gives it; of a hub model no more than its config.json is fetched."""
    if name in BASES:
        return BASES[name].shape
    return replace(read_shape(backends.find(name, files=("config.json",))), name=name)


def make_plan(recipe: Recipe, shape: ModelShape, budget_bytes: float) -> Plan:
    """Fit every stage of `recipe` into `budget_bytes` of a GPU.

    Raises ModelError that names the largest stage, what it would take at least, and a base that fits, if it does not.
    """
    plan = _cut(recipe, shape, budget_bytes)
    if not plan.fits:
        raise ModelError(_too_large(plan, recipe))
    return plan


def pick_base(recipe: Recipe, budget_bytes: float) -> Plan:
    """Return the plan of the largest open base that fits, of those that sample from 16 bit if there are any.

    Raises ModelError, with the smallest plan, if none does.
    """
    plans = _open_plans(recipe, budget_bytes)
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        raise ModelError(_too_large(plans[0], recipe))
    return ([plan for plan in fitting if plan.samples_merged] or fitting)[-1]


def _open_plans(recipe: Recipe, budget_bytes: float) -> list[Plan]:
    """Plans of all bases that are not gated, small ones first."""
    shapes = [base.shape for base in BASES.values() if not base.is_gated]
    return [_cut(recipe, s, budget_bytes) for s in sorted(shapes, key=lambda shape: shape.num_parameters)]


def _cut(recipe: Recipe, shape: ModelShape, budget_bytes: float) -> Plan:
    def largest(choices: Iterable[StagePlan]) -> StagePlan:
        """The first that fits, or else the last, which is the smallest."""
        *_, last = smaller = list(choices)
        return next((stage for stage in smaller if stage.peak_bytes <= budget_bytes), last)

    sampling = largest(_sampling_choices(recipe, shape))
    stages = [largest(_training_choices("sft", recipe, shape)), sampling]
    if recipe.method == "dpo-st":
        stages.append(largest(_training_choices("dpo", recipe, shape)))
    stages.append(_merge(recipe, shape, on_gpu=sampling.choices["weights"] == "merged"))
    return Plan(shape, budget_bytes, tuple(stages))


def _training_choices(name: str, recipe: Recipe, shape: ModelShape) -> Iterable[StagePlan]:
    batch_size = (recipe.sft if name == "sft" else recipe.dpo).batch_size
    return [_training(name, recipe, shape, micro) for micro in MICRO_BATCHES if batch_size % micro == 0]


def weight_bytes(recipe: Recipe, shape: ModelShape) -> float:
    """Bytes of the frozen base: linear layers in 4 bit or 16, everything else in 16."""
    linear = NF4_BYTES if recipe.model.quantization == "nf4" else 2
    return shape.num_linear * linear + (shape.num_parameters - shape.num_linear) * 2


def _training(name: str, recipe: Recipe, shape: ModelShape, micro: int) -> StagePlan:
    """SFT sees `micro` sequences a pass; DPO twice as many, through the policy and through the frozen reference."""
    section = recipe.sft if name == "sft" else recipe.dpo
    num_tokens = micro * section.max_length * (1 if name == "sft" else 2)
    lora = shape.num_lora(recipe.lora.rank)
    # Of a checkpointed model: each layer's input, and all of one layer while its gradient is computed; LoRA keeps a
    # float32 copy of its input; attention (flash or memory-efficient) keeps no scores.
    inputs, outputs = (sum(size[i] for size in shape.linear_sizes) for i in (0, 1))
    layer = 6 * inputs + 2 * outputs + 6 * shape.intermediate + 16 * shape.hidden
    dequantised = 2 * max(i * o for i, o in shape.linear_sizes) if recipe.model.quantization == "nf4" else 0
    logits = num_tokens * shape.vocabulary * (2 + 4 + 4 + 2)  # 16 bit, float32, and both gradients
    if name == "dpo":
        logits += num_tokens * shape.vocabulary * (2 + 4)  # the reference's, alive beside the policy's
    parts = {
        "weights": weight_bytes(recipe, shape),
        "adapters": lora * 4.0 * (1 if name == "sft" else 2),
        "optimiser": lora * (4.0 + 2.0),  # gradient in float32, two moments of 8 bits
        "activations": float(num_tokens * (2 * shape.hidden * shape.num_layers + layer) + 2 * dequantised),
        "logits": float(logits),
    }
    choices: dict[str, int | str] = {
        "micro-batch": micro,
        "accumulation": max(1, section.batch_size // micro),
        "longest": section.max_length,
    }
    settings = (f"{name}.micro_batch_size={micro}",)
    return StagePlan(name, _with_reserve(parts), choices, settings, PROCESS_BYTES + lora * 2.0, lora * 4.0)


def _sampling_choices(recipe: Recipe, shape: ModelShape) -> Iterable[StagePlan]:
    """Merged 16-bit weights as long as they leave room for rows worth having, then 4 bits; many rows before few."""
    rows = [n for n in ROWS if n <= max(MIN_ROWS, recipe.sampling.max_rows)]
    wanted = [("merged", n) for n in rows if n >= min(MIN_MERGED_ROWS, rows[0])] + [("quantized", n) for n in rows]
    if recipe.model.quantization == "none":
        wanted = [("merged", n) for n in rows]
    return [_sampling(recipe, shape, weights, num_rows) for weights, num_rows in wanted]


def _sampling(recipe: Recipe, shape: ModelShape, weights: str, num_rows: int) -> StagePlan:
    section = recipe.sampling
    num_samples = min(section.samples_for_pairs, section.samples_for_labels)
    positions = num_rows * section.max_new_tokens + max_prompts(num_rows, num_samples) * PROMPT_TOKENS
    lora = shape.num_lora(recipe.lora.rank)
    inputs, outputs = (sum(size[i] for size in shape.linear_sizes) for i in (0, 1))
    parts = {
        "weights": 2.0 * shape.num_parameters if weights == "merged" else weight_bytes(recipe, shape),
        "adapters": 0.0 if weights == "merged" else 4.0 * lora,
        "activations": float(MAX_PREFILL_TOKENS * (2 * (inputs + outputs) + 8 * shape.hidden)),
        "logits": 4.0 * num_rows * shape.vocabulary * 4,  # and what the choice makes of them
        "cache": 2.0 * positions * shape.cache_position_values,
    }
    length = section.max_new_tokens + PROMPT_TOKENS
    choices: dict[str, int | str] = {"weights": weights, "rows": num_rows, "longest": length}
    settings = (
        f"sampling.weights={weights}",
        f"sampling.max_rows={num_rows}",
        f"sampling.memory_gib={(parts['cache'] + parts['logits']) / GIB:.2f}",
    )
    num_problems = recipe.data.limit or GSM8K_PROBLEMS
    disk = num_problems * (section.samples_for_pairs + section.samples_for_labels) * RATIONALE_BYTES
    return StagePlan("sampling", _with_reserve(parts), choices, settings, PROCESS_BYTES, disk)


def _merge(recipe: Recipe, shape: ModelShape, *, on_gpu: bool) -> StagePlan:
    """Merging and export: 16-bit weights grow out of the base layer by layer, in RAM if the GPU had no room to sample.

    In RAM lies the copy that is saved.
    """
    merged = 2.0 * shape.num_parameters
    parts = {"weights": merged, "adapters": 4.0 * shape.num_lora(recipe.lora.rank)} if on_gpu else {}
    ram = PROCESS_BYTES + merged * (1 if on_gpu else 2)
    choices: dict[str, int | str] = {"device": "GPU" if on_gpu else "CPU"}
    return StagePlan("merge, export", _with_reserve(parts), choices, (), ram, merged * EXPORT_SHARE)


def _with_reserve(parts: dict[str, float]) -> dict[str, float]:
    return {**parts, "reserve": CONTEXT_BYTES + FRAGMENTATION * sum(parts.values())}


def _too_large(plan: Plan, recipe: Recipe) -> str:
    stage, given = plan.largest, plan.budget_bytes
    fitting = [
        other.shape
        for other in _open_plans(recipe, given)
        if other.fits and other.shape.num_parameters < plan.shape.num_parameters
    ]
    advice = "no base of the table fits; lower sft.max_length and dpo.max_length, or take a card with more memory"
    if fitting:
        advice = f"{fitting[-1].name} fits"
        advice += f"; or lower {stage.name}.max_length" if stage.name in ("sft", "dpo") else ""
    return (
        f"--gpu-mem: {plan.shape.name} needs at least {stage.peak_bytes / GIB:.1f} GiB for {stage.name}, "
        f"and {given / GIB:.1f} GiB are given; {advice}"
    )
