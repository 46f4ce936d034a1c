"""The tokens of one answer while it is written: those the model chose and those a `RowWriter` inserted.

The batched sampler and the solver share this class. It applies the limit and the stop tokens, marks forced tokens, and
holds the answer back while the writer's reply is pending: the reply comes from `poll`, and the tokens are then the same
as if it had come at once.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dpost_lite.problems.forcing import PENDING, Pending, RowWriter

POLL_SECONDS = 0.002  # between two calls of `poll` when there is nothing else to do


def written(writer: RowWriter, token_ids: Sequence[int]) -> list[bool]:
    """Return for each token of a finished answer whether `writer`, which is new, inserts it.

    Where the answer differs from what the writer would insert, the rest is the model's own. A token that the writer
    would replace, as with a merge across the `=`, counts as the model's.
    """
    return [mark for mark in _followed(writer, token_ids, []) if not isinstance(mark, Pending)]


def _followed(writer: RowWriter, token_ids: Sequence[int], rest: list[int]) -> Iterator[bool | Pending]:
    """Show a new writer the tokens of an answer; yield for each whether the writer inserts it, and PENDING to wait.

    At the end, `rest` holds what of an insertion is still to come.
    """
    for token_id in token_ids:
        is_inserted = rest[:1] == [token_id]
        if is_inserted:
            rest.pop(0)
        else:
            reply = writer.push(token_id)
            while reply is PENDING:
                yield PENDING
                reply = writer.poll()
            rest[:] = reply[1:] if reply and reply[0] == token_id else []
        yield is_inserted


@dataclass(slots=True, eq=False)
class AnswerTokens:
    """One answer of at most `max_new_tokens` tokens.

    `forced[i]` is True where the writer wrote token i; `logprobs[i]` is the log-probability given for a chosen token,
    and 0.0 for a forced one. `num_chosen` counts the model's choices, including those that the writer replaced.
    """

    writer: RowWriter | None
    is_stop: Callable[[int], bool]
    max_new_tokens: int
    token_ids: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    end: Literal["stop", "limit"] = "limit"
    num_chosen: int = 0
    is_waiting: bool = False  # a token was chosen, and the writer has not replied yet
    _chosen: tuple[int, float] = (0, 0.0)  # the newest choice and its log-probability
    _replay: Iterator[Pending] | None = None  # of a prefix with a reply pending
    _forced_from_prefix: list[int] = field(default_factory=list)  # the rest of an insertion that the prefix cuts
    _prefix_counts: tuple[int, int] = (0, 0)  # annotations that belong to the prefix: calculated, refused

    def read_prefix(self, prefix_ids: Sequence[int]) -> None:
        """Show the writer the start of the answer, before the first token is appended.

        The prefix and its annotations are not part of this answer. If it ends inside the writer's tokens, the rest of
        them comes first, whatever the model chooses.
        """
        if self.writer and prefix_ids:
            self._replay = self._replayed(self.writer, prefix_ids)
            self._continue_replay()

    def append_token(self, token_id: int, logprob: float = 0.0) -> list[int] | None:
        """Append the model's choice and what the writer makes of it.

        Returns the new tokens (at least one, no more than the limit allows), which the model reads next; None if the
        writer's reply is pending, and nothing was appended.
        """
        self.num_chosen += 1
        self._chosen = token_id, logprob
        if self._replay is None:
            return self._push()
        self.is_waiting = True
        return None

    def poll(self) -> list[int] | None:
        """Return the tokens that `append_token` could not return, or None if the reply is still pending."""
        assert self.is_waiting
        assert self.writer is not None
        if self._replay is None:
            return self._append(self.writer.poll())
        self._continue_replay()
        return self._push() if self._replay is None else None

    def wait(self) -> list[int]:
        """Block until the reply is there, and return the new tokens."""
        while (new := self.poll()) is None:
            time.sleep(POLL_SECONDS)
        return new

    @property
    def is_finished(self) -> bool:
        """Whether a stop token was kept or the limit is reached."""
        return self.end == "stop" or len(self.token_ids) >= self.max_new_tokens

    @property
    def num_calculated(self) -> int:
        """Annotations of this answer that the writer completed."""
        return self.writer.num_calculated - self._prefix_counts[0] if self.writer else 0

    @property
    def num_refused(self) -> int:
        """Annotations of this answer that the writer left to the model."""
        return self.writer.num_refused - self._prefix_counts[1] if self.writer else 0

    def _push(self) -> list[int] | None:
        if self._forced_from_prefix:
            forced, self._forced_from_prefix = self._forced_from_prefix, []
            return self._append(forced, is_kept=False)
        return self._append(self.writer.push(self._chosen[0]) if self.writer else None)

    def _append(self, reply: list[int] | Pending | None, *, is_kept: bool | None = None) -> list[int] | None:
        self.is_waiting = reply is PENDING
        if reply is PENDING:
            return None
        token_id, logprob = self._chosen
        new = ([token_id] if reply is None else reply)[: self.max_new_tokens - len(self.token_ids)]
        if is_kept is None:
            is_kept = new[0] == token_id
        self.token_ids += new
        self.forced += [not is_kept] + [True] * (len(new) - 1)
        self.logprobs += [logprob if is_kept else 0.0] + [0.0] * (len(new) - 1)
        if is_kept and self.is_stop(token_id):
            self.end = "stop"
        return new

    def _continue_replay(self) -> None:
        if self._replay is not None and next(self._replay, None) is None:  # all of the prefix was pushed
            self._replay = None

    def _replayed(self, writer: RowWriter, prefix_ids: Sequence[int]) -> Iterator[Pending]:
        """Push the prefix; yield PENDING whenever a reply is."""
        rest: list[int] = []
        yield from (mark for mark in _followed(writer, prefix_ids, rest) if isinstance(mark, Pending))
        self._forced_from_prefix = rest
        self._prefix_counts = writer.num_calculated - bool(rest), writer.num_refused
