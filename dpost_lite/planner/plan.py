"""The planner: model shape, recipe and device -> micro-batches, rows, and the peak and hours of every stage.

The recipe says what is learned; the plan only says how to split the work so that it fits: neither the effective batch
nor the samples change. Shapes are enough: planning needs neither weights nor a GPU.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dpost_lite.errors import ModelError, RecipeError
from dpost_lite.methods import METHODS
from dpost_lite.models import hardware, hub
from dpost_lite.models.shapes import BASES, ModelShape, read_shape
from dpost_lite.planner.device import GIB, HERE, Device, find_device
from dpost_lite.planner.footprint import (
    Parts,
    logits_in_chunks,
    longest_row,
    merge_parts,
    num_trained,
    sampling_parts,
    training_fragmentation,
    training_parts,
    with_reserve,
)
from dpost_lite.planner.pace import Estimate, Pace
from dpost_lite.planner.recorder import planned_stages
from dpost_lite.planner.workload import Workload, workload_of
from dpost_lite.recipe import Recipe
from dpost_lite.runs.stage_names import StageName

MICRO_BATCHES = (16, 8, 4, 2, 1)
ROWS = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16)
MIN_ROWS = ROWS[-1]
MIN_MERGED_ROWS = 32  # below, 4-bit weights with many rows are the faster choice
RATIONALE_BYTES = 2_000  # text, token ids and figures in JSON
PARENT_BYTES = 2 * GIB  # the command and one stage's process, in RAM beside a GPU
AUTO_SHARE = 1.6  # export.quant=auto has all types side by side
EXPORT_SHARE = 2.3  # of the 16-bit weights on disk: they themselves, the f16 file, and the quantised one (0.3)


PLANNED_KINDS: dict[str, str] = {
    "sft": "sft", "dpo": "dpo", "samples-pairs": "sampling", "rests": "sampling", "gate": "sampling",
    "samples-labels": "sampling", "score": "sampling", "score-also": "sampling",
    "export": "merge, export",
}  # fmt: skip
"""Which plan holds for a kind of stage (`runs.stage_names`); the others need no model."""

NOTHING = Estimate(0, 0)

Case = tuple[Recipe, Workload]
"""A run to plan."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One kind of stage. `parts` are bytes of the device by name, `choices` what was chosen, `settings` the recipe keys
    for it, `total` the tokens and seconds of all stages of this kind."""

    name: str
    parts: Parts
    choices: dict[str, int | str]
    settings: tuple[str, ...]
    ram_bytes: float
    disk_bytes: float
    total: Estimate = NOTHING

    @property
    def peak_bytes(self) -> float:
        """Most memory of the device that the stage takes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(f"{name} {value}" for name, value in self.choices.items())


@dataclass(frozen=True, slots=True)
class Plan:
    """The best fit found for a recipe on one model and device; `fits` says whether that is enough.

    `estimates` are by stage of the run, in its order.
    """

    shape: ModelShape
    device: Device
    stages: tuple[StagePlan, ...]
    estimates: dict[StageName, Estimate]

    @property
    def largest(self) -> StagePlan:
        """The stage that needs most of the device's memory."""
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    @property
    def peaks(self) -> dict[str, float]:
        """Bytes at the peak of each stage of a run that needs a model, by the stage's name."""
        sizes = {stage.name: stage.peak_bytes for stage in self.stages}
        kinds = {str(name): PLANNED_KINDS.get(name.kind) for name in self.estimates}
        return {name: sizes[kind] for name, kind in kinds.items() if kind in sizes}

    @property
    def fits(self) -> bool:
        """Whether every stage stays within the device's memory."""
        return self.largest.peak_bytes <= self.device.memory_bytes

    @property
    def samples_merged(self) -> bool:
        """Whether rationales are sampled from merged 16-bit weights."""
        return any(stage.choices.get("weights") == "merged" for stage in self.stages)

    @property
    def seconds(self) -> float:
        """The whole run."""
        return sum(estimate.seconds for estimate in self.estimates.values())

    def __str__(self) -> str:
        """The base and its licence, then what was chosen for each stage, a line each."""
        base, billions = BASES.get(self.shape.name), self.shape.num_parameters / 1e9
        licence = f", {base.licence}{', gated' if base.is_gated else ''}" if base else ""
        first = f"{self.shape.name}: {billions:.2f} B parameters, {2 * billions:.1f} GB in 16 bit{licence}"
        return "\n".join([first, *map(str, self.stages)])


