"""Segments, padded shapes, memory and schedules: none of them may change what is drawn."""

import pytest

torch = pytest.importorskip("torch")

from test_engine import (  # noqa: E402
    FORCER,
    ID,
    STARTS,
    ask,
    generated,
    prompts,
    run,
    same,
    story_prompt,
    storyteller,  # noqa: F401  (a fixture)
)

from dpost_lite.errors import OutOfMemory  # noqa: E402
from dpost_lite.sampling import engine as engine_module  # noqa: E402
from dpost_lite.sampling.engine import Engine  # noqa: E402
from dpost_lite.sampling.kvcache import KVCache, Prefill  # noqa: E402
from dpost_lite.sampling.layout import Prompt, Row, Shape  # noqa: E402
from dpost_lite.sampling.request import Sample  # noqa: E402


def stories(num_samples=3, max_new_tokens=24):
    return [
        ask(story_prompt(start, i), key=start, num_samples=num_samples, temperature=1.0, seed=i,
            max_new_tokens=max_new_tokens + i)
        for i, start in enumerate(STARTS)
    ]  # fmt: skip


def drawn(engine, requests):
    found = [(sample.key, sample.sample, sample) for sample in engine.run(requests)]
    by_key = {(key, i): sample for key, i, sample in found}
    assert len(by_key) == len(found) == sum(request.num_samples for request in requests)
    return by_key


def row_of(length, num_pending=1, slot=0):
    request = ask((5, 6, 7), max_new_tokens=99)
    return Row(Prompt(request, [], 0, torch.zeros(4)), Sample(None, 0), None, slot, length, [1] * num_pending)


def test_segments_cover_all_rows_and_reach_as_far_as_their_longest():
    rows = [row_of(n, slot=i) for i, n in enumerate([90, 80, 89, 30, 31, 2, 90])]
    shape = Shape.of(rows, [rows[0].prompt], 2)
    assert shape.segments == ((0, 4, 91), (4, 6, 32), (6, 7, 91))  # the first two are about as long: read as one


@pytest.mark.parametrize("segment_rows", [1, 2, 5])
def test_segments_change_nothing(storyteller, monkeypatch, segment_rows):  # noqa: F811
    expected = run(storyteller, stories(), 13, FORCER)
    monkeypatch.setattr("dpost_lite.sampling.engine.SEGMENT_ROWS", segment_rows)
    same(expected, run(storyteller, stories(), 13, FORCER))


def test_long_rows_stay_in_front_of_short_ones(storyteller, monkeypatch):  # noqa: F811
    """What segments are for: refilled rows do not read as far as old ones."""
    monkeypatch.setattr("dpost_lite.sampling.engine.SEGMENT_ROWS", 4)
    engine = Engine(storyteller, forcer=FORCER, max_rows=16)
    read, held = 0, 0
    inner = Shape.of

    def counted(rows, prompts, segment_rows):
        nonlocal read, held
        shape = inner(rows, prompts, segment_rows)
        assert [row.slot for row in rows] == list(range(len(rows)))
        assert [prompt.slot for prompt in prompts] == list(range(len(prompts)))
        read += sum((stop - start) * length for start, stop, length in shape.segments)
        held += len(rows) * max(length for *_, length in shape.segments)
        return shape

    monkeypatch.setattr("dpost_lite.sampling.layout.Shape.of", counted)
    drawn(engine, stories(num_samples=20))
    assert read < 0.75 * held


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gemma2", "gemma3"])
def test_padded_shapes_change_nothing(model_of, family):
    """What a GPU replays as a graph, run on the CPU without one: equal to `generate`."""
    model = model_of(family)
    asked = [ask(p, max_new_tokens=14, num_samples=2) for p in prompts(6)]
    for (prompt, _), sample in drawn(Engine(model, forcer=None, max_rows=5, static=True), asked).items():
        assert sample.token_ids == generated(model, prompt, 14)


def test_padded_shapes_with_forced_tokens_change_nothing(storyteller):  # noqa: F811
    padded = drawn(Engine(storyteller, forcer=FORCER, max_rows=13, static=True), stories())
    same(run(storyteller, stories(), 13, FORCER), padded)


