"""unsloth: LoRA training with faster kernels, where CUDA and the package are present.

Importing it changes transformers, peft and trl in over a hundred places, so this module must be the first import of a
process that does nothing but train (see `backend.FIRST_IMPORTS`). Sampling and export never use it.
"""

import os
from pathlib import Path
from typing import Any

from dpost_lite.errors import ModelError
from dpost_lite.models import hardware
from dpost_lite.recipe import LoraRecipe, ModelRecipe
from dpost_lite.system.machine import cache_dir

# Where unsloth puts the code that it generates and runs, read when it is imported. Its default is the current folder,
# which others may be able to write to.
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth-compiled"))
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

from unsloth import FastLanguageModel

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load(model_dir: Path, recipe: ModelRecipe, *, max_length: int) -> Any:
    """Return the base for sequences of up to `max_length` tokens, in 4 bit or in 16."""
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(model_dir),
        use_exact_model_name=True,  # or a hub name becomes another, already quantised model
        max_seq_length=max_length,
        dtype=hardware.compute_dtype(recipe.compute_dtype),
        load_in_4bit=recipe.precision == "4bit",
        load_in_8bit=False,
        load_in_16bit=recipe.precision == "16bit",
        full_finetuning=False,
        fast_inference=False,
        trust_remote_code=False,
        use_gradient_checkpointing="unsloth",
    )
    return model


def create(model: Any, recipe: LoraRecipe, *, seed: int) -> Any:
    """Wrap `model` with a fresh LoRA adapter named "default" on all linear layers but the head; seeded."""
    return FastLanguageModel.get_peft_model(
        model,
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(LINEAR_LAYERS),
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=seed,
        use_rslora=False,
        init_lora_weights=True,
    )


def attach(model: Any, adapter_dir: Path, recipe: LoraRecipe, *, seed: int) -> Any:
    """Wrap `model` with the adapter saved in `adapter_dir`, named "default", to train on.

    Its weights are put into a fresh adapter: only one that unsloth itself made runs on its kernels. Raises ModelError
    if they do not fit.
    """
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    policy = create(model, recipe, seed=seed)
    try:
        found: Any = set_peft_model_state_dict(policy, load_file(adapter_dir / "adapter_model.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the adapter {adapter_dir} is damaged, or of another base ({str(error).splitlines()[0]}); "
            "--restart-from its stage trains it again"
        ) from error
    if strange := [*found.unexpected_keys, *(key for key in found.missing_keys if "lora_" in key)]:
        raise ModelError(f"the adapter {adapter_dir} does not fit this base: {strange[0]} has no counterpart")
    return policy
