"""The batched engine against transformers' `generate` and against a loop over one row: what must hold, to the token."""

# ruff: noqa: F811 - a fixture is imported and then named as an argument

import random
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from conftest import ALL_FAMILIES, tiny_model  # noqa: E402
from stories import (  # noqa: E402
    FORCER,
    ID,
    STARTS,
    STOP,
    Dictation,
    Forward,
    ask,
    encode,
    generated,
    one_row,
    plain_logprobs,
    prompts,
    run,
    same,
    story_prompt,
    storyteller,  # noqa: F401  (a fixture)
    text_of,
    told,
    watched,
    words,
)

from dpost_lite.errors import ModelError  # noqa: E402
from dpost_lite.problems.calculator import Calculator  # noqa: E402
from dpost_lite.sampling import attention, model_runner  # noqa: E402
from dpost_lite.sampling.engine import Engine  # noqa: E402

# --- greedy, without a calculator ------------------------------------------------------------------------------------


@pytest.fixture(params=["fused", "products"])
def kernel(request, monkeypatch):
    """Two ways to compute attention on every machine: the kernel for CPUs, and products."""
    if request.param == "products":
        monkeypatch.setattr(model_runner, "kernel_for", lambda *_, **__: None)
    return request.param


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.usefixtures("kernel")
def test_greedy_equals_generate(model_of, family):
    """Mixed lengths, more prompts than rows, K > 1, stops that come early; windows shorter than prompt and answer."""
    model = model_of(family)
    questions = prompts(7)
    free = [generated(model, prompt, 16) for prompt in questions]
    common = Counter(token for answer in free for token in answer[2:-2]).most_common(2)
    stops = frozenset({STOP, *(token for token, _ in common)})
    expected = {prompt: generated(model, prompt, 16, stops) for prompt in questions}
    found = run(model, [ask(p, stop_ids=stops, max_new_tokens=16, num_samples=2) for p in questions], num_rows=3)
    for (prompt, _), sample in found.items():
        assert sample.token_ids == expected[prompt]
        assert sample.end == ("stop" if expected[prompt][-1] in stops else "limit")
        assert sample.forced == [False] * len(sample.token_ids)
        assert sample.logprobs == pytest.approx(plain_logprobs(model, prompt, sample.token_ids), abs=2e-4)
        assert (sample.num_calculated, sample.num_refused) == (0, 0)
    assert len({tuple(answer) for answer in expected.values()}) > 3
    assert len(set(map(len, expected.values()))) > 1


def test_a_window_hides_what_lies_before_it(model_of):
    """The windowed families differ from the same weights without a window: their test above tests something."""
    for family in ("mistral-window", "qwen2-window", "gemma2", "gemma3"):
        window, wide = model_of(family), model_of(family, sliding_window=200)
        assert [generated(window, p, 16) for p in prompts(7)] != [generated(wide, p, 16) for p in prompts(7)], family


def test_one_prompt_after_the_other_packed_beyond_one_prefill(model_of, monkeypatch):
    """Prompts that do not fit one packed prefill are computed in several, each as full as may be."""
    monkeypatch.setattr("dpost_lite.sampling.scheduler.MAX_PREFILL_TOKENS", 30)
    model = model_of("llama")
    questions, forwards = prompts(9), list[Forward]()
    with watched(model, forwards.append):
        found = run(model, [ask(p, max_new_tokens=6) for p in questions], num_rows=9)
    prefills = [forward.prompt_lengths for forward in forwards if forward.is_prefill]
    assert {p: s.token_ids for (p, _), s in found.items()} == {p: generated(model, p, 6) for p in questions}
    assert sum(prefills, ()) == tuple(map(len, questions))
    assert all(sum(lengths) <= 30 or len(lengths) == 1 for lengths in prefills)
    assert all(sum(a) + b[0] > 30 for a, b in pairwise(prefills))


def test_limits_differ_between_neighbours(model_of):
    model = model_of("qwen3")
    asked = [ask(p, max_new_tokens=n) for n, p in enumerate(prompts(8), start=1)]
    for (prompt, _), sample in run(model, asked, num_rows=3).items():
        limit = next(r.max_new_tokens for r in asked if r.key == prompt)
        assert sample.token_ids == generated(model, prompt, limit)
        assert len(sample.token_ids) == limit or sample.end == "stop"


