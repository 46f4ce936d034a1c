"""Calculator forcing: a per-row state machine that decides which tokens to insert, and the protocol it follows.

A model writes `<<48/2=`; the calculator then writes `24>>24` (the result, the closing brackets, and the repeated
number: in GSM8K the text after `>>` repeats the result in 27,995 of 27,998 places). Models with another notation get
theirs (notation.py). The paper's hook (papers' code, `generate.py`) decodes every row at every step, indexes tokens by
characters and forces only the annotation. This one sees only the newest token, keeps track of the text itself, and does
nothing until an annotation may open, so a step costs O(1) per row whatever the length.

It works for any tokenizer. Forced text is tokenised as the training text is: the annotation's own tokens are encoded
again together with the forced text, and if a merge crosses the `=` (a token `=2`, say) the newest token, which the
model has not read yet, is replaced. That also corrects a token that carried a wrong first digit along with its `=`.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final, Protocol

from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.notation import GSM8K, Notation

MAX_ANNOTATION_CHARS = 200

_ANCHORS = ("\n", "=", "a")


class Pending(Enum):
    """The type of `PENDING`, a writer's answer that has not arrived yet."""

    PENDING = "pending"


PENDING: Final = Pending.PENDING


class RowWriter(Protocol):
    """Follows the tokens of one row and may insert some of its own.

    An answer is None to keep the newest token, or the ids that replace it, at least one (usually the token itself and
    what follows it): the model reads all of them before it chooses again. `PENDING` means that the answer comes later.
    The row then waits, without holding up other rows, and `poll` is called from time to time. `num_calculated` counts
    completed annotations, `num_refused` those left to the model; both are read when no answer is pending.

    A writer may be dropped at any time, with an answer pending: when memory runs out, the engine starts the sample
    again with a new writer.
    """

    num_calculated: int
    num_refused: int

    def push(self, token_id: int) -> list[int] | Pending | None:
        """Answer the newest token."""

    def poll(self) -> list[int] | Pending | None:
        """Return the answer to the token for which `push` returned PENDING, or PENDING again. Must not block."""


class Writer(Protocol):
    """Makes the writers of all rows of one vocabulary."""

    def row(self) -> RowWriter:
        """Return the writer of a new, empty row."""


class Insertion:
    """Tokenises text that is inserted into an answer; what all rows of one vocabulary share.

    `text_of(token_id)` is the text that one token adds in the middle of a line ("" for special tokens), `encode(text)`
    the token ids of a text without special tokens. Pass a cached `text_of`: it is called for every token of an answer.
    """

    def __init__(self, text_of: Callable[[int], str], encode: Callable[[str], list[int]]) -> None:
        self.text_of = text_of
        self.encode = encode

    def _joined(self, ids: Sequence[int]) -> str:
        return "".join(map(self.text_of, ids))

    def replacement(self, window: list[int], target: str) -> list[int] | None:
        """Return the ids that replace the newest token so that the window's text becomes `target`; None if none do.

        The tokenizer's own encoding of the whole window, as in training text, is preferred. If a merge would
        reach back into tokens the model has already read, only the missing text is encoded.
        """
        fixed, newest = window[:-1], window[-1]
        canonical = self._encode_inside(target)
        if canonical and canonical[: len(fixed)] == fixed and len(canonical) > len(fixed):
            return canonical[len(fixed) :]
        fixed_text = self._joined(fixed)
        kept = [newest] if target.startswith(fixed_text + self.text_of(newest)) else []
        rest = self._encode_inside(target[len(fixed_text + self._joined(kept)) :])
        return None if rest is None else kept + rest

    def _encode_inside(self, text: str) -> list[int] | None:
        """Encode `text` as in the middle of a line, where no tokenizer adds a leading space.

        It is encoded after an anchor, which is then cut off: one that does not merge with the text, usually a newline.
        The texts of the tokens are compared in ASCII alone, since a token may be a part of another character.
        """
        for anchor in _ANCHORS:
            ids = self.encode(anchor + text)
            for cut in range(1, len(ids)):
                if self._joined(ids[:cut]).lstrip(" ") == anchor and _ascii(self._joined(ids[cut:])) == _ascii(text):
                    return ids[cut:]
        if len(text) < 2:
            return None
        chars = [self._encode_inside(char) for char in text]
        return None if None in chars else [i for ids in chars for i in ids or ()]


def _ascii(text: str) -> str:
    return text.encode("ascii", "ignore").decode()


class Forcer(Insertion):
    """The `Writer` that inserts the calculator's results. Other arguments as those of `Insertion`."""

    def __init__(
        self,
        text_of: Callable[[int], str],
        encode: Callable[[str], list[int]],
        calculator: Calculator,
        notation: Notation = GSM8K,
    ) -> None:
        super().__init__(text_of, encode)
        self.calculator = calculator
        self.notation = notation

    def row(self) -> "RowForcer":
        """Return the state machine of a new, empty row."""
        return RowForcer(self)


class RowForcer:
    """The calculator's `RowWriter`: it answers at once."""

    __slots__ = ("_done", "_forcer", "_text", "_window", "num_calculated", "num_refused")

    def __init__(self, forcer: Forcer) -> None:
        self._forcer = forcer
        self._window: list[int] = []  # tokens since (and with) the one that may have opened an annotation
        self._text = ""  # their text
        self._done = 0  # characters of it in annotations that are already handled
        self.num_calculated = 0
        self.num_refused = 0

    def poll(self) -> list[int] | None:
        """Never called, because `push` never returns PENDING."""
        raise AssertionError("push answers at once")

    def push(self, token_id: int) -> list[int] | None:
        """Answer the newest token: None to keep it, or the ids that replace it."""
        piece, notation = self._forcer.text_of(token_id), self._forcer.notation
        if not self._window and notation.opening[0] not in piece:
            return None
        self._window.append(token_id)
        self._text += piece
        while annotation := notation.complete.search(self._text, self._done):
            self._done = annotation.end()
            if (ids := self._complete(annotation[1])) is not None:
                self._forget()
                return ids
        opened = notation.open_end.search(self._text, self._done)
        if opened is None:
            self._forget()
        elif len(self._text) - opened.start() > MAX_ANNOTATION_CHARS:
            self.num_refused += 1
            self._forget()
        return None

    def _complete(self, expression: str) -> list[int] | None:
        """Return the ids that replace the newest token, whose text completes `expression` and `=`; None to keep it."""
        result = self._forcer.calculator(expression)
        if result is None:
            self.num_refused += 1
            return None
        forced = self._forcer.notation.completion(result)
        if self._text.startswith(forced, self._done):
            self.num_calculated += 1
            self._done += len(forced)
            return None
        ids = self._forcer.replacement(self._window, self._text[: self._done] + forced)
        self.num_refused += ids is None
        self.num_calculated += ids is not None
        return ids

    def _forget(self) -> None:
        self._window, self._text, self._done = [], "", 0
