"""LoRA adapters: create, load, save, and merge in 16 bit (Hu et al. 2021; the papers fine-tune in full).

Merging dequantises the base, adds the adapter and stays in 16 bit. A merge back into NF4 would erase it: an update of
0.5 % of a weight's size lies far below the distance of two NF4 codes. What is merged is the *dequantised* base,
because that is the base the adapter was trained on: against the original weights a 135M model's KL divergence is 100
times larger. Which of the two answers better, an export can measure (`export.merge`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dpost_lite.errors import ModelError, is_out_of_memory
from dpost_lite.models.backend import Backend
from dpost_lite.models.family import family_of_model
from dpost_lite.models.loading import dequantize, load
from dpost_lite.models.onednn_layout import use_blocked_layout
from dpost_lite.recipe import LoraRecipe, ModelRecipe, Recipe
from dpost_lite.runs.folder import read_json
from dpost_lite.system.quiet import quiet_transformers

Base = Literal["dequantized", "original"]
"""What an adapter trained on a 4-bit base is merged onto: that base dequantised, or the original 16-bit weights."""


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
        task_type=family_of_model(model).task_type,
    )
    return get_peft_model(model, config)


def attach(model: Any, adapter_dir: Path, *, trainable: bool) -> Any:
    """Wrap `model` with the adapter saved in `adapter_dir`, named "default". Raises ModelError if it cannot be used."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (adapter_dir / "adapter_model.safetensors").is_file():  # peft would look for a pickle, and ask the hub
        raise ModelError(f"the adapter {adapter_dir} has no adapter_model.safetensors; pickles are never read")
    try:
        return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"the adapter {adapter_dir} is damaged, or of another base ({str(error).splitlines()[0]}); "
            "--restart-from its stage trains it again"
        ) from error


def add_reference(policy: Any) -> None:
    """Add a frozen copy "ref" of the adapter "default": DPO's reference."""
    policy.add_adapter("ref", policy.peft_config["default"])
    for name, parameter in policy.named_parameters():
        if ".default." in name:
            policy.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


@contextmanager
def reference(policy: Any) -> Iterator[None]:
    """Within the context `policy` computes with the adapter "ref" instead of "default"."""
    policy.set_adapter("ref")
    try:
        yield
    finally:
        policy.set_adapter("default")


def is_adapter(policy_dir: Path) -> bool:
    """Whether a policy was saved as an adapter, and not as all of its weights."""
    return (policy_dir / "adapter_config.json").is_file()


def has_two_merges(recipe: ModelRecipe, policy_dir: Path | None) -> bool:
    """Whether a policy is an adapter that was trained on a 4-bit base, and so can be merged onto either `Base`."""
    return policy_dir is not None and is_adapter(policy_dir) and recipe.precision == "4bit"


def base_of(adapter_dir: Path) -> str:
    """Return the name of the base that an adapter was trained on. Raises ModelError if it names none."""
    name = read_json(adapter_dir / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise ModelError(f"the adapter {adapter_dir} names no base; give one with --model")
    return str(name)


def save(policy: Any, tokenizer: Any, out: Path) -> None:
    """Save what was trained: the adapter "default" alone, without DPO's frozen reference copy; or all weights.

    In float32: at the papers' learning rate for DPO most updates are below half a step of 16 bit.
    """
    if hasattr(policy, "peft_config"):
        policy.save_pretrained(str(out), selected_adapters=["default"])
    else:
        with quiet_transformers():
            policy.save_pretrained(out)
            tokenizer.save_pretrained(out)


def load_for_sft(model_dir: Path, recipe: Recipe, backend: Backend) -> Any:
    """Return the base with a fresh adapter to train, or the base itself if all weights are trained."""
    if backend == "unsloth":
        from dpost_lite.models import unsloth_backend

        base = unsloth_backend.load(model_dir, recipe.model, max_length=recipe.sft.max_length)
        return unsloth_backend.create(base, recipe.lora, seed=recipe.seed)
    model = load(model_dir, recipe.model.precision, compute=recipe.model.compute_dtype)
    return model if recipe.model.precision == "full" else create(model, recipe.lora, seed=recipe.seed)


def load_for_dpo(model_dir: Path, policy_dir: Path, recipe: Recipe, backend: Backend) -> Any:
    """Return a saved policy, to train on."""
    if not is_adapter(policy_dir):
        return load(policy_dir, "full")
    if backend == "unsloth":
        from dpost_lite.models import unsloth_backend

        base = unsloth_backend.load(model_dir, recipe.model, max_length=recipe.dpo.max_length)
        return unsloth_backend.attach(base, policy_dir, recipe.lora, seed=recipe.seed)
    base = load(model_dir, recipe.model.precision, compute=recipe.model.compute_dtype)
    return attach(base, policy_dir, trainable=True)


def load_policy(model_dir: Path, policy_dir: Path | None, recipe: Recipe) -> Any:
    """Return a policy to sample from: merged weights, or the 4-bit base with its adapter, as the recipe says."""
    if recipe.sampling.weights == "merged" or not (policy_dir is None or is_adapter(policy_dir)):
        return use_blocked_layout(load_merged(model_dir, policy_dir, recipe.model))
    model = load(model_dir, recipe.model.precision, compute=recipe.model.compute_dtype)
    return model if policy_dir is None else attach(model, policy_dir, trainable=False).eval()


def load_merged(
    model_dir: Path,
    policy_dir: Path | None,
    recipe: ModelRecipe,
    *,
    onto: Base = "dequantized",
    on: str | None = None,
) -> Any:
    """Return plain weights in the compute type: the dequantised base, plus the adapter if the policy is one.

    The result samples faster than 4-bit weights and answers like the model that was trained; merged `onto` the original
    base, it may answer better or worse. `on` overrides the default device.
    """
    compute = recipe.compute_dtype
    if policy_dir is not None and not is_adapter(policy_dir):
        return load(policy_dir, "16bit", compute=compute, on=on)
    is_dequantized = recipe.precision == "4bit" and onto == "dequantized"
    model = load(model_dir, "4bit" if is_dequantized else "16bit", compute=compute, on=on)
    if is_dequantized:
        dequantize(model)
    if policy_dir is not None:
        model = attach(model, policy_dir, trainable=False).merge_and_unload()
    return model.eval()


def save_merged(model: Any, tokenizer: Any, out: Path) -> None:
    """Save merged weights in 16 bit with their tokenizer.

    float16 keeps three more bits of each weight than bfloat16; a model with a weight beyond its range is kept in
    bfloat16.
    """
    import torch

    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    dtype = torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16
    for weights in model.parameters():  # not the buffers: rotary frequencies are exact in float32 alone
        weights.data = weights.data.to(dtype)
    with quiet_transformers():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
