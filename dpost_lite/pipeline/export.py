"""Export a policy, an adapter on its base or weights of its own, to GGUF."""

import tempfile
from pathlib import Path

from dpost_lite.local import gguf
from dpost_lite.models import adapters
from dpost_lite.models.loading import load_prompter
from dpost_lite.pipeline.streaming import can_be_streamed, export_streamed
from dpost_lite.recipe import Recipe, solution_format


def export_gguf(recipe: Recipe, model_dir: Path, policy_dir: Path | None, out: Path) -> Path:
    """Write a policy as the GGUF file `out`, quantised as `recipe.export.quant` says; merged in 16 bit by peft if it
    cannot be streamed.
    """
    if can_be_streamed(policy_dir):
        return export_streamed(recipe, model_dir, policy_dir, out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="merged-") as folder:
        # on the CPU if the GPU had no room for merged weights to sample from
        where = None if recipe.sampling.weights == "merged" else "cpu"
        model = adapters.load_merged(model_dir, policy_dir, recipe.model, on=where)
        tokenizer = load_prompter(model_dir, recipe.model).tokenizer  # carries the prompt as its chat template
        for key, value in solution_format(recipe).items():
            setattr(model.config, f"dpost_lite_{key}", value)  # for the GGUF file's metadata
        adapters.save_merged(model, tokenizer, Path(folder))
        del model
        return gguf.export(Path(folder), out, quant=recipe.export.quant)
