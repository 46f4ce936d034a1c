"""Ctrl-C: the first asks the work to stop after the step at hand, the second stops it at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_asked = threading.Event()


def asked() -> bool:
    """Whether the user asked to stop."""
    return _asked.is_set()


@contextmanager
def graceful(tell: Callable[[], None]) -> Iterator[None]:
    """Within the block, the first Ctrl-C is noted and `tell` is called; the second raises KeyboardInterrupt as ever.

    What came to its end all the same raises KeyboardInterrupt behind it: nothing further shall begin. Nothing changes
    outside of the main thread, where Python allows no handler, and where the signal is ignored, as a shell has it for
    jobs in the background.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def note(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _asked.set()
        tell()

    signal.signal(signal.SIGINT, note)
    try:
        yield
        if _asked.is_set():
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _asked.clear()
