"""The order of training's rows: random, with rows of similar length in a micro-batch."""

import random
from itertools import pairwise

import pytest

from dpost_lite.models.order import ByLength, group_size

LENGTHS = [random.Random(i).randint(10, 200) for i in range(54)]


def steps(order: list[int], rows_per_step: int) -> list[list[int]]:
    return [order[start : start + rows_per_step] for start in range(0, len(order), rows_per_step)]


def padding(order: list[int], micro: int, lengths: list[int]) -> float:
    """The share of a pass's tokens that is padding, in micro-batches of `micro` rows."""
    batches = [[lengths[i] for i in batch] for batch in steps(order, micro)]
    return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)


def test_each_pass_takes_all_rows_in_another_order():
    sampler = ByLength(LENGTHS, 16, 4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(54)) != first
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert [sorted(step) for step in steps(list(sampler), 16)] != [sorted(step) for step in steps(first, 16)]
    assert list(ByLength(LENGTHS, 16, 4, seed=4)) != first


def test_rows_of_similar_length_come_together_and_each_step_has_all_lengths():
    order = list(ByLength(LENGTHS, 16, 4, seed=3))
    groups = [[[LENGTHS[i] for i in group] for group in steps(step, 4)] for step in steps(order[:48], 16)]
    for longer, shorter in pairwise(zip(*groups, strict=True)):  # the n-th groups of all steps
        assert min(map(min, longer)) >= max(map(max, shorter))
    last = [LENGTHS[i] for i in order[48:52]]  # they fill no step
    assert last == sorted(last, reverse=True)
    plain = list(ByLength([1] * 54, 16, 4, seed=3))
    assert order[52:] == plain[52:]  # they fill no micro-batch


@pytest.mark.parametrize("num", [54, 16 * 16 + 40])  # 16 steps are sorted at once
def test_sorting_several_steps_at_once_leaves_less_padding(num, monkeypatch):
    lengths = [random.Random(i).randint(10, 200) for i in range(num)]
    shares = {}
    for at_once in (16, 1):
        monkeypatch.setattr("dpost_lite.models.order.STEPS_SORTED", at_once)
        rows = list(ByLength(lengths, 16, 4, seed=3))
        assert sorted(rows) == list(range(num))
        shares[at_once] = padding(rows, 4, lengths)
    plain = padding(list(ByLength([1] * num, 16, 4, seed=3)), 4, lengths)
    assert shares[16] < 0.6 * shares[1] < 0.12 < 0.3 < plain


def test_the_same_rows_make_a_step_in_smaller_micro_batches():
    """For a training that goes on in those."""
    made = [list(ByLength(LENGTHS, 16, micro, seed=3)) for micro in (16, 4, 1)]
    first, *others = [[sorted(step) for step in steps(one, 16)] for one in made]
    assert others == [first, first]


@pytest.mark.parametrize(("rows_per_step", "size"), [(128, 16), (64, 16), (48, 12), (32, 8), (4, 1), (3, 1), (7, 1)])
def test_size_of_groups(rows_per_step, size):
    assert group_size(rows_per_step) == size
    order = list(ByLength(LENGTHS, rows_per_step, 1, seed=3))
    assert sorted(order) == list(range(54))
