"""A stand-in for a writer that replies late."""

import random
from typing import Any

from dpost_lite.problems.forcing import PENDING, Pending, Writer


class Late:
    """Another writer's insertions, after `delay` polls; None draws a delay of 0 to 5 polls for every token."""

    def __init__(self, inner: Writer, delay: int | None = 10) -> None:
        self._inner = inner
        self._delay = delay
        self._dice = random.Random(0)
        self.num_pending = 0  # replies that were not there at once

    def row(self) -> "LateRow":
        return LateRow(self._inner.row(), self)

    def delay(self, reply: list[int] | Pending | None) -> int:
        polls = self._dice.randrange(6) if self._delay is None else self._delay if reply else 0
        self.num_pending += polls > 0
        return polls


class LateRow:
    def __init__(self, inner: Any, late: Late) -> None:
        self._inner = inner
        self._late = late
        self._polls_left = 0
        self._reply: list[int] | Pending | None = None

    @property
    def num_calculated(self) -> int:
        assert not self._polls_left, "counts are read when no reply is pending"
        return self._inner.num_calculated

    @property
    def num_refused(self) -> int:
        assert not self._polls_left
        return self._inner.num_refused

    def push(self, token_id: int) -> list[int] | Pending | None:
        assert not self._polls_left, "the row must wait"
        self._reply = self._inner.push(token_id)
        self._polls_left = self._late.delay(self._reply)
        return PENDING if self._polls_left else self._reply

    def poll(self) -> list[int] | Pending | None:
        assert self._polls_left, "only a pending reply is asked for"
        self._polls_left -= 1
        return PENDING if self._polls_left else self._reply
