"""A writer may reply late: its row waits, its neighbours go on, and what is drawn is the same."""

# ruff: noqa: F811 - a fixture is imported and then named as an argument

import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from conftest import ALL_FAMILIES  # noqa: E402
from late import Late  # noqa: E402
from stories import (  # noqa: E402
    FORCER,
    STARTS,
    Dictation,
    Forward,
    ask,
    encode,
    one_row,
    prompts,
    run,
    same,
    story_prompt,
    storyteller,  # noqa: F401  (a fixture)
    told,
    watched,
)

from dpost_lite.sampling.cache import KVCache  # noqa: E402
from dpost_lite.sampling.engine import Engine  # noqa: E402
from dpost_lite.sampling.request import Completion, Request  # noqa: E402


def greedy(max_new_tokens: int = 30) -> list[Request]:
    return [ask(story_prompt(s, i), key=s, max_new_tokens=max_new_tokens) for i, s in enumerate(STARTS)]


def sampled(num_samples: int = 4) -> list[Request]:
    return [
        ask(story_prompt(start, i), key=start, num_samples=num_samples, temperature=1.0, seed=i, max_new_tokens=20 + i)
        for i, start in enumerate(STARTS)
    ]


def by_key(samples: list[Completion]) -> dict[Any, Completion]:
    found = {(sample.key, sample.index): sample for sample in samples}
    assert len(found) == len(samples)
    return found


def served(engine: Engine, *batches: list[Request], steps_between: int = 7) -> list[Completion]:
    """The samples of requests that come in batches, with some steps in between."""
    ended: list[Completion] = []
    with engine.serving():
        for batch in batches:
            for request in batch:
                engine.add_request(request)
            for _ in range(steps_between):
                ended += engine.step()
        while engine.has_unfinished():
            ended += engine.step()
    return ended


# --- the samples are the same ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 16])
@pytest.mark.parametrize("delay", [1, 10, None])
def test_replies_after_some_steps_equal_the_one_row_reference(storyteller, num_rows, static, delay):
    late = Late(FORCER, delay)
    engine = Engine(storyteller, writer=late, max_rows=num_rows, static=static)
    same(by_key(list(engine.run(greedy()))), told(storyteller, greedy()))
    assert late.num_pending >= 8


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_replies_after_ten_steps_in_every_architecture(model_of, family):
    model = model_of(family)
    asked = [ask(p, key=i, max_new_tokens=18, num_samples=2) for i, p in enumerate(prompts(7))]
    found = run(model, asked, 5, Late(Dictation()))
    same(found, {(r.key, i): one_row(model, r, Dictation()) for r in asked for i in range(2)})
    assert sum(sum(sample.forced) for sample in found.values()) > 10


@pytest.mark.parametrize("segment_rows", [2, 64])
@pytest.mark.parametrize("num_rows", [2, 7, 44])
def test_sampled_answers_too(storyteller, monkeypatch, num_rows, segment_rows):
    expected = run(storyteller, sampled(), 16, FORCER)
    monkeypatch.setattr("dpost_lite.sampling.model_runner.SEGMENT_ROWS", segment_rows)
    same(run(storyteller, sampled(), num_rows, Late(FORCER, None)), expected)


@pytest.mark.parametrize("written", range(4))
def test_a_prefix_may_end_while_a_reply_is_pending(storyteller, written):
    """The prefix is shown to the writer in full before the first token enters."""
    owed = encode("24>>24")
    prefix = (*encode(" has <<48/2="), *owed[:written])
    request = ask(story_prompt("sum", 1), key=0, prefix_ids=prefix, max_new_tokens=12, num_samples=3)
    expected = run(storyteller, [request], 2, FORCER)
    assert expected[0, 0].token_ids[: 3 - written] == owed[written:]
    same(run(storyteller, [request, *greedy()], 2, Late(FORCER)), {**expected, **run(storyteller, greedy(), 2, FORCER)})


# --- and nobody waits for a row that waits ---------------------------------------------------------------------------


def test_a_row_that_waits_does_not_hold_up_its_neighbour(storyteller):
    """The neighbour takes as many steps as alone; the waiting row takes part in none of them."""
    slow = ask(story_prompt("first", 0), key="slow", max_new_tokens=12)  # its first token asks the calculator
    quick = ask(story_prompt("plain", 1), key="quick", max_new_tokens=12)
    alone = Engine(storyteller, writer=FORCER, max_rows=2)
    list(alone.run([quick]))
    forwards: list[Forward] = []
    engine = Engine(storyteller, writer=Late(FORCER, 10), max_rows=2)
    with watched(storyteller, forwards.append):
        steps = {sample.key: engine.statistics.num_steps for sample in engine.run([slow, quick])}
    assert steps["quick"] == alone.statistics.num_steps
    assert [forward.num_rows for forward in forwards if not forward.is_prefill][: steps["quick"]] == [1] * steps[
        "quick"
    ]
    assert steps["slow"] > steps["quick"]


def test_the_model_rests_when_all_rows_wait(storyteller):
    """No forward is spent on a row that waits: as many as with a writer that replies at once."""
    forwards: list[list[Forward]] = []
    for writer in (FORCER, Late(FORCER, 10)):
        forwards.append([])
        with watched(storyteller, forwards[-1].append):
            run(storyteller, greedy()[1:2], 1, writer)
    assert len(forwards[0]) == len(forwards[1])


