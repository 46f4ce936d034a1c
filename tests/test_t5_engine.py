"""The engine on T5: what it has beyond decoder-only models. The tests of every architecture take it in too."""

import copy
from operator import sub

import pytest

torch = pytest.importorskip("torch")

from conftest import tiny_t5  # noqa: E402
from memory_efficient import efficient_attention  # noqa: E402
from stories import Dictation, ask, generated, plain_logprobs, prompts, run, same  # noqa: E402

from dpost_lite.errors import ModelError  # noqa: E402
from dpost_lite.sampling import attention, model_runner  # noqa: E402
from dpost_lite.sampling.attention import flash_for_cpu, memory_efficient, products_if_many  # noqa: E402
from dpost_lite.sampling.engine import Engine  # noqa: E402
from dpost_lite.sampling.request import Request  # noqa: E402


@pytest.mark.parametrize("settings", [{"tie_word_embeddings": True}, {"feed_forward_proj": "relu"}])
def test_the_first_t5_too(settings):
    """T5 1.0 scales the decoder's output; it has another feed-forward layer."""
    model = tiny_t5(**settings)
    assert model.config.scale_decoder_outputs == settings.get("tie_word_embeddings", False)
    for (prompt, _), sample in run(model, [ask(p, max_new_tokens=12) for p in prompts(6)], num_rows=3).items():
        assert sample.token_ids == generated(model, prompt, 12)
        assert sample.logprobs == pytest.approx(plain_logprobs(model, prompt, sample.token_ids), abs=2e-4)


def test_a_decoder_of_another_depth():
    model = tiny_t5(num_layers=1, num_decoder_layers=3)
    for (prompt, _), sample in run(model, [ask(p, max_new_tokens=12) for p in prompts(6)], num_rows=3).items():
        logprobs = plain_logprobs(model, prompt, sample.token_ids)
        assert sample.logprobs == pytest.approx(logprobs, abs=2e-4)


def test_encoder_and_cross_attention_read_each_problem_once(model_of):
    model, encoded, projected = model_of("t5"), [], []
    hooks = [
        model.encoder.register_forward_pre_hook(
            lambda _, args, inputs: encoded.append(inputs["input_ids"].numel()), with_kwargs=True
        ),
        *(
            getattr(block.layer[1].EncDecAttention, name).register_forward_pre_hook(
                lambda _, args: projected.append(args[0].shape[-2])
            )
            for block in model.decoder.block
            for name in "kv"
        ),
    ]
    run(model, [ask(p, num_samples=5, max_new_tokens=8, temperature=1.0) for p in prompts(6)], num_rows=4)
    for hook in hooks:
        hook.remove()
    assert sum(encoded) == sum(map(len, prompts(6)))
    assert sum(projected) == 2 * len(model.decoder.block) * sum(encoded)


def test_each_sample_takes_a_step_for_each_of_its_tokens(model_of):
    """The start token has no step of its own."""
    engine = Engine(model_of("t5"), writer=None, max_rows=5)
    samples = list(engine.run(ask(p, num_samples=2, max_new_tokens=9) for p in prompts(4)))
    assert engine.statistics.num_row_steps == sum(len(sample.token_ids) for sample in samples)


def test_a_prefix_is_read_but_not_returned(model_of):
    model = model_of("t5")
    whole = {p: generated(model, p, 12) for p in prompts(8)}
    asked = [ask(p, prefix_ids=tuple(a[:4]), max_new_tokens=8) for p, a in whole.items() if len(a) > 4]
    assert len(asked) >= 3
    for (prompt, _), sample in run(model, asked, num_rows=2).items():
        assert sample.token_ids == whole[prompt][4:]


def test_distances_beyond_the_last_bucket(model_of):
    """Answers far longer than T5's largest distance."""
    model = model_of("t5")
    asked = [ask(p, max_new_tokens=70, stop_ids=frozenset({63})) for p in prompts(3)]
    for (prompt, _), sample in run(model, asked, num_rows=2).items():
        assert sample.token_ids == generated(model, prompt, 70, stops=(63,))
        assert len(sample.token_ids) > 40


