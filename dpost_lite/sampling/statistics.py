"""Counters of one engine: where the time went, and how full the batch was."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dpost_lite.sampling.request import CacheSize


@dataclass(slots=True)
class Statistics:
    """Counters since the engine was made.

    `seconds` is split into prefill, plan, forward, choose and calculator. On a GPU these are as the host sees them: it
    waits in "choose", where tokens are copied. `num_row_steps` is the number of rows summed over decode steps, and
    `num_positions_read` the row positions that attention reads in one layer, summed likewise. `num_shapes` counts the
    padded shapes, each of which may become a CUDA graph, `num_replayed` the steps that were one. `num_rows`
    is what the memory allowed in the end, `num_caches` how many caches were allocated, `num_shrunk` how often memory
    ran out.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_steps: int = 0
    num_row_steps: int = 0
    num_positions_read: int = 0
    num_shapes: int = 0
    num_replayed: int = 0
    num_caches: int = 0
    num_shrunk: int = 0
    cache_size: CacheSize | None = None  # of the latest cache

    @property
    def num_rows(self) -> int:
        """Rows of the latest cache."""
        return self.cache_size.num_rows if self.cache_size else 0

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a `with` block to `part`."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started
