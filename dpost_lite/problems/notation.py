"""How a model writes calculations: as GSM8K does, `<<48/2=24>>24`, or in brackets, `[ 48 / 2 = 24] 24`.

T5's vocabulary has no `<` and no line feed, so DPO-ST's Flan-T5 writes one line with brackets. Only a model's tokens
are in that form. Texts are in GSM8K's, so all that reads them (grading, pairs, the report) knows one notation.

The paper's code spaces operators by a pattern that misses every second one (`1 + 2+3`). Ours misses none.
"""

import re
from dataclasses import dataclass
from functools import cached_property

_ANNOTATION = re.compile(r"<<([^][<>=\n]*=[^][<>\n]*)>>(?=([\w$€£]|[-.]\d)?)")  # group 2: what needs a space before it
_IN_BRACKETS = re.compile(r"\[ ([^][<>=\n]*=[^][<>\n]*)\] ?")  # `[5]` and `[5 = five]` are plain text
_BINARY = re.compile(r"(?<=[^-+*/=(\s])\s*(//|[-+*/=])\s*")  # not a sign, which has no operand before it
_BEFORE_ANSWER = re.compile(r"\s+(?=####)")


@dataclass(frozen=True)
class Notation:
    """An annotation is `opening`, an expression, `=`, `space`, the result and `closing`; `space` and the result follow.

    This class is for models that write GSM8K's notation.
    """

    opening: str
    closing: str
    space: str

    @cached_property
    def complete(self) -> re.Pattern[str]:
        """Finds what the calculator completes. Group 1 is the expression; the last of nested openings counts."""
        return re.compile(f"{re.escape(self.opening)}{self._expression}=")

    @cached_property
    def open_end(self) -> re.Pattern[str]:
        """Finds an end of a text that may grow to match `complete`."""
        first, rest = re.escape(self.opening[0]), re.escape(self.opening[1:])
        return re.compile(rf"{first}(?:{rest}{self._expression})?\Z")

    @property
    def _expression(self) -> str:
        opening, first, closing = (re.escape(part) for part in (self.opening, self.opening[0], self.closing[0]))
        return rf"(?!{first})((?:(?!{opening})[^{closing}=\n])*)"

    def completion(self, result: str) -> str:
        """Return what follows the `=` of an annotation with this result."""
        return f"{self.space}{result}{self.closing}{self.space}{result}"

    def to_model(self, text: str) -> str:
        """Return a text in GSM8K's notation as the model writes it."""
        return text

    def from_model(self, text: str) -> str:
        """Return what the model wrote in GSM8K's notation."""
        return text


class _Brackets(Notation):
    def to_model(self, text: str) -> str:
        """Return the text on one line, without double spaces, and with its annotations in brackets."""
        return " ".join(_ANNOTATION.sub(_in_brackets, text).split())

    def from_model(self, text: str) -> str:
        """Undo `to_model`, but for the line feeds: only that before `####` comes back."""
        return _BEFORE_ANSWER.sub("\n", _IN_BRACKETS.sub(_annotation, text))


def _in_brackets(match: re.Match[str]) -> str:
    return "[ " + _BINARY.sub(r" \1 ", match[1].strip()) + ("] " if match[2] else "]")


def _annotation(match: re.Match[str]) -> str:
    return "<<" + _BINARY.sub(r"\1", match[1].strip()) + ">>"


GSM8K = Notation("<<", ">>", "")
BRACKETS = _Brackets("[ ", "]", " ")