def test_samples_depend_on_neither_rows_nor_order_nor_neighbours(model_of):
    model, writer = model_of("t5"), Dictation()
    asked = [
        ask(p, num_samples=k, temperature=0.9, seed=k, max_new_tokens=14) for k, p in enumerate(prompts(6), start=1)
    ]
    few = run(model, asked, num_rows=3, writer=writer)
    same(few, run(model, asked, num_rows=16, writer=writer))
    same(few, run(model, asked[::-1], num_rows=5, writer=writer))
    assert len({tuple(sample.token_ids) for sample in few.values()}) > 12


def test_rows_come_from_the_memory_budget(model_of):
    """A row holds the start token and the prefix too; a prompt is as long as its question."""
    model, found = model_of("t5"), []
    asked = ask((5,) * 7, prefix_ids=(6,) * 3, num_samples=64, max_new_tokens=10)
    assert Request(key=0, prompt_ids=(1,), stop_ids=frozenset()).row_length == 300
    for memory_gib in (None, 1e-4):
        engine = Engine(model, writer=None, max_rows=64, memory_gib=memory_gib)
        list(engine.run([asked]))
        size = engine.statistics.cache_size
        found.append(size.num_rows)
        assert (size.prompt_length, size.row_length) == (7, 14)
    position = 2 * 2 * 4 * 16 * 4  # keys and values, layers, heads, head dimension, bytes
    logits = 64 * 4 * size.num_logit_copies
    assert found[0] == 64
    assert found[1] == int((1e-4 * 2**30 - size.num_prompts * 7 * position) // (14 * position + logits))


@pytest.mark.parametrize("kernel", [flash_for_cpu, products_if_many, memory_efficient, None])
def test_bfloat16_is_as_exact_as_transformers(monkeypatch, kernel):
    """On every machine, the kernels for CPUs, that of GPUs, and products."""
    rounded = tiny_t5().bfloat16()
    exact = copy.deepcopy(rounded).float()
    monkeypatch.setattr(model_runner, "kernel_for", lambda *_, **__: kernel)
    monkeypatch.setattr(attention, "PRODUCTS_FROM", 4)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", efficient_attention)
    asked = [ask(p, max_new_tokens=10, temperature=1.0, stop_ids=frozenset()) for p in prompts(6)]
    ours, theirs = list[float](), list[float]()
    for sample in list(Engine(rounded, writer=None, max_rows=4, static=True).run(asked)):
        logprobs, of_transformers = (plain_logprobs(model, sample.key, sample.token_ids) for model in (exact, rounded))
        ours += map(abs, map(sub, sample.logprobs, logprobs))
        theirs += map(abs, map(sub, of_transformers, logprobs))
    assert 0 < sum(ours) < 1.3 * sum(theirs)


def test_the_model_is_left_as_it_was():
    model = tiny_t5()
    ids, names = torch.tensor([prompts(2)[1]]), [*model.state_dict()]
    before = model(input_ids=ids, decoder_input_ids=ids).logits
    stopped = Engine(model, writer=None, max_rows=2).run([ask(p, num_samples=3, max_new_tokens=4) for p in prompts(5)])
    next(stopped)
    with pytest.raises(RuntimeError, match="another engine"):
        next(Engine(model, writer=None, max_rows=2).run([ask(prompts(1)[0])]))
    stopped.close()
    assert [*model.state_dict()] == names
    after = model(input_ids=ids, decoder_input_ids=ids).logits
    assert after.requires_grad
    assert torch.equal(after, before)
    assert {part.config._attn_implementation for part in (model, model.encoder, model.decoder)} == {"sdpa"}


def test_four_bits_with_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from dpost_lite.models.loading import load

    tiny_t5(d_ff=128).save_pretrained(tmp_path)
    model = load(tmp_path, "4bit", compute="float32")
    base = {p: generated(model, p, 10) for p in prompts(4)}
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    policy = peft.get_peft_model(model, lora).eval()
    found = run(policy, [ask(p, max_new_tokens=10) for p in prompts(4)], num_rows=3)
    assert all(sample.token_ids == generated(policy.model, p, 10) for (p, _), sample in found.items())
    assert any(sample.token_ids != base[p] for (p, _), sample in found.items())


def test_other_encoder_decoders_are_refused():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    model = BartForConditionalGeneration(BartConfig(vocab_size=20, d_model=16, **sizes))
    with pytest.raises(ModelError, match="bart: of encoder–decoders, only T5"):
        Engine(model, writer=None, max_rows=1)
