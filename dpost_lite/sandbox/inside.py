"""What runs inside a sandbox: a Python that has imported sympy, and forks for every call.

Its text is passed to `python -c`, so it imports nothing of this package. Requests and answers are lines of JSON on
standard input and output, which the forks do not have. This process never runs a model's code, and a fork can do
nothing to it or to anything else, once the filter of system calls (seccomp.py) is on.
"""

import ast
import codecs
import contextlib
import ctypes
import errno
import gc
import importlib
import io
import json
import mmap
import os
import random
import re
import resource
import select
import signal
import struct
import sys
import time
import types
from typing import Any

PRELOADED = (
    "cmath", "collections", "datetime", "decimal", "fractions", "functools", "itertools", "math", "operator",
    "statistics", "string", "typing", "sympy",
)  # fmt: skip
MAX_ERROR = 2000  # characters of an error's message
MAX_REPORT = 2**16  # bytes of a fork's report
SECONDS_TO_START = 10.0
LIBC = ctypes.CDLL(None, use_errno=True)


def serve(settings: dict[str, Any]) -> None:
    """Answer the requests of standard input until it ends."""
    os.closerange(3, 1 << 16)
    os.environ.clear()
    sys.path += settings["packages"]
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    for name in PRELOADED:
        importlib.import_module(name)
    warm_up()
    sys.setrecursionlimit(1000)
    drop_capabilities()
    settings["address_space"] = address_space() + settings["memory_bytes"]
    gc.collect()
    gc.freeze()
    answer: dict[str, str] = {"end": "ready"}
    while True:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        request = requests.readline()
        if not request.endswith(b"\n"):
            return
        answer = run(json.loads(request), settings, requests.fileno(), answers.fileno())


def warm_up() -> None:
    """Let sympy import and remember now what it would otherwise in every fork that solves or simplifies something."""
    sympy: Any = sys.modules["sympy"]
    x = sympy.Symbol("x")
    sympy.solve(x**2 - 5 * x + 6, x)
    sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2)


def drop_capabilities() -> None:
    """Give up what root may do beyond other users, for instance to raise its own limits."""
    version_3, no_capabilities = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    if LIBC.capset(version_3, no_capabilities):
        raise OSError(ctypes.get_errno(), "capset failed")


