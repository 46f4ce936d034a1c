"""What is Gemma 3's own in a GGUF file: windows of attention, two rotary embeddings, norms that are stored less one.

llama.cpp scales embeddings by sqrt(hidden) and computes q·k norms and tanh-GELU by itself. Where it has one form built
in, and a config asks for another, the model is refused.
"""

from typing import Any

MODEL_TYPE = "gemma3_text"
_PERIOD = 6  # every sixth layer attends to everything
_LAYERS_27B = 62  # llama.cpp tells sizes by their number of layers
_ABSENT = ("attn_logit_softcapping", "attention_bias", "use_bidirectional_attention")
_DEFAULTS = {  # of transformers' Gemma3TextConfig; published configs leave some out
    "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "num_key_value_heads": 4,
}  # fmt: skip


def normalise(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with its defaults, and `rope_parameters` those of the layers with full attention."""
    config = {**config, **{key: value for key, value in _DEFAULTS.items() if config.get(key) is None}}
    ropes = config.get("rope_parameters") or {}
    if "full_attention" not in ropes:  # before transformers 5
        theta, local = config.get("rope_theta", 1e6), config.get("rope_local_base_freq", 1e4)
        full = {**(config.get("rope_scaling") or {"rope_type": "default"}), "rope_theta": theta}
        ropes = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return {**config, "rope_parameters": ropes["full_attention"], "rope_sliding": ropes["sliding_attention"]}


def unsupported(config: dict[str, Any]) -> str | None:
    """Return the setting of a normalised config that llama.cpp cannot follow, if there is one."""
    num_layers, scalar = config["num_hidden_layers"], config["query_pre_attn_scalar"]
    built_in = (
        config["hidden_size"] // config["num_attention_heads"] if num_layers == _LAYERS_27B else config["head_dim"]
    )
    if scalar != built_in:
        return f"query_pre_attn_scalar {scalar} (it takes {built_in} for a model of {num_layers} layers)"
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or _PERIOD
    kinds = config.get("layer_types") or _layer_types(num_layers, pattern)
    if kinds != _layer_types(num_layers, _PERIOD):
        return "layer_types in which not every sixth layer alone has full attention"
    if config["hidden_activation"] != "gelu_pytorch_tanh":
        return f"hidden_activation {config['hidden_activation']}"
    if config["rope_sliding"].get("rope_type", "default") != "default":
        return "a scaled rotary embedding in layers with a window"
    return next((f"{key} {config[key]}" for key in _ABSENT if config.get(key)), None)


def write(writer: Any, config: dict[str, Any]) -> None:
    """Add what other families do not have to a `gguf.GGUFWriter`."""
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base_swa(config["rope_sliding"].get("rope_theta", 1e4))
    if cap := config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(cap)


def is_stored_less_one(source: str) -> bool:
    """Whether a tensor holds the weights of a norm, by its name in transformers: 1 + weight is what scales."""
    return source.endswith("norm.weight")


def _layer_types(num_layers: int, period: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)]
