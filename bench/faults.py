"""What does a run lose when it is killed, stopped, or finds the disk full? Provoked for real, at random moments.

    python bench/faults.py [--faults 50] [--kinds run-killed …] [--model NAME] [--data FILE] [--out DIR] [--seed 0]
                           [--save bench/results/faults.json] [key=value …]

A run is started again and again; each start but the last of a run meets one fault: `run-killed` and `stage-killed`
(kill -9 of the command or of a stage's process, at a random moment), `killed-writing` (at the n-th write of either: a
record, a rename, the middle of a rationale's line, the middle of a file of weights), `interrupted` (Ctrl-C once), and
`disk-full` (the n-th write fails). When it has come to its end it is held against a run that met none: rationales,
pairs, labels and metrics must be equal, adapters within 1e-5. Then the next run begins, until there were enough
faults. Printed for each kind: how often it struck, after how many of them the run ended in the same result, how many
rationales were drawn and training steps done a second time, and the bytes on disk that could not be used again. Also:
how long the finished run takes to say so when its command is given again, and the share of a run's time that goes into
journal, records, shards and checkpoints. Needs Linux or macOS (fork). The last line is one JSON object.
"""

import argparse
import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from publish import publish, result_of
from random_model import save_random

from dpost_lite.models import checkpoint
from dpost_lite.models.shapes import ModelShape
from dpost_lite.pipeline import tasks, worker
from dpost_lite.pipeline.run import execute
from dpost_lite.problems.records import Rationale, as_line, read_jsonl
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs import folder as run_folder
from dpost_lite.runs.fingerprint import flatten
from dpost_lite.runs.folder import UNFINISHED, Run, read_json
from dpost_lite.system import interrupt

KINDS = ("run-killed", "stage-killed", "killed-writing", "interrupted", "disk-full")
SMALL = [
    "rounds=1", "synthetic.num_train=24", "synthetic.num_test=8", "data.num_labelled=12", "data.dev_size=4",
    "sft.epochs=6", "sft.batch_size=8", "dpo.batch_size=8", "sampling.samples_for_pairs=3",
    "sampling.samples_for_labels=3", "sampling.max_new_tokens=64", "export.quant=f16", "checkpoint_s=0",
    "model.precision=16bit",  # starts faster
    "pairs.unfinished_rejected=true",  # all that random weights have to reject
    "sft.micro_batch_size=1", "dpo.micro_batch_size=1",  # smaller ones, after a kill, would round otherwise
]  # fmt: skip
TINY = ModelShape(
    name="tiny", num_layers=2, hidden=64, intermediate=128, num_heads=4, num_kv_heads=2, head_dim=16, vocabulary=49152,
    is_tied=True,
)  # fmt: skip
TOLERANCE = 1e-5  # of an adapter's weights
COLUMNS = ("tried", "recovered", "rationales_again", "steps_again", "bytes_again")
EXPECTED = {  # how a start ends that met a fault
    "run-killed": ("killed",),
    "stage-killed": ("OutOfMemory",),  # a child that is killed is taken for one that the system killed
    "killed-writing": ("killed", "OutOfMemory"),  # of the command, of a stage
    "interrupted": ("KeyboardInterrupt", "killed"),  # before Python is ready to take a signal
    "disk-full": ("RunError", "OSError"),
}


@dataclass(frozen=True)
class Fault:
    """One fault: what happens, in which process, and when (seconds, or which of its writes)."""

    kind: str
    in_stage: bool
    seconds: float
    write: int

    @property
    def at_write(self) -> bool:
        """Whether it waits for a write."""
        return self.kind in ("killed-writing", "disk-full")


