"""Shapes against the models that transformers would build of them."""

import json

import pytest

from dpost_lite.errors import ModelError
from dpost_lite.models.shapes import BASES, read_shape, shape_of


def built(shape):
    """The model of a shape, its weights never allocated."""
    torch = pytest.importorskip("torch")
    import transformers

    config = shape.config()
    auto_class = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
        model.tie_weights()
        if config.is_encoder_decoder and not shape.is_tied:  # transformers ties all T5s until a checkpoint is loaded
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


@pytest.mark.parametrize("name", BASES)
def test_parameters_are_those_of_the_model(name):
    shape = BASES[name].shape
    model = built(shape)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    linear = [m for n, m in model.named_modules() if type(m).__name__ == "Linear" and n != "lm_head"]
    quantised = [m for n, m in model.named_modules() if m in linear and not n.endswith(".wo")]
    assert shape.num_linear == sum(m.weight.numel() for m in quantised)
    assert shape.num_lora(16) == sum(16 * (m.in_features + m.out_features) for m in linear)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 0.1345),
        ("Qwen/Qwen2.5-1.5B", 1.544),
        ("Qwen/Qwen3-8B-Base", 8.19),
        ("meta-llama/Llama-3.1-8B", 8.03),
        ("google/flan-t5-base", 0.2476),
        ("google/flan-t5-large", 0.7832),
    ],
)
def test_known_sizes(name, billions):
    assert BASES[name].shape.num_parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_what_is_picked_is_open_to_all():
    gated = [name for name, base in BASES.items() if base.is_gated]
    assert gated
    assert all(name.startswith("meta-llama/") for name in gated)
    assert not any("nstruct" in name for name in BASES)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_a_config_file_is_read(model_of, tmp_path, family):
    model = model_of(family)
    model.config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"feed_forward_proj": "relu", "tie_word_embeddings": True, "d_kv": 8}])
def test_a_config_file_of_t5_is_read(tmp_path, settings):
    from conftest import tiny_t5

    model = tiny_t5(num_layers=3, num_decoder_layers=2, **settings)
    if settings:  # tied
        model.lm_head.weight = model.shared.weight
    model.config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())


def test_a_config_that_lacks_numbers_is_refused(tmp_path):
    with pytest.raises(ModelError, match="hidden_size"):
        shape_of({"num_attention_heads": 2}, "x")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 5}), encoding="utf-8")
    with pytest.raises(ModelError, match="num_attention_heads"):
        read_shape(tmp_path)
