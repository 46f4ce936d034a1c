"""What is checked of a GPU's memory: that a cap holds, and that steps take what the planner counts.

Checks are as in gpu_checks.py.
"""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpost_lite.errors import is_out_of_memory
from dpost_lite.models import hardware
from dpost_lite.pipeline.gpu_checks import NO_GPU, SHAPE, Outcome, save_base
from dpost_lite.planner.workload import Workload
from dpost_lite.recipe import DpoRecipe, ModelRecipe, Recipe, SamplingRecipe, SftRecipe

CAP_BYTES = 256 * 2**20
TOLERANCE = 0.15
LARGE_SHAPE = replace(SHAPE, vocabulary=32_000)  # what a step takes must outweigh what libraries take beside it
LENGTH, NEW_TOKENS, ROWS, SAMPLES = 256, 64, 512, 4
RECIPE = Recipe(
    model=ModelRecipe(precision="4bit"),
    sft=SftRecipe(micro_batch_size=16, batch_size=16, max_length=LENGTH),
    dpo=DpoRecipe(micro_batch_size=8, batch_size=16, max_length=LENGTH),
    sampling=SamplingRecipe(max_new_tokens=NEW_TOKENS, samples_for_pairs=SAMPLES, samples_for_labels=SAMPLES),
)
WORK = Workload(
    num_train=ROWS // SAMPLES, num_labelled=ROWS // SAMPLES, num_dev=0, num_test=0,
    prompt=64, rationale=64, longest_prompt=64, longest=LENGTH,
)  # fmt: skip


def memory_cap(device: str, folder: Path) -> Outcome:
    """Cap this process as a stage's is, and allocate more."""
    if device == "cpu":
        return NO_GPU
    import torch

    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / total))
    held = [_allocate(CAP_BYTES // 4)]  # fits, or memory is taken by other programs
    try:
        held.append(_allocate(CAP_BYTES))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Outcome("ok", f"an allocation above a cap of {_size(CAP_BYTES)} is refused")
    return Outcome("note", f"an allocation above a cap of {_size(CAP_BYTES)} is not refused here")


def _allocate(num_bytes: int) -> Any:
    import torch

    return torch.empty(num_bytes, dtype=torch.uint8, device="cuda")


def memory_plan(device: str, folder: Path) -> Outcome:
    """Compare the peaks of an SFT step, a DPO step and of sampling with what the planner counts for the same shape."""
    if device == "cpu":
        return NO_GPU
    save_base(folder / "base", LARGE_SHAPE)
    return compare_peaks(planned_peaks(hardware.compute_dtype().itemsize), measured_peaks(folder))


def compare_peaks(planned: dict[str, float], measured: dict[str, float]) -> Outcome:
    """Return a note if a measured peak (bytes) is more than 15 % off the planned one."""
    off = {name: measured[name] / planned[name] - 1 for name in planned}
    figures = ", ".join(
        f"{name} {_size(measured[name])} (planned {_size(planned[name])}, {off[name]:+.0%})" for name in planned
    )
    is_close = all(abs(one) <= TOLERANCE for one in off.values())
    return Outcome("ok" if is_close else "note", figures if is_close else f"differs from the plan: {figures}")


def planned_peaks(number_bytes: int) -> dict[str, float]:
    """Return the planner's bytes for `measured_peaks` in a compute type of `number_bytes`, without its reserve."""
    from dpost_lite.planner.device import card
    from dpost_lite.planner.footprint import sampling_parts, training_parts

    device = replace(card(8e9), number_bytes=number_bytes)
    given = RECIPE, LARGE_SHAPE, WORK, device
    parts = {
        "SFT": training_parts("sft", *given, RECIPE.sft.micro_batch_size),
        "DPO": training_parts("dpo", *given, RECIPE.dpo.micro_batch_size),
        "sampling": sampling_parts(*given, is_merged=True, num_rows=ROWS),
    }
    return {name: sum(found.values()) for name, found in parts.items()}


def measured_peaks(folder: Path) -> dict[str, float]:
    """Return the bytes that PyTorch allocates at most, for one step of each kind on the base in `folder`."""
    import torch

    work = {"SFT": _sft_step, "DPO": _dpo_step, "sampling": _sampling}
    ones = torch.ones(64, 64, device="cuda", requires_grad=True)  # forward and backward: cuBLAS takes its workspaces,
    (ones @ ones).sum().backward()  # which belong to the planner's reserve
    del ones
    return {name: _peak(step, folder) for name, step in work.items()}


def _peak(step: Any, folder: Path) -> float:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # what libraries keep of an earlier step
    step(folder)
    return float(torch.cuda.max_memory_allocated() - before)


def _sft_step(folder: Path) -> None:
    from dpost_lite.models import adapters, loading, sft, training

    recipe = RECIPE
    ids = [5] * LENGTH
    rows = [{"input_ids": ids, "labels": [-100] * 64 + ids[64:]}] * (2 * recipe.sft.batch_size)
    settings = recipe.sft.model_copy(update={"batch_size": 2 * recipe.sft.batch_size})  # two micro-batches a step
    policy = adapters.load_for_sft(folder / "base", recipe, "plain")
    prompter = loading.load_prompter(folder / "base", recipe.model)
    trainer = sft.make_trainer(policy, prompter, rows, folder / "sft", settings, seed=0)
    training.keep_float32(trainer.model)
    training.probe(trainer, [LENGTH] * len(rows))


def _dpo_step(folder: Path) -> None:
    from dpost_lite.models import adapters, dpo, loading, training

    recipe = RECIPE
    ids = [5] * LENGTH
    rows = [{"prompt_ids": ids[:64], "chosen_ids": ids[64:], "rejected_ids": ids[64:]}] * recipe.dpo.batch_size
    policy = adapters.load_for_sft(folder / "base", recipe, "plain")
    prompter = loading.load_prompter(folder / "base", recipe.model)
    trainer = dpo.make_trainer(policy, prompter, rows, folder / "dpo", recipe.dpo, seed=0)
    training.keep_float32(trainer.model)
    training.probe(trainer, [LENGTH] * len(rows))


def _sampling(folder: Path) -> None:
    from dpost_lite.models import loading
    from dpost_lite.sampling.engine import Engine
    from dpost_lite.sampling.request import Request

    model = loading.load(folder / "base", "16bit")
    asked = [
        Request(
            key=key, prompt_ids=(5,) * 64, stop_ids=frozenset(), num_samples=SAMPLES, temperature=1.0,
            max_new_tokens=NEW_TOKENS, seed=key,
        )
        for key in range(ROWS // SAMPLES)
    ]  # fmt: skip
    for _ in Engine(model, writer=None, max_rows=ROWS).run(asked):
        pass


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
