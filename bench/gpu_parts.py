"""The parts of bench/gpu.py: the task that a child process carries out, and what the planner says of it."""

import importlib.util
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from random_model import save_random
from training import ENTRANTS, IDS, Training, training_recipe

from dpost_lite.models import adapters, hardware, loading
from dpost_lite.models.backend import FIRST_IMPORTS
from dpost_lite.models.shapes import BASES, ModelShape
from dpost_lite.pipeline.worker import Task
from dpost_lite.planner.device import GIB, Device
from dpost_lite.planner.pace import LIMIT_SHARE, LOADING_SECONDS, READING_EFFICIENCY, Estimate, Pace
from dpost_lite.planner.plan import StagePlan, fit_stage
from dpost_lite.planner.workload import GSM8K, Workload
from dpost_lite.problems.prompts import Prompter
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.stage_names import BASE, StageName
from dpost_lite.system.machine import machine_info

# The paper's run of Llama-3 (recipes/paper-llama3-8b-24gb.yaml); three rounds are the default.
PAPER = ("sampling.samples_for_labels=10", "sampling.top_k=50", "dpo.gate=off")
ALL_PROBLEMS = 7473  # of GSM8K's training set: the paper's run takes all of them

# Lengths of GSM8K's 7,473 prompts and rationales in tokens of SmolLM2: mean and standard deviation of their logarithms,
# the shortest and the longest. (A log-normal distribution is within 4 % of each decile. The longest rationale has 455;
# dpost-lite samples at most 300.)
PROMPT_TOKENS = (4.139, 0.313, 18, 229)
ANSWER_TOKENS = (4.745, 0.417, 31, 300)
CALCULATED_SHARE = 0.16  # of the tokens of sampled rationales (results/sampler.json: 0.1605)
CALCULATED_TOKENS = 6  # at once: GSM8K's results and the brackets behind them have 5.7
WRITTEN_ID = 29  # what is inserted; any token will do

GENERATE_STEP_S = {"cpu": 0.1, "cuda": 0.04}  # of transformers' loop, beside reading the weights; an assumption
STARTUP_S = {"vllm": 60}  # beside loading: it compiles and records graphs; an assumption


@dataclass(frozen=True)
class Sizes:
    """How large everything is. Lengths of GSM8K are multiplied by `scale`; our sampler draws `waves` times its rows,
    `num_samples` for each prompt, and slow entrants take `slow_prompts`.
    """

    shapes: dict[str, ModelShape]
    settings: tuple[str, ...]
    scale: float
    steps: int
    waves: int
    num_samples: int
    slow_prompts: int
    matrix: int

    @property
    def work(self) -> Workload:
        """The problems of a run at these lengths."""
        prompt, rationale, longest_prompt, longest = (
            self.scaled(n) for n in (GSM8K.prompt, GSM8K.rationale, GSM8K.longest_prompt, GSM8K.longest)
        )
        return replace(
            GSM8K, num_train=ALL_PROBLEMS, num_labelled=ALL_PROBLEMS, num_dev=0,
            prompt=prompt, rationale=rationale, longest_prompt=longest_prompt, longest=longest,
        )  # fmt: skip

    def drawn(self, entrant: str, rows: int) -> tuple[int, int]:
        """Return how many prompts an entrant gets, and how many samples it draws for each."""
        if entrant in ("papers", "generate"):
            return self.slow_prompts, 2 if entrant == "papers" else 1
        prompts = self.slow_prompts if entrant == "continuous" else math.ceil(self.waves * rows / self.num_samples)
        return prompts, self.num_samples

    def scaled(self, tokens: float) -> int:
        return max(1, round(tokens * self.scale))


