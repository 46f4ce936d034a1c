r"""Whether two LaTeX answers are equal: `\dfrac12` and 0.5, `(a+5)(b+2)` and `(b+2)(a+5)`.

Most pairs are decided by text and exact numbers (latex_text.py). The rest goes to math-verify, in one child process:
some calls take seconds and some never end (`9^{9^{9^9}}`), and its own deadline works in main threads only. The child
starts at the first question, stays warm, and is killed and replaced if an answer takes longer than `DEADLINE` seconds.

What could not be compared counts as not equal, is counted in `Comparer.num_given_up`, and is told on stderr, which is a
stage's log in a run.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable

from dpost_lite.errors import DataError
from dpost_lite.problems.grading import TOLERANCE
from dpost_lite.problems.latex_text import (
    MAX_LATEX_CHARS,
    assignment,
    bare_word,
    is_balanced,
    key,
    magnitude_in,
    normal,
    value_of,
    words_of,
)

DEADLINE = 2.0  # seconds of wall time for one comparison; of 500 solutions of MATH the slowest took 0.2
SECONDS_TO_START = 120.0  # a cold disk and a busy machine
MAX_REMEMBERED = 20_000  # pairs
MAX_NESTING = 20  # brackets in brackets; with 60, parsing takes longer than the deadline
PYTHON = (sys.executable, "-P", "-m")  # -P: never import from the user's current folder
NOT_INSTALLED = 'LaTeX answers are compared by math-verify, which is not installed: pip install "dpost-lite[math]"'
REINSTALL = 'pip install --force-reinstall "dpost-lite[math]"'


def check_installed() -> None:
    """Raise DataError if math-verify or the parser it needs is not installed; nothing is imported."""
    if not all(importlib.util.find_spec(name) for name in ("math_verify", "antlr4")):
        raise DataError(NOT_INSTALLED)


def same_latex(predicted: str, answer: str) -> bool:
    r"""Return whether two answers in LaTeX are equal.

    Raises:
        DataError: a formula has to be compared, and math-verify is not installed or does not start.
    """
    if max(len(predicted), len(answer)) > MAX_LATEX_CHARS:
        return False
    decided = _decided(normal(predicted), normal(answer))
    return _comparer.equal(normal(predicted), normal(answer)) if decided is None else decided


def _decided(predicted: str, answer: str) -> bool | None:
    """Return whether two answers in normal form are equal where that can be seen without algebra, else None."""
    if not (_is_comparable(predicted) and _is_comparable(answer)):
        return False
    if key(predicted) == key(answer):
        return True
    for rule in (_as_words, _as_assignments, _as_numbers, _as_digits_in_a_base, _as_lists):
        if (decided := rule(predicted, answer)) is not None:
            return decided
    return None


def _is_comparable(text: str) -> bool:
    """Return whether a text is not empty, has both braces of each pair, and is nested as formulas are."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return bool(text) and deepest <= MAX_NESTING and is_balanced(text)


def _as_words(predicted: str, answer: str) -> bool | None:
    """Compare text letter by letter: as a product of variables, "east" equals "seat".

    math-verify drops "million" as a unit; answers that differ in such a word are not equal here.
    """
    if magnitude_in(predicted) != magnitude_in(answer):
        return False
    if words_of(predicted) is None and words_of(answer) is None:
        return None
    return bare_word(predicted) == bare_word(answer)


def _as_assignments(predicted: str, answer: str) -> bool | None:
    """Values of two variables differ: x = 5, y = 5."""
    names = {assignment(predicted)[0], assignment(answer)[0]}
    return False if None not in names and len(names) == 2 else None


def _as_numbers(predicted: str, answer: str) -> bool | None:
    """Compare exact values; leave percentages and near misses (0.333333 and 1/3) to math-verify."""
    first, second = value_of(predicted), value_of(answer)
    if first is None or second is None:
        return None
    if first == second:
        return True
    return None if "%" in predicted + answer or abs(first - second) < TOLERANCE else False