def plan_for(recipes: Sequence[Recipe], size: str, *, base: str | None = None, to_run: bool = False) -> list[Plan]:
    """Plan runs that differ only in method, seed and number of samples. `size` is GPU memory, "auto" for what is free,
    or "cpu" for this machine's RAM. All get the same settings, so that each fits.

    The model is the one that the recipes name, or else `base`, or else the largest open base that fits; on a CPU, where
    time is short and not memory, the recipe's default. Raises RecipeError for a bad size and, `to_run`, if this machine
    has no such GPU; DataError for problems that cannot be read; and ModelError, with what would fit, if the model does
    not.
    """
    model = recipes[0].model
    device = (_device_here(size) if to_run else find_device(size)).computing(model.compute_dtype)
    cases = [(recipe, workload_of(recipe)) for recipe in recipes]
    if device.is_cpu or "name" in model.model_fields_set:
        base = model.name
    return make_plans(cases, find_shape(base), device) if base else pick_base(cases, device)


def _device_here(size: str) -> Device:
    if size != "cpu" and hardware.device() != "cuda":
        raise RecipeError(
            f"--gpu-mem {size}: this machine has no CUDA GPU; give cpu, or leave it out, to run on the CPU, "
            f"or see what a GPU would do with `dpost-lite plan --gpu-mem {'24GB' if size == 'auto' else size}`"
        )
    device = find_device(size)
    if device.rates_of != HERE:
        raise RecipeError(f"--gpu-mem {size}: this machine's GPU has less; give auto, or a smaller size")
    return device


def settings_of(plans: Sequence[Plan]) -> list[str]:
    """Return what makes runs go as planned, as `key=value`, the same for all of them: a kind of stage has the settings
    of the run that takes most for it, which come last.
    """
    stages = sorted((stage for plan in plans for stage in plan.stages), key=lambda stage: stage.peak_bytes)
    return [f'model.name="{plans[0].shape.name}"', *(setting for stage in stages for setting in stage.settings)]


def estimate(recipe: Recipe) -> Plan:
    """Plan the recipe's own model for all of this machine, whether it fits or not: for the time it will take."""
    device = find_device("auto" if hardware.device() == "cuda" else "cpu").computing(recipe.model.compute_dtype)
    (plan,) = _cut([(recipe, workload_of(recipe))], find_shape(recipe.model.name), device)
    return plan


def find_shape(name: str) -> ModelShape:
    """Return the shape of a model as `model.name` gives it; of a hub model no more than its config.json is fetched."""
    if name in BASES:
        return BASES[name].shape
    return replace(read_shape(hub.find(name, files=("config.json",))), name=name)


def make_plans(cases: Sequence[Case], shape: ModelShape, device: Device) -> list[Plan]:
    """Fit every stage of each case into the device's memory, with the same settings for all.

    Raises ModelError that names the largest stage, what it would take at least, and a base that fits, if it does not.
    """
    plans = _cut(cases, shape, device)
    if not _all_fit(plans):
        raise ModelError(_too_large(plans, cases))
    return plans


def fit_stage(
    kind: Literal["sft", "dpo", "sampling"],
    case: Case,
    shape: ModelShape,
    device: Device,
    *,
    weights: str | None = None,
) -> StagePlan:
    """Return the plan of one kind of stage by itself: the first choice that fits the device, or else the smallest.

    `weights`, "merged" or "quantized", leaves no other to choose from for sampling.
    """
    recipe, work = case
    if kind == "sampling":
        choices = _sampling_choices(recipe, shape, device, work)
        choices = [stage for stage in choices if weights in (None, stage.choices["weights"])]
    else:
        choices = _training_choices(kind, recipe, shape, device, work)
    return next((stage for stage in choices if stage.peak_bytes <= device.memory_bytes), choices[-1])


