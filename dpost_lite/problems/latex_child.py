r"""The child process that compares LaTeX answers with math-verify; latex.py starts, asks and ends it.

    python -m dpost_lite.problems.latex_child

It writes "ready", or the reason why it cannot work. Then each line of its standard input is a JSON list of two texts,
the right answer first, and it answers each with the line "1" (equal) or "0". It ends with its input. A text that cannot
be parsed equals nothing.
"""

import contextlib
import json
import os
import signal
import sys
from functools import lru_cache
from typing import Any

MAX_CPU_SECONDS = 20.0  # for one comparison: longer than any deadline, it ends a child whose parent was killed
MAX_MEMORY_BYTES = 4 * 2**30  # of addresses; sympy with its caches needs a tenth


def serve() -> None:
    """Answer questions until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]

    def tell(line: str) -> None:
        answers.write(line + "\n")
        answers.flush()

    _limit_memory()
    try:
        _same(_parsed(r"\frac{1}{2}"), _parsed("0.5"))  # loads the parsers, which takes a second
    except ImportError as error:
        tell(str(error).splitlines()[0])
        return
    tell("ready")
    for line in sys.stdin:
        _limit_time(MAX_CPU_SECONDS)
        answer, predicted = json.loads(line)
        tell("1" if _same(_parsed(answer), _parsed(predicted)) else "0")
        _limit_time(0)


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[Any, ...]:
    """Return what math-verify reads: a sympy object and a text, or nothing."""
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    with contextlib.suppress(RecursionError):
        return tuple(
            parse(
                rf"\boxed{{{text}}}", extraction_config=config, fallback_mode="no_fallback", parsing_timeout=0
            )
        )  # fmt: skip
    return ()


def _same(answer: tuple[Any, ...], predicted: tuple[Any, ...]) -> bool:
    from math_verify import verify

    with contextlib.suppress(RecursionError):
        return bool(answer and predicted and verify(list(answer), list(predicted), timeout_seconds=0))
    return False


def _limit_time(seconds: float) -> None:
    """End this process after `seconds` of CPU time from now; 0 lifts the limit. Windows has no such timer."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF, unhandled, ends it even inside one long operation


def _limit_memory() -> None:
    """Make huge numbers a MemoryError here before they trouble the machine; best effort."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


if __name__ == "__main__":
    serve()
