"""What all benchmarks do with what they found: name command and machine, keep it as JSON, print it as the last line."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpost_lite.problems.comparing import Comparison, interval_over_seeds, mean_difference
from dpost_lite.system.machine import let_threads_sleep, machine_info

let_threads_sleep()  # as the command line does


def command_of(benchmark: str) -> str:
    """Return the command that was given."""
    return " ".join(["python", f"bench/{benchmark}.py", *sys.argv[1:]])


def mean_and_intervals(compared: Sequence[Comparison]) -> dict[str, float]:
    """Return a mean difference with its interval for these seeds and, of two seeds or more, over seeds."""
    mean, low, high = mean_difference(compared)
    found = {"mean": mean, "low": low, "high": high}
    if len(compared) > 1:
        found["low_over_seeds"], found["high_over_seeds"] = interval_over_seeds(compared)
    return found


def result_of(benchmark: str, **figures: Any) -> dict[str, Any]:
    """Return the figures with the command that was given and the machine it ran on."""
    return {"benchmark": benchmark, "command": command_of(benchmark), "machine": machine_info(), **figures}


def save(result: dict[str, Any], path: Path | None) -> None:
    """Write the result to `path`, if one was given."""
    if path:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def publish(result: dict[str, Any], path: Path | None) -> None:
    """Write the result and print it on one line."""
    save(result, path)
    print(json.dumps(result))
