"""What DPO changes on the dev problems: figures of two policies, worked out by hand."""

from dataclasses import asdict, replace

import pytest
from run_folder import rationale

from dpost_lite.problems.comparing import bootstrap_mean
from dpost_lite.problems.dev_draws import Change, DevDraws, compare_draws
from dpost_lite.problems.records import Problem, Rationale

PROBLEMS = [Problem(str(i), f"How many are {i}?", "1") for i in range(4)]


def drawn(problem: int, sample: int, right: bool, lines: int, ids: range, end: str = "stop") -> Rationale:
    made = rationale(str(problem), sample, correct=right, ids=ids, end=end)
    return replace(made, text="\n".join([*(f"step {i}" for i in range(lines)), "#### 1"]))


SAME, OTHER = range(10), range(20, 30)
BEFORE = [
    drawn(0, 0, True, 1, SAME), drawn(0, 1, True, 1, SAME),  # two right ones that are alike
    drawn(1, 0, False, 3, SAME), drawn(1, 1, True, 2, OTHER),
    drawn(2, 0, False, 1, SAME), drawn(2, 1, False, 9, range(80), "limit"),
    drawn(3, 0, False, 9, range(80), "limit"), drawn(3, 1, False, 9, range(80), "limit"),
]  # fmt: skip
AFTER = [
    drawn(0, 0, True, 1, SAME), drawn(0, 1, True, 2, OTHER),  # two right ones that differ
    drawn(1, 0, True, 3, SAME), drawn(1, 1, True, 2, OTHER),
    drawn(2, 0, True, 1, range(6)), drawn(2, 1, False, 1, range(6)),
    drawn(3, 0, False, 1, range(50)), drawn(3, 1, False, 9, range(80), "limit"),
]  # fmt: skip


def test_the_figures_are_those_worked_out_by_hand() -> None:
    found = compare_draws(PROBLEMS, BEFORE, AFTER, num_samples=2, threshold=0.7)
    assert (found.num_problems, found.num_samples) == (4, 2)
    by_hand = {
        "pass_at_1": (3 / 8, 5 / 8, [0, 0.5, 0.5, 0], 1),  # of 2, 1, 0, 0 right and 2, 2, 1, 0
        "pass_at_k": (2 / 4, 3 / 4, [0, 0, 1, 0], 1),
        "distinct_right": (2, 5, [1, 1, 1, 0], 4),  # 1, 1, 0, 0 and 2, 2, 1, 0
        "unfinished": (3 / 8, 1 / 8, [0, 0, -0.5, -0.5], 1),
        # Of finished ones, on problems 0 to 2: of the last one the first policy finished none.
        "steps": ((1 + 2.5 + 1) / 3, (1.5 + 2.5 + 1) / 3, [0.5, 0, 0], 1),
        "tokens": (10, (10 + 10 + 6) / 3, [0, 0, -4], 1),
    }
    for name, (before, after, differences, scale) in by_hand.items():
        change = getattr(found, name)
        assert (change.before, change.after) == pytest.approx((before, after)), name
        assert change.difference == pytest.approx(after - before), name
        interval = [scale * end for end in bootstrap_mean(differences)]
        assert [change.low, change.high] == pytest.approx(interval), name


def test_pass_at_k_of_all_samples_is_any_right_and_of_one_the_share() -> None:
    """For one sample a problem they are the same; the estimator's values in between: test_comparing.py."""
    once = [[one for one in drawn if one.sample == 0] for drawn in (BEFORE, AFTER)]
    found = compare_draws(PROBLEMS, *once, num_samples=1, threshold=0.7)
    assert found.pass_at_1 == found.pass_at_k
    assert (found.pass_at_1.before, found.pass_at_1.after) == (0.25, 0.75)


def test_equal_policies_differ_in_nothing() -> None:
    found = compare_draws(PROBLEMS, BEFORE, list(reversed(BEFORE)), num_samples=2, threshold=0.7)
    changes = [value for value in (getattr(found, name) for name in DevDraws.__slots__) if isinstance(value, Change)]
    assert len(changes) == 6
    assert all((one.difference, one.low, one.high) == (0, 0, 0) for one in changes)


def test_a_policy_that_never_ends_has_no_steps_to_compare() -> None:
    endless = [replace(one, end="limit", correct=False) for one in AFTER]
    found = compare_draws(PROBLEMS, BEFORE, endless, num_samples=2, threshold=0.7)
    assert found.steps is found.tokens is None
    assert found.unfinished.after == 1
    assert DevDraws.from_metrics(asdict(found)) == found
