"""Checks that take seconds, made before hours are spent."""

from pathlib import Path

from dpost_lite.local import gguf
from dpost_lite.local.config import read_config
from dpost_lite.methods import METHODS
from dpost_lite.models import hub
from dpost_lite.models.backend import choose_backend
from dpost_lite.models.dpo import check_loss
from dpost_lite.models.family import family_of
from dpost_lite.models.tracking import check_trackers
from dpost_lite.pipeline import gpu_check
from dpost_lite.pipeline.proof import disk_bytes
from dpost_lite.recipe import Recipe


def preflight(recipe: Recipe, folder: Path) -> Path:
    """Check, before hours are spent, that a run in `folder` can be finished; return the base model's folder.

    Raises RecipeError, ModelError or ExportError.
    """
    check_loss(recipe.dpo.loss)
    check_trackers(recipe.report_to)
    gpu_check.refuse(recipe)
    choose_backend(recipe.model)  # before a model is downloaded
    model_dir = hub.find(recipe.model.name)
    family = family_of(model_dir)
    family.check(recipe)
    check_loss(recipe.dpo.loss, family)
    choose_backend(recipe.model, family)
    config = read_config(model_dir)
    weights = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    trains_all = recipe.model.precision == "full"
    num_policies = sum(METHODS[recipe.method].num_trained(recipe.rounds).values()) if trains_all else 0  # in float32
    num_states = 2 * 3 if trains_all else 0  # weights and two moments of a checkpoint, and of the one before it
    num_files = 4 if recipe.export.quant == "auto" else 3  # merged 16-bit weights, f16 GGUF, quantised ones
    compared = disk_bytes(config["vocab_size"], recipe.sampling.max_new_tokens)
    gguf.check_disk(folder / "export", (num_files + 2 * num_policies + 2 * num_states) * weights + compared)
    return model_dir
