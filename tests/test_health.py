"""The health of a round, from files made by hand: what is counted."""

from dataclasses import asdict, replace

import pytest
from run_folder import RunFolder, rationale

from dpost_lite.problems.dev_draws import compare_draws
from dpost_lite.problems.gate import Yields
from dpost_lite.problems.records import LabelledRationale, PreferencePair, Problem
from dpost_lite.problems.steps import is_repetitive
from dpost_lite.report import health, tables


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def test_what_was_drawn_is_counted_by_problem_and_by_rationale(folder) -> None:
    looping = range(10, 14)
    drawn = [
        rationale("0", 0, correct=True), rationale("0", 1, correct=True),
        rationale("1", 0, correct=False), rationale("1", 1, correct=False, ids=range(30)),
        rationale("2", 0, correct=True), rationale("2", 1, correct=False),
        rationale("3", 0, correct=False), rationale("3", 1, correct=False, end="limit"),
    ]  # fmt: skip
    drawn[-1] = replace(drawn[-1], token_ids=tuple(looping) * 20, forced=(0,) * 80)
    folder.stage("round-1/samples-pairs", rationales=drawn)
    found = health.sample_stats(folder.path / "round-1/samples-pairs")
    assert (found.all_right, found.mixed, found.all_wrong) == (0.25, 0.25, 0.5)
    assert (found.right, found.unfinished, found.repetitive) == (3 / 8, 1 / 8, 1 / 8)
    assert found.tokens == pytest.approx((6 * 10 + 30) / 7)  # of finished ones
    assert (found.num_rationales, found.calculated, found.left_to_model) == (8, 2, 1)


@pytest.mark.parametrize(
    ("ids", "repeats"),
    [((), False), ((1, 2, 3), False), (tuple(range(50)), False), ((7,) * 30, True), ((1, 2, 3, 4, 5) * 2, False),
     ((1, 2, 3, 4, 5) * 4, True)],
)  # fmt: skip
def test_what_repeats_itself(ids, repeats) -> None:
    assert is_repetitive(ids) == repeats


def test_pairs_and_labels_are_counted(folder) -> None:
    ids = tuple(range(9))
    pairs = [PreferencePair(p, "?", "yes", "no", ids[:8], ids[:n]) for p, n in (("0", 2), ("0", 4), ("2", 6))]
    folder.stage("round-1/pairs", pairs=pairs)
    found = health.pair_stats(folder.path / "round-1/pairs")
    assert (found.num_pairs, found.num_problems, found.chosen_tokens, found.rejected_tokens) == (3, 2, 8, 4)
    gold = LabelledRationale("0", "?", "gold", ids, is_gold=True)
    first, second = (LabelledRationale(p, "?", t, ids, is_gold=False) for p, t in (("1", "a"), ("2", "b")))
    for number in (1, 2):
        drawn = [rationale(p, s, correct=p != "3") for p in "0123" for s in range(number)]
        folder.stage(f"round-{number}/samples-labels", rationales=drawn)
    drawn = [f"round-{number}/samples-labels" for number in (1, 2)]
    folder.stage("round-1/labels", inputs=("data", *drawn[:1]), labels=[gold, first])
    folder.stage("round-2/labels", inputs=("data", *drawn), labels=[gold, first, second])
    one, two = (each.labels for each in health.rounds(folder.path))
    assert (one.num_labels, one.num_gold, one.new_per_problem, one.num_dropped) == (2, 1, 0.25, 2)
    assert (two.num_labels, two.num_gold, two.new_per_problem, two.num_dropped) == (3, 1, 0.25, 7)


def test_right_rationales_drawn_for_pairs_count_where_they_join_the_labels(folder) -> None:
    drawn = ["round-1/samples-labels", "round-1/samples-pairs"]
    for name in drawn:
        folder.stage(name, rationales=[rationale("1", s, correct=True) for s in range(3)])
    label = LabelledRationale("1", "?", "a", (1,), is_gold=False)
    folder.stage("round-1/labels", inputs=("data", *drawn), labels=[label])
    (one,) = health.rounds(folder.path)
    assert one.labels.num_dropped == 5