def main() -> None:
    """Run until there were enough faults, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--model", help="as --model of run; a tiny one with random weights unless given")
    parser.add_argument("--data", default="synthetic", help="as --data of run")
    parser.add_argument("--out", type=Path, help="keep the runs' folders here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="also write the JSON object to this file")
    parser.add_argument("overrides", nargs="*", help="recipe keys, key=value")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        model = arguments.model or save_random(TINY, out / "model")
        sources = [f"model.name={model}", f"data.train={arguments.data}"]
        recipe = load_recipe("rehearsal", [*SMALL, *sources, *arguments.overrides])
        result = provoke(recipe, out, arguments.faults, arguments.kinds, random.Random(arguments.seed))
    print_table(result)
    publish(result_of("faults", **result), arguments.save)
    if any(row["recovered"] < row["tried"] for row in result["faults"].values()):
        sys.exit(1)


def provoke(recipe: Recipe, out: Path, num_faults: int, kinds: list[str], dice: random.Random) -> dict[str, Any]:
    """Run until `num_faults` faults have struck; return the figures."""
    started = time.monotonic()
    unbroken = out / "unbroken"
    ended, spent = attempt(recipe, unbroken, None)
    if ended != "finished":
        raise SystemExit(f"the run without faults ended with: {ended}")
    seconds = time.monotonic() - started
    print(f"a run without faults takes {seconds:.1f} s", file=sys.stderr)
    rows: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    number = 0
    while sum(row["tried"] for row in rows.values()) < num_faults:
        number += 1
        folder = out / f"run-{number}"
        struck, problem = one_run(recipe, folder, seconds, kinds, dice, rows, num_faults)
        found = [problem] if problem else differences(folder, unbroken)
        print(f"run {number}: {len(struck)} faults, {'; '.join(found) or 'the same result'}", file=sys.stderr)
        for fault in struck:
            rows[fault.kind]["recovered"] += not found
        if not found:
            shutil.rmtree(folder)
    return {
        "seconds_unbroken": seconds,
        "faults": {kind: {name: row[name] for name in COLUMNS} for kind, row in rows.items()},
        "runs": number,
        "seconds_to_resume_a_finished_run": seconds_again(recipe, unbroken),
        "journal_seconds": spent,
        "journal_share": spent / seconds,
    }


def one_run(
    recipe: Recipe, folder: Path, seconds: float, kinds: list[str], dice: random.Random,
    rows: dict[str, Counter[str]], num_faults: int,
) -> tuple[list[Fault], str]:  # fmt: skip
    """Start a run until it finishes; return the faults that struck it and what went wrong, if anything did."""
    struck: list[Fault] = []
    before = sum(row["tried"] for row in rows.values())
    while True:
        is_last = before + len(struck) >= num_faults
        kind = kinds[(before + len(struck)) % len(kinds)]
        fault = Fault(kind, dice.random() < 0.7, dice.expovariate(32 / seconds), dice.randint(1, 6))
        seen = done_work(folder)
        ended, _ = attempt(recipe, folder, None if is_last else fault)
        if struck:  # what was done twice was done again because of the fault before
            again = done_work(folder) - seen
            twice = Counter({key: n for key, n in again.items() if seen[key]})
            row = rows[struck[-1].kind]
            row["rationales_again"] += sum(n for key, n in twice.items() if not key.startswith("step "))
            row["steps_again"] += sum(n for key, n in twice.items() if key.startswith("step "))
        if ended == "finished":
            return struck, ""
        struck.append(fault)
        row = rows[fault.kind]
        row["tried"] += 1
        row["bytes_again"] += unusable_bytes(folder)
        if ended not in EXPECTED[fault.kind]:
            return struck, f"{fault} ended with: {ended}"


def attempt(recipe: Recipe, folder: Path, fault: Fault | None) -> tuple[str, float]:
    """Start the run in a process of its own, with at most one fault; return how it ended, and bookkeeping's seconds."""
    context = worker._context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(recipe, folder, fault, sender))
    process.start()
    sender.close()
    if fault is not None and not fault.at_write:
        process.join(fault.seconds)
        strike(process, fault)
    process.join()
    with contextlib.suppress(EOFError):
        return receiver.recv()
    return "killed", 0.0


