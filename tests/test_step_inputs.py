"""Segments, padded shapes, memory and schedules: none of them may change what is drawn."""

# ruff: noqa: F811 - a fixture is imported and then named as an argument

import pytest

torch = pytest.importorskip("torch")

from memory_efficient import efficient_attention  # noqa: E402
from stories import (  # noqa: E402
    FORCER,
    ID,
    STARTS,
    Forward,
    ask,
    generated,
    prompts,
    run,
    same,
    story_prompt,
    storyteller,  # noqa: F401  (a fixture)
    watched,
)

from dpost_lite.errors import OutOfMemory  # noqa: E402
from dpost_lite.problems.answer_tokens import AnswerTokens  # noqa: E402
from dpost_lite.sampling import attention  # noqa: E402
from dpost_lite.sampling.attention import Layer, Part, flash_for_cpu, memory_efficient, products_if_many  # noqa: E402
from dpost_lite.sampling.cache import KVCache  # noqa: E402
from dpost_lite.sampling.engine import Engine  # noqa: E402
from dpost_lite.sampling.request import CacheSize  # noqa: E402
from dpost_lite.sampling.scheduler import Prompt, Row  # noqa: E402
from dpost_lite.sampling.step_inputs import StepInputs, StepShape  # noqa: E402


def stories(num_samples=3, max_new_tokens=24):
    return [
        ask(story_prompt(start, i), key=start, num_samples=num_samples, temperature=1.0, seed=i,
            max_new_tokens=max_new_tokens + i)
        for i, start in enumerate(STARTS)
    ]  # fmt: skip


def drawn(engine, requests):
    found = [(sample.key, sample.index, sample) for sample in engine.run(requests)]
    by_key = {(key, i): sample for key, i, sample in found}
    assert len(by_key) == len(found) == sum(request.num_samples for request in requests)
    return by_key


def row_of(length, num_unread=1, slot=0):
    request = ask((5, 6, 7), max_new_tokens=99)
    answer = AnswerTokens(None, request.stop_ids.__contains__, 99)
    return Row(Prompt(request, [], {0}, 0, torch.zeros(4), 7), 0, answer, frozenset(), slot, length, [1] * num_unread)


@pytest.mark.parametrize("padded", [False, True])
def test_inputs_are_the_same_after_packing_and_unpacking(padded):
    rows = [row_of(10 + slot, num_unread=1 + slot % 3, slot=slot) for slot in range(7)]
    shape = StepShape.of(rows, [rows[0].prompt], 64)
    for row in rows:
        row.prompt = rows[0].prompt
    shape = shape.padded(CacheSize(2, 16, 9, 64, 4)) if padded else shape
    inputs = StepInputs.of(rows, [rows[0].prompt], shape, scratch_row=9)
    unpacked = StepInputs.unpack(inputs.pack(), shape)
    assert [view.flatten().tolist() for view in unpacked.values()] == inputs.values()
    assert [tuple(view.shape) for view in unpacked.values()] == StepInputs.sizes(shape).values()
    assert inputs.row[shape.num_extra :][:7] == [row.slot for row in rows]
    assert set(inputs.row) <= {*range(7), 9}  # padding is written to the scratch row alone: others may be parked


def test_segments_cover_all_rows_and_reach_as_far_as_their_longest():
    rows = [row_of(n, slot=i) for i, n in enumerate([90, 80, 89, 30, 31, 2, 90])]
    shape = StepShape.of(rows, [rows[0].prompt], 2)
    assert shape.segments == ((0, 4, 91), (4, 6, 32), (6, 7, 91))  # the first two are about as long: read as one


@pytest.mark.parametrize("segment_rows", [1, 2, 5])
def test_segments_change_nothing(storyteller, monkeypatch, segment_rows):
    expected = run(storyteller, stories(), 13, FORCER)
    monkeypatch.setattr("dpost_lite.sampling.model_runner.SEGMENT_ROWS", segment_rows)
    same(expected, run(storyteller, stories(), 13, FORCER))