def test_rows_are_refilled_several_at_once_where_steps_are_graphs(storyteller, monkeypatch):  # noqa: F811
    """Each time costs a choice of its own, and mostly a forward."""
    num_new: list[int] = []
    start, found = Engine._start, []
    monkeypatch.setattr(Engine, "_start", lambda *args: num_new.append(args[0].statistics.num_steps) or start(*args))
    for static in (False, True):
        num_new.clear()
        found.append(drawn(Engine(storyteller, forcer=FORCER, max_rows=40, static=static), stories(num_samples=8)))
        found.append(len(set(num_new)))
    eager, num_eager, padded, num_padded = found
    same(eager, padded)
    assert num_padded < 0.8 * num_eager


def test_padded_shapes_are_few(storyteller, monkeypatch):  # noqa: F811
    """Graphs pay only if shapes come back."""
    seen, inner = [], Shape.rounded
    monkeypatch.setattr(Shape, "rounded", lambda *a: seen.append(inner(*a)) or seen[-1])
    drawn(Engine(storyteller, forcer=FORCER, max_rows=16, static=True), stories(num_samples=10, max_new_tokens=60))
    assert len(seen) > 100
    assert len(set(seen)) < 30


def test_a_prompt_is_computed_once_for_all_of_its_samples(model_of, monkeypatch):
    engine = Engine(model_of("llama"), forcer=None, max_rows=4)
    lengths = []
    inner = engine._call

    def counted(ids, positions, batch, ends):
        if isinstance(batch, Prefill):
            lengths.extend(batch.lengths)
        return inner(ids, positions, batch, ends)

    monkeypatch.setattr(engine, "_call", counted)
    asked = [ask(p, num_samples=7, temperature=1.0, max_new_tokens=9) for p in prompts(5)]
    drawn(engine, asked)
    assert sorted(lengths) == sorted(len(request.prompt_ids) for request in asked)


def test_no_row_decodes_after_its_end(model_of):
    """Every token but the first of an answer, which the prompt's own pass gives, is one row in one step."""
    engine = Engine(model_of("llama"), forcer=None, max_rows=5)
    asked = [
        ask(p, num_samples=3, temperature=1.0, max_new_tokens=n, stop_ids=frozenset({2, 9, 17, 30}))
        for n, p in enumerate(prompts(8), start=3)
    ]
    samples = drawn(engine, asked).values()
    assert engine.statistics.num_row_steps == sum(len(sample.token_ids) - 1 for sample in samples)
    assert engine.statistics.num_steps < engine.statistics.num_row_steps / 3


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_p", "copies"), [(1.0, 4), (0.9, 10)])
def test_rows_come_from_the_memory_budget(model_of, monkeypatch, top_p, copies):
    model = model_of("llama")
    asked = [ask(p, num_samples=4, temperature=1.0, top_p=top_p, max_new_tokens=30) for p in prompts(8)]
    plenty = Engine(model, forcer=None, max_rows=64)
    expected = drawn(plenty, asked)
    assert plenty.statistics.num_rows == 32  # no more than there are samples
    caches = []

    def made(*args, **kwargs):
        caches.append(KVCache(*args, **kwargs))
        return caches[-1]

    monkeypatch.setattr(engine_module, "KVCache", made)
    last = 32
    for budget_mib in (0.5, 0.3, 0.1):
        engine = Engine(model, forcer=None, max_rows=64, memory_gib=budget_mib / 1024)
        same(expected, drawn(engine, asked))
        num_rows, cache = engine.statistics.num_rows, caches.pop()
        stores = (cache.prompt_keys, cache.prompt_values, cache.row_keys, cache.row_values)
        logits = 4 * copies * model.config.vocab_size  # of one row, float32, while choosing
        taken = sum(store.nbytes for store in stores) + num_rows * logits
        row = (cache.row_keys.nbytes + cache.row_values.nbytes) / num_rows
        prompt = (cache.prompt_keys.nbytes + cache.prompt_values.nbytes) / cache.num_prompts
        assert taken <= budget_mib * 2**20
        assert taken + row + logits + 2 * prompt > budget_mib * 2**20  # no room for one row more
        assert 1 <= num_rows < last
        last = num_rows
    assert drawn(Engine(model, forcer=None, max_rows=64, memory_gib=1e-9), asked[:1])  # a single row is always tried


