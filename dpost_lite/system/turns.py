"""Processes that compute on the same cores take turns.

Two commands at once would not share the cores half and half: at each of thousands of barriers, the threads of one wait
for a core that the other's hold, and both take three times as long as one alone. With turns of a quarter of a second
they take twice as long (bench/together.py).
"""

import contextlib
import functools
import os
import time
from pathlib import Path

from dpost_lite.system.machine import cache_dir

TURN_SECONDS = 0.25
POLL_SECONDS = 0.005
PATIENCE_SECONDS = 5.0  # a process that was suspended keeps its turn: go on beside it
GIVEN_UP_SECONDS = 60.0  # until the next try


class Turns:
    """This process's part in the turns of all that use `folder`, which has two lock files.

    The system frees the locks of a process that died. Where there are no such locks (Windows, some network file
    systems) nobody waits. Not for several threads.
    """

    def __init__(self, folder: Path) -> None:
        self._turn = self._waiting = -1
        self._since: float | None = None  # when this process's turn began
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

    def __del__(self) -> None:
        for file in (self._turn, self._waiting):
            with contextlib.suppress(OSError):
                os.close(file)

    def take(self) -> None:
        """Call before every piece of work of up to some tenths of a second: wait for a turn, or go on with one's own.

        After a quarter of a second the turn goes to another process, if one waits.
        """
        now = time.monotonic()
        if not self._has_locks or now - self._given_up_at < GIVEN_UP_SECONDS:
            return
        if self._since is not None:
            if now - self._since < TURN_SECONDS:
                return
            if not self._is_awaited():
                self._since = now
                return
            self.end()
            time.sleep(2 * POLL_SECONDS)  # so that the other one takes it
        self._wait()

    def end(self) -> None:
        """Give the turn up. Call it before doing nothing, and when the work is done."""
        if self._since is not None:
            self._since = None
            self._fcntl.flock(self._turn, self._fcntl.LOCK_UN)

    def _is_awaited(self) -> bool:
        is_free = self._locked(self._waiting)
        if is_free:
            self._fcntl.flock(self._waiting, self._fcntl.LOCK_UN)
        return not is_free

    def _wait(self) -> None:
        if not self._locked(self._turn):
            self._fcntl.flock(self._waiting, self._fcntl.LOCK_SH)
            try:
                until = time.monotonic() + PATIENCE_SECONDS
                while not self._locked(self._turn):
                    if time.monotonic() > until:
                        self._given_up_at = time.monotonic()
                        return
                    time.sleep(POLL_SECONDS)
            finally:
                self._fcntl.flock(self._waiting, self._fcntl.LOCK_UN)
        self._since = time.monotonic()

    def _locked(self, file: int) -> bool:
        """Lock a file if it is free; say whether it was."""
        try:
            self._fcntl.flock(file, self._fcntl.LOCK_EX | self._fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@functools.cache
def turns() -> Turns:
    """Return this process's turns at computing on the CPU."""
    return Turns(cache_dir() / "turns")
