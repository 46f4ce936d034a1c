"""The numbers of a model without its weights: what the planner needs to know.

Shapes are read from a `config.json`, or taken from `BASES`: the base models that
dpost-lite picks from.
Dense decoders of the Llama, Mistral, Qwen2, Qwen3 and Gemma kind, and T5, are counted exactly.
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
    def all_linear_sizes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the linear layers of the whole model, but for the head: what LoRA adapts."""
        return self.num_layers * self.linear_sizes

    @property
    def num_linear(self) -> int:
        """Weights of the linear layers that 4 bits shrink."""
        return sum(i * o for i, o in self.all_linear_sizes)

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

    @property
    def num_reading(self) -> int:
        """Weights that a token of a prompt is multiplied with, about: embeddings count in full."""
        return self.num_parameters

    @property
    def num_writing(self) -> int:
        """Weights that a token of an answer is multiplied with."""
        return self.num_parameters

    def num_lora(self, rank: int) -> int:
        """Weights of a LoRA adapter on all linear layers but the head."""
        return rank * sum(i + o for i, o in self.all_linear_sizes)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDecoderShape(ModelShape):
    """Sizes of a T5; `num_layers` are the decoder's."""

    num_encoder_layers: int
    is_gated: bool = True
    """Whether a feed-forward layer has two products in front of its activation (T5 1.1 and Flan-T5)."""
    num_norms: int = 3
    num_buckets: int = 32
    """Of relative positions."""

    @property
    def linear_sizes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the linear layers of one decoder layer: q, k, v, o twice, and the feed-forward layer."""
        own = self._encoder_sizes
        return own[:4] + own

    @property
    def _encoder_sizes(self) -> tuple[tuple[int, int], ...]:
        h, q, m = self.hidden, self.num_heads * self.head_dim, self.intermediate
        return (h, q), (h, q), (h, q), (q, h), *((1 + self.is_gated) * ((h, m),)), (m, h)

    @property
    def all_linear_sizes(self) -> tuple[tuple[int, int], ...]:
        """See `ModelShape`."""
        return self.num_encoder_layers * self._encoder_sizes + self.num_layers * self.linear_sizes

    @property
    def num_linear(self) -> int:
        """See `ModelShape`; the last product of a feed-forward layer is never quantised."""
        return sum(i * o for i, o in self.all_linear_sizes) - self._num_wo

    @property
    def num_small(self) -> int:
        """What is not quantised beside the embeddings: see `num_linear`; norms, and the biases by position."""
        norms = self.num_norms * self.num_layers + 2 * self.num_encoder_layers + 2
        return self._num_wo + norms * self.hidden + 2 * self.num_buckets * self.num_heads

    @property
    def num_reading(self) -> int:
        """See `ModelShape`: the encoder's, and what makes keys and values of its output for the decoder."""
        return self.num_encoder_layers * sum(i * o for i, o in self._encoder_sizes) + self._num_of_encoding

    @property
    def num_writing(self) -> int:
        """See `ModelShape`: the decoder's other ones and the head's."""
        layers = self.num_layers * sum(i * o for i, o in self.linear_sizes) - self._num_of_encoding
        return layers + self.vocabulary * self.hidden

    @property
    def _num_of_encoding(self) -> int:
        return 2 * self.num_layers * self.hidden * self.num_heads * self.head_dim

    @property
    def _num_wo(self) -> int:
        return (self.num_encoder_layers + self.num_layers) * self.intermediate * self.hidden

    def config(self) -> Any:
        """See `ModelShape`."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            "t5",
            num_layers=self.num_encoder_layers,
            num_decoder_layers=self.num_layers,
            d_model=self.hidden,
            d_ff=self.intermediate,
            num_heads=self.num_heads,
            d_kv=self.head_dim,
            vocab_size=self.vocabulary,
            relative_attention_num_buckets=self.num_buckets,
            feed_forward_proj="gated-gelu" if self.is_gated else "relu",
            tie_word_embeddings=self.is_tied,
            decoder_start_token_id=0,
        )


@dataclass(frozen=True, slots=True)
class Base:
    """A base model of the table: not an instruct one, not gated unless it says so.

    One that `is_named_only` is never picked: a run has it only if its recipe names it.
    """

    shape: ModelShape
    licence: str
    is_gated: bool = False
    is_named_only: bool = False


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


def _flan_t5(size: str, layers: int, hidden: int, intermediate: int, heads: int) -> Base:
    shape = EncoderDecoderShape(
        name=f"google/flan-t5-{size}", num_layers=layers, num_encoder_layers=layers, hidden=hidden,
        intermediate=intermediate, num_heads=heads, num_kv_heads=heads, head_dim=64, vocabulary=32_128, is_tied=False,
    )  # fmt: skip
    return Base(shape, "Apache-2.0", is_named_only=True)


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
        _flan_t5("base", 12, 768, 2048, 12),
        _flan_t5("large", 24, 1024, 2816, 16),
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
        if family == "t5":
            return _t5_shape_of(config, name)
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


def _t5_shape_of(config: dict[str, Any], name: str) -> ModelShape:
    heads, layers = int(config["num_heads"]), int(config["num_layers"])
    return EncoderDecoderShape(
        name=name,
        num_layers=int(config.get("num_decoder_layers") or layers),
        num_encoder_layers=layers,
        hidden=int(config["d_model"]),
        intermediate=int(config["d_ff"]),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=int(config["d_kv"]),
        vocabulary=int(config["vocab_size"]),
        is_tied=bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))),
        is_gated=str(config.get("feed_forward_proj", "relu")).startswith("gated"),
        num_buckets=int(config.get("relative_attention_num_buckets", 32)),
    )
