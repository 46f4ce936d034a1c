"""Exact arithmetic on the text between `<<` and `=`: `12/60` -> `0.2`.

A model that writes `<<12/60=` need not work out the rest: the sampler forces what the calculator returns. The grammar
is what GSM8K's annotations use, and blanks: `0-9 . + - * / // ( )`, decimals also as `.5`, signs also after an operator
(`71+-3`). All else (`1,000`, `20%`, `$5`, `2x3`, `5.`, `2(3)`) is "not mine": the model goes on by itself.

Departures from the paper's code, which hands the model's text to `eval` and keeps a float of two decimals: own grammar,
rational numbers, every terminating decimal printed in full (six of GSM8K's annotations need it), negative results too.
The data hold no result that does not terminate, so how to round those is this project's own choice.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from dpost_lite.recipe import CalculatorRecipe

MAX_CHARS = 100  # of an expression; the longest in GSM8K has 36
MAX_SIZE = 10**20  # no numerator or denominator, given or on the way, reaches this; GSM8K stays below 3 * 10**9

_TOKEN = re.compile(r" *([0-9]+(?:\.[0-9]+)?|\.[0-9]+|//|[-+*/()])")
_NEGATE = "negate"  # the sign, told apart from the binary minus
_BINARY: dict[str, Callable[[Fraction, Fraction], Fraction | int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
}
_RANK = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "//": 2, _NEGATE: 3}


@dataclass(frozen=True, slots=True)
class Calculator:
    """Evaluates an expression and prints the result the way a solution would.

    A result with at most `max_decimals` decimals is printed exactly, any other rounded half away from zero to
    `rounded_decimals`. No needless zeros, no `-0`; decimals have a leading zero (`0.5`).
    """

    max_decimals: int = 6
    rounded_decimals: int = 2

    @classmethod
    def from_recipe(cls, recipe: CalculatorRecipe) -> "Calculator | None":
        """Return the calculator that a recipe asks for, or None where it is off."""
        return cls(recipe.max_decimals, recipe.rounded_decimals) if recipe.enabled else None

    def __call__(self, expression: str) -> str | None:
        """Return the result as text, or None where the expression is not the calculator's (see `evaluate`)."""
        value = evaluate(expression)
        if value is None:
            return None
        return decimal_text(value, self.max_decimals) or rounded_text(value, self.rounded_decimals)


def evaluate(expression: str) -> Fraction | None:
    """Return the exact value, or None for junk, a division by zero, and what exceeds `MAX_CHARS` or `MAX_SIZE`.

    Signs bind tighter than `* / //`, those tighter than `+ -`; equals associate to the left. `//` rounds down.
    """
    if len(expression) > MAX_CHARS:
        return None
    try:
        return _value(_tokens(expression))
    except (ValueError, ArithmeticError):
        return None


def decimal_text(value: Fraction, max_decimals: int) -> str | None:
    """Return `value` as its shortest decimal, or None if that takes more than `max_decimals` decimals."""
    exact = (value * 10**max_decimals).denominator == 1
    return rounded_text(value, max_decimals) if exact else None


def rounded_text(value: Fraction, num_decimals: int) -> str:
    """Return `value` rounded half away from zero to `num_decimals`, without needless zeros."""
    units = int(abs(value) * 10**num_decimals + Fraction(1, 2))
    whole, part = divmod(units, 10**num_decimals)
    sign = "-" if value < 0 and units else ""
    return sign + f"{whole}.{part:0{num_decimals}d}".rstrip("0").rstrip(".")


def _tokens(expression: str) -> list[str]:
    tokens, position, end = [], 0, len(expression.rstrip(" "))
    while position < end:
        match = _TOKEN.match(expression, position)
        if match is None:
            raise ValueError("not in the grammar")
        tokens.append(match[1])
        position = match.end()
    return tokens


def _value(tokens: list[str]) -> Fraction:
    """Evaluate by Dijkstra's shunting-yard: two stacks, no recursion, so no depth of parentheses can overflow."""
    values: list[Fraction] = []
    operators: list[str] = []
    wants_operand = True
    for token in tokens:
        if not wants_operand:
            wants_operand = _after_operand(token, values, operators)
        elif token == "(":
            operators.append(token)
        elif token == "-":
            operators.append(_NEGATE)
        elif token != "+":  # a sign `+` changes nothing
            values.append(_bounded(Fraction(token)))  # ValueError where an operator or ")" stands
            wants_operand = False
    if wants_operand:
        raise ValueError("ends where a number is due")
    _apply(values, operators, min_rank=1)
    if operators:
        raise ValueError("unclosed parenthesis")
    return values.pop()


def _after_operand(token: str, values: list[Fraction], operators: list[str]) -> bool:
    """Take the token after a complete operand; return whether an operand must follow."""
    if token in _BINARY:
        _apply(values, operators, min_rank=_RANK[token])
        operators.append(token)
        return True
    if token != ")":
        raise ValueError("two operands in a row")
    _apply(values, operators, min_rank=1)
    if not operators:
        raise ValueError("unopened parenthesis")
    operators.pop()
    return False


def _apply(values: list[Fraction], operators: list[str], min_rank: int) -> None:
    """Apply the operators on top of the stack that bind at least as tightly as `min_rank`."""
    while operators and _RANK[operators[-1]] >= min_rank:
        name = operators.pop()
        right = values.pop()
        if name == _NEGATE:
            values.append(-right)
        else:
            values.append(_bounded(Fraction(_BINARY[name](values.pop(), right))))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= MAX_SIZE:
        raise OverflowError("too large")
    return value
