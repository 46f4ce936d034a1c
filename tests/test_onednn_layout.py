"""Blocked linear layers compute what plain ones do."""

import copy
import weakref

import pytest
import torch

from dpost_lite.models.onednn_layout import BlockedLinear, use_blocked_layout

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.mark.parametrize("num_tokens", [1, 16, 100])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_logits_are_the_same(model_of, family, num_tokens):
    model = model_of(family)
    blocked = use_blocked_layout(copy.deepcopy(model))
    assert not any(type(module) is torch.nn.Linear for module in blocked.modules())
    assert any(isinstance(module, BlockedLinear) for module in blocked.modules())
    ids = torch.arange(num_tokens)[None] % 60
    with torch.inference_mode():
        torch.testing.assert_close(blocked(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_plain_weights_are_freed_on_the_way(model_of, monkeypatch):
    """Or a model would be in memory twice."""
    model = copy.deepcopy(model_of("llama"))
    plain = [weakref.ref(module) for module in model.modules() if type(module) is torch.nn.Linear]
    held = []

    class Watched(BlockedLinear):
        def __init__(self, *given):
            super().__init__(*given)
            held.append(sum(module() is not None for module in plain))

    monkeypatch.setattr("dpost_lite.models.onednn_layout.BlockedLinear", Watched)
    use_blocked_layout(model)
    assert held[0] == len(plain) == 15
    assert held[-1] <= 4  # those of one module


def test_the_embedding_survives_a_tied_head(model_of):
    model = copy.deepcopy(model_of("llama", tie_word_embeddings=True))
    before = model.get_input_embeddings().weight.clone()
    blocked = use_blocked_layout(model)
    assert torch.equal(blocked.get_input_embeddings().weight, before)
    assert isinstance(blocked.lm_head, BlockedLinear)
