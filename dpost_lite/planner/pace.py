"""Tokens and seconds of each stage of a run, from a device's rates and the number of problems.

CPU efficiencies were measured (bench/memory.py checks them). That of training on GPUs was fitted to others'
measurements of LoRA (bench/published.py); the others are assumed. How many rationales will be right, and so the size of
later training sets, is unknown beforehand: workload.py has the assumptions.
"""

import math
from dataclasses import dataclass

from dpost_lite.methods import METHODS
from dpost_lite.models.shapes import ModelShape
from dpost_lite.planner.device import Device
from dpost_lite.planner.footprint import weight_bytes
from dpost_lite.planner.workload import (
    CUT_SHARE,
    CUTS_PER_RATIONALE,
    KEPT_SHARE,
    PAIRS_PER_PROBLEM,
    RIGHT_SHARE,
    WRONG_SHARE,
    Workload,
)
from dpost_lite.problems.gate import num_compared
from dpost_lite.recipe import Recipe
from dpost_lite.runs.stage_names import BASE, StageName
from dpost_lite.sampling.request import ATTEMPTS_PER_WAVE

TRAINING_EFFICIENCY = {"cpu": 0.40, "cuda": 0.44}  # of the rate of large products
SAMPLING_EFFICIENCY = {"cpu": 0.43, "cuda": 0.40}  # of the same
READING_EFFICIENCY = {"cpu": 0.6, "cuda": 0.6}  # of the peak rate of reading
STEP_SECONDS = {"cpu": 0.1, "cuda": 0.004}  # of a decode step, whatever it computes
LOADING_SECONDS = {"cpu": 8, "cuda": 30}  # libraries and weights
LLAMA_FLOPS = {"cpu": 5e10, "cuda": 3e11}  # of llama.cpp, on the processor alone: two cores, and a desktop's eight
LLAMA_BANDWIDTH = {"cpu": 8e9, "cuda": 3e10}
PROVED_ON = 16  # rationales on which the exported file is compared with the 16-bit one
SOLVED = {"one": 50, "auto": 200}  # problems that it answers: at most, of each type for export.quant=auto
NUM_TYPES = 5
LIMIT_SHARE = 0.95  # of the token limit: the base has not learned to stop


