"""Does the package keep its word on a GPU? Memory, speed and the sampler, beside the plan and the targets.

    python bench/gpu.py [--gpu-mem 24GB] [--minutes 25] [--again PART …] [--save bench/results/gpu-<device>.json]
    python bench/gpu.py --tiny --device cpu          # the same on tiny models, to try the command

Needs no download: models have random weights, prompts random words, and the tokenizer comes with the demo extra. The
weights take 19 GB of disk for as long as the command runs, in TMPDIR if that is set, and as much RAM. Each
part runs in a process of its own under the cap, and is written to --save when it is finished. Repeat the command to
go on after a stop; a part that is there is not repeated, even if it failed, unless --again names it or a
beginning of its name. Parts come in order of value, and those that would not fit into --minutes by the planner's
estimate are skipped.

Parts:

- `machine`: GPU and versions, bandwidth, rate of products in bfloat16 and float32.
- `train/SHAPE/ENTRANT/sft` and `/dpo`: QLoRA, LoRA on 16 bit, unsloth if it is installed, all weights where they fit.
  At the planner's micro-batch: a step of the longest rows, for the peak, then timed steps of rows of GSM8K's mean
  length. GiB are what PyTorch reserved, and 0.6 for CUDA.
- `sample/SHAPE/WEIGHTS/ENTRANT`: ours, from merged 16-bit weights and from 4-bit ones under an adapter; from merged
  ones also ours without calculator, of the smaller shape also with attention by matrix products, vLLM if it is
  installed, the papers' procedure, transformers' continuous batching and generate.

What the sampler's parts measure: random weights compute as long as trained ones, but never end an answer or write `<<`.
So each problem has a fixed length, drawn from GSM8K's distribution and the same for all entrants; all samples of a
problem share it. "With calculator" inserts GSM8K's share of tokens through a writer of the engine, wherever they
fall. What they do not measure: the calculator's parsing (bench/sampler.py does), the tokens that the papers' hook would
force (it decodes and matches every row, and finds nothing), lengths of a trained model, and answers that differ in
length among the samples of a problem. Slow entrants draw for the first 32 of the problems, and none is charged for
starting up. At the end of a pass rows run empty, which a stage with many more rationales hardly notices. The bandwidth
bound is reading weights and cache once a step, at the bandwidth measured.

At the end: the hours of DPO-ST with Llama-3-8B on GSM8K (7,473 problems, K = 10, three rounds) at the measured rates,
and a table of targets. The last line is one JSON object.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no downloads
from publish import command_of  # before torch: it sets how OpenMP's threads wait

# isort: split
import gpu_parts
from gpu_parts import FULL, TINY, Measured, Part, Sizes, Weights, all_parts

from dpost_lite.errors import DpostError, ProcessFailed, RecipeError, RunError
from dpost_lite.pipeline.worker import run_in_child
from dpost_lite.planner.device import CONTEXT_BYTES, GIB, HERE, Device, find_device, hide_gpu
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.folder import write_json
from dpost_lite.system import gpu_record
from dpost_lite.system.machine import cpu_name

RESULTS = Path(__file__).parent / "results"
LATE, AT_LEAST_S = 4, 120  # a part is stopped after so many times its estimate, but not before


def main() -> None:
    """Run the parts, print the targets."""
    arguments = parse()
    if arguments.device == "cpu":
        hide_gpu()
        os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more
    try:
        run(arguments)
    except DpostError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only with --tiny")
    parser.add_argument("--gpu-mem", default="24GB", help="cap on the GPU's memory, or auto for what is free")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the command")
    parser.add_argument("--minutes", type=float, default=25, help="limit for this call")
    parser.add_argument("--again", nargs="+", default=[], metavar="PART", help="repeat parts, by (the start of) a name")
    parser.add_argument("--save", type=Path, help="the result, default: bench/results/gpu-<device>.json")
    arguments = parser.parse_args(given)
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu: the full sizes need a GPU; add --tiny to try the command on a CPU")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Measure what is missing from the result, then conclude."""
    deadline = time.monotonic() + 60 * arguments.minutes
    sizes = TINY if arguments.tiny else FULL
    path = arguments.save or RESULTS / f"gpu-{device_name(arguments.device)}{'-tiny' if arguments.tiny else ''}.json"
    record = open_record(path, arguments)
    device = Device(**record["device"])
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as scratch:
        parts = all_parts(sizes, device, {name: Path(scratch) / name for name in sizes.shapes})
        forget(record, arguments.again, parts)
        to_do = [part for part in parts if not part.missing and part.name not in record["parts"]]
        making = len({part.shape for part in to_do if part.shape}) * gpu_parts.weights_seconds(device)
        estimate = (sum(part.seconds for part in to_do) + making) / 60
        print(f"{len(to_do)} parts to measure, {estimate:.0f} minutes by the planner (rates: {device.rates_of});")
        print(f"limit {arguments.minutes:g} minutes; result in {path}", flush=True)
        run_parts(parts, record, path, device, deadline, sizes, Path(scratch))
    if skipped := [name for name, part in record["parts"].items() if part["status"] == "skipped"]:
        print(f"{len(skipped)} parts were skipped; the same command goes on with them")
    conclude(record, sizes, device)
    write_json(path, record)
    print(json.dumps(record))