@pytest.mark.parametrize("where", ["decode", "prefill", "allocation"])
def test_running_out_of_memory_shrinks_the_rows_and_loses_nothing(storyteller, monkeypatch, where):  # noqa: F811
    expected = run(storyteller, stories(), 16, FORCER)
    engine = Engine(storyteller, forcer=FORCER, max_rows=16)
    call, cache = engine._call, KVCache
    num_calls = 0

    def scarce(ids, positions, batch, ends):
        nonlocal num_calls
        num_calls += 1
        is_prefill = isinstance(batch, Prefill)
        too_much = len(batch.lengths) > 3 if is_prefill else batch.row.max() >= 4 and num_calls > 9
        if too_much and is_prefill == (where == "prefill"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(ids, positions, batch, ends)

    def scarce_cache(config, **sizes):
        if sizes["num_rows"] > 5:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return cache(config, **sizes)

    if where == "allocation":
        monkeypatch.setattr("dpost_lite.sampling.engine.KVCache", scarce_cache)
    else:
        monkeypatch.setattr(engine, "_call", scarce)
    same(expected, drawn(engine, stories()))
    assert engine.statistics.num_shrunk >= 1
    assert engine.statistics.num_rows <= 8


def test_too_little_memory_for_one_row_says_so(model_of, monkeypatch):
    engine = Engine(model_of("llama"), forcer=None, max_rows=4)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "_call", full)
    with pytest.raises(OutOfMemory, match="single row"):
        list(engine.run([ask(p, num_samples=4) for p in prompts(3)]))
    assert engine.statistics.num_shrunk == 2


def test_another_runtime_error_is_not_taken_for_want_of_memory(model_of, monkeypatch):
    engine = Engine(model_of("llama"), forcer=None, max_rows=4)

    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(engine, "_call", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        list(engine.run([ask(p) for p in prompts(3)]))


# --- temperature by step ---------------------------------------------------------------------------------------------


def test_a_schedule_of_equal_temperatures_is_that_temperature(model_of):
    model = model_of("llama")
    asked = {
        t: [ask(p, num_samples=3, temperature=t, max_new_tokens=12) for p in prompts(4)] for t in (0.8, (0.8,) * 3)
    }
    engine = Engine(model, forcer=None, max_rows=4, step_ids=frozenset(range(3, 30)))
    same(drawn(engine, asked[0.8]), drawn(engine, asked[(0.8,) * 3]))


def test_each_step_has_its_temperature(model_of):
    """Greedy in the first step, hot in the second, greedy again from the third on."""
    model, schedule = model_of("llama"), (0.0, 30.0, 0.0)
    ends = frozenset(range(3, 20))
    engine = Engine(model, forcer=None, max_rows=8, step_ids=ends)
    asked = [ask(p, num_samples=6, temperature=schedule, max_new_tokens=25, stop_ids=frozenset()) for p in prompts(5)]
    num_hot, num_strange = 0, 0
    for (prompt, _), sample in drawn(engine, asked).items():
        step = 0
        for i, token in enumerate(sample.token_ids):
            with torch.inference_mode():
                read = torch.tensor([[*prompt, *sample.token_ids[:i]]])
                greedy = int(model(input_ids=read).logits[0, -1].argmax())
            if schedule[min(step, 2)] == 0:
                assert token == greedy
            else:
                num_hot += 1
                num_strange += token != greedy
            step += token in ends
    assert num_hot > 20
    assert num_strange > 0.8 * num_hot


def test_the_steps_of_a_prefix_do_not_count(storyteller):  # noqa: F811
    """SCDPO starts its schedule where the rationale is cut."""
    line = ID["\n"]
    cut = (line, ID[" one"], line)
    schedule = (0.0, 50.0)
    engine = Engine(storyteller, forcer=None, max_rows=4, step_ids=frozenset({line}))
    request = ask((ID["plain"],), prefix_ids=cut, num_samples=4, temperature=schedule, max_new_tokens=5)
    greedy = run(storyteller, [ask((ID["plain"],), prefix_ids=cut, max_new_tokens=5)])
    expected = next(iter(greedy.values())).token_ids
    assert line not in expected
    assert all(sample.token_ids == expected for sample in drawn(engine, [request]).values())


def test_stories_are_told(storyteller):  # noqa: F811
    """The tests above compare something: most samples meet the calculator."""
    found = run(storyteller, stories(), 13, FORCER)
    assert sum(sample.num_calculated > 0 for sample in found.values()) > len(found) / 3