def address_space() -> int:
    """Return how many bytes of address space are in use: the least limit under which one more page can be mapped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    low, high = 0, 2**40
    while high - low > 2**20:
        middle = (low + high) // 2
        resource.setrlimit(resource.RLIMIT_AS, (middle, hard))
        try:
            mmap.mmap(-1, mmap.PAGESIZE).close()
            high = middle
        except (OSError, MemoryError):
            low = middle
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return high


def run(blocks: list[str], settings: dict[str, Any], *private: int) -> dict[str, str]:
    """Run the last block in a fork, after the others. `private` are the files that the fork must not have."""
    printed, to_print = os.pipe()
    report, to_report = os.pipe()
    this_process = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            for file in (*private, printed, report):
                os.close(file)
            be_harmless(settings, this_process)
            run_blocks(blocks, to_print, to_report)
        finally:
            os._exit(1)
    os.close(to_print)
    os.close(to_report)
    watch = Watch(child, printed, report, requests=private[0])
    try:
        return watch.until_the_end(len(blocks), settings["seconds"], settings["max_printed"])
    finally:
        watch.close()


class Watch:
    """Reads what a fork prints and reports, until it ends or has to be ended."""

    def __init__(self, child: int, printed: int, report: int, requests: int) -> None:
        self._child, self._printed, self._report, self._requests = child, printed, report, requests
        self._exited = os.pidfd_open(child)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = io.StringIO()
        self._reported = b""

    def until_the_end(self, num_blocks: int, seconds: float, max_printed: int) -> dict[str, str]:
        begun, deadline, end = 0, time.monotonic() + SECONDS_TO_START, ""
        open_files = [self._printed, self._report]
        while not end:
            ready, _, _ = select.select(
                [*open_files, self._exited, self._requests], [], [], max(0.0, deadline - time.monotonic())
            )
            if self._requests in ready:  # the parent is gone
                os.kill(self._child, signal.SIGKILL)
                sys.exit(0)
            open_files = [file for file in open_files if file not in ready or self._read(file)]
            now_begun = min(num_blocks, len(self._reported) - len(self._reported.lstrip(b".")))
            if now_begun > begun:
                begun, deadline = now_begun, time.monotonic() + seconds
            if self._text.tell() > max_printed:
                end = "printed"
            elif self._reported.endswith(b"\n") or self._exited in ready or len(self._reported) > MAX_REPORT:
                end = "exit"
            elif time.monotonic() >= deadline:
                end = "time"
        os.kill(self._child, signal.SIGKILL)
        _, status = os.waitpid(self._child, 0)
        while open_files and self._text.tell() <= max_printed and len(self._reported) <= MAX_REPORT:
            open_files = [file for file in open_files if self._read(file)]
        if end == "exit" and self._text.tell() > max_printed:
            end = "printed"
        return self._answer(end, status, max_printed)

    def close(self) -> None:
        for file in (self._exited, self._printed, self._report):
            os.close(file)

    def _read(self, file: int) -> bool:
        """Read a piece; say whether there may be more."""
        piece = os.read(file, 2**16)
        if file == self._report:
            self._reported += piece
        else:
            self._text.write(self._decoder.decode(piece, final=not piece))
        return bool(piece)

    def _answer(self, end: str, status: int, max_printed: int) -> dict[str, str]:
        error = ""
        report = self._reported.lstrip(b".")
        if end == "exit" and report.endswith(b"\n"):
            end = "memory" if report == b"memory\n" else "done"
            error = " ".join(report.decode("utf-8", "replace").split())[:MAX_ERROR]
        elif end == "exit":
            code = os.waitstatus_to_exitcode(status)
            end, error = "exit", f"exit code {code}" if code >= 0 else f"signal {-code}"
        return {"end": end, "printed": self._text.getvalue()[:max_printed], "error": error}


def be_harmless(settings: dict[str, Any], parent: int) -> None:
    """Set the limits of this process, which code cannot lift, and put the filter of system calls on.

    The process is killed when `parent` dies.
    """
    limits = {
        resource.RLIMIT_AS: settings["address_space"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,  # of files, not of pipes
        resource.RLIMIT_NOFILE: 64,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))
    program = bytes.fromhex(settings["filter"])
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
    die_with_parent, no_new_privileges, set_seccomp, mode_filter = 1, 38, 22, 2
    failed = LIBC.prctl(die_with_parent, signal.SIGKILL, 0, 0, 0) or LIBC.prctl(no_new_privileges, 1, 0, 0, 0)
    if failed or LIBC.prctl(set_seccomp, mode_filter, header, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")
    if os.getppid() != parent:  # it died before that
        os._exit(1)


def run_blocks(blocks: list[str], to_print: int, to_report: int) -> None:
    """Run the blocks in one namespace, print as a notebook does for the last one, report its error and exit.

    The report is a dot before every block, then the error's line, or an empty one.
    """
    make_reproducible()
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    stream = open(1, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)  # noqa: SIM115 - until the end
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = stream  # type: ignore[misc]
    error = ""
    for number, block in enumerate(blocks, start=1):
        if number == len(blocks):
            with contextlib.suppress(ValueError):  # closed
                stream.flush()
            os.dup2(to_print, 1)
            os.dup2(to_print, 2)
        os.write(to_report, b".")
        error = ""
        try:
            execute(block, module.__dict__)
        except BaseException as raised:
            error = in_one_line(raised)
    with contextlib.suppress(ValueError, AttributeError):
        sys.stdout.flush()
    os.write(to_report, error.encode("utf-8", "replace") + b"\n")
    os._exit(0)


def make_reproducible() -> None:
    """Seed random numbers, also those of generators that code will create without a seed, as sympy.randMatrix does."""
    seed_with = random.Random.seed

    def seed(self: random.Random, a: Any = None, version: int = 2) -> None:
        seed_with(self, 0 if a is None else a, version)

    random.Random.seed = seed  # type: ignore[method-assign]
    random.seed(0)
    sys.modules["sympy.core.random"].seed(0)


def execute(block: str, namespace: dict[str, Any]) -> None:
    """Run a block; print the value of its last statement if that is an expression. Raises whatever the block raises."""
    tree = ast.parse(block, "<code>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<code>", "exec", dont_inherit=True), namespace)
    if last is not None:
        exec(compile(ast.Interactive([last]), "<code>", "single", dont_inherit=True), namespace)


def in_one_line(error: BaseException) -> str:
    """Return `Type: message` without addresses and paths of modules; `memory` if memory ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "memory"
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except BaseException:
        message = "<no message>"
    message = re.sub(r" \(/[^()]*\)", "", " ".join(message[:MAX_ERROR].split()))
    message = re.sub(r"\b0x[0-9a-fA-F]{6,}\b", "0x...", message)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
