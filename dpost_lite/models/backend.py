"""Which library trains adapters: plain transformers and peft, or unsloth."""

import importlib.util
from typing import Literal

from dpost_lite.errors import ModelError
from dpost_lite.models import hardware
from dpost_lite.recipe import ModelRecipe

Backend = Literal["plain", "unsloth"]

FIRST_IMPORTS: dict[Backend, str | None] = {"plain": None, "unsloth": "dpost_lite.models.unsloth_backend"}
"""The module that a training process must import before all others."""


def choose_backend(recipe: ModelRecipe) -> Backend:
    """Return the backend for `model.backend` on this machine; "auto" is unsloth if it can run.

    Raises ModelError if the recipe asks for unsloth and it cannot run here.
    """
    if recipe.backend == "plain" or recipe.precision == "full":
        return "plain"
    can_run = hardware.device() == "cuda" and importlib.util.find_spec("unsloth") is not None
    if recipe.backend == "unsloth" and not can_run:
        raise ModelError(
            "model.backend=unsloth needs a CUDA GPU and pip install 'dpost-lite[unsloth]'; use auto or plain instead"
        )
    return "unsloth" if can_run else "plain"
