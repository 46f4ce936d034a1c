"""LoRA adapters: create, load, save, and merge into 16-bit weights (Hu et al. 2021; the papers fine-tune all weights).

Merging dequantises the base, adds the adapter, and keeps the result in 16 bit. Requantising it to NF4 would erase the
adapter: an update of 0.5 % of a weight's size is far smaller than the gap between two NF4 codes. The adapter is merged
into the *dequantised* base, not into the original weights, because it was trained on the former: for a 135M model,
merging into the original weights gives a KL divergence from the trained policy that is 100 times larger.
"""

import sys
from pathlib import Path
from typing import Any

from dpost_lite.errors import ModelError, is_out_of_memory
from dpost_lite.models.backends import UNSLOTH, count_as_plain, load, quiet_transformers
from dpost_lite.models.onednn_layout import to_onednn_layout
from dpost_lite.recipe import LoraRecipe, ModelRecipe, Recipe
from dpost_lite.runs.folder import read_json


def create(model: Any, recipe: LoraRecipe, *, seed: int) -> Any:
    """Wrap `model` with a new LoRA adapter named "default" on all linear layers except the head; seeded.

    peft's `prepare_model_for_kbit_training` is not called: it casts embedding and head to float32, which costs 4 GB for
    an 8B model.
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
    """Wrap `model` with the adapter saved in `adapter_dir`, under the name "default".

    Raises ModelError if the adapter is missing, damaged, or belongs to another base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (adapter_dir / "adapter_model.safetensors").is_file():  # peft would try a pickle, then the hub
        raise ModelError(f"the adapter {adapter_dir} holds no adapter_model.safetensors; pickles are not loaded")
    try:
        return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"the adapter {adapter_dir} is damaged or belongs to another base ({str(error).splitlines()[0]}); "
            "use --restart-from with its stage to train it again"
        ) from error


def is_adapter(policy_dir: Path) -> bool:
    """Whether a policy was saved as an adapter rather than as all of its weights."""
    return (policy_dir / "adapter_config.json").is_file()


def base_of(adapter_dir: Path) -> str:
    """Return the name of the base that an adapter was trained on. Raises ModelError if it names none."""
    name = read_json(adapter_dir / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise ModelError(f"the adapter {adapter_dir} names no base; give one with --model")
    return str(name)


def save(policy: Any, tokenizer: Any, out: Path) -> None:
    """Save the trained weights in float32: the adapter "default" without DPO's frozen reference copy, or all weights.

    16 bit would lose the training: at the papers' learning rate for DPO, most updates are smaller than half the
    spacing of 16-bit numbers.
    """
    if hasattr(policy, "peft_config"):
        policy.save_pretrained(str(out), selected_adapters=["default"])
    else:
        with quiet_transformers():
            policy.save_pretrained(out)
            tokenizer.save_pretrained(out)


def load_for_sft(model_dir: Path, recipe: Recipe) -> Any:
    """Return the model to train with SFT: the base with a new adapter, or the base itself if all weights are trained.

    Raises ModelError if the base cannot be loaded.
    """
    if UNSLOTH in sys.modules:
        from dpost_lite.models import unsloth_backend

        base = unsloth_backend.load(model_dir, recipe.model, max_length=recipe.sft.max_length)
        return unsloth_backend.create(base, recipe.lora, seed=recipe.seed)
    model = load(model_dir, recipe.model.precision, compute=recipe.model.compute_dtype)
    return model if recipe.model.precision == "full" else create(model, recipe.lora, seed=recipe.seed)


def load_for_dpo(model_dir: Path, policy_dir: Path, recipe: Recipe) -> Any:
    """Return the saved SFT policy in `policy_dir`, ready to continue training with DPO.

    Raises ModelError if base or policy cannot be loaded.
    """
    if not is_adapter(policy_dir):
        return load(policy_dir, "full")
    if UNSLOTH in sys.modules:
        from dpost_lite.models import unsloth_backend

        base = unsloth_backend.load(model_dir, recipe.model, max_length=recipe.dpo.max_length)
        return unsloth_backend.attach(base, policy_dir, recipe.lora, seed=recipe.seed)
    base = load(model_dir, recipe.model.precision, compute=recipe.model.compute_dtype)
    return attach(base, policy_dir, trainable=True)


def load_policy(model_dir: Path, policy_dir: Path | None, recipe: Recipe) -> Any:
    """Return a policy to sample from, as `sampling.weights` says: merged weights, or the quantised base with its adapter.

    `policy_dir` None is the base. Raises ModelError if base or policy cannot be loaded.
    """
    if recipe.sampling.weights == "merged" or not (policy_dir is None or is_adapter(policy_dir)):
        return to_onednn_layout(load_merged(model_dir, policy_dir, recipe.model), recipe.sampling.max_rows)
    model = load(model_dir, recipe.model.precision, compute=recipe.model.compute_dtype)
    return model if policy_dir is None else attach(model, policy_dir, trainable=False).eval()


def load_merged(model_dir: Path, policy_dir: Path | None, recipe: ModelRecipe, *, on: str | None = None) -> Any:
    """Return a model with plain weights in the compute dtype: the dequantised base with the policy's adapter merged.

    A policy without an adapter is loaded as it is; `policy_dir` None is the base. The result samples faster than 4-bit
    weights and computes the same function as the model that was trained, up to rounding. `on` is the device (None: the
    GPU if there is one). Raises ModelError if base or policy cannot be loaded.
    """
    compute = recipe.compute_dtype
    if policy_dir is not None and not is_adapter(policy_dir):
        return load(policy_dir, "16bit", compute=compute, on=on)
    model = load(model_dir, "4bit" if recipe.precision == "4bit" else "16bit", compute=compute, on=on)
    if recipe.precision == "4bit":
        with quiet_transformers():
            model = model.dequantize()
        count_as_plain(model)
    if policy_dir is not None:
        model = attach(model, policy_dir, trainable=False).merge_and_unload()
    return model.eval()


def save_merged(model: Any, tokenizer: Any, out: Path) -> None:
    """Save merged weights in 16 bit, with the tokenizer.

    float16 has three more mantissa bits than bfloat16; bfloat16 is used only if a weight exceeds float16's range.
    """
    import torch

    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    with quiet_transformers():
        model.to(torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