def test_a_prefix_is_read_but_not_returned(model_of):
    model = model_of("llama")
    whole = {p: generated(model, p, 12) for p in prompts(5)}
    asked = [ask(p, prefix_ids=tuple(a[:4]), max_new_tokens=8) for p, a in whole.items() if len(a) > 4]
    assert len(asked) >= 3
    for (prompt, _), sample in run(model, asked, num_rows=2).items():
        assert sample.token_ids == whole[prompt][4:]


def test_answers_come_as_they_end(model_of):
    engine = Engine(model_of("llama"), writer=None, max_rows=2)
    asked = [ask(p, max_new_tokens=5, stop_ids=frozenset()) for p in prompts(6)]
    steps = [engine.statistics.num_steps for _ in engine.run(asked)]
    assert steps == [4, 4, 8, 8, 12, 12]


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"prompt": ()}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}]
)
def test_what_cannot_be_answered_is_refused(settings):
    with pytest.raises(ValueError, match="a request needs"):
        ask(**{"prompt": (3,), **settings})


def test_layers_without_keys_and_values_are_refused():
    model = tiny_model("llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="llama: layers of linear_attention cannot be sampled from"):
        Engine(model, writer=None, max_rows=2)


def test_attention_sinks_are_refused(model_of, monkeypatch):
    """gpt-oss hands them to the attention function as `s_aux`."""
    model, inner = tiny_model("llama"), attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args, **kw: inner(*args, **kw, s_aux=torch.zeros(4)))
    with pytest.raises(ModelError, match="sinks, which cannot be sampled from yet"):
        run(model, [ask((3, 4))])


def test_a_model_that_computes_nan_is_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(ModelError, match="computes NaN"):
            run(model, [ask(p, temperature=temperature) for p in prompts(3)])


def test_nothing_asked_is_nothing_answered(model_of):
    assert run(model_of("llama"), []) == {}


# --- sampling --------------------------------------------------------------------------------------------------------


def test_samples_depend_on_neither_rows_nor_order_nor_neighbours(model_of):
    model = model_of("llama")
    asked = [
        ask(p, num_samples=k, temperature=t, top_p=top_p, seed=i, max_new_tokens=14, stop_ids=frozenset({2, 9, 17}))
        for i, (p, k, t, top_p) in enumerate(
            zip(prompts(6), [1, 4, 2, 3, 1, 5], [1.0, 0.7, 1.5, 0.0, 0.9, 0.7], [1, 1, 0.9, 1, 0.5, 0.8], strict=True)
        )
    ]
    few = run(model, asked, num_rows=3)
    same(few, run(model, asked, num_rows=1))
    same(few, run(model, asked, num_rows=16))
    same(few, run(model, random.Random(1).sample(asked, len(asked)), num_rows=5))
    for request in asked:
        alone = run(model, [request], num_rows=2)
        same(alone, {key: sample for key, sample in few.items() if key[0] == request.key})


def test_samples_differ_by_seed_and_by_number(model_of):
    model = model_of("llama")
    prompt = prompts(2)[1]
    asked = [ask(prompt, key=s, seed=s, num_samples=20, temperature=1.0, max_new_tokens=8) for s in range(5)]
    answers = [tuple(sample.token_ids) for sample in run(model, asked, num_rows=16).values()]
    assert len(set(answers)) > 0.9 * len(answers)


def test_logprobs_are_the_models_own_at_temperature_one(model_of):
    model = model_of("llama")
    asked = [ask(p, num_samples=3, temperature=0.6, top_p=0.8, max_new_tokens=12) for p in prompts(4)]
    for (prompt, _), sample in run(model, asked, num_rows=5).items():
        assert sample.logprobs == pytest.approx(plain_logprobs(model, prompt, sample.token_ids), abs=2e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.4, 1.0), (1.0, 0.8), (0.7, 0.6)])
def test_sampling_follows_the_models_distribution(model_of, temperature, top_p):
    """Chi-square over all pairs of two tokens of an 8-token vocabulary; no stop, so that each answer has both."""
    model = model_of("llama", vocab_size=8, initializer_range=0.05)
    prompt, num_samples = (3, 5, 4), 4000
    probs = pair_probabilities(model, prompt, temperature, top_p)
    asked = ask(
        prompt, num_samples=num_samples, temperature=temperature, top_p=top_p, max_new_tokens=2, stop_ids=frozenset()
    )
    counts = Counter(tuple(s.token_ids) for s in run(model, [asked], num_rows=250).values())
    assert counts.keys() <= {pair for pair, p in probs.items() if p > 0}, "a token outside of the nucleus was drawn"
    statistic, num_cells = chi_square(counts, {pair: p * num_samples for pair, p in probs.items()})
    assert num_cells >= 4
    assert statistic < chi_square_limit(num_cells - 1)


