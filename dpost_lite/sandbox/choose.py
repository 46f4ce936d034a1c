"""Opening a sandbox by its name, or one that runs nothing."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import get_args

from dpost_lite.errors import SandboxError
from dpost_lite.sandbox.base import Limits, Ran, Sandbox, SandboxName
from dpost_lite.sandbox.monty import MontySandbox
from dpost_lite.sandbox.real_python import RealPython

NOT_RUN = "NotRun: --allow-code runs this code in a sandbox"


@contextmanager
def sandbox(name: SandboxName | None, limits: Limits) -> Iterator[Sandbox]:
    """Open a sandbox for a `with` block, which ends its processes; None is one that runs nothing, and says so.

    Raises SandboxError if it is not installed or cannot work on this machine.
    """
    opened = _opened(name, limits)
    try:
        yield opened
    finally:
        opened.close()


def _opened(name: SandboxName | None, limits: Limits) -> Sandbox:
    if name is None:
        return _Refusing(limits)
    return MontySandbox(limits) if name == "monty" else RealPython(name, limits)


def packages(name: SandboxName) -> tuple[str, ...]:
    """Return the packages whose versions may change what code prints in this sandbox."""
    return {"monty": ("pydantic-monty",), "sandlock": ("sandlock", "sympy"), "bubblewrap": ("sympy",)}[name]


def available() -> dict[SandboxName, str]:
    """Try every sandbox; return "works", or why it does not, by its name. Takes about a second."""
    found: dict[SandboxName, str] = {}
    for name in get_args(SandboxName):
        try:
            with sandbox(name, Limits()) as box:
                text = box.run((), "print(6*7)").result().text
            found[name] = "works" if text == "42" else f"a trial gave {text!r}"
        except SandboxError as error:
            found[name] = str(error)
    return found


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
