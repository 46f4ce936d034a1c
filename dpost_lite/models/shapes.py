"""The numbers of a model without its weights: what the planner needs to know.

Shapes are read from a `config.json`, or taken from `BASES`: the base models that
dpost-lite picks from.
Dense decoders of the Llama, Mistral, Qwen2, Qwen3 and Gemma kind are counted exactly.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpost_lite.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder; counts are in parameters."""

    name: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    num_norms: int = 2
    """Of a layer, each of `hidden` weights."""

    @property
    def linear_sizes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the linear layers of one decoder layer: q, k, v, o, gate, up, down."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, m = self.hidden, self.intermediate
        return (h, q), (h, kv), (h, kv), (q, h), (h, m), (h, m), (m, h)

    @property
    def num_linear(self) -> int:
        """Weights of the decoder's linear layers: what 4 bits shrink and LoRA adapts."""
        return self.num_layers * sum(i * o for i, o in self.linear_sizes)

    @property
    def num_embedding(self) -> int:
        """Weights of the embedding and, if it is not the same, of the head."""
        return self.vocabulary * self.hidden * (1 if self.is_tied else 2)

    @property
    def num_small(self) -> int:
        """Norms and biases."""
        layer = self.num_norms * self.hidden
        layer += (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.has_qkv_bias else 0
        layer += 2 * self.head_dim if self.has_qk_norm else 0
        return self.num_layers * layer + self.hidden

    @property
    def num_parameters(self) -> int:
        """All weights."""
        return self.num_linear + self.num_embedding + self.num_small

    def num_lora(self, rank: int) -> int:
        """Weights of a LoRA adapter on all linear layers but the head."""
        return self.num_layers * rank * sum(i + o for i, o in self.linear_sizes)

    def config(self) -> Any:
        """Return a transformers config of this shape, for a model with random weights."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            "qwen3" if self.has_qk_norm else "qwen2" if self.has_qkv_bias else "llama",
            num_hidden_layers=self.num_layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.is_tied,
        )

    @property
    def cache_position_values(self) -> int:
        """Keys and values of one position over all layers, in numbers (not bytes)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Base:
    """A base model of the table: not an instruct one, not gated unless it says so."""

    shape: ModelShape
    licence: str
    is_gated: bool = False


def _qwen3(name: str, layers: int, hidden: int, intermediate: int, heads: int, *, tied: bool) -> Base:
    shape = ModelShape(
        name=f"Qwen/{name}", num_layers=layers, hidden=hidden, intermediate=intermediate, num_heads=heads,
        num_kv_heads=8, head_dim=128, vocabulary=151_936, is_tied=tied, has_qk_norm=True,
    )  # fmt: skip
    return Base(shape, "Apache-2.0")


def _qwen2(
    name: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int = 128,
    vocabulary: int = 151_936, *, tied: bool,
) -> Base:  # fmt: skip
    shape = ModelShape(
        name=f"Qwen/{name}", num_layers=layers, hidden=hidden, intermediate=intermediate, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim, vocabulary=vocabulary, is_tied=tied, has_qkv_bias=True,
    )  # fmt: skip
    return Base(shape, "Apache-2.0")


def _llama(
    name: str, licence: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int,
    *, head_dim: int = 64, tied: bool = True, gated: bool = False,
) -> Base:  # fmt: skip
    shape = ModelShape(
        name=name, num_layers=layers, hidden=hidden, intermediate=intermediate, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim, vocabulary=vocabulary, is_tied=tied,
    )  # fmt: skip
    return Base(shape, licence, gated)


BASES = {
    base.shape.name: base
    for base in (
        _llama("HuggingFaceTB/SmolLM2-135M", "Apache-2.0", 30, 576, 1536, 9, 3, 49_152),
        _llama("HuggingFaceTB/SmolLM2-360M", "Apache-2.0", 32, 960, 2560, 15, 5, 49_152),
        _qwen2("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 64, tied=True),
        _qwen3("Qwen3-0.6B-Base", 28, 1024, 3072, 16, tied=True),
        _qwen2("Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, tied=True),
        _qwen3("Qwen3-1.7B-Base", 28, 2048, 6144, 16, tied=True),
        _qwen3("Qwen3-4B-Base", 36, 2560, 9728, 32, tied=True),
        _qwen2("Qwen2.5-7B", 28, 3584, 18_944, 28, 4, vocabulary=152_064, tied=False),
        _qwen3("Qwen3-8B-Base", 36, 4096, 12_288, 32, tied=False),
        _qwen3("Qwen3-14B-Base", 40, 5120, 17_408, 40, tied=False),
        _qwen2("Qwen2.5-32B", 64, 5120, 27_648, 40, 8, vocabulary=152_064, tied=False),
        _llama("meta-llama/Meta-Llama-3-8B", "Llama 3 Community", 32, 4096, 14_336, 32, 8, 128_256, head_dim=128,
               tied=False, gated=True),
        _llama("meta-llama/Llama-3.1-8B", "Llama 3.1 Community", 32, 4096, 14_336, 32, 8, 128_256, head_dim=128,
               tied=False, gated=True),
    )
}  # fmt: skip
"""By hub id, small ones first within a family."""


def read_shape(model_dir: Path) -> ModelShape:
    """Read the shape of a model folder from its `config.json`. Raises ModelError if it has none that can be planned."""
    path = model_dir / "config.json"
    try:
        return shape_of(json.loads(path.read_text(encoding="utf-8")), str(model_dir))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(f"model.name: {path} cannot be read; give a folder saved by transformers") from error


def shape_of(config: dict[str, Any], name: str) -> ModelShape:
    """Return the shape that a `config.json` describes. Raises ModelError where a number is missing."""
    config = config.get("text_config") or config
    family = str(config.get("model_type", ""))
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return ModelShape(
            name=name,
            num_layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            is_tied=bool(config.get("tie_word_embeddings", family.startswith("gemma"))),
            has_qkv_bias=family == "qwen2" or bool(config.get("attention_bias")),
            has_qk_norm=family in ("qwen3", "gemma3_text", "gemma3"),
            num_norms=4 if family in ("gemma2", "gemma3_text", "gemma3") else 2,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"model.name: the config.json of {name} lacks {error}; its memory cannot be planned"
        ) from error