def test_other_samples_use_the_rows_that_are_free(storyteller):
    """Of two rows one waits for long; all other samples go through the other row."""
    slow = ask(story_prompt("first", 0), key="slow", max_new_tokens=12)
    others = [ask(story_prompt("plain", i), key=i, max_new_tokens=12) for i in range(6)]
    ended = list(Engine(storyteller, writer=Late(FORCER, 100), max_rows=2).run([slow, *others]))
    assert ended[-1].key == "slow"
    assert {sample.key for sample in ended[:-1]} == set(range(6))


# --- memory, and requests that come later ----------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
def test_out_of_memory_while_rows_wait(storyteller, static):
    """Their samples are drawn again by new writers; what they were waiting for is dropped."""
    expected = run(storyteller, sampled(), 16, FORCER)
    engine = Engine(storyteller, writer=Late(FORCER), max_rows=16, static=static)
    num_waiting: list[int] = []

    def scarce(forward: Forward) -> None:
        parked = len(engine._scheduler.parked)
        if not forward.is_prefill and parked >= 2 and engine.statistics.num_rows > 4:
            num_waiting.append(parked)
            raise torch.OutOfMemoryError("CUDA out of memory")

    with watched(storyteller, scarce):
        same(by_key(list(engine.run(sampled()))), expected)
    assert len(num_waiting) == engine.statistics.num_shrunk >= 1


def test_requests_may_come_while_others_run(storyteller):
    expected = run(storyteller, sampled(), 16, FORCER)
    few, many, more = sampled()[:1], sampled()[1:6], sampled()[6:]
    engine = Engine(storyteller, writer=Late(FORCER), max_rows=9)
    same(by_key(served(engine, few, many, more)), expected)


@pytest.mark.parametrize("writer", [FORCER, Late(FORCER)])
def test_a_longer_request_gets_a_larger_cache(storyteller, writer):
    short = [ask(story_prompt("sum", 1), key="short", num_samples=3, max_new_tokens=14)]
    long = [ask((5,) * 40 + story_prompt("sum", 1), key="long", num_samples=3, max_new_tokens=30)]
    engine = Engine(storyteller, writer=writer, max_rows=4)
    same(by_key(served(engine, short, long, short_again := [ask(short[0].prompt_ids, key="again", max_new_tokens=14)])),
         run(storyteller, short + long + short_again, 4, FORCER))  # fmt: skip
    assert engine.statistics.num_caches == 2


def test_more_requests_get_more_rows(storyteller):
    """A cache made for one sample is not kept for a hundred."""
    first, later = [ask(story_prompt("sum", 1), key="early", max_new_tokens=20)], sampled()
    engine = Engine(storyteller, writer=FORCER, max_rows=16)
    same(by_key(served(engine, first, later)), run(storyteller, first + later, 16, FORCER))
    assert engine.statistics.num_rows == 16
    assert engine.statistics.num_caches == 2


def test_more_requests_get_room_for_their_prompts(storyteller):
    """A cache made for eight samples of one prompt has rows enough for eight prompts, but holds one or two of them."""
    first = [ask((5,) * 20 + story_prompt("sum", 1), key="first", num_samples=8, max_new_tokens=20)]
    later = [ask(story_prompt("plain", i), key=i, max_new_tokens=20) for i in range(40)]
    engine = Engine(storyteller, writer=FORCER, max_rows=8)
    same(by_key(served(engine, first, later)), run(storyteller, first + later, 8, FORCER))
    assert engine.statistics.cache_size is not None
    assert engine.statistics.cache_size.num_prompts >= 8


@pytest.mark.parametrize("why", ["out of memory", "a longer request"])
def test_the_old_cache_is_freed_before_a_new_one_is_made(storyteller, monkeypatch, why):
    """Two at once would not fit where one did not."""
    caches: list[Any] = []
    num_steps = 0

    class Watched(KVCache):
        def __init__(self, *args: Any, **settings: Any) -> None:
            assert not [cache for cache in caches if cache() is not None]
            super().__init__(*args, **settings)
            caches.append(weakref.ref(self))

    def scarce(forward: Forward) -> None:
        nonlocal num_steps
        num_steps += 1
        if why == "out of memory" and num_steps == 12:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dpost_lite.sampling.model_runner.KVCache", Watched)
    long = [ask((5,) * 40 + story_prompt("sum", 1), key="long", num_samples=3, max_new_tokens=40)]
    engine = Engine(storyteller, writer=FORCER, max_rows=8)
    with watched(storyteller, scarce):
        served(engine, sampled(), long)
    assert len(caches) > 1
    assert not [cache for cache in caches if cache() is not None]  # nor is the last one kept


# --- one thing at a time ---------------------------------------------------------------------------------------------


def test_steps_and_requests_need_a_serving_engine(storyteller):
    engine = Engine(storyteller, writer=None, max_rows=2)
    for call in (engine.step, lambda: engine.add_request(greedy()[0])):
        with pytest.raises(RuntimeError, match="serving"):
            call()


def test_an_engine_does_one_thing_at_a_time(storyteller):
    engine = Engine(storyteller, writer=FORCER, max_rows=2)
    first = engine.run(greedy())
    ended = [next(first)]
    with pytest.raises(RuntimeError, match="already"):
        next(engine.run(greedy()))
    with pytest.raises(RuntimeError, match="already"), engine.serving():
        pass
    same(by_key([*ended, *first]), told(storyteller, greedy()))  # which was not disturbed


def test_what_is_left_of_a_serving_engine_is_forgotten(storyteller):
    engine = Engine(storyteller, writer=Late(FORCER), max_rows=2)
    with engine.serving():
        for request in sampled():
            engine.add_request(request)
        for _ in range(5):
            engine.step()
    assert not engine.has_unfinished()
    same(by_key(list(engine.run(greedy()))), told(storyteller, greedy()))
