"""The calculator: every annotation of GSM8K, random expressions against `fractions`, printing, and refusals."""

import json
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpost_lite.problems.calculator import (
    MAX_CHARS,
    MAX_SIZE,
    Calculator,
    decimal_text,
    evaluate,
    rounded_text,
)

DATA_DIR = os.environ.get("DPOST_DATA_DIR")


@pytest.mark.skipif(DATA_DIR is None, reason="DPOST_DATA_DIR is not set: no GSM8K files to check against")
def test_every_gsm8k_annotation_is_numerically_equal():
    calculator = Calculator()
    num_annotations = 0
    for split in ("train", "test"):
        with (Path(str(DATA_DIR)) / "gsm8k" / f"{split}.jsonl").open(encoding="utf-8") as file:
            for line in file:
                for annotation in re.findall(r"<<(.*?)>>", json.loads(line)["answer"]):
                    expression, printed = annotation.split("=")
                    result = calculator(expression)
                    assert result is not None, annotation
                    assert Fraction(result) == Fraction(printed), annotation
                    num_annotations += 1
    assert num_annotations == 27_998


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48/2", "24"),
        ("12/60", "0.2"),
        ("18*.5", "9"),
        ("1.20*4", "4.8"),
        ("3*(2/3)", "2"),
        ("7.5*(1+(1/3))", "10"),
        ("560//10", "56"),
        ("-7//2", "-4"),  # rounds down, and the sign belongs to the 7
        ("7.5//2", "3"),
        ("71+-3", "68"),
        ("3*+6", "18"),
        ("-14+-8+1", "-21"),
        ("(-17)+43", "26"),
        ("-(2+3)*2", "-10"),
        ("5--3", "8"),
        ("10-2-3", "5"),
        ("100/5/2", "10"),
        ("2+3*4", "14"),
        ("8-4*3/2", "2"),
        ("12", "12"),
        ("05+1", "6"),
        ("  2 +  3 ", "5"),
        ("2 // 1", "2"),
        ("4.35*100", "435"),  # a float gives 434.99999999999994
        ("1.1*3", "3.3"),
    ],
)
def test_results(expression, result):
    assert Calculator()(expression) == result


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("1/64", "0.015625"),  # six decimals: exact
        ("1/128", "0.01"),  # seven: rounded
        ("10/3", "3.33"),
        ("20/3", "6.67"),
        ("-20/3", "-6.67"),
        ("2.675/1.0000000", "2.675"),
        ("1/3-1/3", "0"),
        ("-1/3/1000", "0"),  # no "-0"
        ("0-0", "0"),
        ("-0", "0"),
        ("1.50", "1.5"),
        ("100", "100"),
        ("2/3*3000", "2000"),
        ("299/300", "1"),  # 0.996…: the carry reaches the whole part
    ],
)
def test_printing(expression, result):
    assert Calculator()(expression) == result


def test_the_numbers_of_decimals_are_settings():
    assert Calculator(max_decimals=2)("1/8") == "0.13"  # half away from zero …
    assert Calculator(max_decimals=2)("-1/8") == "-0.13"  # … on either side
    assert Calculator(rounded_decimals=4)("2/3") == "0.6667"
    assert Calculator(max_decimals=0, rounded_decimals=0)("5/2*4") == "10"
    assert Calculator(max_decimals=0, rounded_decimals=0)("5/2") == "3"


BROKEN = ["", " ", "()", "(", ")", "(1", "1)", ")(", "1+", "*2", "+", "-", ".", "2///3", "2/ /3", "1=1"]
AMBIGUOUS = ["2(3)", "(2)3", "(1)(2)", "1 000", "1 .5", "1.2.3", "5.", "2**3", "2^3"]
FOREIGN = ["1,000", "20%", "$5", "2x3", "2×3", "6÷2", "−3", "3 apples", "x", "1e5", "0x10", "٣", "²", "1\n+1", "1\t+1"]
PYTHON = ["1_000", "inf", "nan", "True", "1if 1else 2", "__import__('os')"]
BY_ZERO = ["1/0", "1//0", "0/0", "5/(3-3)", "1/(.5-1/2)"]


@pytest.mark.parametrize("expression", [*BROKEN, *AMBIGUOUS, *FOREIGN, *PYTHON, *BY_ZERO])
def test_junk_and_division_by_zero_are_not_mine(expression):
    assert evaluate(expression) is None
    assert Calculator()(expression) is None


def test_length_is_bounded():
    assert evaluate("1" + "+1" * 49 + " ") == 50
    assert len("1" + "+1" * 49 + " ") == MAX_CHARS
    assert evaluate("1" + "+1" * 49 + "  ") is None