def pick_base(cases: Sequence[Case], device: Device) -> list[Plan]:
    """Return the plans for the largest open base with which all cases fit, preferring bases sampled from 16 bit.

    Raises ModelError, with the smallest plan, if none does.
    """
    by_base = _open_plans(cases, device)
    fitting = [plans for plans in by_base if _all_fit(plans)]
    if not fitting:
        raise ModelError(_too_large(by_base[0], cases))
    return ([plans for plans in fitting if plans[0].samples_merged] or fitting)[-1]


def _all_fit(plans: Iterable[Plan]) -> bool:
    return all(plan.fits for plan in plans)


def _open_plans(cases: Sequence[Case], device: Device) -> list[list[Plan]]:
    """Plans for each base that is not gated, small ones first."""
    shapes = [base.shape for base in BASES.values() if not base.is_gated]
    return [_cut(cases, shape, device) for shape in sorted(shapes, key=lambda shape: shape.num_parameters)]


def _cut(cases: Sequence[Case], shape: ModelShape, device: Device) -> list[Plan]:
    def largest(choices: Iterable[list[StagePlan]]) -> tuple[StagePlan, ...]:
        """Return each case's first choice with which all cases fit, or else the last, the smallest."""
        *_, last = smaller = list(zip(*choices, strict=True))
        return next((row for row in smaller if all(map(fits, cases, row))), last)

    def fits(case: Case, stage: StagePlan) -> bool:
        """Whether a stage fits, and merging too if it samples from merged weights."""
        stages = [stage]
        if stage.choices.get("weights") == "merged":
            stages.append(_merge(case[0], shape, device, on_device=True))
        return all(one.peak_bytes <= device.memory_bytes for one in stages)

    sft = largest(_training_choices("sft", recipe, shape, device, work) for recipe, work in cases)
    dpo = largest(_training_choices("dpo", recipe, shape, device, work) for recipe, work in cases)
    sampling = largest(_sampling_choices(recipe, shape, device, work) for recipe, work in cases)
    return [_plan(case, shape, device, *stages) for case, *stages in zip(cases, sft, sampling, dpo, strict=True)]


def _plan(case: Case, shape: ModelShape, device: Device, sft: StagePlan, sampling: StagePlan, dpo: StagePlan) -> Plan:
    recipe, work = case
    is_merged = sampling.choices["weights"] == "merged"
    merge = _merge(recipe, shape, device, on_device=is_merged or device.is_cpu)
    pace = Pace(recipe, shape, work, device, num_rows=int(sampling.choices["rows"]), is_merged=is_merged)
    estimates = {name: pace.of(name) for name in planned_stages(recipe)}
    stages = [sft, sampling, *([dpo] if METHODS[recipe.method].has_dpo else []), merge]
    return Plan(shape, device, tuple(_with_total(stage, estimates) for stage in stages), estimates)


def _with_total(stage: StagePlan, estimates: dict[StageName, Estimate]) -> StagePlan:
    own = [estimate for name, estimate in estimates.items() if PLANNED_KINDS.get(name.kind) == stage.name]
    return replace(stage, total=Estimate(sum(e.tokens for e in own), sum(e.seconds for e in own)))


def _training_choices(name: str, recipe: Recipe, shape: ModelShape, device: Device, work: Workload) -> list[StagePlan]:
    """Large micro-batches before small ones; a CPU gains nothing from more than the recipe's own."""
    section = recipe.sft if name == "sft" else recipe.dpo
    most = min(section.batch_size, section.micro_batch_size if device.is_cpu else MICRO_BATCHES[0])
    sizes = [n for n in range(most, 0, -1) if section.batch_size % n == 0 and (device.is_cpu or n in MICRO_BATCHES)]
    return [_training(name, recipe, shape, device, work, micro) for micro in sizes]


def _training(name: str, recipe: Recipe, shape: ModelShape, device: Device, work: Workload, micro: int) -> StagePlan:
    section = recipe.sft if name == "sft" else recipe.dpo
    choices: dict[str, int | str] = {
        "micro-batch": micro,
        "accumulation": section.batch_size // micro,
        "longest": longest_row(name, recipe, work),
        "logits": "in chunks" if logits_in_chunks() else "whole",
    }
    is_full = recipe.model.precision == "full"
    if name == "dpo":
        choices["reference"] = "computed beforehand" if is_full else "a frozen adapter"
    counted = training_parts(name, recipe, shape, work, device, micro)
    parts = with_reserve(counted, device, training_fragmentation(recipe, device))
    num_saved = METHODS[recipe.method].num_trained(recipe.rounds)[name]
    disk = num_saved * num_trained(recipe, shape) * 4.0
    ram = sum(parts.values()) if device.is_cpu else PARENT_BYTES
    return StagePlan(name, parts, choices, (f"{name}.micro_batch_size={micro}",), ram, disk)


