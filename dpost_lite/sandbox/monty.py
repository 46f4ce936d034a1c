"""The default sandbox: pydantic-monty, a Python interpreter of its own in Rust.

It has nothing of CPython or of the system to escape into: no files, no network, no processes, and of the standard
library only what it implements itself (math, decimal, itertools, re, datetime …; no sympy, no fractions). Each session
runs in one of a pool of worker processes, so that a crash ends that worker alone.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dpost_lite.errors import SandboxError
from dpost_lite.sandbox.base import (
    CRASHED,
    MAX_PRINTED,
    PRINTED_TOO_MUCH,
    Limits,
    Ran,
    num_cores,
    ran,
    took_too_long,
    took_too_much_memory,
)
from dpost_lite.sandbox.echo import with_echo

MAX_RECURSION = 500  # calls deep
GRACE_S = 3.0  # a worker that keeps silent for so much longer than the limit is killed
_CLOCK = "2024-07-01T12:00:00+00:00"  # what the code believes the time to be, so that equal calls give equal texts


class MontySandbox:
    """A `Sandbox` in at most `num_workers` processes, by default one for each core.

    Raises SandboxError if pydantic-monty is not installed or does not start.
    """

    def __init__(self, limits: Limits, num_workers: int | None = None) -> None:
        try:
            import pydantic_monty
        except ImportError as error:
            raise SandboxError(
                'code.sandbox=monty needs pydantic-monty; install it with pip install "dpost-lite[code]"'
            ) from error
        self.limits = limits
        self._monty = pydantic_monty
        num_workers = num_workers or num_cores()
        self._pool = pydantic_monty.Monty(max_processes=num_workers, request_timeout=limits.seconds + GRACE_S)
        try:
            self._pool.__enter__()
        except Exception as error:
            raise SandboxError(f"code.sandbox=monty: pydantic-monty does not start ({error})") from error
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="sandbox")

    def run(self, earlier: Sequence[str], code: str) -> Future[Ran]:
        """Run `code` after the `earlier` blocks, as `Sandbox.run`."""
        # Parsed here, not in the pool: before Python 3.13 threads that parse at once spoil each other's count of depth.
        return self._threads.submit(self._run, [with_echo(block) for block in earlier], with_echo(code))

    def close(self) -> None:
        """End the workers; calls that have not started are dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pool.__exit__(None, None, None)

    def _run(self, earlier: list[str], code: str) -> Ran:
        for _ in range(2):  # a worker can also die of a signal that was meant for the whole process group
            try:
                return self._in_session(earlier, code)
            except self._monty.MontyCrashedError as error:
                if error.timed_out:
                    return ran("", took_too_long(self.limits), self.limits)
        return ran("", CRASHED, self.limits)

    def _in_session(self, earlier: list[str], code: str) -> Ran:
        import datetime

        import pydantic_monty

        limits: pydantic_monty.ResourceLimits = {
            "max_feed_duration_secs": self.limits.seconds,
            "max_total_sleep_secs": self.limits.seconds * (len(earlier) + 1),
            "max_memory": self.limits.memory_mib * 2**20,
            "max_recursion_depth": MAX_RECURSION,
        }
        policy: pydantic_monty.OSPolicy = {
            "datetime": datetime.datetime.fromisoformat(_CLOCK),
            "random_start": {"seed": 0},
        }
        with self._pool.checkout(limits=limits, os_policy=policy) as session:
            for block in earlier:
                self._feed(session, block)
            return self._feed(session, code)

    def _feed(self, session: Any, code: str) -> Ran:
        printed, room = list[str](), MAX_PRINTED

        def keep(_: str, text: str) -> None:
            nonlocal room
            printed.append(text[: max(0, room)])
            room -= len(text)

        error = ""
        try:
            session.feed_run(code, print_callback=keep)
        except self._monty.MontyCrashedError:
            raise
        except self._monty.MontyError as raised:
            error = self._line_of(raised)
        if room < 0:
            error = PRINTED_TOO_MUCH
        return ran("".join(printed), error, self.limits)

    def _line_of(self, error: Any) -> str:
        """Return an exception as `Type: message`; those of limits without measured times."""
        text = error.display("type-msg") if hasattr(error, "display") else str(error)
        if text.startswith(("TimeoutError: feed time limit", "TimeoutError: sleep limit")):
            return took_too_long(self.limits)
        return took_too_much_memory(self.limits) if text.startswith("MemoryError: memory limit") else text
