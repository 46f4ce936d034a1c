"""Does DPO pay? Draws of two policies, compared problem by problem."""

import random

import pytest

from dpost_lite.problems import comparing
from dpost_lite.problems.comparing import bootstrap_mean
from dpost_lite.problems.gate import compare_yields, num_compared
from dpost_lite.problems.records import LabelledRationale, Problem, Rationale

PROBLEMS = [Problem(f"p{i}", f"How many are {i}?", "1") for i in range(80)]


def draws(problem: Problem, texts: list[str], *, correct: bool = True, end: str = "stop") -> list[Rationale]:
    return [
        Rationale(problem.id, i, text, tuple(text.encode()), (0,) * len(text), 0.0, end, "1", correct, 0, 0)
        for i, text in enumerate(texts)
    ]


def policy(seed: int, rate: float) -> list[Rationale]:
    """Each problem is answered four times, each time right with probability `rate`, always in other words."""
    dice = random.Random(seed)
    return [
        drawn
        for problem in PROBLEMS
        for word in ("abcd", "efgh", "ijkl", "mnop")
        for drawn in draws(problem, [word], correct=dice.random() < rate)
    ]


def test_a_better_policy_is_kept_and_a_worse_one_is_not():
    kept = [
        compare_yields(PROBLEMS, policy(i, 0.4), policy(i + 100, 0.6), {}, threshold=0.7).is_better for i in range(9)
    ]
    assert all(kept)
    lost = [
        compare_yields(PROBLEMS, policy(i, 0.4), policy(i + 100, 0.3), {}, threshold=0.7).is_better for i in range(9)
    ]
    assert not any(lost)


def test_in_doubt_dpo_does_not_pay(monkeypatch):
    """Equal policies: a gain is seen in about one of ten comparisons."""
    monkeypatch.setattr(comparing, "NUM_RESAMPLES", 1000)  # for time
    seen = [compare_yields(PROBLEMS, policy(i, 0.5), policy(i + 500, 0.5), {}, threshold=0.7) for i in range(200)]
    assert 0.04 < sum(found.is_better for found in seen) / len(seen) < 0.17
    same = compare_yields(PROBLEMS, policy(1, 0.5), policy(1, 0.5), {}, threshold=0.7)
    assert (same.difference, same.low, same.high, same.is_better) == (0, 0, 0, False)


def test_repeated_unfinished_wrong_and_known_rationales_do_not_count():
    problem = PROBLEMS[0]
    gold = {problem.id: LabelledRationale(problem.id, problem.question, "gold", tuple(b"gold"), is_gold=True)}
    before = draws(problem, ["gold", "aaaa", "aaaa"])
    after = (
        draws(problem, ["aaaa", "bbbb"]) + draws(problem, ["cccc"], correct=False) + draws(problem, ["d"], end="limit")
    )
    found = compare_yields([problem], before, after, gold, threshold=0.7)
    assert (found.distinct_right_before, found.distinct_right_after, found.difference) == (1, 2, 1)


@pytest.mark.parametrize(
    ("share", "num_problems", "expected"),
    [(0.05, 7000, 467), (0.05, 500, 64), (0.05, 40, 40), (1.0, 7000, 7000), (0.0001, 7000, 64)],
)
def test_what_is_compared_is_a_share_of_the_round_but_enough_to_see_harm(share, num_problems, expected):
    number = num_compared(share, num_problems, 5, 3)
    assert number == expected
    if expected == 467:
        assert 2 * 3 * number == pytest.approx(0.05 * 7000 * 8, abs=6)


def test_the_interval_of_a_mean():
    values = [0.0, 1.0] * 200
    low, high = bootstrap_mean(values)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)
    narrow = bootstrap_mean(values, confidence=0.8)
    assert narrow == pytest.approx((0.5 - 1.28 * 0.025, 0.5 + 1.28 * 0.025), abs=0.005)
