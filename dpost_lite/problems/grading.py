"""Extract numbers from a rationale, compare them, and compute confidence intervals.

Two ways to extract, both always reported, since published figures use one or the other:

- strict: the number after the last `####` that is followed by one, as the paper's `#+ (-?[0-9.,]+)`;
- flexible: the last number in the text.

Numbers are kept in canonical form: optional `-`, digits without leading zeros or commas, and if needed a point and
decimals without trailing zeros ("1,234.50" -> "1234.5", "-$5" -> "-5", "50%" -> "50", "3/4" -> "0.75").

Departures from the paper's code: exact arithmetic instead of floats, one comparison for both scoring and building data
(the paper uses |Δ| < 1e-4 and float equality), support for fractions and currencies, and calculator annotations `<<…>>`
are removed first. Which answer counts, and LaTeX: answers.py.
"""

import math
import re
from collections import deque
from fractions import Fraction

from dpost_lite.problems.calculator import decimal_text

MAX_NUMBER_CHARS = 50  # longer runs of digits are not an answer, and Python limits int() of very long ones
TOLERANCE = Fraction(1, 10_000)  # as in the paper's evaluation code
Z_95 = 1.959963984540054  # the 97.5th percentile of the standard normal distribution

_MINUS = "−–-"  # GSM8K also has U+2212 and the en dash; the ASCII one comes last, or [...] would be a range
_NUMBER_PATTERN = (
    rf"(?P<sign>(?<![\w)%{_MINUS}])[+{_MINUS}])?"  # after an operand, `-` is not a sign: "10-5"
    rf"(?:\\?[$€£¥₹] ?(?P<inner_sign>[{_MINUS}])?)?"  # "-$5" and "$-5"
    r"(?P<digits>[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
    r"(?:/(?P<denominator>[0-9]+))?"
)
_NUMBER = re.compile(_NUMBER_PATTERN)
_FINAL = re.compile(r"####[ \t]*" + _NUMBER_PATTERN)
_NUMBER_ALONE = re.compile(_NUMBER_PATTERN + r"(?: ?\\?%)?\.?")
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


def strict_answer(text: str) -> str | None:
    """Return, in canonical form, the number after the last `####` that has one on its line, or None.

    Text after the number is ignored: `#### 18 apples` gives "18".
    """
    return _last(_FINAL, text)


def flexible_answer(text: str) -> str | None:
    """Return, in canonical form, the last number of `text` outside closed annotations, or None."""
    return _last(_NUMBER, text)


def canonical_number(text: str) -> str | None:
    """Return `text` in canonical form if it is a single number, else None.

    A sign, currency symbol, thousands commas, `%` and a final full stop are accepted; units are not, so that "3
    million" or "2 1/2" do not silently become 3 or 2. Also None for fractions with a non-terminating decimal ("1/3")
    and for numbers of more than `MAX_NUMBER_CHARS` characters.
    """
    match = _NUMBER_ALONE.fullmatch(text.strip())
    return _canonical(match) if match else None


def same_number(a: str | None, b: str | None) -> bool:
    """Return whether both are numbers (by `canonical_number`) that differ by less than 1e-4, computed exactly."""
    first, second = canonical_number(a or ""), canonical_number(b or "")
    if first is None or second is None:
        return False
    return abs(Fraction(first) - Fraction(second)) < TOLERANCE


def without_annotations(text: str) -> str:
    """Remove calculator annotations: `$<<12/60=0.2>>0.2` -> `$0.2`. Unclosed ones stay."""
    return _ANNOTATION.sub("", text)


def wilson_interval(num_right: int, num_problems: int) -> tuple[float, float]:
    """Return the 95 % score interval (low, high) of an accuracy (Wilson 1927); (0, 1) if there are no problems.

    Unlike ± 1.96 standard errors, it stays within [0, 1] and is valid for few problems and rates near 0 or 1.
    """
    assert 0 <= num_right <= num_problems, (num_right, num_problems)
    if num_problems == 0:
        return 0.0, 1.0
    rate = num_right / num_problems
    spread = Z_95**2 / num_problems
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread**2 / 4) / (1 + spread)
    # At 0 and 1 the interval ends there exactly; the formula is off by a rounding error.
    low = 0.0 if num_right == 0 else centre - half
    high = 1.0 if num_right == num_problems else centre + half
    return low, high


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    last = deque(pattern.finditer(without_annotations(text)), maxlen=1)
    return _canonical(last[0]) if last else None


def _canonical(match: re.Match[str]) -> str | None:
    digits, denominator = match["digits"].replace(",", ""), match["denominator"] or "1"
    if max(len(digits), len(denominator)) > MAX_NUMBER_CHARS or not int(denominator):
        return None
    value = Fraction(digits) / int(denominator)
    is_negative = (match["sign"] or "+") in _MINUS
    if is_negative != bool(match["inner_sign"]):
        value = -value
    text = decimal_text(value, max_decimals=MAX_NUMBER_CHARS)
    return text if text and len(text.lstrip("-")) <= MAX_NUMBER_CHARS else None