FULL = Sizes(
    shapes={
        "llama-3.1-8b": BASES["meta-llama/Llama-3.1-8B"].shape, "qwen2.5-1.5b": BASES["Qwen/Qwen2.5-1.5B"].shape,
    },
    settings=PAPER, scale=1, steps=2, waves=6, num_samples=10, slow_prompts=32, matrix=8192,
)  # fmt: skip
TINY = Sizes(
    shapes={
        "tiny": ModelShape(
            name="tiny", num_layers=2, hidden=64, intermediate=128, num_heads=4, num_kv_heads=2, head_dim=16,
            vocabulary=20_480, is_tied=False,
        ),
    },
    settings=(
        *PAPER, "sampling.max_new_tokens=38", "sampling.max_rows=16", "sft.batch_size=4", "dpo.batch_size=4",
        "sft.micro_batch_size=2", "dpo.micro_batch_size=2",
    ),
    scale=0.125, steps=1, waves=2, num_samples=2, slow_prompts=4, matrix=512,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One line of the benchmark. `seconds` is the planner's estimate; `planned` is saved beside what was measured;
    `missing` says why it cannot be measured on this machine. `shape` names the random weights that it needs.
    """

    name: str
    task: Task | None
    seconds: float
    planned: dict[str, Any] = field(default_factory=dict)
    shape: str = ""
    first_import: str | None = None
    missing: str = ""


def all_parts(sizes: Sizes, device: Device, folders: dict[str, Path]) -> list[Part]:
    """Return the parts in order of value: the planner's claims and our sampler first, slow entrants last."""
    trained: dict[str, list[Part]] = {}
    for entrant in ENTRANTS:
        trained[entrant] = [
            training_part(name, entrant, kind, sizes, device, folders[name])
            for name in sizes.shapes
            for kind in ("sft", "dpo")
        ]

    def sampled(weights: str, *entrants: str) -> Iterator[Part]:
        for entrant in entrants:
            for name in sizes.shapes:
                yield sampling_part(name, weights, entrant, sizes, device, folders[name])

    smallest = min(sizes.shapes, key=lambda name: sizes.shapes[name].num_parameters)  # most rows, so most attention
    return [
        Part("machine", Machine(sizes.matrix), LOADING_SECONDS[device.kind]),
        *trained["qlora"],
        *sampled("merged", "ours", "ours-off"),
        *trained["16bit"],
        *sampled("4bit", "ours"),
        sampling_part(smallest, "merged", "ours-products", sizes, device, folders[smallest]),
        *trained["unsloth"],
        *trained["full"],
        *sampled("merged", "vllm", "papers", "continuous", "generate"),
    ]


def weights_seconds(device: Device) -> float:
    """Return how long making random weights takes: about as long as loading them."""
    return LOADING_SECONDS[device.kind]


def training_part(
    shape_name: str, entrant: str, kind: Literal["sft", "dpo"], sizes: Sizes, device: Device, folder: Path
) -> Part:
    """Train at the planner's micro-batch: on rows of the longest length for memory, of the mean one for speed."""
    shape, work = sizes.shapes[shape_name], sizes.work
    recipe = load_recipe(None, [*sizes.settings, *ENTRANTS[entrant]])
    stage = fit_stage(kind, (recipe, work), shape, device)
    micro, longest = int(stage.choices["micro-batch"]), int(stage.choices["longest"])
    own = training_recipe(entrant, kind, micro, 2 * micro, longest, sizes.settings)
    rate = training_rate(kind, recipe, shape, work, device)
    length, rows = round(work.mean_length), 2 * micro * (2 if kind == "dpo" else 1)
    tokens = rows * (2 * longest + (sizes.steps + 2) * length)  # with the probe of the longest rows before a training
    seconds = LOADING_SECONDS[device.kind] + tokens / rate * (1.3 if kind == "dpo" else 1)  # DPO also saves rewards
    return Part(
        name=f"train/{shape_name}/{entrant}/{kind}",
        task=Training(kind, own, folder, length, sizes.steps, longest),
        seconds=seconds,
        planned={"gib": stage.peak_bytes / GIB, "tokens_per_s": rate, "micro_batch": micro, "longest": longest},
        shape=shape_name,
        first_import=FIRST_IMPORTS["unsloth" if entrant == "unsloth" else "plain"],
        missing=cannot_train(entrant, stage, device),
    )


def cannot_train(entrant: str, stage: StagePlan, device: Device) -> str:
    """Say why an entrant cannot be trained here; "" if it can."""
    if entrant == "unsloth" and importlib.util.find_spec("unsloth") is None:
        return "not installed"
    if entrant == "unsloth" and device.is_cpu:
        return "needs a GPU"
    if stage.peak_bytes > device.memory_bytes:
        needed, given = stage.peak_bytes / GIB, device.memory_bytes / GIB
        return f"does not fit: it is planned at {needed:.1f} GiB, and {given:.1f} are given"
    return ""


def sampling_part(
    shape_name: str, weights: str, entrant: str, sizes: Sizes, device: Device, folder: Path
) -> Part:  # fmt: skip
    """Draw rationales of GSM8K's lengths, as many side by side as the planner has memory for."""
    shape, work = sizes.shapes[shape_name], sizes.work
    recipe = load_recipe(None, sizes.settings)
    is_merged = weights == "merged"
    stage = fit_stage("sampling", (recipe, work), shape, device, weights="merged" if is_merged else "quantized")
    rows = int(stage.choices["rows"])
    rate = sampling_rate(recipe, shape, work, device, rows, is_merged=is_merged)
    prompts, samples = sizes.drawn(entrant, rows)
    seconds = prompts * samples * work.rationale / rate + STARTUP_S.get(entrant, 0)
    if entrant in ("continuous", "papers", "generate"):
        step = GENERATE_STEP_S[device.kind]
        step += device.number_bytes * shape.num_parameters / (READING_EFFICIENCY[device.kind] * device.bandwidth)
        in_batches = samples * math.ceil(prompts / 32) * sizes.scaled(ANSWER_TOKENS[3])
        seconds = step * (prompts * samples * work.rationale / 64 if entrant == "continuous" else in_batches)
    missing = "not installed" if entrant == "vllm" and importlib.util.find_spec("vllm") is None else ""
    if stage.peak_bytes > device.memory_bytes:
        missing = f"does not fit: it is planned at {stage.peak_bytes / GIB:.1f} GiB"
    return Part(
        name=f"sample/{shape_name}/{weights}/{entrant}",
        task=Sampling(entrant, folder, recipe, is_merged, rows, prompts, samples, sizes.scale, device.memory_share),
        seconds=LOADING_SECONDS[device.kind] + seconds,
        planned={"gib": stage.peak_bytes / GIB, "tokens_per_s": rate, "rows": rows} if entrant == "ours" else {},
        shape=shape_name,
        missing=missing,
    )


def training_rate(
    kind: Literal["sft", "dpo"], recipe: Recipe, shape: ModelShape, work: Workload, device: Device
) -> float:
    """Return the tokens per second that the planner expects of SFT or DPO, without loading."""
    estimate = Pace(recipe, shape, work, device, num_rows=1, is_merged=False).of(StageName(kind, 1))
    return estimate.tokens / (estimate.seconds - LOADING_SECONDS[device.kind])


def sampling_rate(
    recipe: Recipe, shape: ModelShape, work: Workload, device: Device, rows: int, *, is_merged: bool
) -> float:  # fmt: skip
    """Return the tokens written per second that the planner expects, without loading."""
    stage = StageName("samples-labels", 1)
    estimate = Pace(recipe, shape, work, device, num_rows=rows, is_merged=is_merged).of(stage)
    return written(stage, estimate, recipe, work) / (estimate.seconds - LOADING_SECONDS[device.kind])


def written(stage: StageName, estimate: Estimate, recipe: Recipe, work: Workload) -> float:
    """Return the tokens of a sampling stage that are written; the others are those of its prompts."""
    number = {
        "samples-pairs": recipe.sampling.samples_for_pairs,
        "samples-labels": recipe.sampling.samples_for_labels,
        "score": 1,
    }[stage.kind]
    length = recipe.sampling.max_new_tokens * LIMIT_SHARE if stage.policy == BASE else work.rationale
    return estimate.tokens * number * length / (number * length + work.prompt)


def lengths(distribution: tuple[float, float, int, int], number: int, scale: float, seed: int) -> list[int]:
    """Draw lengths in tokens, the same for the same seed; fewer are the first of more."""
    mean, deviation, shortest, most = distribution
    dice = random.Random(seed)
    drawn = (dice.lognormvariate(mean, deviation) for _ in range(number))
    return [max(1, round(scale * min(most, max(shortest, length)))) for length in drawn]


def problems(number: int, scale: float) -> dict[tuple[int, ...], int]:
    """Return prompts of random words, each with the length of its answers; the longest prompt first."""
    dice, made = random.Random(2), {}
    answers = lengths(ANSWER_TOKENS, number, scale, seed=1)
    for prompt, answer in zip(lengths(PROMPT_TOKENS, number, scale, seed=0), answers, strict=True):
        made[tuple(dice.choice(IDS) for _ in range(prompt))] = answer
    return dict(sorted(made.items(), key=lambda item: len(item[0]), reverse=True))


class Calculations:
    """A `Writer` that inserts as large a share of tokens as the calculator does, CALCULATED_TOKENS at a time.

    It makes as much work for the engine, which reads them in the row's next step. Where a row's first insertion comes
    differs from row to row.
    """

    every = round(CALCULATED_TOKENS * (1 - CALCULATED_SHARE) / CALCULATED_SHARE)  # chosen tokens between insertions

    def __init__(self, every: int | None = None) -> None:
        self.every = every or self.every
        self._dice = random.Random(0)

    def row(self) -> "RowCalculations":
        return RowCalculations(self.every, self._dice.randint(1, self.every))


class RowCalculations:
    """The `RowWriter` of one row: it answers at once."""

    def __init__(self, every: int, first: int) -> None:
        self._every, self._left = every, first
        self.num_calculated = self.num_refused = 0

    def push(self, token_id: int) -> list[int] | None:
        self._left -= 1
        if self._left:
            return None
        self._left = self._every
        self.num_calculated += 1
        return [token_id] + [WRITTEN_ID] * CALCULATED_TOKENS

    def poll(self) -> list[int] | None:
        raise AssertionError("push answers at once")


@dataclass(frozen=True)
class Machine:
    """The task that measures the machine: rates of reading, and of products of `size` x `size`."""

    size: int

    def run(self, out: Path, progress: Callable[..., None]) -> dict[str, Any]:
        import torch
        from sampler import machine_rates

        device = torch.device(hardware.device())
        rates = {
            str(dtype).removeprefix("torch."): machine_rates(device, dtype, self.size)
            for dtype in (torch.bfloat16, torch.float32)
        }
        found: dict[str, Any] = {"machine": machine_info(), "rates": rates, "compute": str(hardware.compute_dtype())}
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(0)
            found |= {"cuda": torch.version.cuda, "capability": f"{properties.major}.{properties.minor}"}
            found["memory_gib"] = properties.total_memory / GIB
        return found


@dataclass(frozen=True)
class Weights:
    """The task that saves random weights."""

    shape: ModelShape
    folder: Path

    def run(self, out: Path, progress: Callable[..., None]) -> dict[str, Any]:
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        save_random(self.shape, partial).rename(self.folder)
        return {}


@dataclass(frozen=True)
class Sampling:
    """The task that draws rationales with one entrant of bench/sampler.py."""

    entrant: str
    folder: Path
    recipe: Recipe
    is_merged: bool
    num_rows: int
    num_prompts: int
    num_samples: int
    scale: float
    memory_share: float | None

    def run(self, out: Path, progress: Callable[..., None]) -> dict[str, Any]:
        import sampler
        import torch

        torch.manual_seed(0)
        answers = problems(self.num_prompts, self.scale)
        setting = sampler.Setting(
            self._model(), Prompter(loading.load_tokenizer(self.folder), "plain"), list(answers), self.num_samples,
            self.num_rows, max(answers.values()), self.recipe.sampling.temperature, lengths=answers,
            writer=Calculations(), folder=self.folder, memory_share=self.memory_share,
        )  # fmt: skip
        row = sampler.measure(self.entrant, setting, repeats=1)
        return {**row, "prompt_tokens": sum(map(len, answers)) / len(answers), "samples": self.num_samples}

    def _model(self) -> Any:
        """Load the weights: merged, or the 4-bit base under an adapter, as a run samples from it."""
        if self.entrant == "vllm":
            return None  # loads them itself
        if self.is_merged:
            return loading.load(self.folder, "16bit")
        return adapters.create(loading.load(self.folder, "4bit"), self.recipe.lora, seed=0).eval()


@dataclass(frozen=True)
class Measured:
    """A task that also reports what PyTorch allocated of a GPU."""

    task: Task

    def run(self, out: Path, progress: Callable[..., None]) -> dict[str, Any]:
        found = self.task.run(out, progress)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            found["allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        return found
