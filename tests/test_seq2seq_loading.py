"""Encoder–decoders as Flan-T5 is saved: their head, their types, LoRA and its merge."""

import json

import pytest
import torch
from conftest import tiny_model
from seq2seq import labelled, make_policy, save_as_flan, tiny_t5
from tiny_t5 import t5_tokenizer
from tiny_training import LORA, model_recipe, whole

from dpost_lite.errors import ModelError, RecipeError
from dpost_lite.models import adapters, hardware, loading
from dpost_lite.models.backend import choose_backend
from dpost_lite.models.family import ENCODER_DECODER, family_of
from dpost_lite.models.merging import TensorMerge
from dpost_lite.models.onednn_layout import BlockedLinear, use_blocked_layout
from dpost_lite.pipeline.preflight import preflight
from dpost_lite.problems.prompts import EncoderDecoderPrompter
from dpost_lite.recipe import DpoRecipe, ModelRecipe, Recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_as_flan(tiny_t5(), tmp_path_factory.mktemp("flan"))


@pytest.fixture(scope="module")
def prompter():
    return EncoderDecoderPrompter(t5_tokenizer())


@pytest.fixture(scope="module")
def policy_dir(base, tmp_path_factory):
    return make_policy(base, tmp_path_factory.mktemp("policy"))


def logits(model, prompter):
    item = labelled(prompter, 3)[2]
    prompt, answer = prompter.prompt_ids(item.question), item.token_ids
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]])).logits[0]


@pytest.mark.parametrize("precision", ["full", "16bit"])
def test_a_head_of_its_own_is_loaded_and_saved(base, prompter, tmp_path, precision):
    """transformers takes T5's head for tied whatever the config says; outputs are not scaled, as they were saved."""
    original = tiny_t5()
    assert family_of(base) is ENCODER_DECODER
    folder = base
    for again in range(3):
        model = loading.load(folder, precision, compute="float32")
        assert not model.config.scale_decoder_outputs
        model.tie_weights()  # which would tie them if the config said so
        assert torch.equal(model.lm_head.weight, original.lm_head.weight)
        assert torch.equal(model.shared.weight, original.shared.weight)
        assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight
        assert torch.equal(logits(model, prompter), logits(original, prompter))
        folder = tmp_path / str(again)
        adapters.save(model, prompter.tokenizer, folder)
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_head_is_still_scaled(prompter, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)).eval()
    model.save_pretrained(tmp_path)
    loaded = loading.load(tmp_path, "full")
    assert loaded.config.scale_decoder_outputs
    assert loaded.lm_head.weight is loaded.shared.weight
    assert torch.equal(logits(loaded, prompter), logits(model, prompter))


def test_a_merged_model_keeps_its_head(base, policy_dir, prompter, tmp_path):
    merged = adapters.load_merged(base, policy_dir, model_recipe("4bit", "float32"))
    expected = logits(merged, prompter)
    head = merged.lm_head.weight.clone()
    assert torch.equal(head, tiny_t5().lm_head.weight)
    adapters.save_merged(merged, prompter.tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    again = loading.load(tmp_path, "full")
    assert not again.config.scale_decoder_outputs
    assert torch.equal(again.lm_head.weight, head.half().float())
    assert torch.allclose(logits(again, prompter), expected, atol=0.1)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_wo_stays_unquantised_and_lora_adapts_it_but_not_the_head(base, compute):
    model = adapters.create(loading.load(base, compute=compute), LORA, seed=1)
    dtype = getattr(torch, compute)
    adapted = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_modules() if "lora_A" in name
    }
    assert adapted == {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.weight"):
            assert parameter.dtype == (dtype if ".wo." in name else torch.uint8), name
    assert model.lm_head.weight.dtype == model.shared.weight.dtype == dtype
    assert json.loads(json.dumps(model.peft_config["default"].task_type)) == "SEQ_2_SEQ_LM"


def test_t5_never_computes_in_float16(base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert hardware.compute_dtype(on="cuda") is torch.float16
    assert hardware.compute_dtype(on="cuda", float16=ENCODER_DECODER.uses_float16) is torch.float32
    seen = []
    monkeypatch.setattr(hardware, "compute_dtype", lambda *_, **how: seen.append(how["float16"]) or torch.float32)
    loading.load(base, "16bit")
    assert seen == [False]


@pytest.mark.parametrize("precision", ["4bit", "16bit"])
@pytest.mark.parametrize("has_adapter", [True, False])
def test_the_merge_by_tensors_is_that_of_peft(base, policy_dir, precision, has_adapter):
    from safetensors.torch import load_file

    recipe, adapter = model_recipe(precision, "float32"), policy_dir if has_adapter else None
    expected = adapters.load_merged(base, adapter, recipe, on="cpu").state_dict()
    tensors = load_file(base / "model.safetensors")
    merge = TensorMerge(recipe, adapter)
    merge.check(tensors)
    changed = set()
    for name, values in tensors.items():
        found = merge(name, values.clone())
        assert torch.allclose(found.float(), expected[name], rtol=0, atol=1e-6), name
        if not torch.equal(found, values):
            changed.add(name.removesuffix(".weight").rpartition(".")[2])
    quantised = {"q", "k", "v", "o", "wi_0", "wi_1"} if precision == "4bit" else set()
    assert changed == quantised | ({"q", "k", "v", "o", "wi_0", "wi_1", "wo"} if has_adapter else set())
    assert adapters.has_two_merges(recipe, policy_dir) == (precision == "4bit")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_blocked_layers_compute_the_same(base, prompter, compute):
    plain = loading.load(base, "16bit", compute=compute)
    expected = logits(plain, prompter)
    blocked = use_blocked_layout(plain)
    assert isinstance(blocked.decoder.block[0].layer[2].DenseReluDense.wo, BlockedLinear)
    tolerance = 1e-5 if compute == "float32" else 0.1
    assert torch.allclose(logits(blocked, prompter), expected, rtol=tolerance, atol=tolerance)


def test_an_adapter_of_a_decoder_is_refused(base, tmp_path):
    adapters.save(adapters.create(tiny_model("llama"), LORA, seed=1), None, tmp_path)
    with pytest.raises(ModelError, match="of another base"):
        adapters.attach(loading.load(base, "full"), tmp_path, trainable=False)


def test_a_policy_to_sample_from_is_the_merged_one(base, policy_dir, prompter):
    policy = adapters.load_policy(base, policy_dir, whole(compute="float32"))
    attached = adapters.attach(loading.load(base, compute="float32"), policy_dir, trainable=False)
    assert torch.allclose(logits(policy, prompter), logits(attached, prompter), atol=1e-4)


def test_unsloth_is_for_decoders(monkeypatch):
    monkeypatch.setattr("dpost_lite.models.backend.hardware.device", lambda: "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    assert choose_backend(ModelRecipe(), ENCODER_DECODER) == "plain"
    with pytest.raises(
        ModelError, match=r"model\.backend=unsloth trains decoder-only models; for T5 use auto or plain"
    ):
        choose_backend(ModelRecipe(backend="unsloth"), ENCODER_DECODER)


def test_the_preflight_refuses_what_t5_cannot_be_trained_with(base, tmp_path):
    def check(**sections):
        return preflight(Recipe(**{"model": ModelRecipe(name=str(base)), **sections}), tmp_path)

    with pytest.raises(RecipeError, match=r"dpo\.loss: ipo is for decoder-only models; for T5 use sigmoid"):
        check(dpo=DpoRecipe(loss="ipo"))
    with pytest.raises(ModelError, match=r"model\.backend=unsloth"):
        check(model=ModelRecipe(name=str(base), backend="unsloth"))
