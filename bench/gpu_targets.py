"""What bench/gpu.py concludes: the hours of one night, and the table of targets."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gpu_parts import Sizes, written
from sampler import ceiling

from dpost_lite.errors import ModelError
from dpost_lite.models.shapes import ModelShape
from dpost_lite.planner.device import Device
from dpost_lite.planner.footprint import weight_bytes
from dpost_lite.planner.pace import LOADING_SECONDS
from dpost_lite.planner.plan import PLANNED_KINDS, make_plans
from dpost_lite.planner.workload import Workload
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe

MEMORY_WITHIN, RATE_WITHIN = 0.15, 0.30
AGAINST_PAPERS, CALCULATOR_ON_OFF, FUSED_ON_OFF, BANDWIDTH_SHARE, NIGHT_HOURS = 6.0, 1.0, 1.0, 0.25, 10.0

Parts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """A claim, the figure that was measured for it (None: not measured), and whether that is good enough."""

    claim: str
    figure: str | None
    holds: bool = False

    @property
    def verdict(self) -> str:
        return "not measured" if self.figure is None else "holds" if self.holds else "missed"


def measured(parts: Parts) -> Parts:
    """Return the parts that were measured."""
    return {name: part for name, part in parts.items() if part["status"] == "done"}


def bounds(parts: Parts, sizes: Sizes, device: Device) -> dict[str, dict[str, float]]:
    """Return for each measurement of our sampler what reading weights and cache once a step allows, and its share."""
    done = measured(parts)
    if "machine" not in done:
        return {}
    recipe = load_recipe(None, sizes.settings)
    rates = done["machine"]["rates"]["bfloat16" if device.number_bytes == 2 else "float32"]
    found = {}
    for name, part in done.items():
        if name.endswith(("/ours", "/ours-off")):
            _, shape_name, weights, _ = name.split("/")
            shape = sizes.shapes[shape_name]
            # A step reads a row a token of an embedding that is not the head.
            not_read = 0 if shape.is_tied else shape.vocabulary * shape.hidden
            read = shape.num_parameters - not_read
            in_4_bit = weight_bytes(recipe, shape, device) - not_read * device.number_bytes
            found[name] = ceiling(
                part, rates, num_weights=read,
                weight_bytes=read * device.number_bytes if weights == "merged" else in_4_bit,
                position_bytes=shape.cache_position_values * device.number_bytes,
                prompt=part["prompt_tokens"] / part["samples"], num_rationales=part["rationales"],
            )  # fmt: skip
    return found


def night(parts: Parts, recipe: Recipe, work: Workload, shape: ModelShape, name: str, device: Device) -> dict[str, Any]:
    """Return the hours of a run by the planner and by the measured rates, by kind of stage.

    The measurements are those at shape `name`. Loading, and the export, take as long as the planner says.
    """
    try:
        (plan,) = make_plans([(recipe, work)], shape, device)
    except ModelError as error:
        return {"error": str(error)}
    rates = _rates(measured(parts), name, "merged" if plan.samples_merged else "4bit")
    hours: dict[str, list[float | None]] = {}
    for stage, estimate in plan.estimates.items():
        kind = PLANNED_KINDS.get(stage.kind, "")
        seconds: float | None = estimate.seconds
        if kind in ("sft", "dpo", "sampling"):
            tokens = written(stage, estimate, recipe, work) if kind == "sampling" else estimate.tokens
            rate = rates.get(kind)
            seconds = None if rate is None else LOADING_SECONDS[device.kind] + tokens / rate
        if estimate.seconds:
            so_far = hours.setdefault(kind, [0.0, 0.0])
            so_far[0] = (so_far[0] or 0) + estimate.seconds / 3600
            so_far[1] = None if seconds is None or so_far[1] is None else so_far[1] + seconds / 3600
    found = [own for _, own in hours.values()]
    return {
        "shape": name,
        "rates": rates,
        "planned_h": plan.seconds / 3600,
        "measured_h": None if None in found else sum(own or 0 for own in found),
        "stages": {kind: {"planned_h": planned, "measured_h": own} for kind, (planned, own) in hours.items()},
    }


def _rates(done: Parts, name: str, weights: str) -> dict[str, float]:
    """Return the measured tokens per second, by kind of stage; unsloth's training if it was measured, as a run's."""
    rates = {}
    for kind in ("sft", "dpo"):
        for entrant in ("qlora", "unsloth"):
            if part := done.get(f"train/{name}/{entrant}/{kind}"):
                rates[kind] = part["tokens_per_s"]
    if part := done.get(f"sample/{name}/{weights}/ours"):
        rates["sampling"] = part["tokens_per_s"]
    return rates


def targets(parts: Parts, bound: dict[str, dict[str, float]], hours: dict[str, Any], *, on_gpu: bool) -> list[Target]:
    """Return the targets; where several measurements count, the worst decides. A CPU's memory is no measurement."""
    done = measured(parts)
    planned = {name: part for name, part in done.items() if part.get("planned")}
    trained = {name: part for name, part in planned.items() if name.startswith("train/")}
    memory = {name: part["gib"] / part["planned"]["gib"] for name, part in trained.items() if on_gpu}
    speed = {name: part["tokens_per_s"] / part["planned"]["tokens_per_s"] for name, part in planned.items()}
    goal = hours.get("measured_h")
    return [
        _within("training's memory within 15 % of the plan", memory, MEMORY_WITHIN),
        _within("speed within 30 % of the plan", speed, RATE_WITHIN),
        _at_least(
            "sampler at least 6 times the papers' procedure", ratios(done, "papers", "tokens_per_s"), AGAINST_PAPERS
        ),
        _at_least(
            "rationales/s with the calculator at least as without",
            ratios(done, "ours-off", "rationales_per_s"),
            CALCULATOR_ON_OFF,
        ),
        _at_least(
            "fused attention at least as fast as matrix products",
            ratios(done, "ours-products", "tokens_per_s"),
            FUSED_ON_OFF,
        ),
        *(
            _at_least(
                f"at least a quarter of the bandwidth bound, {weights}",
                {name: b["bandwidth_reached"] for name, b in bound.items() if name.endswith(f"/{weights}/ours")},
                BANDWIDTH_SHARE,
            )
            for weights in ("merged", "4bit")
        ),
        Target(
            "DPO-ST in one night of 10 h",
            None if goal is None else f"{goal:.1f} h",
            goal is not None and goal <= NIGHT_HOURS,
        ),
    ]


def ratios(done: Parts, other: str, figure: str) -> dict[str, float]:
    """Return how many times another entrant's figure ours is, for each shape and type of weights that has both."""
    found = {}
    for name, part in done.items():
        against = done.get(name.removesuffix("/ours") + f"/{other}")
        if name.endswith("/ours") and against:
            found[name] = part[figure] / against[figure]
    return found


def _within(claim: str, ratios: dict[str, float], tolerance: float) -> Target:
    if not ratios:
        return Target(claim, None)
    good = [abs(ratio - 1) <= tolerance for ratio in ratios.values()]
    name, worst = max(ratios.items(), key=lambda item: abs(item[1] - 1))
    return Target(claim, f"{sum(good)} of {len(good)}; worst {worst - 1:+.0%} ({name})", all(good))


def _at_least(claim: str, figures: dict[str, float], goal: float) -> Target:
    if not figures:
        return Target(claim, None)
    name, worst = min(figures.items(), key=lambda item: item[1])
    return Target(claim, f"{worst:.2f} ({name})", worst >= goal)


def table(found: Iterable[Target]) -> Iterator[str]:
    """Yield the lines of the table."""
    for target in found:
        yield f"{target.claim:<54}{target.verdict:<14}{target.figure or ''}"
