"""What is T5's own in a GGUF file: two stacks of layers, attention biased by distance, a token to start with.

llama.cpp has one form of each built in; a config that asks for another is refused.
"""

from typing import Any

MODEL_TYPE = ARCHITECTURE = "t5"  # by their names in transformers and in GGUF
EMBEDDING, HEAD = "shared.weight", "output.weight"  # likewise
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # other names of EMBEDDING

MAX_QUESTION = 512  # tokens; llama.cpp's encoder reads them in one batch. T5 itself has no limit
ONLY_HERE = "llama.cpp's own server and Ollama cannot run encoder–decoders; `dpost-lite solve` and `serve` can"

_MAX_DISTANCE = 128
_SIZES = {
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
    "rms_norm_eps": "layer_norm_epsilon",
}
_DEFAULTS = {  # of transformers' T5Config; published configs leave some out
    "d_kv": 64, "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32, "decoder_start_token_id": 0,
    "relative_attention_max_distance": _MAX_DISTANCE, "feed_forward_proj": "relu",
}  # fmt: skip


def normalise(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with its defaults, and its sizes under the names that other families have too."""
    config = {**config, **{key: value for key, value in _DEFAULTS.items() if config.get(key) is None}}
    sizes = {name: config[theirs] for name, theirs in _SIZES.items() if theirs in config}
    decoder_layers = config.get("num_decoder_layers") or config.get("num_layers")
    # before transformers 5, a config said by its tied head that outputs are scaled; since then, all say that it is tied
    scales = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return {
        **config,
        **sizes,
        "max_position_embeddings": MAX_QUESTION,
        "tie_word_embeddings": scales,
        "num_decoder_layers": decoder_layers,
        "scale_decoder_outputs": scales,
    }


def unsupported(config: dict[str, Any]) -> str | None:
    """Return the setting of a normalised config that llama.cpp cannot follow, if there is one."""
    if config["feed_forward_proj"] not in ("relu", "gated-gelu"):
        return f"feed_forward_proj {config['feed_forward_proj']}"
    if config["relative_attention_max_distance"] != _MAX_DISTANCE:
        return f"relative_attention_max_distance {config['relative_attention_max_distance']} (it has {_MAX_DISTANCE})"
    if config["num_decoder_layers"] > config["num_hidden_layers"]:
        return f"num_decoder_layers above num_layers, {config['num_decoder_layers']}"
    return None


def is_scaled(config: dict[str, Any]) -> bool:
    """Whether the head is the embedding, and the decoder's outputs are scaled before it; llama.cpp scales nothing.

    So such a model, the T5 of 2019, is written with a scaled head.
    """
    return config["model_type"] == MODEL_TYPE and config["scale_decoder_outputs"]


def head_scale(config: dict[str, Any]) -> float:
    """Return what the decoder's outputs are multiplied with."""
    return float(config["d_model"] ** -0.5)


def stays_float32(name: str, dtype: str) -> bool:
    """Whether a tensor, by its name in GGUF, is kept in float32 in a file of this type.

    A float16 tensor has llama.cpp narrow what it is multiplied with, and the activations of T5's feed-forward layers
    may be beyond float16's range. The bias by distance is small, and never narrowed.
    """
    is_down = name.startswith(("enc.", "dec.")) and name.endswith("ffn_down.weight")
    return name.endswith("attn_rel_b.weight") or (is_down and dtype == "f16")


def write(writer: Any, config: dict[str, Any]) -> None:
    """Add what other families do not have to a `gguf.GGUFWriter`."""
    writer.add_decoder_block_count(config["num_decoder_layers"])
    writer.add_relative_attn_buckets_count(config["relative_attention_num_buckets"])
    writer.add_decoder_start_token_id(config["decoder_start_token_id"])
