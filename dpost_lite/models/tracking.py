"""Experiment trackers, which transformers hands a training's metrics to: `report_to` of the recipe.

Every training is one run there, named after its folder: rehearsal/round-1/dpo. TensorBoard's files lie in the stage's
own folder, so `tensorboard --logdir RUN` shows all of them.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpost_lite.errors import RecipeError

MODULES = {  # any one will do; the first is what to install
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
PROJECT = "dpost-lite"


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError if a tracker is not installed."""
    for name in names:
        if not any(find_spec(module) for module in MODULES[name]):
            raise RecipeError(
                f"report_to: {name} is not installed; run pip install {MODULES[name][0]}, or leave it out"
            )


def tracker_arguments(names: Sequence[str], out: Path) -> dict[str, Any]:
    """Return the arguments of a Trainer that tracks the training in folder `out`; others go through the environment.

    What the user has set there (WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME …) is left as it is.
    """
    if not names:
        return {"report_to": "none"}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "tensorboard")
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        os.environ["WANDB_MODE"] = "offline"  # --offline asks nobody
    run = next((parent for parent in out.parents if (parent / "run.json").is_file()), out.parent)
    name = f"{run.name}/{out.relative_to(run).as_posix().removesuffix('.partial')}"
    return {"report_to": list(names), "run_name": name, "project": PROJECT}
