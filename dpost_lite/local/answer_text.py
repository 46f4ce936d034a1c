"""The text of one answer as it is written: whole characters, what the tools wrote, and no stop text."""

import codecs
import re
from collections.abc import Sequence
from itertools import groupby

from dpost_lite.local.request import Piece
from dpost_lite.problems.notation import Notation

# an end of text that may become the line of the answer, or an annotation
_BEFORE_CHANGE = re.compile(r"\s*(?<!#)#{0,3}\Z|\[(?: [^\]\[<>\n]*)?\Z")
_SOURCES = {"<": "<[", ">": ">]", "\n": "\n "}  # what a character of GSM8K's notation may have been


class AnswerText:
    """Turns the bytes of tokens into pieces of text, and ends at the first of the `stop` texts.

    What may be the start of a stop text is held back until it is known. `text` is what the pieces add up to.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.is_stopped = False
        self._stop = [text for text in stop if text]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._marks: list[bool] = []  # for each character held back, whether a tool wrote it

    def add(self, data: bytes, *, is_inserted: bool) -> list[Piece]:
        """Take what tokens add; return what is certain to be part of the text, nothing after a stop text."""
        if self.is_stopped:
            return []
        self.hold(self._decoder.decode(data), is_inserted)
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            pieces = self._release(min(found))
            self._held, self._marks = "", []
            return pieces
        return self._release(len(self._held) - self._num_undecided())

    def finish(self) -> list[Piece]:
        """Return what was held back, at the end of the answer."""
        if not self.is_stopped:
            self.hold(self._decoder.decode(b"", final=True), is_inserted=False)
        return self._release(len(self._held))

    def hold(self, text: str, is_inserted: bool) -> None:
        self._held += text
        self._marks += [is_inserted] * len(text)

    def _num_undecided(self) -> int:
        """Return the length of the longest end of the text held back that a stop text begins with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        ends = (self._held[-length:] for length in range(min(longest, len(self._held)), 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop)), 0)

    def _release(self, num_chars: int) -> list[Piece]:
        text, marks = self._held[:num_chars], self._marks[:num_chars]
        self._held, self._marks = self._held[num_chars:], self._marks[num_chars:]
        self.text += text
        groups = groupby(zip(text, marks, strict=True), key=lambda pair: pair[1])
        return [Piece("".join(char for char, _ in group), mark) for mark, group in groups]


class TranslatedText(AnswerText):
    """The same for a model with a notation of its own; the text is in GSM8K's, held back where that is not certain."""

    def __init__(self, notation: Notation, stop: Sequence[str] = ()) -> None:
        super().__init__(stop)
        self._notation = notation
        self._written = ""
        self._written_marks: list[bool] = []
        self._num_translated = 0  # characters of the translation that were passed on
        self._place = 0  # of the character in `_written` that the last of these came from

    def finish(self) -> list[Piece]:
        """See `AnswerText`."""
        if not self.is_stopped:
            self.hold(self._decoder.decode(b"", final=True), is_inserted=False)
            self._translate(len(self._written))
        return super().finish()

    def hold(self, text: str, is_inserted: bool) -> None:
        self._written += text
        self._written_marks += [is_inserted] * len(text)
        change = _BEFORE_CHANGE.search(self._written)
        self._translate(change.start() if change else len(self._written))

    def _translate(self, num_chars: int) -> None:
        """Pass on what is new in the translation of the first characters; T5's answers start with a space."""
        text = self._notation.from_model(self._written[:num_chars].removeprefix(" "))
        for char in text[self._num_translated :]:
            super().hold(char, self._mark(char))
        self._num_translated = max(self._num_translated, len(text))

    def _mark(self, char: str) -> bool:
        """Return whether a tool wrote what became the next character of the translation."""
        places = range(self._place, len(self._written))
        self._place = next((i for i in places if self._written[i] in _SOURCES.get(char, char)), self._place)
        is_inserted = self._written_marks[self._place]
        self._place += char not in _SOURCES
        return is_inserted