def test_size_is_bounded():
    assert evaluate(str(MAX_SIZE - 1)) == MAX_SIZE - 1
    assert evaluate(str(MAX_SIZE)) is None
    assert evaluate(f"{MAX_SIZE - 1}+1") is None
    assert evaluate(f"{10**10}*{10**10}/{10**10}") is None  # too large on the way
    assert evaluate("." + "0" * 18 + "1") == Fraction(1, 10**19)
    assert evaluate("." + "0" * 19 + "1") is None  # the denominator counts too


@pytest.mark.parametrize("text", ["(" * 100_000, "-" * 100_000, "1+" * 50_000 + "1", "9" * 100_000, " " * 100_000])
def test_a_very_long_expression_is_refused(text):
    assert evaluate(text) is None


def test_a_very_long_expression_is_not_even_read():
    class Long:
        """A text of which there is nothing but the length."""

        def __len__(self):
            return 100_000

    assert Calculator()(Long()) is None


def num_calls(expression):
    """Calls of functions, Python's own included, that it takes to evaluate an expression."""
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    try:
        evaluate(expression)
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in calls)


@pytest.mark.parametrize("piece", ["1+", "(", "-", "1)", "9", ".5", " ", "1/", "(1", "2//"])
def test_work_grows_no_faster_than_the_expression(piece):
    half, whole = (piece * (num_chars // len(piece)) + "1" for num_chars in (MAX_CHARS // 2 - 1, MAX_CHARS - 1))
    assert num_calls(whole) <= 2.2 * num_calls(half)


@pytest.mark.parametrize("num", [10, 49])
def test_deep_nesting_within_the_length_limit(num):
    assert evaluate("(" * num + "7" + ")" * num) == 7
    assert evaluate("-" * num + "7") == 7 * (-1) ** num


def spaced(draw, text):
    return " " * draw(st.integers(0, 1)) + text + " " * draw(st.integers(0, 1))


@st.composite
def numbers(draw):
    """A number as text, and its value built from integers alone."""
    whole, decimals = draw(st.integers(0, 999)), draw(st.text("0123456789", max_size=3))
    value = Fraction(int(str(whole) + decimals), 10 ** len(decimals))
    show_whole = not decimals or whole or draw(st.booleans())
    text = (str(whole) if show_whole else "") + ("." + decimals if decimals else "")
    return spaced(draw, text), value


@st.composite
def factors(draw, depth):
    """A number or a parenthesised expression, with signs in front or not."""
    if depth and draw(st.booleans()):
        text, value = draw(expressions(depth - 1))
        text = spaced(draw, f"({text})")
    else:
        text, value = draw(numbers())
    for sign in draw(st.text("+-", max_size=2)):
        text, value = sign + text, -value if sign == "-" and value is not None else value
    return text, value


@st.composite
def terms(draw, depth):
    text, value = draw(factors(depth))
    for symbol in draw(st.lists(st.sampled_from(["*", "/", "//"]), max_size=2)):
        right_text, right = draw(factors(depth))
        text += symbol + right_text
        if value is None or right is None or (symbol != "*" and right == 0):
            value = None
        else:
            value = value * right if symbol == "*" else value / right if symbol == "/" else Fraction(value // right)
    return text, value


@st.composite
def expressions(draw, depth=2):
    """An expression as text, and its value, None where it divides by zero; built by the grammar, top down."""
    text, value = draw(terms(depth))
    for symbol in draw(st.lists(st.sampled_from("+-"), max_size=2)):
        right_text, right = draw(terms(depth))
        text += symbol + right_text
        if value is None or right is None:
            value = None
        else:
            value = value + right if symbol == "+" else value - right
    return text, value


@given(expressions())
def test_random_expressions_agree_with_fractions(expression):
    text, value = expression
    result = evaluate(text)
    if value is None or len(text) > MAX_CHARS:
        assert result is None
    elif len(re.sub(r"[^0-9]", "", text)) < 16:  # then nothing on the way can exceed MAX_SIZE
        assert result == value
    else:
        assert result in (value, None)


@given(st.text(max_size=120) | st.text("0123456789.+-*/() ", max_size=120))
def test_no_text_raises_and_results_are_short_plain_numbers(text):
    result = Calculator()(text)
    assert (result is None) == (evaluate(text) is None)
    if result is not None:
        assert re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", result)
        assert result != "-0"
        assert len(result) <= 1 + 20 + 1 + 6


@given(st.fractions(-(10**6), 10**6), st.integers(0, 8))
def test_printing_is_exact_or_off_by_at_most_half_a_unit(value, num_decimals):
    exact, rounded = decimal_text(value, num_decimals), rounded_text(value, num_decimals)
    assert abs(Fraction(rounded) - value) <= Fraction(1, 2 * 10**num_decimals)
    assert (exact is not None) == (Fraction(rounded) == value)
    assert exact in (rounded, None)
