"""Reading answers, comparing them, and the interval of an accuracy."""

import json
import os
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpost_lite.problems.grading import (
    MAX_NUMBER_CHARS,
    canonical_number,
    flexible_answer,
    same_number,
    strict_answer,
    wilson_interval,
    without_annotations,
)

DATA_DIR = os.environ.get("DPOST_DATA_DIR")


@pytest.mark.skipif(DATA_DIR is None, reason="DPOST_DATA_DIR is not set: no GSM8K files to check against")
def test_every_gsm8k_answer_reads_as_its_final():
    num_problems = 0
    for split in ("train", "test"):
        with (Path(str(DATA_DIR)) / "gsm8k" / f"{split}.jsonl").open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                assert strict_answer(row["answer"]) == row["final"], row["id"]
                assert flexible_answer(row["answer"]) == row["final"], row["id"]
                assert canonical_number(row["final"]) == row["final"], row["id"]
                num_problems += 1
    assert num_problems == 8_792


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"),
        (" 18\n", "18"),
        ("18.", "18"),
        ("18.0", "18"),
        ("1.50", "1.5"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("007", "7"),
        ("0", "0"),
        ("-0.0", "0"),
        ("100", "100"),
        ("+5", "5"),
        ("-5", "-5"),
        ("−5", "-5"),  # U+2212
        ("–5", "-5"),  # en dash
        ("1,234.50", "1234.5"),
        ("1,00,000", "100000"),
        ("$5", "5"),
        ("$ 5", "5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("−€5.50", "-5.5"),
        (r"\$1,000", "1000"),
        ("50%", "50"),
        (r"50\%.", "50"),
        ("50 %", "50"),
        ("3/4", "0.75"),
        ("-3/4", "-0.75"),
        ("6/3", "2"),
    ],
)
def test_canonical_number(text, number):
    assert canonical_number(text) == number
    assert canonical_number(number) == number
    assert strict_answer(f"So:\n#### {text.strip()}") == number
    assert flexible_answer(f"The answer is {text.strip()} indeed") == number


NOTHING = ["", " ", "-", "$", "%", ".", ",", "abc", "x=5", "Infinity", "nan", "٣", "½"]
WITH_UNIT = ["18 apples", "18kg", "3 million", "5%%", "$5$"]
NOT_ONE_NUMBER = ["2 1/2", "1.2.3", "10-5", "--5", "2:30", "1e5", "1,", ",1"]
NO_DECIMAL = ["1/3", "5/0", "9" * (MAX_NUMBER_CHARS + 1)]


@pytest.mark.parametrize("text", [*NOTHING, *WITH_UNIT, *NOT_ONE_NUMBER, *NO_DECIMAL])
def test_what_is_no_number(text):
    assert canonical_number(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2+2=4\n#### 4", "4"),
        ("####4", "4"),
        ("#### $4.00 in all", "4"),
        ("#### 18 apples, of 20", "18"),
        ("#### 1\n#### 2", "2"),
        ("#### 1\n#### none", "1"),  # the last one *with a number*, as in the paper's code
        ("##### 7", "7"),
        ("#### <<3*6=18>>18", "18"),
        ("#### about 18", None),
        ("####\n18", None),
        ("### 18", None),
        ("The answer is 18", None),
        ("#### 1/3", None),
        ("", None),
    ],
)
def test_strict_answer(text, answer):
    assert strict_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Of 20 she has 18 left.", "18"),
        ("She has 18.", "18"),
        ("She pays $1,234.50.", "1234.5"),
        ("10 - 5", "5"),
        ("10-5", "5"),  # a minus between, not in front of, numbers
        ("(3)-5", "5"),
        ("x-5", "5"),
        ("50%-60%", "60"),
        ("--5", "5"),
        ("71+-3", "-3"),
        ("a 10–15 range", "15"),
        ("it fell to -5 degrees", "-5"),
        ("= -$5 (a loss)", "-5"),
        ("a 1, a 2, a 3", "3"),
        ("so 3/4 of it", "0.75"),
        ("6*3=$<<6*3=18>>18 in all", "18"),
        ("18 it is <<6*4=24>>", "18"),  # an annotation is no answer
        ("18 it is <<6*4=24", "24"),  # an unclosed one is text
        ("#### 4\nNo, wait: 5", "5"),
        ("no number", None),
        ("", None),
    ],
)
def test_flexible_answer(text, answer):
    assert flexible_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("$<<12/60=0.2>>0.2 a minute", "$0.2 a minute"),
        ("<<1=1>><<2=2>>", ""),
        ("a <<1+1=", "a <<1+1="),
        ("a <<1+\n1=2>>", "a <<1+\n1=2>>"),
        ("<<<1=1>>", "<"),
        ("3 < 4 > 2", "3 < 4 > 2"),
    ],
)
def test_without_annotations(text, plain):
    assert without_annotations(text) == plain