def test_long_rows_stay_in_front_of_short_ones(storyteller, monkeypatch):
    """What segments are for: refilled rows do not read as far as old ones."""
    monkeypatch.setattr("dpost_lite.sampling.model_runner.SEGMENT_ROWS", 4)
    segmented, whole = Engine(storyteller, writer=FORCER, max_rows=16), Engine(storyteller, writer=FORCER, max_rows=16)
    drawn(segmented, stories(num_samples=20))
    monkeypatch.setattr("dpost_lite.sampling.model_runner.SEGMENT_ROWS", 16)  # each row reads as far as the longest
    drawn(whole, stories(num_samples=20))
    assert segmented.statistics.num_row_steps == whole.statistics.num_row_steps
    assert segmented.statistics.num_positions_read < 0.75 * whole.statistics.num_positions_read


@pytest.mark.parametrize("kernel", [None, memory_efficient])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gemma2", "gemma3", "t5"])
def test_padded_shapes_change_nothing(model_of, family, kernel, monkeypatch):
    """What a GPU replays as a graph, run on the CPU without one: equal to `generate`."""
    model = model_of(family)
    monkeypatch.setattr("dpost_lite.sampling.model_runner.kernel_for", lambda *_, **__: kernel)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", efficient_attention)
    asked = [ask(p, max_new_tokens=14, num_samples=2) for p in prompts(6)]
    for (prompt, _), sample in drawn(Engine(model, writer=None, max_rows=5, static=True), asked).items():
        assert sample.token_ids == generated(model, prompt, 14)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        (flash_for_cpu, torch.float32), (flash_for_cpu, torch.bfloat16), (products_if_many, torch.bfloat16),
        (memory_efficient, torch.float32), (memory_efficient, torch.bfloat16), (None, torch.bfloat16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("width", [1, 3])
def test_kernels_agree_with_products_in_float32(kernel, dtype, width, window, monkeypatch):
    """Also in the log-sum-exp, and where a window hides a whole part, which then has no weight."""
    torch.manual_seed(0)
    query = torch.randn(6 * width, 6, 16, dtype=dtype) / 4
    keys, values = torch.randn(2, 8, 2, 26, 16, dtype=dtype)
    position = torch.tensor([19, 12, 5, 30, 0, 7])[:, None].expand(-1, width)
    tokens = torch.arange(6 * width).view(6, width) if width > 1 else slice(0, 6)
    slots = torch.arange(1, 7) if width > 1 else slice(1, 7)
    part = Part(tokens, slots, 24, position[:, :1].clamp(max=23), position)
    layer = Layer(0, 1.0, window, None)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", efficient_attention)
    monkeypatch.setattr(attention, "PRODUCTS_FROM", 6)
    fused, weight = layer._part(query, keys, values, part, kernel)
    products, other = layer._part(query.float(), keys.float(), values.float(), part, None)
    assert fused.dtype == dtype
    assert fused.shape == products.shape == query.shape
    hidden = other < -1e30
    assert hidden.any() == (window is not None)
    assert (weight < -1e30).equal(hidden)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype is torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(fused.float()[~hidden], products[~hidden], **tolerance)
    torch.testing.assert_close(weight[~hidden], other[~hidden], **tolerance)


def test_large_parts_in_bfloat16_are_products_on_cpus(monkeypatch):
    called = list[str]()

    def noted(name, function):
        return lambda *args: (called.append(name), function(*args))[1]

    for name in ("flash_for_cpu", "products"):
        monkeypatch.setattr(attention, name, noted(name, getattr(attention, name)))
    torch.manual_seed(0)
    q, (k, v) = torch.randn(16, 2, 3, 16).bfloat16() / 4, torch.randn(2, 16, 2, 12, 16).bfloat16()[..., :9, :]
    mask = torch.zeros(16, 1, 1, 9).bfloat16()
    small = [products_if_many(*(t[part] for t in (q, k, v, mask))) for part in (slice(15), slice(15, 16))]
    large = products_if_many(q, k, v, mask)
    assert called == ["flash_for_cpu", "flash_for_cpu", "products"]
    for parts, whole in zip(zip(*small, strict=True), large, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, atol=2e-2, rtol=2e-2)


def test_padded_shapes_with_forced_tokens_change_nothing(storyteller):
    padded = drawn(Engine(storyteller, writer=FORCER, max_rows=13, static=True), stories())
    same(run(storyteller, stories(), 13, FORCER), padded)


class Starts:
    """The calculator's writer, noting after how many steps each row starts."""

    engine: Engine

    def __init__(self):
        self.at_steps = set()

    def row(self):
        self.at_steps.add(self.engine.statistics.num_steps)
        return FORCER.row()


def test_rows_are_refilled_several_at_once_where_steps_are_graphs(storyteller):
    """Each time costs a choice of its own, and mostly a forward."""
    found = []
    for static in (False, True):
        starts = Starts()
        starts.engine = Engine(storyteller, writer=starts, max_rows=40, static=static)
        found.append(drawn(starts.engine, stories(num_samples=8)))
        found.append(len(starts.at_steps))
    eager, num_eager, padded, num_padded = found
    same(eager, padded)
    assert num_padded < 0.8 * num_eager


def test_padded_shapes_are_few(storyteller):
    """Graphs pay only if shapes come back."""
    engine = Engine(storyteller, writer=FORCER, max_rows=16, static=True)
    drawn(engine, stories(num_samples=10, max_new_tokens=60))
    assert engine.statistics.num_steps > 100
    assert 1 < engine.statistics.num_shapes < 30


def test_a_prompt_is_computed_once_for_all_of_its_samples(model_of):
    model, forwards = model_of("llama"), list[Forward]()
    asked = [ask(p, num_samples=7, temperature=1.0, max_new_tokens=9) for p in prompts(5)]
    with watched(model, forwards.append):
        drawn(Engine(model, writer=None, max_rows=4), asked)
    lengths = [length for forward in forwards if forward.is_prefill for length in forward.prompt_lengths]
    assert sorted(lengths) == sorted(len(request.prompt_ids) for request in asked)


def test_no_row_decodes_after_its_end(model_of):
    """Every token but the first of an answer, which the prompt's own pass gives, is one row in one step."""
    engine = Engine(model_of("llama"), writer=None, max_rows=5)
    asked = [
        ask(p, num_samples=3, temperature=1.0, max_new_tokens=n, stop_ids=frozenset({2, 9, 17, 30}))
        for n, p in enumerate(prompts(8), start=3)
    ]
    samples = drawn(engine, asked).values()
    assert engine.statistics.num_row_steps == sum(len(sample.token_ids) - 1 for sample in samples)
    assert engine.statistics.num_steps < engine.statistics.num_row_steps / 3


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_p", "copies"), [(1.0, 3), (0.9, 10)])
def test_rows_come_from_the_memory_budget(model_of, top_p, copies):
    model = model_of("llama")
    asked = [ask(p, num_samples=4, temperature=1.0, top_p=top_p, max_new_tokens=30) for p in prompts(8)]
    plenty = Engine(model, writer=None, max_rows=64)
    expected = drawn(plenty, asked)
    assert plenty.statistics.num_rows == 32  # no more than there are samples
    last = 32
    for budget_mib in (0.5, 0.3, 0.1):
        engine = Engine(model, writer=None, max_rows=64, memory_gib=budget_mib / 1024)
        same(expected, drawn(engine, asked))
        num_rows, size = engine.statistics.num_rows, engine.statistics.cache_size
        cache = KVCache(model.config, size, num_scratch=0, dtype=model.dtype, device=model.device)
        stores = (cache.prompt_keys, cache.prompt_values, cache.row_keys, cache.row_values)
        logits = 4 * copies * model.config.vocab_size  # of one row, float32, while choosing
        taken = sum(store.nbytes for store in stores) + num_rows * logits
        row = (cache.row_keys.nbytes + cache.row_values.nbytes) / num_rows
        prompt = (cache.prompt_keys.nbytes + cache.prompt_values.nbytes) / size.num_prompts
        assert taken <= budget_mib * 2**20
        assert taken + row + logits + 2 * prompt > budget_mib * 2**20  # no room for one row more
        assert 1 <= num_rows < last
        last = num_rows
    assert drawn(Engine(model, writer=None, max_rows=64, memory_gib=1e-9), asked[:1])  # a single row is always tried


@pytest.mark.parametrize("where", ["decode", "prefill", "allocation"])
def test_running_out_of_memory_shrinks_the_rows_and_loses_nothing(storyteller, monkeypatch, where):
    expected = run(storyteller, stories(), 16, FORCER)
    engine = Engine(storyteller, writer=FORCER, max_rows=16)
    num_calls = 0

    def scarce(forward):
        nonlocal num_calls
        num_calls += 1
        too_much = len(forward.prompt_lengths) > 3 if forward.is_prefill else forward.num_rows > 4 and num_calls > 9
        if too_much and where == ("prefill" if forward.is_prefill else "decode"):
            raise torch.OutOfMemoryError("CUDA out of memory")

    def scarce_cache(config, size, **settings):
        if size.num_rows > 5:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return KVCache(config, size, **settings)

    if where == "allocation":
        monkeypatch.setattr("dpost_lite.sampling.model_runner.KVCache", scarce_cache)
    with watched(storyteller, scarce):
        same(expected, drawn(engine, stories()))
    assert engine.statistics.num_shrunk >= 1
    assert engine.statistics.num_rows <= 8


def test_too_little_memory_for_one_row_says_so(model_of):
    engine = Engine(model_of("llama"), writer=None, max_rows=4)

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with watched(model_of("llama"), full), pytest.raises(OutOfMemory, match="single row"):
        list(engine.run([ask(p, num_samples=4) for p in prompts(3)]))
    assert engine.statistics.num_shrunk == 2


def test_another_runtime_error_is_not_taken_for_want_of_memory(model_of):
    engine = Engine(model_of("llama"), writer=None, max_rows=4)

    def broken(_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with watched(model_of("llama"), broken), pytest.raises(RuntimeError, match="mat1"):
        list(engine.run([ask(p) for p in prompts(3)]))


# --- temperature by step ---------------------------------------------------------------------------------------------


def test_a_schedule_of_equal_temperatures_is_that_temperature(model_of):
    model = model_of("llama")
    asked = {
        t: [ask(p, num_samples=3, temperature=t, max_new_tokens=12) for p in prompts(4)] for t in (0.8, (0.8,) * 3)
    }
    engine = Engine(model, writer=None, max_rows=4, step_ids=frozenset(range(3, 30)))
    same(drawn(engine, asked[0.8]), drawn(engine, asked[(0.8,) * 3]))


def test_each_step_has_its_temperature(model_of):
    """Greedy in the first step, hot in the second, greedy again from the third on."""
    model, schedule = model_of("llama"), (0.0, 30.0, 0.0)
    ends = frozenset(range(3, 20))
    engine = Engine(model, writer=None, max_rows=8, step_ids=ends)
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


def test_the_steps_of_a_prefix_do_not_count(storyteller):
    """SCDPO starts its schedule where the rationale is cut."""
    line = ID["\n"]
    cut = (line, ID[" one"], line)
    schedule = (0.0, 50.0)
    engine = Engine(storyteller, writer=None, max_rows=4, step_ids=frozenset({line}))
    request = ask((ID["plain"],), prefix_ids=cut, num_samples=4, temperature=schedule, max_new_tokens=5)
    greedy = run(storyteller, [ask((ID["plain"],), prefix_ids=cut, max_new_tokens=5)])
    expected = next(iter(greedy.values())).token_ids
    assert line not in expected
    assert all(sample.token_ids == expected for sample in drawn(engine, [request]).values())


def test_stories_are_told(storyteller):
    """The tests above compare something: most samples meet the calculator."""
    found = run(storyteller, stories(), 13, FORCER)
    assert sum(sample.num_calculated > 0 for sample in found.values()) > len(found) / 3