def test_right_rests_count_where_they_join_the_labels(folder) -> None:
    folder.stage("round-1/samples-labels", rationales=[rationale("1", 0, correct=True)])
    counts = {"cuts": 3, "rests": 8, "right": 4, "usable": 2, "unfinished": 1, "repetitive": 1}
    folder.stage("round-1/rests", metrics=counts)
    label = LabelledRationale("1", "?", "a", (1,), is_gold=False)
    folder.stage("round-1/labels", inputs=("data", "round-1/samples-labels", "round-1/rests"), labels=[label])
    (one,) = health.rounds(folder.path)
    assert one.labels.num_dropped == 4
    assert one.rests == health.RestStats(3, 8, usable=0.25, right=0.5, unfinished=0.125, repetitive=0.125)


def test_what_dpo_did_is_read_from_the_last_fifth_of_its_steps(folder) -> None:
    folder.stage("round-1/dpo")
    folder.dpo_steps(*[(0.0, 0.0)] * 8, (1.0, -3.0), (2.0, -6.0))
    (one,) = health.rounds(folder.path)
    assert (one.dpo.num_steps, one.dpo.chosen_change, one.dpo.rejected_change) == (10, 1.5, -4.5)
    assert (one.dpo.kl, one.dpo.margin) == (pytest.approx(1.5), pytest.approx(0.6))
    assert health.dpo_stats([]) is None  # of an older version, without steps in its journal


def gate(folder: RunFolder, *, num_samples: int, is_old: bool = False) -> None:
    """A gate whose DPO policy solves both of two dev problems, and the one before it every second time the first."""
    before = [rationale(p, s, correct=p == "0" and s % 2 == 0) for p in "01" for s in range(num_samples)]
    after = [rationale(p, s, correct=True, ids=range(5)) for p in "01" for s in range(num_samples)]
    problems = [Problem(p, "?", "1") for p in "01"]
    found = compare_draws(problems, before, after, num_samples=num_samples, threshold=0.7)
    drawn = {"before": before, "after": after, "dev": after[::num_samples]}
    metrics = {"goes_on_with": "dpo", **asdict(Yields(2, 1, 2, 0.5, 0.0, 1.0)), "dev": 1.0}
    if not is_old:
        drawn |= {"dev-before": before, "dev-after": after}
        metrics["dev_draws"] = asdict(found)
    folder.stage("score/sft-0", dev=before[::num_samples])
    folder.stage("round-1/gate", metrics=metrics, **drawn)


def test_what_dpo_did_to_the_dev_problems_is_a_table(folder) -> None:
    gate(folder, num_samples=4)
    (one,) = health.rounds(folder.path)
    assert (one.dev_draws.num_problems, one.dev_draws.num_samples) == (2, 4)
    assert tables.dev_table(one) == [
        ("greedy accuracy, 2 problems", "50.0%", "100.0%", "+50.0 points (+0.0 to +100.0)"),
        ("samples: right (pass@1)", "25.0%", "100.0%", "+75.0 points (+50.0 to +100.0)"),
        ("problems with a right one (pass@4)", "50.0%", "100.0%", "+50.0 points (+0.0 to +100.0)"),
        ("distinct right rationales", "1", "2", "+1 (+0 to +2)"),
        ("steps per rationale", "1.00", "1.00", "+0.00 (+0.00 to +0.00)"),
        ("tokens per rationale", "10.0", "5.0", "-5.0 (-5.0 to -5.0)"),
        ("unfinished", "0.0%", "0.0%", "+0.0 points (+0.0 to +0.0)"),
    ]


def test_a_gate_that_drew_nothing_on_dev_has_only_the_greedy_answers(folder) -> None:
    """As those of older versions."""
    gate(folder, num_samples=4, is_old=True)
    (one,) = health.rounds(folder.path)
    assert one.dev_draws is None
    assert [row[0] for row in tables.dev_table(one)] == ["greedy accuracy, 2 problems"]


def test_with_one_sample_pass_at_1_is_shown_once(folder) -> None:
    gate(folder, num_samples=1)
    (one,) = health.rounds(folder.path)
    assert [row[0] for row in tables.dev_table(one)].count("samples: right (pass@1)") == 1
    assert not any("problems with a right one" in row[0] for row in tables.dev_table(one))


def test_a_round_without_a_gate_has_no_such_table(folder) -> None:
    folder.stage("round-1/dpo")
    (one,) = health.rounds(folder.path)
    assert tables.dev_table(one) == []
