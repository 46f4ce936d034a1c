"""Which rows run, wait and end, without a model: a list of tokens per slot stands in for the cache."""

import contextlib
import random
from typing import Any

import pytest
from late import Late

from dpost_lite.sampling.request import CacheSize, Completion, Request
from dpost_lite.sampling.scheduler import Row, Scheduler

STOP, INSERTED = 0, 99
SIZE = CacheSize(num_prompts=4, prompt_length=8, num_rows=6, row_length=16, num_logit_copies=4)


class Inserts:
    """A writer that puts two tokens behind every 3."""

    num_calculated = num_refused = 0

    def row(self) -> "Inserts":
        return Inserts()

    def poll(self) -> None:
        raise AssertionError

    def push(self, token_id: int) -> list[int] | None:
        return [token_id, INSERTED, INSERTED] if token_id == 3 else None


class Slots:
    """A `RowStore` of plain lists."""

    def __init__(self, size: CacheSize = SIZE) -> None:
        self.size = size
        self.rows: list[list[int]] = [[] for _ in range(size.num_rows)]
        self.prompts: list[tuple[int, ...]] = [() for _ in range(size.num_prompts)]

    def move_row(self, source: int, target: int, length: int) -> None:
        self.rows[target] = self.rows[source][:length]
        self.rows[source] = []  # what moved away is never read again

    def swap_rows(self, first: int, second: int, length: int) -> None:
        self.rows[first], self.rows[second] = self.rows[second][:length], self.rows[first][:length]

    def move_prompt(self, source: int, target: int, length: int) -> None:
        self.prompts[target], self.prompts[source] = self.prompts[source][:length], ()


def ask(key: Any, num_samples: int, prompt_ids: tuple[int, ...] = (7, 8), **settings: Any) -> Request:
    settings.setdefault("max_new_tokens", 14)
    return Request(key=key, prompt_ids=prompt_ids, stop_ids=frozenset({STOP}), num_samples=num_samples, **settings)


def choice(row: Row) -> int:
    """The stand-in for the model: a token that depends on the sample and its position alone."""
    request, answer = row.prompt.request, row.answer
    return random.Random(f"{request.key} {row.index} {answer.num_chosen}").choice([STOP, 1, 2, 2, 3, 4])


def check(scheduler: Scheduler, slots: Slots) -> None:
    """Slots are what they should be, and hold what their rows have written."""
    running, parked = scheduler.running, scheduler.parked
    assert [row.slot for row in running] == list(range(len(running)))
    assert [row.slot for row in parked] == [slots.size.num_rows - 1 - i for i in range(len(parked))]
    assert len(running) + len(parked) <= slots.size.num_rows
    assert [prompt.slot for prompt in scheduler.prompts] == list(range(len(scheduler.prompts)))
    for prompt in scheduler.prompts:
        assert slots.prompts[prompt.slot] == prompt.request.read_ids
        assert prompt.num_running == sum(row.prompt is prompt for row in running)
        assert prompt.unfinished == {*prompt.todo} | {r.index for r in running + parked if r.prompt is prompt}
    for row in running + parked:
        assert slots.rows[row.slot] == row.answer.token_ids[: row.length]
    assert not any(row.answer.is_waiting or row.answer.is_finished for row in running)


def choose(scheduler: Scheduler, rows: list[Row]) -> None:
    for row in rows:
        row.append_token(choice(row), 0.0)
    scheduler.settle(rows)


def step(scheduler: Scheduler, slots: Slots) -> list[Completion]:
    """What the engine does in a step."""
    scheduler.settle(scheduler.poll())
    check(scheduler, slots)
    if scheduler.should_admit:
        while True:
            for slot, queued in enumerate(batch := scheduler.next_requests(), start=len(scheduler.prompts)):
                slots.prompts[slot] = queued.request.read_ids
            scheduler.add_prompts([None] * len(batch))
            if not (rows := scheduler.start_rows()):
                break
            for row in rows:
                slots.rows[row.slot] = []
            choose(scheduler, rows)
            check(scheduler, slots)
    if running := list(scheduler.running):
        for row in running:
            slots.rows[row.slot] = slots.rows[row.slot] + row.unread
            row.length += len(row.unread)
        choose(scheduler, running)
        check(scheduler, slots)
    return scheduler.take_completions()


