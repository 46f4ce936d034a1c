"""What something ran on: hardware and versions, for manifests and benchmarks."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = (
    "dpost-lite", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "unsloth",
    "llama-cpp-python",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Return processor, GPU, memory and package versions of this machine."""
    import psutil
    import torch

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "bf16": torch.cpu._is_avx512_bf16_supported(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def cache_dir() -> Path:
    """Return the folder for converted models and what is learnt of a machine: `$DPOST_LITE_CACHE`, or
    `~/.cache/dpost-lite`.
    """
    return Path(os.environ.get("DPOST_LITE_CACHE") or Path.home() / ".cache" / "dpost-lite")


def ram_share_gib() -> float:
    """Return how much RAM sampling may take for its cache and logits: a third of what the machine has."""
    import psutil

    return psutil.virtual_memory().total / 3 / 2**30


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # how OpenMP's threads wait for each other


def let_threads_sleep() -> None:
    """Make OpenMP's threads sleep soon when they wait for each other, in this process and its children.

    By default they spin for milliseconds. Beside any other work that is time taken from the thread they wait for: two
    commands at once then take 11 times as long as one, and 3 times with this (bench/together.py). A user's own setting
    wins. To be called before PyTorch or llama.cpp is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = "10000"  # libgomp, Linux; rounds of its loop, half a millisecond or so
        os.environ["KMP_BLOCKTIME"] = "1"  # libomp, macOS and Windows; in milliseconds, 200 by default


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def minor_version(package: str) -> str | None:
    """Return major and minor of the installed version of a package, or None."""
    found = version(package)
    return found and ".".join(found.split("+")[0].split(".")[:2])
