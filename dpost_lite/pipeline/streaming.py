"""Merge a policy and write it to GGUF one tensor at a time; or its adapter alone."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from dpost_lite.errors import ExportError
from dpost_lite.local import gguf, t5
from dpost_lite.local.lora import write_lora
from dpost_lite.models import adapters
from dpost_lite.models.adapters import Base
from dpost_lite.models.family import ENCODER_DECODER, family_of
from dpost_lite.models.loading import load_prompter
from dpost_lite.models.merging import Adapter, TensorMerge, is_plain_lora
from dpost_lite.recipe import Recipe


def can_be_streamed(policy_dir: Path | None) -> bool:
    """Whether a policy is the base, all of its weights, or a LoRA adapter that is no more than that, as ours are."""
    return policy_dir is None or not adapters.is_adapter(policy_dir) or is_plain_lora(policy_dir)


def export_streamed(
    recipe: Recipe,
    model_dir: Path,
    policy_dir: Path | None,
    out: Path,
    *,
    quant: Literal["f16", "q8_0"],
    onto: Base = "dequantized",
    noted: Mapping[str, str],
) -> Path:
    """Write a policy that can be streamed as the GGUF file `out`, without llama.cpp, with `noted` in its metadata.

    An adapter is merged in float32, `onto` the base that it was trained on or the original one. Peak memory:
    local/gguf.py. Raises ExportError, or ModelError for an adapter of another base.
    """
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="tokenizer-") as folder:
        # carries the prompt as its chat template
        load_prompter(model_dir, recipe.model).tokenizer.save_pretrained(folder)
        merge = None
        if policy_dir is not None and not adapters.is_adapter(policy_dir):
            model_dir = policy_dir
        elif policy_dir is not None or recipe.model.precision == "4bit":
            precision = "16bit" if onto == "original" else recipe.model.precision
            merge = TensorMerge(recipe.model.model_copy(update={"precision": precision}), policy_dir)
            merge.check(gguf.names_in_gguf(model_dir).keys())
        return gguf.write_gguf(model_dir, out, dtype=quant, tokenizer_dir=Path(folder), change=merge, noted=noted)


def adapter_alone(model_dir: Path, policy_dir: Path | None) -> Path:
    """Return the folder of an adapter that `export_lora` can write. Raises ExportError if it is none, or more, or if
    nothing could add it to the file of its base.
    """
    if family_of(model_dir) is ENCODER_DECODER:
        raise ExportError(f"--lora: {t5.ONLY_HERE}, with merged weights; leave out --lora")
    if policy_dir is None or not adapters.is_adapter(policy_dir):
        raise ExportError(f"--lora: {policy_dir or 'the base'} is not a LoRA adapter; leave out --lora")
    if not is_plain_lora(policy_dir):
        raise ExportError(f"--lora: {policy_dir} is more than LoRA (adapter_config.json); leave out --lora")
    return policy_dir


def export_lora(model_dir: Path, adapter_dir: Path, out: Path) -> Path:
    """Write an adapter alone as the GGUF file `out`, for llama.cpp to add to the base's file."""
    adapter = Adapter(adapter_dir)
    return write_lora(model_dir, out, names=adapter.names, factors=adapter.factors, scale=adapter.scale)
