"""Keys and values of running samples.

A prompt is stored once for all of its samples, and each sample's row holds only what was written in it, so that a
decode step, whose time is spent reading the cache, reads nothing twice.
"""

from typing import Any

import torch

from dpost_lite.errors import ModelError
from dpost_lite.sampling.request import CacheSize


class KVCache:
    """Keys and values of all layers, for the prompts and rows of `size` and `num_scratch` more rows for padding.

    Keys and values are `(layers, prompts or rows, kv_heads, length, head_dim)`.
    """

    def __init__(
        self, config: Any, size: CacheSize, *, num_scratch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        heads, head_dim = kv_shape(config)
        self.size = size

        def store(number: int, length: int) -> torch.Tensor:
            shape = (2, num_layers(config), number, heads, length, head_dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        self._prompts = store(size.num_prompts, size.prompt_length)
        self._rows = store(size.num_rows + num_scratch, size.row_length)
        self.prompt_keys, self.prompt_values = self._prompts
        self.row_keys, self.row_values = self._rows

    def move_prompt(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of prompt `source` over prompt `target`."""
        self._prompts[:, :, target, :, :length] = self._prompts[:, :, source, :, :length]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` over row `target`."""
        self._rows[:, :, target, :, :length] = self._rows[:, :, source, :, :length]

    def swap_rows(self, first: int, second: int, length: int) -> None:
        """Exchange the first `length` positions of two rows."""
        before = self._rows[:, :, first, :, :length].clone()
        self.move_row(second, first, length)
        self._rows[:, :, second, :, :length] = before


def num_layers(config: Any) -> int:
    """Return the number of layers that write an answer: all of them, or an encoder–decoder's decoder."""
    return getattr(config, "num_decoder_layers", None) or config.num_hidden_layers


def kv_shape(config: Any) -> tuple[int, int]:
    """Return (key-value heads, head dimension) of a transformers config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, head_dim


def position_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes that one cached position takes over all layers."""
    heads, head_dim = kv_shape(config)
    return 2 * num_layers(config) * heads * head_dim * dtype.itemsize


def check_layers(config: Any) -> None:
    """Raise ModelError if a model's config names layers that keep something other than keys and values.

    Of encoder–decoders, T5 alone can be sampled from.
    """
    if config.is_encoder_decoder and config.model_type != "t5":
        raise ModelError(f"{config.model_type}: of encoder–decoders, only T5 can be sampled from (Flan-T5, T5 1.1)")
    unknown = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(
            f"{config.model_type}: layers of {', '.join(sorted(unknown))} cannot be sampled from; take a model whose "
            "layers are all plain or windowed attention (Llama, Mistral, Qwen2, Qwen3, Gemma, …)"
        )
