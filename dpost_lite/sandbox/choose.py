"""Opening a sandbox by its name."""

from collections.abc import Iterator
from contextlib import contextmanager

from dpost_lite.sandbox.base import Limits, Sandbox, SandboxName


def open_sandbox(name: SandboxName, limits: Limits) -> Sandbox:
    """Return the sandbox of this name. Raises SandboxError if it is not installed or cannot work on this machine."""
    from dpost_lite.sandbox.monty import MontySandbox

    return MontySandbox(limits)


@contextmanager
def sandbox(name: SandboxName, limits: Limits) -> Iterator[Sandbox]:
    """Open a sandbox for a `with` block, and end its processes afterwards."""
    opened = open_sandbox(name, limits)
    try:
        yield opened
    finally:
        opened.close()
