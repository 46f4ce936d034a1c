"""The order of training's rows: random between steps, by length within one."""

import random

from dpost_lite.models.order import ByLength

LENGTHS = [random.Random(i).randint(10, 200) for i in range(54)]


def steps(order: list[int], rows_per_step: int) -> list[list[int]]:
    return [order[start : start + rows_per_step] for start in range(0, len(order), rows_per_step)]


def padding(order: list[int], micro: int) -> float:
    """The share of a pass's tokens that is padding, in micro-batches of `micro` rows."""
    batches = [[LENGTHS[i] for i in batch] for batch in steps(order, micro)]
    return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)


def test_each_pass_takes_all_rows_in_another_order():
    sampler = ByLength(LENGTHS, 16, 4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(54)) != first
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert [sorted(step) for step in steps(list(sampler), 16)] != [sorted(step) for step in steps(first, 16)]
    assert list(ByLength(LENGTHS, 16, 4, seed=4)) != first


def test_a_steps_rows_do_not_depend_on_their_lengths_but_come_by_length():
    order = list(ByLength(LENGTHS, 16, 4, seed=3))
    plain = list(ByLength([1] * 54, 16, 4, seed=3))
    assert [sorted(step) for step in steps(order, 16)] == [sorted(step) for step in steps(plain, 16)]
    assert order[52:] == plain[52:]  # two rows fill no micro-batch
    for step in steps(order[:52], 16):
        assert [LENGTHS[i] for i in step] == sorted((LENGTHS[i] for i in step), reverse=True)
    assert padding(order, 4) < 0.2 < 0.3 < padding(plain, 4)
