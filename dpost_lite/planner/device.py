"""A device's memory and speed: bytes per number, FLOP/s, and memory bandwidth."""

import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

from dpost_lite.errors import RecipeError
from dpost_lite.models import hardware
from dpost_lite.recipe import ComputeType

GIB = 2**30
CONTEXT_BYTES = 0.6 * GIB  # CUDA, cuBLAS and the kernels loaded, which PyTorch does not count
HERE = "measured here"
EMULATION_SLOWDOWN = 3  # of bfloat16 on a CPU that does not multiply it, about
NAMED_SHARE = 1.05  # a card may report a little less than its name says
UNITS = {"gb": 1e9, "g": 1e9, "gib": GIB, "mb": 1e6, "mib": 2**20}

# By GB of memory: FLOP/s of bfloat16 products accumulated in float32, without sparsity, and bytes/s of memory. The
# smallest card that has the requested size is taken. From 24 GB on, products are the best that others measured
# (5090: github.com/xzwgit/gpu-flops-bench, others: github.com/mag-/gpu_benchmark); the rest is as the vendor states.
# A100s are sold with 312 TFLOP/s, RTX 4090s with 165.
CARDS = {
    8: ("RTX 4060", 30e12, 272e9),
    12: ("RTX 4070", 58e12, 504e9),
    16: ("RTX 4060 Ti", 44e12, 288e9),
    24: ("RTX 4090", 179e12, 1008e9),
    32: ("RTX 5090", 254e12, 1792e9),
    48: ("RTX A6000", 131e12, 768e9),
    80: ("A100", 268e12, 2039e9),
}
FLOAT32_FLOPS = {"RTX 4090": 58e12, "RTX 5090": 83e12, "RTX A6000": 38.7e12, "A100": 19.5e12}
"""The RTX 4090's and 5090's from gpu-flops-bench, the others as stated; half of 16-bit products for those left out."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where a run is planned for.

    `memory_bytes` may be used, of `total_bytes` (0: not known, or no cap is needed); `number_bytes` are those of the
    compute type. Rates are of large products in FLOP/s and of memory in bytes/s; `rates_of` says whether they were
    measured here, or else of which card they are. Those of float32 products are half of 16-bit ones where they are
    not known.
    """

    kind: str
    memory_bytes: float
    number_bytes: int
    flops: float
    bandwidth: float
    rates_of: str
    total_bytes: float = 0.0
    measured_float32_flops: float = 0.0

    def computing(self, choice: ComputeType) -> "Device":
        """Return the device for the recipe's `model.compute_dtype`."""
        number_bytes = {"auto": self.number_bytes, "bfloat16": 2, "float32": 4}[choice]
        if number_bytes == self.number_bytes:
            return self
        flops = self.float32_flops if number_bytes == 4 else self.flops / EMULATION_SLOWDOWN
        return replace(self, number_bytes=number_bytes, flops=flops, measured_float32_flops=self.float32_flops)

    @property
    def float32_flops(self) -> float:
        """Rate of products in float32, in which all weights are trained."""
        return self.measured_float32_flops or (self.flops if self.number_bytes == 4 else self.flops / 2)

    @property
    def is_cpu(self) -> bool:
        """Whether memory is RAM, which also holds the stage's process."""
        return self.kind == "cpu"

    @property
    def memory_share(self) -> float | None:
        """Share of the GPU that PyTorch may allocate, or None for no cap."""
        return min(1.0, (self.memory_bytes - CONTEXT_BYTES) / self.total_bytes) if self.total_bytes else None


def parse_memory(text: str) -> float:
    """Return the bytes of a size such as 24GB (10⁹) or 24GiB (2³⁰). Raises RecipeError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|G|MB|MiB)\s*", text, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise RecipeError(f"--gpu-mem: '{text}' is no size; give one like 24GB or 24GiB, or auto, or cpu")
    return float(match[1]) * UNITS[match[2].lower()]


def find_device(size: str) -> Device:
    """Return the device that `--gpu-mem` names: this machine's CPU, the free part of its GPU, or, for a size it does
    not have, one of `CARDS`.

    Raises RecipeError for a bad size, and for "auto" without a GPU.
    """
    if size == "cpu":
        return this_cpu()
    asked = None if size == "auto" else parse_memory(size)
    found = this_gpu()
    if found is None or (asked or 0) > NAMED_SHARE * found[1]:
        if asked is None:
            raise RecipeError("--gpu-mem auto: this machine has no CUDA GPU; give a size to plan for, such as 24GB")
        return card(asked)
    free, total, flops, bandwidth, in_float32 = found
    memory, cap = (free, 0.0) if asked is None else (min(asked, free), total)
    return Device("cuda", memory, 2, flops, bandwidth, HERE, cap, in_float32)


def card(memory_bytes: float) -> Device:
    """Return a card with this much memory, with the rates of `CARDS`."""
    name, flops, bandwidth = next((card for gb, card in CARDS.items() if memory_bytes <= gb * GIB), CARDS[80])
    in_float32 = FLOAT32_FLOPS.get(name, 0.0)
    rates_of = f"{name}, not measured here"
    return Device("cuda", memory_bytes, 2, flops, bandwidth, rates_of, measured_float32_flops=in_float32)


def this_cpu() -> Device:
    """Return this machine's CPU and the RAM that is available now."""
    import psutil
    import torch

    dtype = hardware.compute_dtype(on="cpu")
    flops, bandwidth, in_float32 = _rates(torch.device("cpu"), dtype, size=1024)
    memory = float(psutil.virtual_memory().available)
    return Device("cpu", memory, dtype.itemsize, flops, bandwidth, HERE, measured_float32_flops=in_float32)


def this_gpu() -> tuple[float, float, float, float, float] | None:
    """Return (free bytes, total bytes, FLOP/s, bytes/s, FLOP/s in float32) of the first GPU, or None without one.

    Measured in a child process: it takes half a gigabyte of the GPU for as long as the process lives.
    """
    if hardware.device() != "cuda":
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure_gpu).result()


def _measure_gpu() -> tuple[float, float, float, float, float]:
    import torch

    free, total = torch.cuda.mem_get_info(0)
    return float(free), float(total), *_rates(torch.device("cuda"), hardware.compute_dtype(), size=4096)


def _rates(device: Any, dtype: Any, *, size: int) -> tuple[float, float, float]:
    """Measure FLOP/s of a product, bytes/s of a copy, and FLOP/s of a product in float32, in about a second."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    def product(dtype: Any) -> float:
        a = torch.randn(size, size, device=device, dtype=dtype)
        return 2 * size**3 / _shortest(lambda: a @ a, wait)

    source, target = (torch.ones(2**28, dtype=torch.uint8, device=device) for _ in range(2))
    copied = 2 * source.nbytes / _shortest(lambda: target.copy_(source), wait)
    flops = product(dtype)
    return flops, copied, flops if dtype is torch.float32 else product(torch.float32)


def _shortest(work: Callable[[], Any], wait: Callable[[], Any], repeats: int = 8) -> float:
    seconds = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def hide_gpu() -> None:
    """Make this process and its children run on the CPU. Call it before PyTorch is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