def strike(process: Any, fault: Fault) -> None:
    """Kill or interrupt a run that is still going; a stage's process is waited for."""
    with contextlib.suppress(psutil.NoSuchProcess):
        run = psutil.Process(process.pid)
        if fault.kind == "run-killed":
            stages = run.children()
            run.kill()
            psutil.wait_procs(stages, timeout=60)  # a forked stage inherits the lock, and ends with its run
        elif fault.kind == "interrupted":
            run.send_signal(signal.SIGINT)
        else:
            while process.is_alive():
                if stages := run.children():
                    stages[0].kill()
                    break
                process.join(0.02)


def _run(recipe: Recipe, folder: Path, fault: Fault | None, sender: Any) -> None:
    """The command, in its own process: stages are forked from it, so that they have its traps."""
    worker._context = lambda: multiprocessing.get_context("fork")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder.mkdir(parents=True, exist_ok=True)
    spent = folder.with_name(f"{folder.name}.spent")
    set_traps(folder.with_name(f"{folder.name}.done"), spent, fault)
    try:
        run = Run.create(folder, recipe, listeners=(_count_steps(folder.with_name(f"{folder.name}.done")),))
        with run.locked(), interrupt.graceful(lambda: None):
            execute(recipe, run)
        ended = "finished"
    except BaseException as error:
        ended = type(error).__name__
    seconds = sum(map(float, spent.read_text().split())) if spent.exists() else 0.0
    sender.send((ended, seconds))


def _count_steps(file: Path) -> Callable[[dict[str, Any]], None]:
    stage = ""

    def listen(event: dict[str, Any]) -> None:
        nonlocal stage
        stage = event.get("stage", stage)
        if event["kind"] == "progress" and event["unit"] == "steps":
            note(file, f"step {event['done']} of {stage}")

    return listen


