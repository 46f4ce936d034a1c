"""Exact arithmetic on the text between `<<` and `=`: `12/60` -> `0.2`.

When a model writes `<<12/60=`, the sampler inserts the calculator's result. The grammar covers GSM8K's annotations, and
spaces: `0-9 . + - * / // ( )`, decimals such as `.5`, signs after an operator (`71+-3`). Anything else (`1,000`, `20%`,
`$5`, `2x3`, `5.`, `2(3)`) is left to the model.

The paper's code passes the model's text to `eval` and keeps two decimals. Departures: our own grammar, rational
arithmetic, terminating decimals printed in full (six of GSM8K's annotations need it), and negative results. GSM8K has
no non-terminating results, so how those are rounded is our choice.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from dpost_lite.recipe import CalculatorRecipe

MAX_CHARS = 100  # of an expression; the longest in GSM8K has 36
MAX_SIZE = 10**20  # bound on every numerator and denominator, intermediate ones too; GSM8K stays below 3e9

_TOKEN = re.compile(r" *([0-9]+(?:\.[0-9]+)?|\.[0-9]+|//|[-+*/()])")
_NEGATE = "negate"  # unary minus, as opposed to binary "-"
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
    """Evaluates an expression and formats the result as GSM8K's solutions do.

    Results with at most `max_decimals` decimals are exact, others are rounded half away from zero to
    `rounded_decimals`. No trailing zeros, no `-0`; decimals have a leading zero (`0.5`).
    """

    max_decimals: int = 6
    rounded_decimals: int = 2

    @classmethod
    def from_recipe(cls, recipe: CalculatorRecipe) -> "Calculator | None":
        """Return the calculator configured by a recipe, or None if it is disabled."""
        return cls(recipe.max_decimals, recipe.rounded_decimals) if recipe.enabled else None

    def __call__(self, expression: str) -> str | None:
        """Return the result as text, or None if the expression is left to the model (see `evaluate`)."""
        value = evaluate(expression)
        if value is None:
            return None
        return decimal_text(value, self.max_decimals) or rounded_text(value, self.rounded_decimals)


def evaluate(expression: str) -> Fraction | None:
    """Return the exact value, or None if it is not in the grammar, divides by 0, or exceeds `MAX_CHARS` or `MAX_SIZE`.

    Signs bind tighter than `* / //`, which bind tighter than `+ -`; all are left-associative. `//` rounds down.
    """
    if len(expression) > MAX_CHARS:
        return None
    try:
        return _value(_tokens(expression))
    except (ValueError, ArithmeticError):
        return None


def decimal_text(value: Fraction, max_decimals: int) -> str | None:
    """Return `value` as its shortest exact decimal, or None if that needs more than `max_decimals` decimals."""
    exact = (value * 10**max_decimals).denominator == 1
    return rounded_text(value, max_decimals) if exact else None


def rounded_text(value: Fraction, num_decimals: int) -> str:
    """Return `value` rounded half away from zero to `num_decimals`, without trailing zeros."""
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
    """Evaluate by the shunting-yard algorithm: two stacks, no recursion, so nested parentheses cannot overflow."""
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
        elif token != "+":  # a unary `+` has no effect
            values.append(_bounded(Fraction(token)))  # ValueError for an operator or ")"
            wants_operand = False
    if wants_operand:
        raise ValueError("a number is missing at the end")
    _apply(values, operators, min_rank=1)
    if operators:
        raise ValueError("unclosed parenthesis")
    return values.pop()


def _after_operand(token: str, values: list[Fraction], operators: list[str]) -> bool:
    """Process the token after a complete operand; return whether an operand must follow."""
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
    """Apply operators from the top of the stack while they bind at least as tightly as `min_rank`."""
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