def device_name(kind: str) -> str:
    """Return the processor's or the GPU's name as part of a file's name."""
    name = "cpu" if kind == "cpu" else gpu_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def gpu_name() -> str:
    """Return the GPU's name."""
    if (name := gpu_record.device_name()) is None:
        raise RecipeError("--device cuda: this machine has no CUDA GPU; --tiny --device cpu tries the command without")
    return name


def open_record(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the result that is there, or a new one. Raises RunError if it was made with other settings."""
    gpu_mem = "cpu" if arguments.device == "cpu" else arguments.gpu_mem
    processor = cpu_name() if arguments.device == "cpu" else gpu_name()
    settings = {"processor": processor, "gpu_mem": gpu_mem, "tiny": arguments.tiny}
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record.get("settings") != settings:
            raise RunError(f"--save {path}: it has other settings ({record.get('settings')}); name another file")
        return record
    if not path.parent.is_dir():
        raise RunError(f"--save {path}: there is no folder {path.parent}; make it first")
    device = find_device(gpu_mem)
    if device.rates_of != HERE:
        raise RecipeError(f"--gpu-mem {gpu_mem}: this machine's GPU has less; give a smaller size, or auto")
    return {
        "benchmark": "gpu", "command": command_of("gpu"), "settings": settings, "device": asdict(device), "parts": {},
    }  # fmt: skip


def forget(record: dict[str, Any], again: Sequence[str], parts: Sequence[Part]) -> None:
    """Drop the parts to repeat, and those that were not measured. Raises RecipeError for a name that no part has."""
    for name in again:
        if not any(part.name.startswith(name) for part in parts):
            raise RecipeError(f"--again {name}: there is no such part; parts are named like {parts[1].name}")
    record["parts"] = {
        name: part
        for name, part in record["parts"].items()
        if part["status"] in ("done", "failed") and not any(name.startswith(start) for start in again)
    }


def run_parts(
    parts: Sequence[Part], record: dict[str, Any], path: Path, device: Device, deadline: float, sizes: Sizes,
    scratch: Path,
) -> None:  # fmt: skip
    """Measure the parts that the record lacks, as far as time allows, and save it after each."""
    for part in parts:
        if part.name in record["parts"]:
            status = record["parts"][part.name]["status"]
            print(f"{part.name:<42} {'there already' if status == 'done' else f'{status} before; --again repeats it'}")
            continue
        left = deadline - time.monotonic()
        lacks_weights = bool(part.shape) and not (scratch / part.shape).is_dir()
        seconds = part.seconds + lacks_weights * gpu_parts.weights_seconds(device)
        if part.missing:
            found: dict[str, Any] = {"status": "not run", "why": part.missing}
        elif seconds > left:
            found = {"status": "skipped", "why": f"planned at {seconds:.0f} s, and {max(0, left):.0f} s are left"}
        else:
            found = measure(part, device, left, sizes, scratch)
        record["parts"][part.name] = found
        write_json(path, record)
        print(f"{part.name:<42} {as_text(found)}", flush=True)


def measure(part: Part, device: Device, left: float, sizes: Sizes, scratch: Path) -> dict[str, Any]:
    """Run a part in a child process; return what was found, or why it failed."""
    limit = max(AT_LEAST_S, LATE * part.seconds)
    started = time.monotonic()
    found: dict[str, Any] = {"status": "done", "planned_s": part.seconds, "planned": part.planned}
    assert part.task is not None
    try:
        if part.shape and not (scratch / part.shape).is_dir():
            in_child(Weights(sizes.shapes[part.shape], scratch / part.shape), "weights", device, limit, scratch)
        task_limit = max(1.0, min(limit, left - (time.monotonic() - started)))
        value = in_child(part.task, part.name, device, task_limit, scratch, first_import=part.first_import)
    except DpostError as error:
        if left <= time.monotonic() - started:
            return {"status": "skipped", "why": "stopped, as --minutes were over"}
        return {"status": "failed", "why": reason(error), "wall_s": time.monotonic() - started}
    found |= value.metrics
    found["wall_s"] = time.monotonic() - started
    found["resident_gib"] = value.ram_bytes / GIB
    if value.gpu_bytes is not None:
        found["reserved_gib"] = value.gpu_bytes / GIB
        found["gib"] = (value.gpu_bytes + CONTEXT_BYTES) / GIB
    return found


def reason(error: DpostError) -> str:
    """Say in one line why a part failed."""
    if isinstance(error, ProcessFailed):
        return ": ".join(filter(None, (error.reason, error.last_line)))
    return str(error)


def in_child(
    task: gpu_parts.Task, name: str, device: Device, limit: float, scratch: Path, *, first_import: str | None = None
) -> Any:  # fmt: skip
    """Run a task in a process under the cap, for at most `limit` seconds."""
    slug = name.replace("/", "-")
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        return run_in_child(
            Measured(task), Path(out), log=scratch / f"{slug}.log", progress=lambda *_, **__: None,
            memory_share=device.memory_share, first_import=first_import, limit_s=limit,
        )  # fmt: skip


def as_text(found: dict[str, Any]) -> str:
    """Say in a line what a part found."""
    if found["status"] != "done":
        return f"{found['status']}: {found['why']}"
    words = []
    if "rates" in found:
        words.append(found["machine"]["gpu"] or found["machine"]["cpu"])
        words += [
            f"{name} {rates['matrix_gflop_s'] / 1e3:.2f} TFLOP/s, {rates['bandwidth_gb_s']:.0f} GB/s"
            for name, rates in found["rates"].items()
        ]
    planned = found["planned"]
    if "tokens_per_s" in found:
        beside = f" (planned {planned['tokens_per_s']:.0f})" if planned else ""
        words.append(f"{found['tokens_per_s']:.0f} tokens/s{beside}")
    if "gib" in found:
        words.append(f"{found['gib']:.2f} GiB" + (f" (planned {planned['gib']:.2f})" if planned else ""))
    elif planned:
        words.append(f"{found['resident_gib']:.2f} GiB resident (planned {planned['gib']:.2f})")
    return ", ".join([*words, f"{found['wall_s']:.0f} s"])


def conclude(record: dict[str, Any], sizes: Sizes, device: Device) -> None:
    """Add the bounds, the night and the targets to the record, and print them."""
    import gpu_targets

    parts = record["parts"]
    recipe = load_recipe(None, sizes.settings)
    name, shape = next(iter(sizes.shapes.items()))
    bounds = record["bounds"] = gpu_targets.bounds(parts, sizes, device)
    hours = record["night"] = gpu_targets.night(parts, recipe, sizes.work, shape, name, device)
    found = gpu_targets.targets(parts, bounds, hours, on_gpu=not device.is_cpu)
    record["targets"] = [{**asdict(target), "verdict": target.verdict} for target in found]
    for part, bound in bounds.items():
        print(f"{part}: {bound['bandwidth_reached']:.1%} of the bandwidth bound")
    print(f"\nDPO-ST, {name}, K = 10, three rounds of 7,473 problems, hours:")
    if "error" in hours:
        print(hours["error"])
    else:
        print(f"{'':<16}{'planned':>9}{'measured':>10}")
        for kind, own in [*hours["stages"].items(), ("all", hours)]:
            print(f"{kind:<16}{as_hours(own['planned_h']):>9}{as_hours(own['measured_h']):>10}")
    print(f"\ntargets{' (of tiny models: no verdict on anything but this command)' if sizes is TINY else ''}:")
    print("\n".join(gpu_targets.table(found)))


def as_hours(hours: float | None) -> str:
    return "–" if hours is None else f"{hours:.2f}"


if __name__ == "__main__":
    main()
