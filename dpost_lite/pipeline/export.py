"""Export a policy, an adapter on its base or weights of its own, to GGUF."""

import tempfile
from pathlib import Path

from dpost_lite.errors import ExportError
from dpost_lite.local import gguf
from dpost_lite.local.lora import write_lora
from dpost_lite.models import adapters
from dpost_lite.models.loading import load_prompter
from dpost_lite.models.merging import Adapter, TensorMerge, is_plain_lora
from dpost_lite.recipe import Recipe, solution_format


def export_gguf(recipe: Recipe, model_dir: Path, policy_dir: Path | None, out: Path) -> Path:
    """Write a policy as the GGUF file `out`, quantised as `recipe.export.quant` says, its adapter merged in float32.

    Tensors are merged and written one at a time (peak memory: local/gguf.py). Only adapters that are more than LoRA,
    which are not ours, are merged by peft, with all weights in memory.
    """
    quant, noted = recipe.export.quant, solution_format(recipe)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="merged-") as folder:
        tokenizer = load_prompter(model_dir, recipe.model).tokenizer  # carries the prompt as its chat template
        tokenizer.save_pretrained(folder)
        if policy_dir is not None and not adapters.is_adapter(policy_dir):
            return gguf.export(policy_dir, out, quant=quant, tokenizer_dir=Path(folder), noted=noted)
        if policy_dir is not None and not is_plain_lora(policy_dir):
            model = adapters.load_merged(model_dir, policy_dir, recipe.model, on="cpu")
            adapters.save_merged(model, tokenizer, Path(folder))
            del model
            return gguf.export(Path(folder), out, quant=quant, noted=noted)
        merge = None
        if policy_dir is not None or recipe.model.precision == "4bit":
            merge = TensorMerge(recipe.model, policy_dir)
            merge.check(gguf.names_in_gguf(model_dir).keys())
        return gguf.export(model_dir, out, quant=quant, tokenizer_dir=Path(folder), change=merge, noted=noted)


def export_lora(model_dir: Path, policy_dir: Path | None, out: Path) -> Path:
    """Write a policy's adapter alone as the GGUF file `out`, for llama.cpp to add to the base's file.

    Raises ExportError if the policy is no adapter, or more than LoRA.
    """
    if policy_dir is None or not adapters.is_adapter(policy_dir):
        raise ExportError(f"--lora: {policy_dir or 'the base'} is not a LoRA adapter; leave out --lora")
    if not is_plain_lora(policy_dir):
        raise ExportError(f"--lora: {policy_dir} is more than LoRA (adapter_config.json); leave out --lora")
    adapter = Adapter(policy_dir)
    return write_lora(model_dir, out, names=adapter.names, factors=adapter.factors, scale=adapter.scale)