def finish(scheduler: Scheduler, slots: Slots, num_steps: int = 10_000) -> list[Completion]:
    ended: list[Completion] = []
    for _ in range(num_steps):
        if not scheduler.has_unfinished:
            break
        ended += step(scheduler, slots)
    return ended


def opened(writer: Any, segment_rows: int = 64, min_free: int = 1) -> tuple[Scheduler, Slots]:
    scheduler, slots = Scheduler(writer, frozenset()), Slots()
    scheduler.open(slots, min_free=min_free, segment_rows=segment_rows)
    return scheduler, slots


def by_key(ended: list[Completion]) -> dict[Any, Any]:
    found = {(done.key, done.index): (done.token_ids, done.forced, done.end) for done in ended}
    assert len(found) == len(ended)
    return found


REQUESTS = [ask(key, 1 + key % 5, (7,) * (1 + key % 8)) for key in range(30)]


def undisturbed() -> dict[Any, Any]:
    scheduler, slots = opened(Inserts())
    for request in REQUESTS:
        scheduler.add(request)
    return by_key(finish(scheduler, slots))


@pytest.mark.parametrize("segment_rows", [1, 2, 64])
@pytest.mark.parametrize("min_free", [1, 3])
@pytest.mark.parametrize("delay", [0, 1, 10, None])
def test_rows_keep_their_cache_wherever_they_are_moved(segment_rows, min_free, delay):
    expected = undisturbed()
    late = Late(Inserts(), delay)
    scheduler, slots = opened(late, segment_rows, min_free)
    for request in REQUESTS:
        scheduler.add(request)
    assert by_key(finish(scheduler, slots)) == expected
    assert set(expected) == {(request.key, i) for request in REQUESTS for i in range(request.num_samples)}
    assert not scheduler.has_unfinished
    assert bool(late.num_pending) == (delay != 0)


@pytest.mark.parametrize("after", [0, 1, 5, 20, 60])
def test_requeued_samples_are_drawn_again_and_finished_ones_are_not(after):
    """Also those of rows that wait."""
    scheduler, slots = opened(Late(Inserts(), 5))
    for request in REQUESTS:
        scheduler.add(request)
    ended = finish(scheduler, slots, num_steps=after)
    scheduler.requeue()
    assert scheduler.needs_cache
    smaller = Slots(CacheSize(2, 8, 3, 16, 4))
    scheduler.open(smaller, min_free=1, segment_rows=2)
    ended += finish(scheduler, smaller)
    assert by_key(ended) == undisturbed()


@pytest.mark.parametrize("operation", ["move_row", "swap_rows", "move_prompt"])
@pytest.mark.parametrize("call", [1, 2, 3, 5, 8, 11])
def test_a_move_that_fails_loses_and_repeats_nothing(operation, call):
    """On a GPU a copy may need memory that is not there. What has ended by then was taken note of."""
    scheduler, slots = opened(Late(Inserts(), None), segment_rows=2)
    moves = 0

    def failing(*args: int) -> None:
        nonlocal moves
        moves += 1
        if moves == call:
            raise MemoryError
        getattr(Slots, operation)(slots, *args)

    setattr(slots, operation, failing)
    for request in REQUESTS:
        scheduler.add(request)
    ended = []
    with contextlib.suppress(MemoryError):
        while scheduler.has_unfinished:
            ended += step(scheduler, slots)
    assert moves == call
    scheduler.requeue()
    again = Slots()
    scheduler.open(again, min_free=1, segment_rows=2)
    ended += finish(scheduler, again)
    assert by_key(ended) == undisturbed()


def test_a_request_that_is_too_long_waits_for_another_cache():
    scheduler, slots = opened(None)
    for request in (ask("a", 2), ask("long", 1, (7,) * 9), ask("b", 2)):
        scheduler.add(request)
    ended = [done.key for _ in range(40) for done in step(scheduler, slots)]
    assert ended == ["a", "a"]
    assert scheduler.needs_cache
    assert scheduler.has_unfinished


def test_samples_that_exist_are_not_queued():
    scheduler, _ = opened(None)
    scheduler.add(ask("done", 2, done=frozenset({0, 1})))
    assert not scheduler.has_unfinished