@dataclass(frozen=True, slots=True)
class Estimate:
    """Tokens that go through the model, and seconds."""

    tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Pace:
    """Estimates the stages of one run. `num_rows` decode side by side, from `is_merged` weights."""

    recipe: Recipe
    shape: ModelShape
    work: Workload
    device: Device
    num_rows: int
    is_merged: bool

    def of(self, stage: StageName) -> Estimate:
        """Estimate one stage. Work on text takes no time."""
        kind, round_number = stage.kind, stage.round
        recipe, work = self.recipe, self.work
        sampling = recipe.sampling
        if kind == "sft":
            rationales = self._num_labels(round_number) * recipe.sft.epochs
            return self._training(min(rationales, (recipe.sft.max_steps or math.inf) * recipe.sft.batch_size))
        if kind == "dpo":
            pairs = self._num_pairs() * (round_number if recipe.pairs.pool_rounds else 1)
            pairs = min(pairs * recipe.dpo.epochs, recipe.dpo.max_steps * recipe.dpo.batch_size)
            return self._training(2 * pairs, reference=2)
        if kind == "samples-pairs":
            return self._sampling(work.num_train, sampling.samples_for_pairs, work.rationale)
        if kind == "samples-labels":
            return self._sampling(work.num_train, sampling.samples_for_labels, work.rationale)
        if kind == "rests":
            tries = min(ATTEMPTS_PER_WAVE, recipe.rests.max_tries)
            return self._sampling(math.ceil(self._num_cuts()), tries, work.rationale)
        if kind == "gate":
            number = num_compared(
                recipe.dpo.gate, work.num_train, sampling.samples_for_pairs, sampling.samples_for_labels
            )
            number += min(number, work.num_dev)
            draws = self._sampling(number, sampling.samples_for_labels, work.rationale, times=2)
            on_dev = self._sampling(work.num_dev, 1, work.rationale) if work.num_dev else Estimate(0, 0)
            return Estimate(draws.tokens + on_dev.tokens, draws.seconds + on_dev.seconds)
        if kind in ("score", "score-also"):
            number = work.num_also if kind == "score-also" else work.num_test + work.num_dev
            length = sampling.max_new_tokens * LIMIT_SHARE if stage.policy == BASE else work.rationale
            return self._sampling(number, 1, length)
        if kind == "export":
            return self._export()
        return Estimate(0, 0)

    def _export(self) -> Estimate:
        """Write the file, and prove it: llama.cpp reads rationales and answers problems, one after the other."""
        kind, work = self.device.kind, self.work
        is_auto = self.recipe.export.quant == "auto"
        answers = min(work.num_dev or work.num_test, SOLVED["auto" if is_auto else "one"])
        read = PROVED_ON * (work.prompt + work.rationale) + answers * work.prompt
        flops = 2 * self.shape.num_parameters * (read + PROVED_ON * (work.prompt + work.rationale))
        decoding = answers * work.rationale * self.shape.num_parameters * (1.0 if is_auto else 0.75)  # bytes a token
        proving = flops / LLAMA_FLOPS[kind] + decoding / LLAMA_BANDWIDTH[kind]
        seconds = LOADING_SECONDS[kind] + 20 * self.shape.num_parameters / 1e9 + proving * (NUM_TYPES if is_auto else 1)
        if self.recipe.export.merge != "auto" or self.recipe.model.precision != "4bit" or not work.num_dev:
            return Estimate(0, seconds)
        other_merge = self._sampling(min(work.num_dev, SOLVED["auto"]), 1, work.rationale)
        return Estimate(other_merge.tokens, seconds + other_merge.seconds)

    def _num_cuts(self) -> float:
        """Where right rationales are cut in a round, for step-controlled pairs."""
        return self.work.num_train * CUT_SHARE * (CUTS_PER_RATIONALE if self.recipe.rests.cut == "every" else 1)

    def _num_pairs(self) -> float:
        """Preference pairs of one round's samples."""
        method, share = METHODS[self.recipe.method], self.recipe.pairs.stepwise
        ordinary = self.work.num_train * PAIRS_PER_PROBLEM
        if not method.samples_rests(share):
            return ordinary
        stepwise = min(self._num_cuts() * WRONG_SHARE, self.work.num_train * self.recipe.pairs.max_per_problem)
        return stepwise + (min(ordinary, stepwise * (1 - share) / share) if method.pairs == "by share" else ordinary)

    def _num_labels(self, round_number: int) -> float:
        """Gold rationales, plus right ones of all rounds so far."""
        sampling, recipe = self.recipe.sampling, self.recipe
        uses_pairs = recipe.labels.from_pairs and METHODS[recipe.method].has_dpo
        number = sampling.samples_for_labels + (sampling.samples_for_pairs if uses_pairs else 0)
        drawn = self.work.num_train * number * RIGHT_SHARE * KEPT_SHARE
        rounds = round_number if self.recipe.labels.pool_rounds else min(1, round_number)
        return self.work.num_labelled + drawn * rounds

    def _training(self, num_rows: float, *, reference: int = 0) -> Estimate:
        """FLOP per weight: 2 forward and 2 backward, as LoRA needs no gradients of frozen weights; `reference` for the
        reference's forward. Full training takes 2 more, and so does a GPU's checkpointing, for a second forward.

        On a CPU that multiplies bfloat16, adapters train no faster than in float32: little of a step is products there.
        """
        is_full = self.recipe.model.precision == "full"
        per_weight = 2 + 2 + reference + (2 if is_full else 0)
        per_weight += 0 if self.device.is_cpu else 2
        tokens = num_rows * self.work.mean_length
        kind = self.device.kind
        flops = self.device.float32_flops if is_full else self.device.flops
        if self.device.is_cpu:
            flops = min(flops, self.device.float32_flops)
        products = num_rows * (self.work.prompt * self.shape.num_reading + self.work.rationale * self.shape.num_writing)
        seconds = per_weight * products / (TRAINING_EFFICIENCY[kind] * flops)
        return Estimate(tokens, LOADING_SECONDS[kind] + seconds)

    def _sampling(self, num_prompts: int, num_samples: int, length: float, *, times: int = 1) -> Estimate:
        """Each decode step computes one token per row, and reads the weights and the rows' cache once.

        `times` policies do all of it, one after the other.
        """
        shape, device = self.shape, self.device
        kind = device.kind
        written, read = num_prompts * num_samples * length, num_prompts * self.work.prompt
        rows = max(1, min(self.num_rows, num_prompts * num_samples))
        product = 2 / (SAMPLING_EFFICIENCY[kind] * device.flops)
        merged = float(device.number_bytes * shape.num_parameters)
        weights = merged if self.is_merged else weight_bytes(self.recipe, shape, device)
        weights *= shape.num_writing / shape.num_parameters
        cache = rows * (length / 2 + self.work.prompt / num_samples) * shape.cache_position_values * device.number_bytes
        reading = (weights + cache) / (READING_EFFICIENCY[kind] * device.bandwidth)
        step = max(rows * product * shape.num_writing, reading) + STEP_SECONDS[kind]
        seconds = written / rows * step + read * product * shape.num_reading
        return Estimate(times * (written + read), times * (LOADING_SECONDS[kind] + seconds))
