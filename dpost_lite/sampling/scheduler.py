"""Which samples run, and in which slots of the cache: queue, admit, park, resume, retire, compact. Without torch.

Running rows are kept in slots 0, 1, 2, …, so that a step reads a slice of the cache. A row whose writer has a reply
pending is parked in the last slots: it keeps its keys and values and takes no part in the steps. Free slots lie
between. Moving rows means copying their cache, which is done by a `RowStore`.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from dpost_lite.problems.answer_tokens import AnswerTokens
from dpost_lite.problems.forcing import Writer
from dpost_lite.sampling.request import MAX_PREFILL_TOKENS, CacheSize, Completion, Request


class RowStore(Protocol):
    """What the scheduler needs of a cache."""

    size: CacheSize

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` over row `target`."""

    def swap_rows(self, first: int, second: int, length: int) -> None:
        """Exchange the first `length` positions of two rows."""

    def move_prompt(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of prompt `source` over prompt `target`."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A request and the indices of its samples that have not been started."""

    request: Request
    indices: list[int]


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt in the cache, in `slot`. Its samples in `todo` wait for a row; those in `unfinished` have not ended.

    `logits` are those of the first answer token, `(vocabulary,)`, or None if each row computes its own; `num_running`
    counts the running rows.
    """

    request: Request
    todo: list[int]
    unfinished: set[int]
    slot: int
    logits: Any
    num_running: int = 0

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return len(self.request.read_ids)


@dataclass(slots=True, eq=False)
class Row:
    """One running sample: `length` of its tokens are cached; the `unread` ones are not yet, new or a row's start."""

    prompt: Prompt
    index: int
    answer: AnswerTokens
    step_ids: frozenset[int]
    slot: int
    length: int = 0
    unread: list[int] = field(default_factory=list)
    num_steps: int = 0  # finished steps of the rationale

    @property
    def temperature(self) -> float:
        """Of the next token, by the step of the rationale that it belongs to."""
        schedule = self.prompt.request.temperature
        return schedule[min(self.num_steps, len(schedule) - 1)] if isinstance(schedule, tuple) else schedule

    def append_token(self, token_id: int, logprob: float) -> None:
        """Append the model's choice and what the writer makes of it, or leave the row waiting for the writer."""
        self._append(self.answer.append_token(token_id, logprob))

    def poll(self) -> bool:
        """Ask a pending writer again; return whether it has replied."""
        self._append(self.answer.poll())
        return not self.answer.is_waiting

    def completion(self) -> Completion:
        """Return the finished answer."""
        answer = self.answer
        return Completion(
            self.prompt.request.key, self.index, answer.token_ids, answer.forced, answer.logprobs, answer.end,
            answer.num_calculated, answer.num_refused,
        )  # fmt: skip

    def _append(self, new: list[int] | None) -> None:
        if new is not None:
            self.unread = new
            self.num_steps += new[0] in self.step_ids and not self.answer.forced[-len(new)]


class Scheduler:
    """Holds the queue, the prompts in the cache, and the running and parked rows.

    Call `open` with a new cache before rows are started; no row may be running then. A row that becomes free is
    refilled when `min_free` are; rows are compacted in segments of `segment_rows`.
    """

    def __init__(self, writer: Writer | None, step_ids: frozenset[int]) -> None:
        self._writer = writer
        self._step_ids = step_ids
        self.wants_larger_cache = False  # stop starting prompts, so that it can be made
        self.clear()

    def clear(self) -> None:
        """Forget all requests, rows and completions."""
        self.queue: deque[Queued] = deque()
        self._completions: list[Completion] = []
        self.close()

    def close(self) -> None:
        """Forget the cache and what is in it."""
        self.prompts: list[Prompt] = []  # by slot
        self.running: list[Row] = []  # by slot, from 0
        self.parked: list[Row] = []  # by slot, from the last one down
        self._cache: RowStore | None = None  # no other reference to it is kept, so that its memory can be freed

    def add(self, request: Request) -> None:
        """Queue a request."""
        if request.indices:
            self.queue.append(Queued(request, request.indices))

    def open(self, cache: RowStore, *, min_free: int, segment_rows: int) -> None:
        """Start with an empty cache."""
        assert not self.prompts
        self._cache, self._min_free, self._segment_rows = cache, min_free, segment_rows
        self.wants_larger_cache = False

    def requeue(self) -> None:
        """Close the cache, and put its unfinished samples back at the front of the queue."""
        for prompt in reversed(self.prompts):
            if prompt.unfinished:
                self.queue.appendleft(Queued(prompt.request, sorted(prompt.unfinished)))
        self.close()

    def take_completions(self) -> list[Completion]:
        """Return the samples that ended since the last call."""
        completions, self._completions = self._completions, []
        return completions

    @property
    def has_unfinished(self) -> bool:
        """Whether a sample is queued or running, or has ended and was not taken."""
        return bool(self.queue or self.prompts or self._completions)

    @property
    def needs_cache(self) -> bool:
        """Whether requests are queued, nothing is in the cache, and a new one must be allocated."""
        return bool(self.queue) and not self.prompts and not self._may_start(self.queue[0].request)

    def _may_start(self, request: Request) -> bool:
        return self._cache is not None and not self.wants_larger_cache and self._cache.size.fits(request)

    @property
    def num_free(self) -> int:
        """Free rows."""
        return self._cache.size.num_rows - len(self.running) - len(self.parked) if self._cache else 0

    @property
    def should_admit(self) -> bool:
        """Whether enough rows are free to be worth the extra choice, and mostly a forward, that admitting takes."""
        return not self.running or self.num_free >= self._min_free

    def next_requests(self) -> list[Queued]:
        """Return the requests whose prompts to compute together next: those that the free rows can use.

        Empty while prompts in the cache have samples to start. They stay queued until `add_prompts`.
        """
        batch: list[Queued] = []
        room, num_tokens = self.num_free, 0
        if self._cache is None or any(prompt.todo for prompt in self.prompts):
            return batch
        for queued in islice(self.queue, self._cache.size.num_prompts - len(self.prompts)):
            num_tokens += len(queued.request.read_ids)
            is_full = room <= 0 or (batch and num_tokens > MAX_PREFILL_TOKENS)
            if is_full or not self._may_start(queued.request):
                break
            batch.append(queued)
            room -= len(queued.indices)
        return batch

    def add_prompts(self, logits: Iterable[Any]) -> None:
        """Take the first requests off the queue, whose prompts are now in the cache, with the logits of each."""
        for slot, of_prompt in enumerate(logits, start=len(self.prompts)):
            queued = self.queue.popleft()
            self.prompts.append(Prompt(queued.request, queued.indices, set(queued.indices), slot, of_prompt))

    def start_rows(self) -> list[Row]:
        """Give free rows to samples whose prompt is in the cache; return the new rows."""
        room, first = self.num_free, len(self.running)
        for prompt in self.prompts:
            started, prompt.todo = prompt.todo[:room], prompt.todo[room:]
            room -= len(started)
            prompt.num_running += len(started)
            self.running += [self._start(prompt, index, slot) for slot, index in enumerate(started, len(self.running))]
        return self.running[first:]

    def _start(self, prompt: Prompt, index: int, slot: int) -> Row:
        request = prompt.request
        writer = self._writer.row() if self._writer else None
        answer = AnswerTokens(writer, request.stop_ids.__contains__, request.max_new_tokens)
        answer.read_prefix(request.prefix_ids)
        return Row(prompt, index, answer, self._step_ids, slot, unread=list(request.row_ids))

    def poll(self) -> list[Row]:
        """Ask the writers of parked rows again; the rows whose writer has replied run again and are returned."""
        replied = [row for row in self.parked if row.poll()]
        for row in replied:
            self._resume(row)
        return replied

    def settle(self, rows: list[Row]) -> None:
        """Retire the finished ones of these running rows, and park those whose writer has a reply pending."""
        waiting = [row for row in rows if row.answer.is_waiting]
        finished = [row for row in rows if row.answer.is_finished and not row.answer.is_waiting]
        for row in finished:  # first of all: moving rows may run out of memory
            row.length = 0  # its cache is not needed
            row.prompt.unfinished.discard(row.index)
            self._completions.append(row.completion())
        for row in reversed(finished):
            self._close_gap(row.slot)
            row.prompt.num_running -= 1
        for prompt in dict.fromkeys(row.prompt for row in reversed(finished)):
            if not prompt.unfinished:
                self._drop_prompt(prompt)
        for row in waiting:
            self._park(row)

    def _park(self, row: Row) -> None:
        """Move a row to the last slot that no parked row has."""
        target = self._open_cache.size.num_rows - len(self.parked) - 1
        if target < len(self.running):  # no row is free: the last running one has that slot
            last = self.running[target]
            self._swap(row, last)
            self.running[last.slot] = last
            self.running.pop()
        else:
            gap = row.slot
            self._move(row, target)
            self._close_gap(gap)
        self.parked.append(row)
        row.prompt.num_running -= 1

    def _resume(self, row: Row) -> None:
        """Move a parked row behind the running ones."""
        lowest = self.parked[-1]
        place = self._open_cache.size.num_rows - 1 - row.slot
        self._swap(row, lowest)
        self.parked[place] = lowest
        self.parked.pop()
        if row.slot != len(self.running):
            self._move(row, len(self.running))
        self.running.append(row)
        row.prompt.num_running += 1

    @property
    def _open_cache(self) -> RowStore:
        assert self._cache is not None
        return self._cache

    def _move(self, row: Row, slot: int) -> None:
        self._open_cache.move_row(row.slot, slot, row.length)
        row.slot = slot

    def _swap(self, first: Row, second: Row) -> None:
        if first is not second:
            self._open_cache.swap_rows(first.slot, second.slot, max(first.length, second.length))
            first.slot, second.slot = second.slot, first.slot

    def _close_gap(self, slot: int) -> None:
        """Fill a free slot so that running rows stay in front, and long ones before short ones, segment by segment.

        The longest row of the next segment takes the slot, the longest of the one after that takes its slot, and so on.
        """
        rows, size = self.running, self._segment_rows
        while slot < len(rows) - 1:
            following = rows[(slot // size + 1) * size :][:size]
            row = max(following, key=lambda row: row.length) if following else rows[-1]
            gap = row.slot
            self._move(row, slot)
            rows[slot], slot = row, gap
        rows.pop()

    def _drop_prompt(self, prompt: Prompt) -> None:
        last = self.prompts[-1]
        if last is not prompt:
            self._open_cache.move_prompt(last.slot, prompt.slot, last.length)
            last.slot = prompt.slot
            self.prompts[last.slot] = last
        self.prompts.pop()
