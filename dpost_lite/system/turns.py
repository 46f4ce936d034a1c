"""Processes that compute on the same cores take turns.

Two commands at once would not share the cores half and half: at each of thousands of barriers, the threads of one wait
for a core that the other's hold, and both take three times as long as one alone. With turns they take about twice as
long (bench/together.py). A process with threads of the user's own choice (OMP_NUM_THREADS) takes no turns.
"""

import contextlib
import functools
import hashlib
import os
import platform
import time
from pathlib import Path

from dpost_lite.system.machine import cache_dir

TURN_SECONDS = 0.25
MAX_TURN_SECONDS = 5.0  # beside a process whose pieces of work are long
POLL_SECONDS = 0.005
PATIENCE_SECONDS = 60.0  # a process that was suspended keeps its turn: go on beside it
GIVEN_UP_SECONDS = 600.0  # until the next try


class Turns:
    """This process's part in the turns of all that use `folder`, which has two lock files.

    The system frees the locks of a process that died. Where there are no such locks (Windows, some network file
    systems) nobody waits. Not thread-safe.
    """

    def __init__(self, folder: Path) -> None:
        self._turn = self._waiting = -1
        self._since: float | None = None  # when this process's turn began
        self._length = TURN_SECONDS
        self._given_up_at = -GIVEN_UP_SECONDS
        self._has_locks = False
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            self._fcntl = fcntl
            folder.mkdir(parents=True, exist_ok=True)
            self._turn, self._waiting = (
                os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for name in ("turn", "waiting")
            )
            self._is_awaited()  # an OSError where there are no such locks
            self._has_locks = True

    def take(self) -> None:
        """Call before every piece of work: wait for a turn, or go on with one's own.

        A turn goes to another process, if one waits, after a quarter of a second, or after as long as this process
        waited for it (at most five seconds): the pieces of a training take seconds.
        """
        now = time.monotonic()
        if not self._has_locks or now - self._given_up_at < GIVEN_UP_SECONDS:
            return
        try:
            if self._since is not None:
                if now - self._since < self._length or not self._is_awaited():
                    return
                self.end()
                time.sleep(2 * POLL_SECONDS)  # so that the other one takes it
            self._wait()
        except OSError:  # the locks' file system is gone
            self._has_locks = False

    def end(self) -> None:
        """Give the turn up. Call it before doing nothing, and when the work is done."""
        if self._since is not None:
            self._since = None
            with contextlib.suppress(OSError):
                self._fcntl.flock(self._turn, self._fcntl.LOCK_UN)

    def _is_awaited(self) -> bool:
        is_free = self._locked(self._waiting)
        if is_free:
            self._fcntl.flock(self._waiting, self._fcntl.LOCK_UN)
        return not is_free

    def _wait(self) -> None:
        started = time.monotonic()
        if not self._locked(self._turn):
            self._fcntl.flock(self._waiting, self._fcntl.LOCK_SH)
            try:
                while not self._locked(self._turn):
                    if time.monotonic() - started > PATIENCE_SECONDS:
                        self._given_up_at = time.monotonic()
                        return
                    time.sleep(POLL_SECONDS)
            finally:
                self._fcntl.flock(self._waiting, self._fcntl.LOCK_UN)
        self._since = time.monotonic()
        self._length = min(MAX_TURN_SECONDS, max(TURN_SECONDS, self._since - started))

    def _locked(self, file: int) -> bool:
        """Lock a file if it is free; say whether it was."""
        try:
            self._fcntl.flock(file, self._fcntl.LOCK_EX | self._fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@functools.cache
def turns() -> Turns | None:
    """Return this process's turns with all that may use the same cores; None if the user chose its threads."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    place = hashlib.sha256(repr((platform.node(), sorted(cores))).encode()).hexdigest()[:8]
    return Turns(cache_dir() / "turns" / place)
