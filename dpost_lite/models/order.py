"""The order in which training sees its rows."""

import random
from collections.abc import Iterator, Sequence


class ByLength:
    """A sampler for a DataLoader: row numbers in a random order, those of one optimiser step sorted by length.

    Micro-batches are padded to their longest row. In a random order up to half of DPO's tokens would be padding; sorted
    within a step, rows of similar length come together. A step's gradient is the mean of its micro-batches' means. It
    stays the same: rows that do not fill a micro-batch, at the end of a pass, weigh more, and are those that they would
    be without sorting. (trl's losses sft, aot and aot_unpaired are no means over rows: for them, it matters which rows
    share a micro-batch.)
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
        order = list(range(len(self)))
        random.Random(f"{self._seed} {self._epoch}").shuffle(order)
        for start in range(0, len(order), self._rows_per_step):
            step = order[start : start + self._rows_per_step]
            num_sorted = len(step) - len(step) % self._micro_batch_size
            yield from sorted(step[:num_sorted], key=self._lengths.__getitem__, reverse=True)
            yield from step[num_sorted:]

    def set_epoch(self, epoch: int) -> None:
        """Take another order for another pass."""
        self._epoch = epoch
