"""Translate a model's config.json to GGUF metadata: sizes, context length, rotary embedding.

Settings that GGUF or llama.cpp cannot express are refused: a file that drops one would run, and answer worse.
"""

from pathlib import Path
from typing import Any

from dpost_lite.errors import ExportError
from dpost_lite.local import gemma3, t5
from dpost_lite.local.vocabulary import read_model_json

# transformers' model_type -> GGUF's architecture (Mistral's dense models are Llamas there)
FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    gemma3.MODEL_TYPE: "gemma3",
    t5.MODEL_TYPE: t5.ARCHITECTURE,
}
_OWN = {gemma3.MODEL_TYPE: gemma3, t5.MODEL_TYPE: t5}  # modules for what one family alone has
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


def read_config(model_dir: Path) -> dict[str, Any]:
    """Read config.json. Raises ExportError if the model is not of a supported type and form."""
    config = read_model_json(model_dir / "config.json")
    family = config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ExportError(f"{model_dir}: models of type {family!r} cannot be exported to GGUF; supported: {known}")
    own = _OWN.get(family)
    if own is not None:
        config = own.normalise(config)
    if missing := [key for key in _NEEDED if not isinstance(config.get(key), int)]:
        raise ExportError(f"{model_dir}: config.json lacks {', '.join(missing)}; save or download the model again")
    if "quantization_config" in config:
        raise ExportError(f"{model_dir} has quantised weights; merge them into 16-bit weights and export those")
    if config.get("hidden_act", "silu") != "silu":
        raise ExportError(
            f"{model_dir}: llama.cpp's {family} supports the activation 'silu' only, not {config['hidden_act']!r}; "
            "train from another base model"
        )
    if own is not None and (setting := own.unsupported(config)) is not None:
        raise ExportError(
            f"{model_dir}: llama.cpp's {FAMILIES[family]} has no {setting}; train from another base model"
        )
    return config


def write_config(writer: Any, config: dict[str, Any]) -> None:
    """Add the config to a `gguf.GGUFWriter`. Raises ExportError for a rotary embedding that GGUF cannot express."""
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or num_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if _has_rope(config):
        writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    if (own := _OWN.get(config["model_type"])) is not None:
        own.write(writer, config)
    if not _has_rope(config):
        return
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _context_length(config: dict[str, Any]) -> int:
    """Return the context length, capped at the sliding window: llama.cpp uses full attention for these models."""
    windowed = config["model_type"] == "mistral" or config.get("use_sliding_window")
    window = config.get("sliding_window") if windowed else None
    return min(config["max_position_embeddings"], window or config["max_position_embeddings"])


def _has_rope(config: dict[str, Any]) -> bool:
    return config["model_type"] != t5.MODEL_TYPE


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters from `rope_parameters` (transformers 5) or the older keys, with type and theta set.

    Raises ExportError for a type, or a parameter of one, that GGUF cannot express.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", "default")
    rope["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    understood = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    if rope["rope_type"] == "llama3":
        understood |= {"low_freq_factor", "high_freq_factor"}
    defaults = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "truncate": True, "partial_rotary_factor": 1}
    others = [key for key, value in rope.items() if key not in understood and value != defaults.get(key, ...)]
    if rope["rope_type"] not in ("default", "linear", "yarn", "llama3") or others:
        detail = f"type {rope['rope_type']!r}" + (f" with {', '.join(others)}" if others else "")
        raise ExportError(
            f"config.json: a rotary embedding of {detail} cannot be exported to GGUF; train from another base model"
        )
    if rope["rope_type"] != "default":
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return rope


def rope_factors(config: dict[str, Any]) -> Any:
    """Return Llama 3's rotary frequency divisors, float32 (head_dim / 2,), or None for other types and for T5.

    Long wavelengths are divided by `factor`, short ones kept, those between interpolated (Llama 3.1, `apply_scaling`).
    """
    import numpy as np

    if not _has_rope(config) or (rope := _rope(config))["rope_type"] != "llama3":
        return None
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / rope["factor"] + smooth)).astype(np.float32)
