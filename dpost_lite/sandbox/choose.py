"""Opening a sandbox by its name, or one that runs nothing."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from dpost_lite.sandbox.base import Limits, Ran, Sandbox, SandboxName
from dpost_lite.sandbox.monty import MontySandbox

NOT_RUN = "NotRun: this code was not run; --allow-code runs it in a sandbox"


@contextmanager
def sandbox(name: SandboxName, limits: Limits) -> Iterator[Sandbox]:
    """Open a sandbox for a `with` block, which ends its processes.

    Raises SandboxError if it is not installed or cannot work on this machine.
    """
    opened = MontySandbox(limits)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def refusing(limits: Limits) -> Iterator[Sandbox]:
    """Open a sandbox that runs nothing, and says so to whoever reads the solution."""
    yield _Refusing(limits)


class _Refusing:
    """A `Sandbox` whose blocks all end in `NOT_RUN`."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def run(self, earlier: Sequence[str], code: str) -> Future[Ran]:
        future: Future[Ran] = Future()
        future.set_result(Ran(NOT_RUN, NOT_RUN))
        return future

    def close(self) -> None:
        """Nothing runs."""
