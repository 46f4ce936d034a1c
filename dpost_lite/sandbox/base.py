"""What every sandbox does, and the text that a model gets to read of what its code did."""

import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

SandboxName = Literal["monty", "sandlock", "bubblewrap"]
MAX_PRINTED = 2**20  # characters of one block; code that prints more has failed
PRINTED_TOO_MUCH = f"MemoryError: the code printed more than {MAX_PRINTED} characters"
ENDED = "SystemExit: the code ended"
CRASHED = "RuntimeError: the interpreter crashed"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one block: `seconds` and `memory_mib` while it runs, `output_chars` of what the model reads of it."""

    seconds: float = 2.0
    memory_mib: int = 64
    output_chars: int = 400


@dataclass(frozen=True, slots=True)
class Ran:
    """What a block did: `text` is what the model reads of it, `error` the exception's line in it, or ""."""

    text: str
    error: str


class Sandbox(Protocol):
    """Runs the code blocks of rationales, several side by side. A block sees the variables of earlier ones.

    Nothing is kept between two calls of `run`, and what the code does changes neither this process nor other calls.
    """

    limits: Limits

    def run(self, earlier: Sequence[str], code: str) -> Future[Ran]:
        """Run `code` after the `earlier` blocks of the same rationale, as a notebook does.

        Whatever the code does is in the text. Equal calls give equal texts, as far as the code allows: random numbers
        and hashes are seeded, and messages about limits hold no measured times. The future raises SandboxError if the
        sandbox itself does not work. Leave blocks that reached a limit out of `earlier` (`keeps_state`).
        """

    def close(self) -> None:
        """End all processes. Running calls may never finish."""


def ran(printed: str, error: str, limits: Limits) -> Ran:
    """Return what a block did. Its text is what was printed and then the error, without white space at the ends.

    Of more than `limits.output_chars` characters the middle is cut out, and a mark says how many.
    """
    return Ran(_visible(printed, error, limits), error)


def keeps_state(done: Ran, limits: Limits) -> bool:
    """Whether later blocks may use the variables of this one: not if a limit stopped it, or its process ended."""
    stopped = (took_too_long(limits), took_too_much_memory(limits), PRINTED_TOO_MUCH, CRASHED)
    return done.error not in stopped and not done.error.startswith(ENDED)


def _visible(printed: str, error: str, limits: Limits) -> str:
    text = "\n".join(part for part in (printed.rstrip(), error.rstrip()) if part)
    surplus = len(text) - limits.output_chars
    if surplus <= 0:
        return text
    head = limits.output_chars // 2
    tail = limits.output_chars - head
    return f"{text[:head]}\n[{surplus} characters cut]\n{text[len(text) - tail :]}"


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def took_too_long(limits: Limits) -> str:
    """The error of code that ran out of time."""
    return f"TimeoutError: the code ran for more than {limits.seconds:g} s"


def took_too_much_memory(limits: Limits) -> str:
    """The error of code that ran out of memory."""
    return f"MemoryError: the code needed more than {limits.memory_mib} MiB"
