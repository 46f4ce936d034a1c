r"""LaTeX answers as text: find them in a solution, write them in one way, and read the numbers among them.

Everything here is plain text handling in time linear in the length; equality of formulas is in latex.py. We extract
answers and read numbers ourselves because math-verify, which compares the rest, takes "12. Wait, 13." for 12, finds
nothing in "(-3)", and reads "7 1/2" as 1 or 4.
"""

import re
from fractions import Fraction

from dpost_lite.problems.calculator import decimal_text
from dpost_lite.problems.grading import MAX_NUMBER_CHARS, canonical_number, without_annotations

MAX_LATEX_CHARS = 500  # the longest answer of MATH-500 has 59
MAGNITUDES = ("dozen", "hundred", "thousand", "million", "billion", "trillion")  # words that change a number

_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox) ?\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_WRAPPED = re.compile(r"\$\$(?P<a>[^$]*)\$\$|\$(?P<b>[^$]*)\$|\\\((?P<c>.*)\\\)|\\\[(?P<d>.*)\\\]", re.DOTALL)
_TEXT_GROUP = re.compile(r"\\(?:text|mbox|textrm|textbf|mathrm|operatorname) ?\{[^{}]*\}")
_REWRITTEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r", ?\\! ?|\{,\}", ","),  # 10,\!080 and 10{,}080
        (r"(?<=[0-9])\\[,;: ](?=[0-9]{3}(?![0-9]))", ","),  # 10\,080
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~", " "),
        (r"\\frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac ?([0-9]) ?\{", r"\\frac{\1}{"),
        (r"\\frac ?\{([0-9]+)\} ?([0-9])", r"\\frac{\1}{\2}"),
        (r"\\sqrt ?([0-9])", r"\\sqrt{\1}"),
        (r"^([-+−–]?[0-9]+) +([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),  # 7 1/2
    )
)
_GROUPED = re.compile(r"[^0-9,]*[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?[^0-9,]*")
_FRACTION = re.compile(
    r"(?P<sign>[-+−–])? ?(?:(?P<over>[0-9]+/[0-9]+)"
    r"|(?P<whole>[0-9]+)? ?\\frac ?\{ ?(?P<inner>[-−–])?(?P<top>[0-9]+) ?\} ?\{ ?(?P<bottom>[0-9]+) ?\})"
)
_ASSIGNED = re.compile(r"(?P<name>[A-Za-z]) ?= ?(?P<value>[^=]+)")
_UNIT = re.compile(r" ?\\(?:text|mbox|textrm|mathrm) ?\{(?P<unit>[^{}]*)\}(?: ?\^ ?\{?[23]\}?)?$")
_DEGREES = re.compile(r" ?(?:\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\degree|°)$")
_MATHS = re.compile(r"[A-Za-z0-9\\{}()\[\]^_+\-*/=<>,.|!' $%−–π√]+")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the `\boxed{…}` with balanced braces that starts last, or None if there is none.

    `\fbox{…}` counts too. An empty box counts as none.
    """
    opened: list[tuple[int, bool]] = []
    found: tuple[int, int] | None = None
    text = without_annotations(text)
    for token in _BRACES.finditer(text):
        if token["box"] or token["open"]:
            opened.append((token.end(), bool(token["box"])))
        elif token["close"] and opened:
            start, is_box = opened.pop()
            if is_box and (found is None or start > found[0]):
                found = start, token.start()
    return trimmed(text[slice(*found)]) or None if found else None


def after_mark(text: str) -> str | None:
    """Return what follows the last `####` on its line, or None if that is nothing or there is no `####`."""
    _, mark, end = without_annotations(text).rpartition("####")
    return trimmed(end.partition("\n")[0]) or None if mark else None


def trimmed(text: str) -> str:
    r"""Return `text` without outer white space, a final full stop, and `$…$`, `\(…\)` or `\[…\]` around all of it."""
    text = text.strip().removesuffix(".").rstrip()
    match = _WRAPPED.fullmatch(text)
    return next(part for part in match.groups() if part is not None).strip() if match else text


def normal(text: str) -> str:
    r"""Return an answer in one way of writing: `\dfrac12` as `\frac{1}{2}`, `10,\!080` as `10,080`, no `\left`."""
    text = " ".join(trimmed(text).split())
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def key(text: str) -> str:
    """Return the normal form of an answer without spaces, except between digits; equal keys are equal answers."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", normal(text))