def set_traps(done: Path, spent: Path, fault: Fault | None) -> None:
    """Make every write count, be timed, and meet the fault at its turn; a forked stage starts counting again."""
    command, left = os.getpid(), {os.getpid(): fault.write if fault else 0}

    def is_turn() -> bool:
        if fault is None or not fault.at_write or fault.in_stage == (os.getpid() == command):
            return False
        left[os.getpid()] = left.get(os.getpid(), fault.write) - 1
        return left[os.getpid()] == 0

    def go_off() -> None:
        if fault is not None and fault.kind == "disk-full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL)

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def trapped(*args: Any, **kwargs: Any) -> Any:
            if is_turn():
                go_off()
            return real(*args, **kwargs)

        return trapped

    def timed(real: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                note(spent, f"{time.perf_counter() - started:.6f}")

        return measured

    def append(file: Any, record: Any) -> None:
        line = as_line(record)
        if is_turn():
            file.write(line[: len(line) // 2])
            file.flush()
            go_off()
        real_append(file, record)
        note(done, f"{file.name} {record.problem_id} {record.sample}")

    def weights(real: Callable[..., Any]) -> Callable[..., Any]:
        def trapped(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
            value = real(tensors, filename, *args, **kwargs)
            if is_turn():
                os.truncate(filename, os.path.getsize(filename) // 2)
                go_off()
            return value

        return trapped

    import peft.peft_model
    import safetensors.torch

    real_append = timed(tasks.append_jsonl)
    tasks.append_jsonl = append
    os.fsync, os.replace, os.rename = before(os.fsync), before(os.replace), before(os.rename)
    safetensors.torch.save_file = weights(safetensors.torch.save_file)
    peft.peft_model.safe_save_file = weights(peft.peft_model.safe_save_file)
    run_folder.write_json = timed(run_folder.write_json)
    run_folder.Run.emit = timed(run_folder.Run.emit)
    checkpoint.Checkpoints.save = timed(checkpoint.Checkpoints.save)


def note(file: Path, line: str) -> None:
    """Append a line in one write, which no kill can halve."""
    number = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(number, f"{line}\n".encode())
    os.close(number)


def done_work(folder: Path) -> Counter[str]:
    """Every rationale that was appended and every step that was reported so far, with how often."""
    file = folder.with_name(f"{folder.name}.done")
    return Counter(file.read_text(encoding="utf-8").splitlines() if file.exists() else ())


def unusable_bytes(folder: Path) -> int:
    """Bytes of the unfinished stage that its next start cannot resume from."""
    return sum(_unusable(path) for path in folder.rglob("*.partial/**/*") if path.is_file())


def _unusable(path: Path) -> int:
    size = path.stat().st_size
    if path.name == "begun.json":
        return 0
    if path.parent.name == UNFINISHED:  # a shard
        return size - (path.read_bytes().rfind(b"\n") + 1)
    if path.parent.name.startswith("checkpoint-") and not path.parent.name.endswith(".partial"):
        return 0
    return 0 if path.suffix == ".jsonl" else size  # a part of a stage that was finished


def _without_speed(metrics: Any) -> Any:
    """Leave out what depends on the load of the machine."""
    if isinstance(metrics, list):
        return [_without_speed(value) for value in metrics]
    if not isinstance(metrics, dict):
        return metrics
    return {key: _without_speed(value) for key, value in metrics.items() if key != "tokens_per_second"}


def differences(folder: Path, expected: Path) -> list[str]:
    """Say in what a finished run differs from the one without faults."""
    return [line for path in sorted(expected.rglob("*")) for line in _difference(path, folder, expected)]


def _difference(path: Path, folder: Path, expected: Path) -> Iterator[str]:
    name = path.relative_to(expected)
    other = folder / name
    if path.is_dir() or path.name in ("events.jsonl", ".lock") or name.parts[0] == "logs":
        return
    if not other.is_file():
        yield f"{name} is missing"
    elif path.name == "done.json":
        if _without_speed(read_json(path)["metrics"]) != _without_speed(read_json(other)["metrics"]):
            yield f"{name} has other metrics"
    elif path.suffix == ".safetensors":
        if not _close(path, other):
            yield f"{name} has other weights"
    elif path.name == "rationales.jsonl" or name.parts[0] == "score":
        if [replace(r, logprob=0.0) for r in read_jsonl(path, Rationale)] != [
            replace(r, logprob=0.0) for r in read_jsonl(other, Rationale)
        ]:
            yield f"{name} has other rationales"
    elif path.suffix == ".jsonl" and path.read_bytes() != other.read_bytes():
        yield f"{name} differs"


def _close(a: Path, b: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(
        torch.allclose(ours[name], theirs[name], rtol=0, atol=TOLERANCE) for name in ours
    )


def seconds_again(recipe: Recipe, folder: Path) -> float:
    """How long `dpost-lite run`, given again, takes on a finished run, the start of Python included."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    settings = [f"{key}={json.dumps(value)}" for key, value in flatten(values)]
    command = [sys.executable, "-m", "dpost_lite", "run", "--out", str(folder), *settings]
    subprocess.run(command, check=True, capture_output=True)  # the first one writes the manifest
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - started


def print_table(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    print(f"{'fault':<16}{'tried':>7}{'recovered':>11}{'drawn again':>13}{'steps again':>13}{'bytes again':>13}")
    for kind, row in result["faults"].items():
        print(
            f"{kind:<16}{row['tried']:>7}{row['recovered']:>11}{row['rationales_again']:>13}{row['steps_again']:>13}"
            f"{row['bytes_again']:>13,}"
        )
    print(
        f"the finished run's command, given again: {result['seconds_to_resume_a_finished_run']:.1f} s\n"
        f"journal, records, shards and checkpoints: {result['journal_seconds']:.2f} s, "
        f"{result['journal_share']:.2%} of a run"
    )


if __name__ == "__main__":
    main()
