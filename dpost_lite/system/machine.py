"""Hardware and package versions of this machine, for manifests and benchmarks; its cache folder; OpenMP settings."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

REPORTED_PACKAGES = (
    "dpost-lite", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "unsloth",
    "llama-cpp-python",
)  # fmt: skip


def machine_info() -> dict[str, Any]:
    """Return processor, GPU, memory and package versions of this machine, as written to manifests."""
    import psutil
    import torch

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "bf16": torch.cpu._is_avx512_bf16_supported(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in REPORTED_PACKAGES},
    }


def physical_cores() -> int:
    """Return the number of physical cores, but no more than the cores that this process may use."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def cache_dir() -> Path:
    """Return the folder for converted models, cached test results and unsloth's generated code.

    `$DPOST_LITE_CACHE`, or `~/.cache/dpost-lite`.
    """
    return Path(os.environ.get("DPOST_LITE_CACHE") or Path.home() / ".cache" / "dpost-lite")


def ram_share_gib() -> float:
    """Return how much RAM (GiB) sampling may use for KV cache and logits: a third of the machine's total."""
    import psutil

    return psutil.virtual_memory().total / 3 / 2**30


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # settings for how OpenMP threads wait


def let_threads_sleep() -> None:
    """Make waiting OpenMP threads sleep early instead of spinning, in this process and its children.

    By default they spin for milliseconds, which takes CPU time from other programs (two commands of dpost-lite take
    turns: turns.py). Beside a program that keeps one of two cores busy, an evaluation takes four times as long as
    alone; with shorter waits it is less, but then it is slower alone too (bench/README.md). The user's own settings
    take precedence. Call this before importing PyTorch or llama.cpp.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = "20000"  # libgomp (Linux), in loop iterations: about a millisecond
        os.environ["KMP_BLOCKTIME"] = "1"  # libomp (macOS, Windows), in milliseconds; the default is 200


def cpu_name() -> str:
    """Return the processor's name as reported by the system."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def minor_version(package: str) -> str | None:
    """Return the installed version of a package as "major.minor", or None if it is not installed."""
    found = version(package)
    return found and ".".join(found.split("+")[0].split(".")[:2])
