"""The real Python, with sympy, in a sandbox of the Linux kernel: for code that a small interpreter cannot run.

Every worker is a sandbox of its own and runs one call at a time, in a process forked for that call (inside.py). What
it sends back is text of unknown content and bounded size, whatever the code did to it.
"""

import contextlib
import json
import os
import select
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

from dpost_lite.errors import SandboxError
from dpost_lite.sandbox import launchers
from dpost_lite.sandbox.base import (
    ENDED,
    MAX_PRINTED,
    PRINTED_TOO_MUCH,
    Limits,
    Ran,
    num_cores,
    ran,
    took_too_long,
    took_too_much_memory,
)
from dpost_lite.sandbox.launchers import WAY_OUT, Launcher

LAUNCHERS: tuple[Launcher, ...] = ("sandlock", "bubblewrap")
MAX_ANSWER = 16 * MAX_PRINTED  # bytes of JSON
SECONDS_TO_START = 60.0  # importing sympy on a busy machine
DIED = f"{ENDED} the process that it ran in"
SECONDS_TO_ANSWER = 20.0  # beyond the limits of the blocks

TRIAL = """
import os, socket
works = []
for function, arguments in ((open, [{file!r}]), (socket.socket, []), (os.kill, [os.getppid(), 0]), (os.fork, [])):
    try:
        function(*arguments)
        works.append(function.__name__)
    except OSError:
        pass
print(*works or ["safe"])
"""


class RealPython:
    """Runs code as `Sandbox` says. Raises SandboxError if the launcher is missing or does not work on this machine.

    A fork starts with sympy imported, so a call costs milliseconds, and a worker half a second of one core, once.
    `num_workers` calls run side by side: as many as there are cores, by default.
    """

    def __init__(self, launcher: Launcher, limits: Limits, num_workers: int | None = None) -> None:
        launchers.check(launcher)
        self._launcher, self.limits = launcher, limits
        self._own = threading.local()  # a worker ends with the thread that started it
        self._workers: set[Worker] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        num_workers = num_workers or num_cores()
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="sandbox")
        try:
            self._try_out()
        except BaseException:
            self.close()
            raise

    def run(self, earlier: Sequence[str], code: str) -> Future[Ran]:
        return self._threads.submit(self._call, [*earlier, code])

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.end()

    def _call(self, blocks: list[str]) -> Ran:
        found = self._in_worker(blocks)
        return self._in_worker(blocks) if found.error == DIED else found  # the system may have killed the worker

    def _in_worker(self, blocks: list[str]) -> Ran:
        worker = getattr(self._own, "worker", None)
        if worker is None or worker.is_dead:
            worker = self._own.worker = self._start()
        try:
            return worker.run(blocks)
        finally:
            if worker.is_dead:
                worker.end()
                with self._lock:
                    self._workers.discard(worker)

    def _start(self) -> "Worker":
        with self._lock:
            if self._is_closed:
                raise SandboxError("the sandbox is closed")
            worker = Worker(self._launcher, self.limits)
            self._workers.add(worker)
        try:
            worker.wait_until_ready()
        except BaseException:
            worker.end()
            raise
        return worker

    def _try_out(self) -> None:
        """Raise SandboxError unless code runs, and cannot do the most important things that it must not."""
        with tempfile.NamedTemporaryFile() as file:
            text = self.run([], TRIAL.format(file=file.name)).result().text
        if text != "safe":
            raise SandboxError(
                f'the sandbox "{self._launcher}" does not work here: a trial gave "{" ".join(text.split())}"; {WAY_OUT}'
            )


class Worker:
    """A Python in a sandbox. One thread may use it at a time; others may `kill` it."""

    def __init__(self, launcher: Launcher, limits: Limits) -> None:
        self._launcher, self._limits = launcher, limits
        settings = {
            "seconds": limits.seconds, "memory_bytes": limits.memory_mib * 2**20, "max_printed": MAX_PRINTED,
        }  # fmt: skip
        self._process = launchers.start(launcher, launchers.python_command(settings))
        self.is_dead = False
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self._stdin, self._stdout, self._stderr = self._process.stdin, self._process.stdout, self._process.stderr
        self._files = (self._stdin, self._stdout, self._stderr)
        for file in self._files:
            os.set_blocking(file.fileno(), False)

    def wait_until_ready(self) -> None:
        """Raise SandboxError if Python does not start in the sandbox."""
        if self._answer(time.monotonic() + SECONDS_TO_START).get("end") != "ready":
            self.is_dead = True
            said = (self._stderr.read() or b"").decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), "it gave no reason")
            raise SandboxError(f'the sandbox "{self._launcher}" does not work here ({last[:300]}); {WAY_OUT}')

    def run(self, blocks: list[str]) -> Ran:
        """Return what the last block did."""
        deadline = time.monotonic() + self._limits.seconds * len(blocks) + SECONDS_TO_ANSWER
        self._write(json.dumps(blocks).encode() + b"\n", deadline)
        answer = self._answer(deadline)
        errors = {
            "done": answer.get("error", ""),
            "exit": f"{ENDED} its process ({answer.get('error')})",
            "time": took_too_long(self._limits),
            "memory": took_too_much_memory(self._limits),
            "printed": PRINTED_TOO_MUCH,
        }
        error = errors.get(answer.get("end", ""))
        if error is None:
            self.is_dead = True
            error = DIED
        return ran(answer.get("printed", ""), error, self._limits)

    def kill(self) -> None:
        """End the worker's processes; a thread that waits for it goes on."""
        with contextlib.suppress(OSError):
            self._process.kill()

    def end(self) -> None:
        """End the worker's processes and wait until they have ended."""
        self.kill()
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        self._process.wait()

    def _write(self, request: bytes, deadline: float) -> None:
        rest = memoryview(request)
        while rest and _is_ready(self._stdin, select.POLLOUT, deadline):
            try:
                rest = rest[self._stdin.write(rest) or 0 :]
            except OSError:  # it has died; the answer is missing
                return

    def _answer(self, deadline: float) -> dict[str, str]:
        """Return the next answer; nothing if there is none, or it is none."""
        line = bytearray()
        while not line.endswith(b"\n"):
            piece = self._stdout.read(2**16) if _is_ready(self._stdout, select.POLLIN, deadline) else b""
            line += piece or b""
            if not piece or len(line) > MAX_ANSWER:
                return {}
        try:
            answer = json.loads(line)
        except ValueError:
            return {}
        return {str(key): str(value) for key, value in answer.items()} if isinstance(answer, dict) else {}


def _is_ready(file: IO[bytes], event: int, deadline: float) -> bool:
    """Wait until `file` can be read or written without blocking (`event`); False if that takes too long."""
    poll = select.poll()
    poll.register(file, event)
    return bool(poll.poll(1000 * max(0.0, deadline - time.monotonic())))