def _as_digits_in_a_base(predicted: str, answer: str) -> bool | None:
    """Compare `52_8` with `52_{8}` or 52; math-verify ignores the base, so that it takes `52_8` for `52_9`."""
    pairs = [re.fullmatch(r"([0-9A-Z]+)(?:_(?:\{ ?([0-9]+) ?\}|([0-9])))?", text) for text in (predicted, answer)]
    if not all(pairs):
        return None
    (first, first_base), (second, second_base) = ((m[1], m[2] or m[3]) for m in pairs if m)
    if first_base is None and second_base is None:
        return None
    return first == second and (first_base == second_base or None in (first_base, second_base))


def _as_lists(predicted: str, answer: str) -> bool | None:
    """Tell points and intervals from sets: math-verify takes (1, 2) for {1, 2}."""
    first, second = _kind_of_list(predicted), _kind_of_list(answer)
    return False if first and second and first != second else None


def _kind_of_list(text: str) -> str | None:
    r"""Return the brackets of a list with commas: "()", "(]", … or "{}", also for one without; None if it is none."""
    text = assignment(text)[1].replace(r"\{", "{").replace(r"\}", "}")
    depth, commas, ends = 0, set(), []
    for place, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                ends.append(place)
        elif character == ",":
            commas.add(depth)
    if 0 in commas:
        return "{}"
    is_one_group = text[0] in "([{" and ends[:1] == [len(text) - 1] if text else False
    return text[0] + text[-1] if is_one_group and 1 in commas else None


class Comparer:
    """math-verify in a child process that is started when it is needed. Calls from several threads take turns.

    `num_asked` counts the comparisons that the child was asked for, `num_given_up` those that it did not survive or
    finish in time.
    """

    def __init__(self, *, deadline: float = DEADLINE, warn: Callable[[str], None] | None = None) -> None:
        self.num_given_up = 0
        self.num_asked = 0
        self._deadline = deadline
        self._warn = warn or (lambda text: print(text, file=sys.stderr, flush=True))
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], bool] = {}

    @property
    def pid(self) -> int | None:
        """The process id of the child, or None if it is not running."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def equal(self, predicted: str, answer: str) -> bool:
        """Return whether math-verify finds a prediction equal to an answer; False if it fails to decide.

        Raises:
            DataError: math-verify is not installed, or its process does not start.
        """
        pair = predicted, answer
        with self._lock:
            if pair not in self._known:
                if len(self._known) >= MAX_REMEMBERED:
                    self._known.clear()
                self._known[pair] = self._asked(predicted, answer)
            return self._known[pair]

    def close(self) -> None:
        """End the child, at once and in the middle of a comparison."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # a fork must not end its parent's child
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        process.wait()

    def _asked(self, predicted: str, answer: str) -> bool:
        process = self._running()
        assert process.stdin is not None
        self.num_asked += 1
        with contextlib.suppress(OSError):  # it has died; `_line` finds that
            process.stdin.write(json.dumps([answer, predicted]) + "\n")
            process.stdin.flush()
        line, in_time = self._line(process, self._deadline)
        if line in ("0", "1"):
            return line == "1"
        self.close()
        self.num_given_up += 1
        reason = "the comparison ended with its process" if in_time else f"no result in {self._deadline:g} s"
        self._warn(f"LaTeX answers {predicted!r} and {answer!r} count as not equal: {reason}")
        return False

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self.close()
        check_installed()
        process = self._process = subprocess.Popen(
            [*PYTHON, "dpost_lite.problems.latex_child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches a whole group; this process decides
        )  # fmt: skip
        self._owner = os.getpid()
        line, _ = self._line(process, SECONDS_TO_START)
        if line != "ready":
            self.close()
            raise DataError(f"math-verify does not start ({line or 'its process ended'}): {REINSTALL}")
        return process

    def _line(self, process: subprocess.Popen[str], deadline: float) -> tuple[str, bool]:
        """Read a line, "" if the child ends before or is killed at the deadline; and whether it was in time."""
        assert process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(deadline, expire)
        timer.daemon = True
        timer.start()
        try:
            line = process.stdout.readline().rstrip("\n")
        except BaseException:
            self.close()  # its answer would be read as that to the next question
            raise
        finally:
            timer.cancel()
            timer.join()
        return line, not expired.is_set()


_comparer = Comparer()
atexit.register(_comparer.close)


def num_given_up() -> int:
    """Return how many comparisons in this process had no result and count as not equal."""
    return _comparer.num_given_up
