"""Run a task in its own process: its memory is freed for certain, and whatever kills it leaves the run alive.

The child reports through a pipe; what it and its libraries print goes to a log file. With a GPU a child is spawned,
since CUDA does not survive a fork; without one it is forked from a server that has imported the libraries once,
which saves seconds per stage.
"""

import contextlib
import functools
import importlib
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from dpost_lite.errors import DpostError, OutOfMemory, ProcessFailed, is_out_of_memory, of_disk
from dpost_lite.models import hardware
from dpost_lite.runs.folder import WorkResult
from dpost_lite.system import interrupt
from dpost_lite.system.machine import cache_dir, let_threads_sleep
from dpost_lite.system.quiet import stderr_to

SECONDS_TO_END = 10
SECONDS_TO_NOTICE = 0.5  # that the user asked to stop
KILLED = 9  # the signal with which Linux ends a process when memory runs out


class Task(Protocol):
    """Work for a child process. It is pickled, so it holds settings and paths, never a model."""

    def run(self, out: Path, progress: Callable[..., None]) -> dict[str, Any]:
        """Write files into `out` and return metrics. `progress` may raise KeyboardInterrupt."""


def run_in_child(
    task: Task,
    out: Path,
    *,
    log: Path,
    progress: Callable[..., None],
    memory_share: float | None = None,
    first_import: str | None = None,
    limit_s: float = math.inf,
) -> WorkResult:
    """Return what `task.run(out, progress)` returned in a child process, with the child's peak memory.

    `memory_share` caps the child's share of the GPU's memory; `first_import` names a module that must be imported
    before transformers, peft and trl. Raises what the child raised if it is one of errors.py; OutOfMemory if an
    allocation failed or the system killed the child; and ProcessFailed, with the end of its log, for anything else, or
    if the child takes longer than `limit_s` seconds. When the user asks to stop, `progress` raises KeyboardInterrupt in
    the child; if the task does not catch it, it is raised here. The log is kept if there was an error or something was
    printed.
    """
    with tempfile.TemporaryDirectory(prefix="dpost-lite-") as scratch:  # the child may not live to remove its own
        return _run(task, out, log, progress, limit_s, (Path(scratch), memory_share, first_import))


def _run(
    task: Task,
    out: Path,
    log: Path,
    progress: Callable[..., None],
    limit_s: float,
    settings: tuple[Path, float | None, str | None],
) -> WorkResult:
    context = _context()
    receiver, sender = context.Pipe()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    process = context.Process(target=_main, args=(sender, log, *settings, task, out))
    with stderr_to(log):  # for a spawned child, until it has opened its log itself
        process.start()
    sender.close()
    was_told, deadline = False, time.monotonic() + limit_s
    try:
        while True:
            if time.monotonic() > deadline:
                raise _failed(f"the process was stopped after {limit_s:.0f} s", log)
            ready = wait([receiver, process.sentinel], timeout=SECONDS_TO_NOTICE)
            if interrupt.asked() and not was_told:
                was_told = True
                with contextlib.suppress(OSError):  # it has just ended
                    receiver.send("stop")
            if not ready:
                continue
            kind, value = _received(receiver)
            if kind == "died":
                raise KeyboardInterrupt if interrupt.asked() else _died(process, log)
            if kind == "progress":
                progress(*value[0], **value[1])
            elif kind == "error":
                raise value
            elif kind == "interrupted":
                raise KeyboardInterrupt
            elif kind == "bug":
                raise _failed("the work failed", log, ", which is a bug; please report it with its log")
            else:
                break
        process.join(SECONDS_TO_END)  # do not wait for threads of libraries
    finally:
        _end(process)
        receiver.close()
    if not log.stat().st_size:
        log.unlink()
    return value


def _received(receiver: Connection) -> tuple[str, Any]:
    """Return the kind of the child's message, and its content."""
    try:
        return receiver.recv() if receiver.poll() else ("died", None)
    except (EOFError, OSError):  # possibly with our message to it unread
        return "died", None


def _context() -> Any:
    """Return how children are started on this machine. Huge pages help: sampling reads gigabytes per step."""
    let_threads_sleep()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first allocation
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))  # shared by the stages
    on_gpu = hardware.device() == "cuda"
    if on_gpu:  # one is planned for: with more in sight, trainers may split each batch among all
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if on_gpu or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpost_lite.pipeline.preload"])
    forkserver.ensure_running()  # before a stage's log is stderr, which the server would keep
    return context


def _died(process: Any, log: Path) -> DpostError:
    process.join()
    if process.exitcode == -KILLED:
        return OutOfMemory("the system killed the process, as it does when memory runs out; close other programs")
    return _failed(f"the process ended with exit code {process.exitcode}", log, "; the same command tries again")


def _failed(reason: str, log: Path, advice: str = "") -> ProcessFailed:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    last_line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ProcessFailed(reason, advice=advice, log=log, last_line=last_line[:200])


def _end(process: Any) -> None:
    if process.is_alive():
        process.terminate()
        process.join(SECONDS_TO_END)
    if process.is_alive():
        process.kill()
        process.join()


def _main(
    sender: Connection,
    log: Path,
    scratch: Path,
    memory_share: float | None,
    first_import: str | None,
    task: Task,
    out: Path,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.simplefilter("ignore", FutureWarning)  # meant for developers
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    answer: tuple[str, Any]
    try:
        if first_import is not None:
            importlib.import_module(first_import)
        if memory_share is not None:
            import torch

            torch.cuda.set_per_process_memory_fraction(memory_share)
        metrics = task.run(out, functools.partial(_report, sender))
        answer = ("value", WorkResult(metrics, *_peak_memory()))
    except KeyboardInterrupt:  # raised by _report: the signal itself is ignored
        answer = "interrupted", None
    except BaseException as error:
        sys.stdout.flush()
        traceback.print_exc()
        answer = _as_answer(error)
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(answer)
    sender.close()


def _report(sender: Connection, *args: Any, **kwargs: Any) -> None:
    """Send progress to the parent; raise KeyboardInterrupt if the parent asked to stop."""
    sender.send(("progress", (args, kwargs)))
    if sender.poll():
        sender.recv()
        raise KeyboardInterrupt


def _as_answer(error: BaseException) -> tuple[str, Any]:
    if is_out_of_memory(error):
        words = " ".join(str(error).split())[:200] or type(error).__name__
        return "error", error if isinstance(error, OutOfMemory) else OutOfMemory(words)
    if isinstance(error, DpostError):
        return "error", error
    if (disk_error := of_disk(error)) is not None:
        return "error", disk_error
    return "bug", None


def _peak_memory() -> tuple[int, int | None]:
    """Peak bytes of this process: resident, and what PyTorch reserved of the GPU, if there is one."""
    import psutil

    memory = psutil.Process().memory_info()
    resident = getattr(memory, "peak_wset", 0) or _peak_resident() or memory.rss
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_available()
    return resident, torch.cuda.max_memory_reserved() if torch is not None and has_gpu else None


def _peak_resident() -> int:
    """Linux counts it from the start of the process; a fork starts with what it shares with its server."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(
        (int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")), 0
    )


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
