"""The order in which training sees its rows."""

import random
from collections.abc import Iterator, Sequence


class ByLength:
    """A sampler for a DataLoader: row numbers in a random order, those of one optimiser step sorted by length.

    Micro-batches are padded to their longest row. In a random order up to half of DPO's tokens would be padding; sorted
    within a step, rows of similar length come together. The step's gradient is a mean over the same rows, so it is the
    same.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, *, seed: int) -> None:
        self._lengths = lengths
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self)))
        random.Random(f"{self._seed} {self._epoch}").shuffle(order)
        for start in range(0, len(order), self._rows_per_step):
            step = order[start : start + self._rows_per_step]
            yield from sorted(step, key=self._lengths.__getitem__, reverse=True)

    def set_epoch(self, epoch: int) -> None:
        """Take another order for another pass."""
        self._epoch = epoch
