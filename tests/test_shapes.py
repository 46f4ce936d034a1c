"""Shapes against the models that transformers would build of them."""

import json

import pytest

from dpost_lite.errors import ModelError
from dpost_lite.models.shapes import BASES, read_shape, shape_of


def built(shape):
    """The model of a shape, its weights never allocated."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", BASES)
def test_parameters_are_those_of_the_model(name):
    shape = BASES[name].shape
    model = built(shape)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    linear = [m for n, m in model.named_modules() if type(m).__name__ == "Linear" and n != "lm_head"]
    assert shape.num_linear == sum(m.weight.numel() for m in linear)
    assert shape.num_lora(16) == sum(16 * (m.in_features + m.out_features) for m in linear)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 0.1345),
        ("Qwen/Qwen2.5-1.5B", 1.544),
        ("Qwen/Qwen3-8B-Base", 8.19),
        ("meta-llama/Llama-3.1-8B", 8.03),
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