def is_balanced(text: str) -> bool:
    """Return whether each brace of `text` has its counterpart; `\\{` and `\\}` do not count."""
    depth = 0
    for token in _BRACES.finditer(text):
        depth += bool(token["box"] or token["open"]) - bool(token["close"])
        if depth < 0:
            return False
    return depth == 0


def plain_number(text: str) -> str | None:
    """Return an answer as canonical number if it is written as one, with thousands commas at most, else None.

    Stricter than `canonical_number` about commas: "-2,1" are two numbers here, not -21.
    """
    if len(text) > MAX_LATEX_CHARS:
        return None
    text = normal(text)
    return None if "," in text and not _GROUPED.fullmatch(text) else canonical_number(text)


def number_in(text: str) -> str | None:
    r"""Return the number that an answer states, in canonical form, or None.

    Beyond plain numbers: `\frac{3}{4}`, "7 1/2", "(-3)", `90^\circ`, `5 \text{ cm}`, "x = 5". None for fractions
    without a finite decimal.
    """
    value = value_of(text)
    found = decimal_text(value, max_decimals=MAX_NUMBER_CHARS) if value is not None else None
    return found if found and len(found.lstrip("-")) <= MAX_NUMBER_CHARS else None


def value_of(text: str) -> Fraction | None:
    """Return the exact value of an answer that states one number, as in `number_in`, or None. "50%" is 50."""
    if len(text) > MAX_LATEX_CHARS:
        return None
    text = _bare(assignment(normal(text))[1])
    number = plain_number(text)
    return Fraction(number) if number is not None else _fraction(text)


def assignment(text: str) -> tuple[str | None, str]:
    """Return ("x", "5") for "x = 5", and (None, text) for what is no value of a variable with a name of one letter."""
    match = _ASSIGNED.fullmatch(text)
    return (match["name"], match["value"]) if match else (None, text)


def words_of(text: str) -> str | None:
    r"""Return the words of an answer that is text (`\text{(C)}`, `\text{east}`) in lower case, else None.

    Brackets and spaces are dropped. A run of four or more letters is text even without `\text`.
    """
    if not (_TEXT_GROUP.fullmatch(text) or re.fullmatch(r"[A-Za-z]{4,}", text)):
        return None
    return bare_word(text)


def bare_word(text: str) -> str:
    r"""Return `text` in lower case without `\text`, brackets and spaces."""
    return re.sub(r"\\(?:text|mbox|textrm|textbf|mathrm|operatorname)(?![A-Za-z])|[{}()\s]", "", text).casefold()


def magnitude_in(text: str) -> str | None:
    """Return the word for a power of ten (or "dozen") in `text`, or None."""
    return next((word for word in MAGNITUDES if word in text.casefold()), None)


def is_maths(text: str) -> bool:
    r"""Return whether a text without `\boxed` is written as maths and not as prose.

    One line of at most `MAX_LATEX_CHARS` characters that LaTeX formulas use, with balanced braces, with a digit, an
    operator or a command, and with no two letters in a row outside commands and `\text{…}`.
    """
    if len(text) > MAX_LATEX_CHARS or not _MATHS.fullmatch(text) or not is_balanced(text):
        return False
    outside = re.sub(r"\\[A-Za-z]+", "\\\\", _TEXT_GROUP.sub("\\\\", text))
    return (
        not re.search(r"[A-Za-z]{2}", outside)
        and bool(re.search(r"[A-Za-z0-9\\]", outside))
        and bool(re.search(r"[0-9\\^_+*/=<>−–√π-]", outside))
        and "." not in (outside.strip()[-1:], outside.strip()[:-1][-1:])
        and not re.search(r"[.,!] +[A-Za-z]", outside)
    )


def _bare(text: str) -> str:
    """Remove a unit, degrees and brackets around a number."""
    unit = _UNIT.search(text)
    if unit and magnitude_in(unit["unit"]) is None:
        text = text[: unit.start()]
    text = _DEGREES.sub("", text).strip()
    return text[1:-1].strip() if re.fullmatch(r"\([^(),]*\)", text) else text


def _fraction(text: str) -> Fraction | None:
    match = _FRACTION.fullmatch(text)
    if not match or len(text) > 3 * MAX_NUMBER_CHARS:
        return None
    top, bottom = match["over"].split("/") if match["over"] else (match["top"], match["bottom"])
    if not int(bottom) or (match["whole"] and match["inner"]):
        return None
    value = int(match["whole"] or 0) + Fraction(int(top), int(bottom))
    return -value if ((match["sign"] or "+") in "-−–") != bool(match["inner"]) else value
