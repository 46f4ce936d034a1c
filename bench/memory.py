"""Does the planner keep its word? Planned against measured peak memory and time, stage by stage of a real run.

    python bench/memory.py --out DIR [--model NAME | --shape llama-3.1-8b] [--gpu-mem 24GB | cpu] [--recipe NAME]
                           [--save bench/results/memory.json] [KEY=VALUE …]

Runs `dpost-lite run` as anybody would, in DIR, and reads what its stages recorded. With --gpu-mem the run is capped, so
that a larger card can stand for a smaller one. A random model of a --shape writes to the limit and is never right:
times of such runs say nothing, their memory does. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from publish import publish, result_of
from random_model import add_model_options, model_folder

from dpost_lite.models import hardware
from dpost_lite.planner.device import CONTEXT_BYTES, GIB
from dpost_lite.runs.folder import read_json


def main() -> None:
    """Run, compare, print the table."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        given = ["--model", str(model_folder(arguments, Path(scratch))[0])] if arguments.shape else []
        given += ["--model", arguments.model] if arguments.model else []
        given += ["--recipe", arguments.recipe] if arguments.recipe else []
        command = [sys.executable, "-m", "dpost_lite", "run", "--gpu-mem", arguments.gpu_mem, *given]
        subprocess.run([*command, "--out", str(arguments.out), *arguments.overrides], check=True, stdout=sys.stderr)
    rows = compare(arguments.out, on_cpu=arguments.gpu_mem == "cpu")
    print(f"{'stage':<24}{'planned':>9}{'peak GiB':>9}{'off':>7}   {'planned':>8}{'seconds':>9}{'off':>7}")
    for row in rows:
        memory = f"{row['planned_gib']:9.2f}{row['gib']:9.2f}{row['gib'] / row['planned_gib'] - 1:+7.0%}"
        print(f"{row['stage']:<24}{memory}   {row['planned_s']:8.0f}{row['s']:9.0f}{off(row['s'], row['planned_s'])}")
    totals = {key: sum(row[key] for row in rows) for key in ("planned_s", "s")}
    peaks = {key: max(row[key] for row in rows) for key in ("planned_gib", "gib")}
    print(
        f"peak of the run: planned {peaks['planned_gib']:.2f}, measured {peaks['gib']:.2f} GiB; "
        f"seconds: planned {totals['planned_s']:.0f}, measured {totals['s']:.0f}"
    )
    publish(result_of("memory", rows=rows, **totals, **peaks), arguments.save)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--gpu-mem", default="auto" if hardware.device() == "cuda" else "cpu")
    parser.add_argument("--recipe")
    parser.add_argument("--save", type=Path)
    parser.add_argument("overrides", nargs="*", help="recipe keys, key=value")
    return parser.parse_intermixed_args()


def compare(folder: Path, *, on_cpu: bool) -> list[dict[str, Any]]:
    """Return a row for each stage that was planned, with what its `done.json` says."""
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    planned = next(event for event in map(json.loads, lines) if event["kind"] == "planned")
    rows = []
    for stage, estimate in planned["stages"].items():
        size = planned["peak_bytes"].get(stage)  # 0: on the CPU, for want of room on the GPU
        done = folder / stage / "done.json"
        if not size or not done.is_file():
            continue
        record = read_json(done)
        peak = record["ram_bytes"] if on_cpu else record["gpu_bytes"] + CONTEXT_BYTES
        rows.append(
            {
                "stage": stage,
                "planned_gib": size / GIB,
                "gib": peak / GIB,
                "planned_s": estimate["seconds"],
                "s": record["seconds"],
            }
        )
    return rows


def off(measured: float, planned: float) -> str:
    return f"{measured / planned - 1:+7.0%}" if planned else ""


if __name__ == "__main__":
    main()
