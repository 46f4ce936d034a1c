"""The order in which training sees its rows."""

import random
from collections.abc import Iterator, Sequence

STEPS_SORTED = 16  # at once; more steps would leave hardly less padding
LARGEST_GROUP = 16  # rows: the planner's largest micro-batch on a GPU


class ByLength:
    """A sampler for a DataLoader: row numbers in a random order, where rows of a micro-batch have similar lengths.

    Micro-batches are padded to their longest row. In a random order up to half of DPO's tokens would be padding, so the
    rows of up to 16 optimiser steps are drawn at random, sorted by length and cut into groups, at least four a step.
    Each step gets one at random of the groups of the longest rows, one of the next longest, and so on: steps differ in
    their mean length about as little as if all rows were drawn at random (bench/README.md). Which rows make a step does
    not depend on the size of its micro-batches, so that a training can go on in smaller ones.

    A step's gradient is the mean of its micro-batches' means. The rows at the end of a pass that do not fill a step are
    sorted by themselves. Those that do not fill a micro-batch weigh more, and are drawn without regard to length.
    (trl's losses sft, aot and aot_unpaired are no means over rows: for them, it matters which rows share a
    micro-batch.)
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, micro_batch_size: int, *, seed: int) -> None:
        self._lengths = lengths
        self._rows_per_step = rows_per_step
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed} {self._epoch}")
        order = draw.sample(range(len(self)), len(self))
        num_whole = len(order) - len(order) % self._rows_per_step
        num_full = len(order) - len(order) % self._micro_batch_size
        at_once = STEPS_SORTED * self._rows_per_step
        for start in range(0, num_whole, at_once):
            yield from self._steps(order[start : min(start + at_once, num_whole)], draw)
        yield from self._sorted(order[num_whole:num_full])
        yield from order[num_full:]

    def _steps(self, rows: Sequence[int], draw: random.Random) -> Iterator[int]:
        """Sort the rows of some steps by length, and deal them out to the steps in groups."""
        num_steps, size = len(rows) // self._rows_per_step, group_size(self._rows_per_step)
        by_length = self._sorted(rows)
        groups = [by_length[i : i + size] for i in range(0, len(rows), size)]
        dealt = [draw.sample(groups[i : i + num_steps], num_steps) for i in range(0, len(groups), num_steps)]
        for step in zip(*dealt, strict=True):
            for group in step:
                yield from group

    def _sorted(self, rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=self._lengths.__getitem__, reverse=True)

    def set_epoch(self, epoch: int) -> None:
        """Take another order for another pass."""
        self._epoch = epoch


def group_size(rows_per_step: int) -> int:
    """Return the size of a step's groups: the largest divisor that makes at least four of them, if there is one."""
    most = max(1, min(rows_per_step // 4, LARGEST_GROUP))
    return max(n for n in range(1, most + 1) if rows_per_step % n == 0)
