"""The planner: model shape, recipe and memory -> micro-batches, rows, and the peak of every stage, before it is run.

The recipe says what is learned; the plan says only how it is cut so that it fits: the effective batch never changes,
and neither do the samples. Sizes are counted from shapes, tensor by tensor, so planning needs neither weights nor a
GPU. What cannot be counted is reserved: the CUDA context, and a share for fragmentation.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dpost_lite.errors import ModelError, RecipeError
from dpost_lite.models import backends
from dpost_lite.models.shapes import BASES, ModelShape, read_shape
from dpost_lite.recipe import Recipe

GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight's code, its block's 8-bit scale, that one's own scale (QLoRA, 3)
CONTEXT_BYTES = 0.6 * GIB  # CUDA, cuBLAS and the kernels loaded
FRAGMENTATION = 0.06  # of what is allocated
MICRO_BATCHES = (16, 8, 4, 2, 1)
ROWS = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16)
MIN_ROWS = ROWS[-1]
MIN_MERGED_ROWS = 32  # below, 4-bit weights with many rows are the faster choice
PROMPT_TOKENS = 256  # the papers' limit; GSM8K's mean is about 100
PREFILL_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage on the device. `parts` are bytes by name and add up to the peak; `choices` are what was chosen."""

    name: str
    parts: dict[str, float]
    choices: dict[str, int | str]
    ram_bytes: float
    disk_bytes: float

    @property
    def peak_bytes(self) -> float:
        """Most memory of the device that the stage takes."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits: stages in their order, and the recipe keys that make it so."""

    shape: ModelShape
    budget_bytes: float
    stages: tuple[StagePlan, ...]
    overrides: tuple[str, ...]

    @property
    def peak_bytes(self) -> float:
        """Most memory of the device that any stage takes."""
        return max(stage.peak_bytes for stage in self.stages)