@torch.inference_mode()
def pair_probabilities(model: Any, prompt: tuple[int, ...], temperature: float, top_p: float) -> dict[Any, float]:
    """The exact probability of each pair of tokens behind a prompt."""

    def following(*ids: int) -> list[float]:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        probs = (logits / temperature).softmax(-1).tolist()
        kept, mass = [], 0.0
        for token in sorted(range(len(probs)), key=lambda i: -probs[i]):
            if mass >= top_p:
                break
            kept.append(token)
            mass += probs[token]
        return [p / mass if i in kept else 0.0 for i, p in enumerate(probs)]

    return {(a, b): p * q for a, p in enumerate(following(*prompt)) for b, q in enumerate(following(*prompt, a))}


def chi_square(counts: Counter, expected: dict[Any, float]) -> tuple[float, int]:
    """Pearson's statistic and the number of cells, those that expect fewer than 5 put together."""
    rare = [pair for pair, n in expected.items() if n < 5]
    cells = [(counts[pair], n) for pair, n in expected.items() if n >= 5]
    if rare and (pooled := sum(expected[pair] for pair in rare)) >= 5:
        cells.append((sum(counts[pair] for pair in rare), pooled))
    return sum((seen - n) ** 2 / n for seen, n in cells), len(cells)


def chi_square_limit(degrees: int) -> float:
    """The 99.9th percentile, by Wilson and Hilferty's approximation."""
    return degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3


# --- with the calculator ---------------------------------------------------------------------------------------------


def test_the_storyteller_reads_all_that_went_before(storyteller):
    """Else its log-probabilities would not show a forced token missing from the cache."""
    answer = encode(" has <<48/2=24>>24 apples.")
    for i in range(len(answer) - 1):
        changed = [*answer[:i], ID["3"], *answer[i + 1 :]]
        last = [plain_logprobs(storyteller, (ID["sum"],), ids)[-1] for ids in (answer, changed)]
        assert abs(last[0] - last[1]) > 2e-3


def test_stories_with_annotations_equal_the_one_row_reference(storyteller):
    """Rows with and without annotations side by side, in all phases, for one row and for many."""
    asked = [ask(story_prompt(start, i), key=start, max_new_tokens=30) for i, start in enumerate(STARTS)]
    expected = told(storyteller, asked)
    for num_rows in (1, 3, 16):
        same(run(storyteller, asked, num_rows, FORCER), expected)
    found = {start: words(sample) for (start, _), sample in expected.items()}
    assert found["plain"] == " one two three four"
    assert found["sum"].startswith(" has <<48/2=24>>24 apples. four")
    assert found["kept digit"].startswith("=<<3*5=15>>15")
    assert found["changed digit"].startswith("c<<7*8=56>>56 pears")
    assert found["long"].startswith("l<<12345678*1001=12358023678>>12358023678")
    assert found["refused"].startswith("r<<5/0=0>> apples")
    assert found["unclosed"] == "u<<7+ two three four"
    assert found["nested"].startswith("n<<1+<<48/2=24>>24 apples")
    assert found["newline"].startswith("w<<6+\n6=99 wrong")
    assert found["first"].startswith("f<<1+1=2>>2 apples")
    assert found["three"].startswith("<<<9/2=4.5>>4.5 five")
    assert expected["changed digit", 0].forced[3]
    assert not expected["kept digit", 0].forced[3]
    assert expected["refused", 0].num_refused == 1
    assert {sample.end for sample in expected.values()} == {"stop", "limit"}


class Counted:
    """The calculator's writer, counting the tokens that it is shown: those that were drawn."""

    def __init__(self, shown: list[int]) -> None:
        self._shown = shown

    def row(self) -> Any:
        return CountedRow(FORCER.row(), self._shown)


class CountedRow:
    def __init__(self, inner: Any, shown: list[int]) -> None:
        self._inner, self._shown = inner, shown

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def push(self, token_id: int) -> list[int] | None:
        self._shown.append(token_id)
        return self._inner.push(token_id)