def test_same_number_is_exact_about_its_tolerance():
    assert same_number("18", "18.0")
    assert same_number("$1,000", "1000")
    assert same_number("0.33333", "0.3334")
    assert not same_number("0", "0.0001")
    assert same_number("0", "0.00009999999999999999999999999")
    # As floats these two would be equal.
    assert not same_number("100000000000000000000", "100000000000000000001")
    assert not same_number("5", "-5")


def test_a_missing_answer_is_never_the_same_number():
    assert not same_number(None, "5")
    assert not same_number(None, None)
    assert not same_number("", "")
    assert not same_number("abc", "abc")


HARD = ["<", "<<", "<<1", "#", "####", "#### -", "9", "1,", "1 ", "1/", "-$", "\\$ ", ".", " ", "1.", ">>", "-", "٣"]


@pytest.mark.parametrize("piece", HARD)
def test_a_megabyte_of_anything_takes_bounded_time(piece):
    text = "#### " + piece * (1_000_000 // len(piece)) + "x"
    start = time.perf_counter()
    strict_answer(text)
    flexible_answer(text)
    canonical_number(text)
    assert time.perf_counter() - start < 5  # here 0.3 s; anything quadratic would take minutes


def test_an_endless_number_is_no_answer():
    digits = "9" * 100_000
    assert strict_answer(f"#### {digits}") is None
    assert flexible_answer(f"5 and {digits}") is None
    assert flexible_answer(f"5 and 1/{digits}") is None
    assert not same_number(digits, digits)


@given(st.text() | st.text("0123456789.,-−$%/#<>= \n", max_size=200))
def test_no_text_raises_and_answers_are_canonical(text):
    for answer in (strict_answer(text), flexible_answer(text), canonical_number(text)):
        if answer is not None:
            assert re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", answer)
            assert answer != "-0"
            assert canonical_number(answer) == answer


@given(st.decimals(-(10**9), 10**9, places=4), st.sampled_from(["", "$", "$ ", "€"]), st.booleans())
def test_every_way_to_write_a_number_reads_as_the_number(value, currency, sign_inside):
    number = f"{abs(value):,}"
    minus = "-" if value < 0 else ""
    text = currency + minus + number if sign_inside and currency else minus + currency + number
    for answer in (strict_answer(f"#### {text}"), flexible_answer(f"so {text}."), canonical_number(text)):
        assert answer is not None
        assert Fraction(answer) == Fraction(value)


@pytest.mark.parametrize(
    ("num_right", "num_problems", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # z² / (n + z²)
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),  # 1/2 ± z / (2 √(n + z²))
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),  # Newcombe 1998, table I
        (0, 20, 0.0, 0.1611),  # Newcombe 1998, table I
        (1, 29, 0.0061, 0.1718),  # Newcombe 1998, table I
    ],
)
def test_wilson_interval(num_right, num_problems, low, high):
    assert wilson_interval(num_right, num_problems) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_without_problems_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_rate_and_stays_within_bounds(counts):
    num_right, num_problems = counts
    low, high = wilson_interval(num_right, num_problems)
    assert 0 <= low <= num_right / num_problems <= high <= 1
    assert low < high