def parse_memory(text: str) -> float:
    """Return the bytes of a size such as 24GB (10⁹) or 24GiB (2³⁰). Raises RecipeError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|G|MB|MiB)\s*", text, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise RecipeError(f"--gpu-mem: '{text}' is no size; give one like 24GB or 24GiB, or auto, or cpu")
    unit = {"gb": 1e9, "g": 1e9, "gib": GIB, "mb": 1e6, "mib": 2**20}[match[2].lower()]
    return float(match[1]) * unit


def free_memory() -> float:
    """Return the bytes that are free now on the first GPU. Raises RecipeError without one."""
    import torch

    if not torch.cuda.is_available():
        raise RecipeError("--gpu-mem auto: this machine has no CUDA GPU; give a size such as 24GB to plan for, or cpu")
    return float(torch.cuda.mem_get_info(0)[0])


def find_shape(name: str) -> ModelShape:
    """Return the shape of a model as `model.name` gives it; of a hub model no more than its config.json is fetched."""
    if name in BASES:
        return BASES[name].shape
    return replace(read_shape(backends.find_config(name)), name=name)


def make_plan(recipe: Recipe, shape: ModelShape, budget_bytes: float) -> Plan:
    """Fit every stage of `recipe` into `budget_bytes` of a GPU.

    Raises ModelError that names the stage, what it would take at least, and a base that fits, if one does not.
    """
    sft = _largest((_training("sft", recipe, shape, micro) for micro in _divisors(recipe.sft.batch_size)), budget_bytes)
    sampling = _largest(_sampling_choices(recipe, shape), budget_bytes)
    stages = [sft, sampling]
    if recipe.method == "dpo-st":
        stages.append(
            _largest(
                (_training("dpo", recipe, shape, micro) for micro in _divisors(recipe.dpo.batch_size)), budget_bytes
            )
        )
    stages.append(_merge(recipe, shape, on_gpu=sampling.choices["weights"] == "merged"))
    for stage in stages:
        if stage.peak_bytes > budget_bytes:
            raise ModelError(_too_large(stage, shape, recipe, budget_bytes))
    overrides = [f"sft.micro_batch_size={sft.choices['micro-batch']}"]
    if recipe.method == "dpo-st":
        overrides.append(f"dpo.micro_batch_size={stages[2].choices['micro-batch']}")
    cache = sum(sampling.parts[part] for part in ("cache", "logits"))
    overrides += [
        f"sampling.weights={sampling.choices['weights']}",
        f"sampling.max_rows={sampling.choices['rows']}",
        f"sampling.memory_gib={cache / GIB:.2f}",
    ]
    return Plan(shape, budget_bytes, tuple(stages), tuple(overrides))


def pick_base(recipe: Recipe, budget_bytes: float) -> ModelShape:
    """Return the largest open base of the table that fits, in 16 bit where it samples, if there is one.

    Raises ModelError, with the smallest plan, if none does.
    """
    bases = sorted(_open_bases(), key=lambda shape: shape.num_parameters)
    fitting = [shape for shape in bases if _fits(recipe, shape, budget_bytes)]
    if not fitting:
        make_plan(recipe, bases[0], budget_bytes)  # says why not
    fast = [shape for shape in fitting if _samples_merged(recipe, shape, budget_bytes)]
    return (fast or fitting)[-1]


def _samples_merged(recipe: Recipe, shape: ModelShape, budget_bytes: float) -> bool:
    plan = make_plan(recipe, shape, budget_bytes)
    return plan.stages[1].choices["weights"] == "merged"


def _open_bases() -> list[ModelShape]:
    return [base.shape for base in BASES.values() if not base.is_gated]


def _fits(recipe: Recipe, shape: ModelShape, budget_bytes: float) -> bool:
    try:
        make_plan(recipe, shape, budget_bytes)
    except ModelError:
        return False
    return True


def _largest(choices: Iterator[StagePlan], budget_bytes: float) -> StagePlan:
    """Return the first that fits, or else the last, which is the smallest."""
    stage = None
    for stage in choices:
        if stage.peak_bytes <= budget_bytes:
            return stage
    assert stage is not None
    return stage


def _divisors(batch_size: int) -> list[int]:
    return [micro for micro in MICRO_BATCHES if batch_size % micro == 0]


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
    return StagePlan(name, _with_reserve(parts), choices, ram_bytes=2 * GIB + lora * 2.0, disk_bytes=lora * 4.0)


def _sampling_choices(recipe: Recipe, shape: ModelShape) -> Iterator[StagePlan]:
    """Merged 16-bit weights as long as they leave room for rows worth having, then 4 bits; many rows before few."""
    rows = [n for n in ROWS if n <= max(MIN_ROWS, recipe.sampling.max_rows)]
    wanted = [("merged", n) for n in rows if n >= min(MIN_MERGED_ROWS, rows[0])] + [("quantized", n) for n in rows]
    if recipe.model.quantization == "none":
        wanted = [("merged", n) for n in rows]
    for weights, num_rows in wanted:
        yield _sampling(recipe, shape, weights, num_rows)


def _sampling(recipe: Recipe, shape: ModelShape, weights: str, num_rows: int) -> StagePlan:
    section = recipe.sampling
    num_samples = min(section.samples_for_pairs, section.samples_for_labels)
    num_prompts = min(num_rows, 2 * -(-num_rows // num_samples) + 1)  # as the engine counts them
    positions = num_rows * section.max_new_tokens + num_prompts * PROMPT_TOKENS
    lora = shape.num_lora(recipe.lora.rank)
    inputs, outputs = (sum(size[i] for size in shape.linear_sizes) for i in (0, 1))
    parts = {
        "weights": 2.0 * shape.num_parameters if weights == "merged" else weight_bytes(recipe, shape),
        "adapters": 0.0 if weights == "merged" else 4.0 * lora,
        "activations": float(PREFILL_TOKENS * (2 * (inputs + outputs) + 8 * shape.hidden)),
        "logits": 4.0 * num_rows * shape.vocabulary * 4,  # and what the choice makes of them
        "cache": 2.0 * positions * shape.cache_position_values,
    }
    length = section.max_new_tokens + PROMPT_TOKENS
    choices: dict[str, int | str] = {"weights": weights, "rows": num_rows, "longest": length}
    num_rationales = recipe.data.limit or 7_473
    disk = num_rationales * (section.samples_for_pairs + section.samples_for_labels) * 2_000.0
    return StagePlan("sampling", _with_reserve(parts), choices, ram_bytes=2 * GIB, disk_bytes=disk)


def _merge(recipe: Recipe, shape: ModelShape, *, on_gpu: bool) -> StagePlan:
    """Merging and export: 16-bit weights grow out of the base layer by layer, in RAM if the GPU had no room to sample.

    On disk lie the merged weights, the f16 file and the quantised one.
    """
    merged = 2.0 * shape.num_parameters
    parts = {"weights": merged, "adapters": 4.0 * shape.num_lora(recipe.lora.rank)} if on_gpu else {}
    ram = 2 * GIB + merged * (1 if on_gpu else 2)  # the copy that is saved
    choices: dict[str, int | str] = {"device": "GPU" if on_gpu else "CPU"}
    return StagePlan("merge, export", _with_reserve(parts), choices, ram_bytes=ram, disk_bytes=merged * 2.3)


def _with_reserve(parts: dict[str, float]) -> dict[str, float]:
    return {**parts, "reserve": CONTEXT_BYTES + FRAGMENTATION * sum(parts.values())}


def _too_large(stage: StagePlan, shape: ModelShape, recipe: Recipe, budget_bytes: float) -> str:
    smaller = [
        other
        for other in _open_bases()
        if other.num_parameters < shape.num_parameters and _fits(recipe, other, budget_bytes)
    ]
    advice = "no base of the table fits; lower sft.max_length and dpo.max_length, or take a card with more memory"
    if smaller:
        best = max(smaller, key=lambda other: other.num_parameters)
        advice = f"{best.name} fits; or lower {'dpo' if stage.name == 'dpo' else 'sft'}.max_length"
    return (
        f"--gpu-mem: {shape.name} needs at least {stage.peak_bytes / GIB:.1f} GiB for {stage.name}, "
        f"and {budget_bytes / GIB:.1f} GiB are given; {advice}"
    )