def test_forced_tokens_take_no_step_of_their_own(storyteller):
    """A row is in one step for each token it drew, but for the first, which the prompt's own pass gives."""
    drawn: list[int] = []
    engine = Engine(storyteller, writer=Counted(drawn), max_rows=5)
    asked = [ask(story_prompt(start, i), max_new_tokens=30) for i, start in enumerate(STARTS)]
    samples = list(engine.run(asked))
    assert engine.statistics.num_row_steps == len(drawn) - len(samples)
    assert sum(len(sample.token_ids) for sample in samples) > len(drawn) + 40


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_forced_tokens_in_every_architecture(model_of, family, kernel):
    """Within windows and beyond them, capped or not: several tokens of a row in one forward equal one after another."""
    model, writer = model_of(family), Dictation()
    asked = [ask(p, key=i, max_new_tokens=18, num_samples=2) for i, p in enumerate(prompts(7))]
    engine = Engine(model, writer=writer, max_rows=5, static=kernel == "products")
    found = {(sample.key, sample.index): sample for sample in engine.run(asked)}
    same(found, {(r.key, i): one_row(model, r, writer) for r in asked for i in range(2)})
    assert sum(sum(sample.forced) for sample in found.values()) > 10


def test_the_limit_holds_wherever_it_falls(storyteller):
    """Also in the middle of forced tokens: every limit from one token to the whole, for every story."""
    asked = [
        ask(story_prompt(start, i), key=(start, limit), max_new_tokens=limit)
        for i, start in enumerate(STARTS)
        for limit in (*range(1, 9), 12, 20, 29)
    ]
    whole = {start: one_row(storyteller, ask(story_prompt(start, i), max_new_tokens=29), FORCER).token_ids
             for i, start in enumerate(STARTS)}  # fmt: skip
    num_cut = 0
    for ((start, limit), _), sample in run(storyteller, asked, 7, FORCER).items():
        assert sample.token_ids == whole[start][:limit]
        assert len(sample.token_ids) == len(sample.forced) == len(sample.logprobs) <= limit
        assert sample.end == ("stop" if sample.token_ids[-1] == STOP else "limit")
        num_cut += sample.forced[-1] and sample.end == "limit"
    assert num_cut > 20


def test_forced_tokens_have_no_logprob_and_sampled_ones_the_models_own(storyteller):
    asked = [ask(story_prompt(start, i), key=(start, i), max_new_tokens=25) for i, start in enumerate(STARTS)]
    prompt_of = {request.key: request.prompt_ids for request in asked}
    num_forced = 0
    for (key, _), sample in run(storyteller, asked, 4, FORCER).items():
        plain = plain_logprobs(storyteller, prompt_of[key], sample.token_ids)
        for logprob, forced, own in zip(sample.logprobs, sample.forced, plain, strict=True):
            assert logprob == (0.0 if forced else pytest.approx(own, abs=2e-4))
        num_forced += sum(sample.forced)
    assert num_forced > 50


def test_neighbours_with_annotations_leave_a_plain_row_alone(storyteller):
    plain = [ask(story_prompt("plain", i), key=i, max_new_tokens=20) for i in range(4)]
    others = [ask(story_prompt(start, i), key=start, max_new_tokens=30) for i, start in enumerate(STARTS[1:])]
    mixed = run(storyteller, [x for pair in zip(others, plain, strict=False) for x in pair] + others[4:], 6, FORCER)
    same({key: s for key, s in mixed.items() if isinstance(key[0], int)}, run(storyteller, plain, 2))


def test_random_stories_hold_only_right_results(storyteller):
    """In the text of each sample, what stands behind an `<<expr=` is the calculator's, up to where the limit cut it."""
    asked = [
        ask(story_prompt(start, i), key=start, num_samples=8, temperature=1.0, seed=i, max_new_tokens=40)
        for i, start in enumerate(STARTS)
    ]
    found = run(storyteller, asked, 13, FORCER)
    num_calculated = num_refused = 0
    for sample in found.values():
        text, done, calculated = words(sample), 0, 0
        while match := re.compile(r"<<(?!<)((?:(?!<<)[^>=\n])*)=").search(text, done):
            done = match.end()
            if (result := Calculator()(match[1])) is not None:
                forced = f"{result}>>{result}"
                assert text[done:].startswith(forced) or (forced.startswith(text[done:]) and sample.end == "limit")
                done += len(forced)
                calculated += 1
        assert sample.num_calculated == calculated
        num_calculated += calculated
        num_refused += sample.num_refused
    assert num_calculated > 30
    assert num_refused > 5
    same(found, run(storyteller, asked[::-1], 40, FORCER))
    single = [request for request in asked if request.key in STARTS[1:5]]
    same({key: s for key, s in found.items() if key[0] in STARTS[1:5]}, run(storyteller, single, 1, FORCER))


