"""What two commands side by side cost each other, by how OpenMP's threads wait: `python bench/together.py`.

Evaluates the demo model on built-in problems, once alone and once two at a time, with each setting of the environment;
with --busy also beside a program that keeps one core busy. "ours" is what dpost-lite sets where the user has set
nothing. Prints seconds (medians) and the factor of two over one alone.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from publish import publish, result_of

from dpost_lite.system.machine import WAITING

SETTINGS: dict[str, dict[str, str]] = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},  # what libgomp takes where threads are no more than cores
    "GOMP_SPINCOUNT=20000": {"GOMP_SPINCOUNT": "20000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "ours": {},
}


def seconds(variables: dict[str, str], num_together: int, limit: int) -> float:
    """Run the evaluation `num_together` times at once; return the seconds until the last one ends."""
    environment = {k: v for k, v in os.environ.items() if k not in WAITING} | variables
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "dpost_lite", "eval", "smollm2-135m-instruct", "--data", "synthetic", "--limit",
                 str(limit), "--calculator", "on", "--out", str(Path(folder) / str(i))],
                env=environment, stdout=subprocess.DEVNULL,
            )
            for i in range(num_together)
        ]  # fmt: skip
        codes = [process.wait() for process in running]
        assert not any(codes), codes
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=int, default=100, help="problems")
    parser.add_argument("--save", type=Path, metavar="FILE.json")
    parser.add_argument("--busy", action="store_true", help="also measure beside a program that keeps a core busy")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {name: {"alone": [], "two": []} for name in arguments.settings}
    for _ in range(arguments.repeats):
        for name in arguments.settings:
            for key, number in (("alone", 1), ("two", 2)):
                found[name][key].append(round(seconds(SETTINGS[name], number, arguments.limit), 2))
                print(f"{name}, {key}: {found[name][key][-1]:.1f} s", flush=True)
            if arguments.busy:
                busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                try:
                    found[name].setdefault("busy", []).append(round(seconds(SETTINGS[name], 1, arguments.limit), 2))
                finally:
                    busy.kill()
                print(f"{name}, beside a busy program: {found[name]['busy'][-1]:.1f} s", flush=True)
    print(f"\n{'':26}{'alone':>8}{'two':>8}{'factor':>8}")
    for name, times in found.items():
        alone, two = median(times["alone"]), median(times["two"])
        print(f"{name:26}{alone:8.1f}{two:8.1f}{two / alone:8.2f}")
    publish(result_of("together", limit=arguments.limit, seconds=found), arguments.save)


if __name__ == "__main__":
    main()
