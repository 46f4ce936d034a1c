"""LoRA adapters: create, load, save, and merge in 16 bit (Hu et al. 2021; the papers fine-tune in full).

Merging dequantises the base, adds the adapter and stays in 16 bit. A merge back into NF4 would erase it: an update of
0.5 % of a weight's size lies far below the distance of two NF4 codes. What is merged is the *dequantised* base,
because that is the base the adapter was trained on: against the original weights a 135M model's KL divergence is 100
times larger.
"""

from pathlib import Path
from typing import Any

from dpost_lite.errors import ModelError
from dpost_lite.models.backends import Quantization, count_as_plain, load, quiet_transformers
from dpost_lite.models.packing import pack
from dpost_lite.recipe import LoraRecipe, Recipe


def create(model: Any, recipe: LoraRecipe, *, seed: int) -> Any:
    """Wrap `model` with a fresh LoRA adapter named "default" on all linear layers but the head; seeded.

    peft's prepare_model_for_kbit_training is left out: it would hold embedding and head in float32, 4 GB more for 8 B.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def attach(model: Any, adapter_dir: Path, *, trainable: bool) -> Any:
    """Wrap `model` with the adapter saved in `adapter_dir`, named "default"."""
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the adapter {adapter_dir} does not fit this base: {str(error).splitlines()[0]}") from error


def save(model: Any, adapter_dir: Path) -> None:
    """Save the adapter "default" alone; DPO's frozen reference copy stays out of the folder."""
    model.save_pretrained(str(adapter_dir), selected_adapters=["default"])


def load_policy(model_dir: Path, adapter_dir: Path | None, recipe: Recipe) -> Any:
    """Return a policy to sample from: merged weights, or the 4-bit base with its adapter, as the recipe says."""
    if recipe.sampling.weights == "merged":
        return pack(load_merged(model_dir, adapter_dir, recipe.model.quantization), recipe.sampling.max_rows)
    model = load(model_dir, recipe.model.quantization)
    return model if adapter_dir is None else attach(model, adapter_dir, trainable=False).eval()


def load_merged(
    model_dir: Path, adapter_dir: Path | None, quantization: Quantization = "nf4", *, on: str | None = None
) -> Any:
    """Return plain weights in the compute type: the dequantised base, plus the adapter if one is given.

    The result samples faster than 4-bit weights and answers like the model that was trained. `on` names a device where
    it shall be other than the first choice.
    """
    model = load(model_dir, quantization, on=on)
    if quantization == "nf4":
        with quiet_transformers():
            model = model.dequantize()
        count_as_plain(model)
    if adapter_dir is not None:
        model = attach(model, adapter_dir, trainable=False).merge_and_unload()
    return model.eval()


def save_merged(model: Any, tokenizer: Any, out: Path) -> None:
    """Save merged weights in 16 bit with their tokenizer.

    float16 keeps three more bits of each weight than bfloat16; a model with a weight beyond its range is kept in
    bfloat16.
    """
    import torch

    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    with quiet_transformers():
        model.to(torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