def test_a_prefix_may_end_inside_an_annotation(storyteller):
    """The row state machine has read the prefix; what the calculator did in there is not counted again."""
    prompt, prefix = story_prompt("sum", 1), tuple(encode(" has <<48"))
    sample = run(storyteller, [ask(prompt, key=0, prefix_ids=prefix, max_new_tokens=6)], 1, FORCER)[0, 0]
    assert words(sample) == "/2=24>>24 apples"
    assert sample.forced == [False, False, True, True, True, False]
    assert sample.num_calculated == 1


@pytest.mark.parametrize("written", range(4))
def test_a_prefix_may_end_where_the_calculator_writes(storyteller, written):
    """What it owes comes first, whatever the model would rather write, up to the limit."""
    owed = encode("24>>24")
    prefix = (*encode(" has <<48/2="), *owed[:written])
    owed = owed[written:]
    for limit in (1, 2, 12):
        request = ask(story_prompt("sum", 1), key=0, prefix_ids=prefix, max_new_tokens=limit)
        sample = run(storyteller, [request], 1, FORCER)[0, 0]
        assert sample.token_ids[: len(owed)] == owed[:limit]
        assert sample.forced == [True] * min(len(owed), limit) + [False] * (len(sample.token_ids) - len(owed))
        assert sample.num_calculated == bool(owed)
        assert len(sample.token_ids) == limit or sample.end == "stop"
    assert "".join(map(text_of, sample.token_ids[len(owed) :])) == " apples. four"


def test_annotations_of_the_prefix_are_not_counted_as_the_answers(storyteller):
    prefix = tuple(encode(" has <<48/2=24>>24 apples"))
    request = ask(story_prompt("sum", 1), key=0, prefix_ids=prefix, max_new_tokens=3)
    sample = run(storyteller, [request], 1, FORCER)[0, 0]
    assert words(sample).startswith(". four")
    assert (sample.num_calculated, sample.num_refused) == (0, 0)


# --- the model is left as it was -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(attention, training):
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    ids = torch.tensor([prompts(2)[1]])
    before = model(input_ids=ids).logits
    model.train(training)
    engine = Engine(model, writer=None, max_rows=2)
    list(engine.run([ask(p, max_new_tokens=4) for p in prompts(3)]))
    assert (model.config._attn_implementation, model.training) == (attention, training)
    stopped = engine.run([ask(p, num_samples=3, max_new_tokens=4) for p in prompts(5)])
    next(stopped)
    stopped.close()
    assert (model.config._attn_implementation, model.training) == (attention, training)
    after = model(input_ids=ids).logits
    assert after.requires_grad
    assert torch.equal(after, before)


def test_an_engine_that_was_stopped_early_starts_afresh(model_of):
    engine = Engine(model_of("llama"), writer=None, max_rows=2)
    stopped = engine.run([ask(p, num_samples=3, max_new_tokens=4) for p in prompts(5)])
    next(stopped)
    stopped.close()
    asked = [ask(p, key=i, max_new_tokens=5) for i, p in enumerate(prompts(3, seed=7))]
    found = {(sample.key, sample.index): sample for sample in engine.run(asked)}
    same(found, run(model_of("llama"), asked))


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    with watched(model, lambda _: 1 / 0), pytest.raises(ZeroDivisionError):
        list(Engine(model, writer=None, max_rows=2).run([ask(prompts(1)[0])]))
    assert model.config._attn_implementation == "sdpa"


# --- 4 bits and an adapter -------------------------------------------------------------------------------------------


def test_four_bits_with_an_adapter(tmp_path):
    """A QLoRA policy samples as it is, without being merged: the engine equals `generate` there too."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model("llama", intermediate_size=128).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes would compute in bf16 where float32 is asked for
    base = {p: generated(model, p, 10) for p in prompts(4)}
    torch.manual_seed(0)
    policy = peft.get_peft_model(
        model, peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    ).eval()
    expected = {p: generated(policy, p, 10) for p in prompts(4)}
    assert expected != base
    found = run(policy, [ask(p, max_new_tokens=10, num_samples=2) for p in prompts(4)], num_rows=3)
    for (prompt, _), sample in found.items():
        assert sample.token_ids == expected[prompt]