def _sampling_choices(recipe: Recipe, shape: ModelShape, device: Device, work: Workload) -> list[StagePlan]:
    """Merged 16-bit weights as long as they leave room for rows worth having, then 4 bits; many rows before few."""
    most = max(MIN_ROWS, recipe.sampling.max_rows)
    rows = sorted({most, *(n for n in ROWS if n <= most)}, reverse=True)
    wanted = [(True, n) for n in rows if n >= min(MIN_MERGED_ROWS, rows[0])] + [(False, n) for n in rows]
    if recipe.model.precision != "4bit":
        wanted = [(True, n) for n in rows]
    return [_sampling(recipe, shape, device, work, is_merged, num_rows) for is_merged, num_rows in wanted]


def _sampling(
    recipe: Recipe, shape: ModelShape, device: Device, work: Workload, is_merged: bool, num_rows: int
) -> StagePlan:
    section = recipe.sampling
    counted = sampling_parts(recipe, shape, work, device, is_merged=is_merged, num_rows=num_rows)
    weights = "merged" if is_merged else "quantized"
    length = section.max_new_tokens + work.longest_prompt
    choices: dict[str, int | str] = {"weights": weights, "rows": num_rows, "longest": length}
    settings = (
        f"sampling.weights={weights}",
        f"sampling.max_rows={num_rows}",
        f"sampling.memory_gib={(counted['cache'] + counted['logits']) / GIB:.2f}",
    )
    parts = with_reserve(counted, device)
    trained = METHODS[recipe.method].num_trained(recipe.rounds)
    per_problem = trained["dpo"] * section.samples_for_pairs + (trained["sft"] - 1) * section.samples_for_labels
    drawn = work.num_train * per_problem
    ram = sum(parts.values()) if device.is_cpu else PARENT_BYTES
    return StagePlan("sampling", parts, choices, settings, ram, float(drawn * RATIONALE_BYTES))


def _merge(recipe: Recipe, shape: ModelShape, device: Device, *, on_device: bool) -> StagePlan:
    """Merging and export: on the CPU if the GPU has no room for merged weights. RAM holds them while they are saved."""
    parts = with_reserve(merge_parts(recipe, shape, device), device) if on_device else {}
    in_16_bit = 2.0 * shape.num_parameters
    ram = sum(parts.values()) if device.is_cpu else PARENT_BYTES + in_16_bit * (1 if on_device else 2)
    choices: dict[str, int | str] = {"device": device.kind.upper() if on_device else "CPU"}
    share = EXPORT_SHARE + (AUTO_SHARE if recipe.export.quant == "auto" else 0)
    return StagePlan("merge, export", parts, choices, (), ram, in_16_bit * share)


def _too_large(plans: Sequence[Plan], cases: Sequence[Case]) -> str:
    plan = max(plans, key=lambda plan: plan.largest.peak_bytes)
    stage, given = plan.largest, plan.device.memory_bytes
    fitting = [
        others[0].shape.name
        for others in _open_plans(cases, plan.device)
        if _all_fit(others) and others[0].shape.num_parameters < plan.shape.num_parameters
    ]
    advice = "no base of the table fits; lower sft.max_length and dpo.max_length, or "
    advice += "close other programs" if plan.device.is_cpu else "take a card with more memory"
    if fitting:
        advice = f"{fitting[-1]} fits"
        advice += f"; or lower {stage.name}.max_length" if stage.name in ("sft", "dpo") else ""
    return (
        f"--gpu-mem: {plan.shape.name} needs at least {stage.peak_bytes / GIB:.1f} GiB for {stage.name}, "
        f"and {given / GIB:.1f} GiB are given; {advice}"
    )
