"""pass@k, maj@k, McNemar and the paired bootstrap: by hand, by enumeration, and by simulation."""

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpost_lite.errors import DataError
from dpost_lite.problems.comparing import (
    bootstrap_interval,
    compare,
    interval_over_seeds,
    majority,
    mcnemar,
    mean_difference,
    pass_at_k,
    score_samples,
)
from dpost_lite.problems.records import Problem, Rationale


@pytest.mark.parametrize(
    ("num_samples", "num_right", "k", "expected"),
    [(1, 0, 1, 0), (1, 1, 1, 1), (10, 3, 1, 0.3), (10, 0, 10, 0), (10, 1, 10, 1), (5, 2, 4, 1), (4, 1, 2, 0.5)],
)
def test_pass_at_k_by_hand(num_samples, num_right, k, expected):
    assert pass_at_k(num_samples, num_right, k) == pytest.approx(expected)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_one(case):
    num_samples, num_right, k = case
    subsets = list(itertools.combinations(range(num_samples), k))
    share = sum(any(i < num_right for i in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(num_samples, num_right, k) == pytest.approx(share)


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [(["3", "5", "3"], "3"), ([None, None, "5"], "5"), (["7", "5"], "7"), ([None], None), ([], None)],
)
def test_majority(predictions, expected):
    assert majority(predictions) == expected


def rationale(problem_id: str, sample: int, predicted: str | None, *, correct: bool = False, end="stop") -> Rationale:
    return Rationale(problem_id, sample, "", (), (), 0.0, end, predicted, correct)


def test_samples_are_scored_by_problem():
    problems = [Problem("a", "?", "3"), Problem("b", "?", "5")]
    samples = [
        rationale("a", 0, "3", correct=True),
        rationale("a", 1, "3", correct=True),
        rationale("a", 2, "4"),
        rationale("b", 0, "5", end="limit"),  # no vote, and not right
        rationale("b", 1, "6"),
        rationale("b", 2, None),
    ]
    scored = score_samples("m", samples, problems, has_calculator=False)
    assert scored.num_samples == 3
    assert scored.pass_at == {1: pytest.approx(1 / 3), 2: pytest.approx(0.5), 3: 0.5}
    assert scored.majority == 0.5
    assert not scored.calculator


@pytest.mark.parametrize(("won", "lost", "p"), [(0, 0, 1), (5, 5, 1), (1, 0, 1), (6, 0, 2 / 64), (8, 1, 20 / 512)])
def test_mcnemar_by_hand(won, lost, p):
    assert mcnemar(won, lost) == mcnemar(lost, won) == pytest.approx(p)


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_a_probability(won, lost):
    assert 0 < mcnemar(won, lost) <= 1


def test_the_bootstrap_interval_is_that_of_the_normal_distribution_for_many_problems():
    won, lost, number = 300, 200, 2000
    low, high = bootstrap_interval(won, lost, number)
    difference = (won - lost) / number
    error = math.sqrt((won + lost) / number - difference**2) / math.sqrt(number)
    assert low == pytest.approx(difference - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(difference + 1.96 * error, abs=0.1 * error)
    assert bootstrap_interval(won, lost, number) == (low, high)  # seeded


def test_intervals_hold_the_truth_about_95_times_in_100():
    dice, held = random.Random(1), 0
    for _ in range(200):
        draws = dice.choices((1, -1, 0), weights=(0.15, 0.10, 0.75), k=400)
        low, high = bootstrap_interval(draws.count(1), draws.count(-1), 400)
        held += low <= 0.05 <= high
    assert 180 <= held <= 199


def test_the_interval_over_seeds_is_students():
    once = compare({"1": True}, {"1": True})

    def interval(*points: float) -> tuple[float, float]:
        return interval_over_seeds([replace(once, difference=one / 100) for one in points])

    assert interval(1, 2, 3) == pytest.approx(((2 - 2.484) / 100, (2 + 2.484) / 100), abs=1e-5)
    assert interval(0, 2) == pytest.approx(((1 - 12.706) / 100, (1 + 12.706) / 100), abs=1e-5)
    low, high = interval(*range(20))  # more seeds than the table has
    assert high - low == pytest.approx(2 * 2.262 * math.sqrt(35 / 20) / 100, rel=1e-3)
    dice = random.Random(0)
    drawn = [interval(*(dice.gauss(1, 3) for _ in range(5))) for _ in range(2000)]
    assert 0.935 < sum(low < 0.01 < high for low, high in drawn) / len(drawn) < 0.965


def test_two_models_on_the_problems_that_both_were_asked():
    a = {"1": True, "2": True, "3": False, "4": False, "only a's": True}
    b = {"1": True, "2": False, "3": True, "4": True, "only b's": False}
    found = compare(a, b)
    assert (found.num_problems, found.a, found.b, found.difference) == (4, 0.5, 0.75, 0.25)
    assert (found.only_a, found.only_b) == (("2",), ("3", "4"))
    assert found.low < found.difference < found.high
    assert found.p == 1
    assert compare(b, a).difference == -0.25


def test_the_mean_over_seeds_draws_a_problem_with_all_of_its_answers():
    a, b = ({str(i): i < solved for i in range(400)} for solved in (100, 140))
    once = compare(a, b)
    difference, low, high = mean_difference([once])
    assert difference == pytest.approx(once.difference)
    assert (low, high) == (pytest.approx(once.low, abs=0.005), pytest.approx(once.high, abs=0.005))
    assert mean_difference([once] * 3) == (difference, low, high)  # the same answers again tell nothing new
    other = compare(a, {str(i): i >= 360 for i in range(400)})  # another seed wins 40 others, and loses 100
    difference, low, high = mean_difference([once, other])
    assert difference == pytest.approx((40 - 60) / 2 / 400)
    error = math.sqrt((80 + 100) / 4 / 400 - difference**2) / math.sqrt(400)  # each of 180 problems counts half
    assert (low, high) == (
        pytest.approx(difference - 1.96 * error, abs=0.15 * error),
        pytest.approx(difference + 1.96 * error, abs=0.15 * error),
    )


def test_models_without_a_common_problem_cannot_be_compared():
    with pytest.raises(DataError, match="--compare: the two have no problems in common"):
        compare({"a": True}, {"b": True})


def test_every_published_row_is_on_a_set_of_ours_and_in_percent():
    from dpost_lite.evaluation.papers import PUBLISHED, SETS, published

    for row in PUBLISHED:
        assert set(row.accuracies) <= set(SETS)
        assert all(10 < accuracy < 100 for accuracy in row.accuracies.values())
    assert [row.name for row in published("svamp")] == [row.name for row in PUBLISHED[:6]]
