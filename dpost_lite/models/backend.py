"""Which library trains adapters: plain transformers and peft, or unsloth."""

import importlib.util
from typing import Literal

from dpost_lite.errors import ModelError
from dpost_lite.models import hardware
from dpost_lite.models.family import DECODER_ONLY, Family
from dpost_lite.recipe import ModelRecipe
from dpost_lite.system.gpu_record import switched_off

Backend = Literal["plain", "unsloth"]

FIRST_IMPORTS: dict[Backend, str | None] = {"plain": None, "unsloth": "dpost_lite.models.unsloth_backend"}
"""The module that a training process must import before all others."""


def choose_backend(recipe: ModelRecipe, family: Family = DECODER_ONLY) -> Backend:
    """Return the backend for `model.backend` on this machine; "auto" is unsloth if it can run and passed its check.

    Raises ModelError if the recipe asks for unsloth and it cannot run here, cannot train such a model, or failed.
    """
    if recipe.backend == "plain" or recipe.precision == "full":
        return "plain"
    if family is not DECODER_ONLY:
        if recipe.backend == "unsloth":
            raise ModelError("model.backend=unsloth trains decoder-only models; for T5 use auto or plain")
        return "plain"
    can_run = hardware.device() == "cuda" and importlib.util.find_spec("unsloth") is not None
    if recipe.backend == "unsloth" and not can_run:
        raise ModelError(
            "model.backend=unsloth needs a CUDA GPU and pip install 'dpost-lite[unsloth]'; use auto or plain instead"
        )
    if not can_run:
        return "plain"
    if "unsloth" not in switched_off():
        return "unsloth"
    if recipe.backend == "unsloth":
        raise ModelError(
            "model.backend=unsloth: its training step failed the check on this GPU (`dpost-lite doctor` says how); use "
            "auto or plain instead, or test again with `dpost-lite doctor --gpu`"
        )
    return "plain"
