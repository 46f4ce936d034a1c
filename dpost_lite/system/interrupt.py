"""Ctrl-C: the first press asks the work to stop after the current step, the second stops it immediately."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_stop_requested = threading.Event()


def asked() -> bool:
    """Whether the user has asked to stop."""
    return _stop_requested.is_set()


@contextmanager
def graceful(notify: Callable[[], None]) -> Iterator[None]:
    """Within the block, the first Ctrl-C sets `asked()` and calls `notify`; a second one raises KeyboardInterrupt.

    If the block finishes after the first Ctrl-C, KeyboardInterrupt is raised on exit, so that nothing else starts. Does
    nothing outside the main thread, where Python allows no handlers, or if SIGINT is ignored or handled already, as in
    background jobs of a shell.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def on_interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _stop_requested.set()
        notify()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
        if _stop_requested.is_set():
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _stop_requested.clear()
