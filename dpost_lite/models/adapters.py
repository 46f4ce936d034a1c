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
from dpost_lite.recipe import LoraRecipe


def create(model: Any, recipe: LoraRecipe, *, seed: int) -> Any:
    """Wrap `model` with a fresh LoRA adapter named "default" on all linear layers but the head; seeded."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
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
    from peft import PeftModel, prepare_model_for_kbit_training
    from safetensors import SafetensorError

    if trainable and getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the adapter {adapter_dir} does not fit this base: {str(error).splitlines()[0]}") from error


def save(model: Any, adapter_dir: Path) -> None:
    """Save the adapter "default" alone; DPO's frozen reference copy stays out of the folder."""
    model.save_pretrained(str(adapter_dir), selected_adapters=["default"])


def load_merged(model_dir: Path, adapter_dir: Path | None, quantization: Quantization = "nf4") -> Any:
    """Return plain weights in the compute type: the dequantised base, plus the adapter if one is given.

    The result samples faster than 4-bit weights and answers like the model that was trained.
    """
    model = load(model_dir, quantization)
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
