"""Experiment trackers that transformers reports training metrics to: `report_to` of the recipe.

Every training is one run there, named after its folder: rehearsal/round-1/dpo. TensorBoard's files are in
RUN/logs/tensorboard.
"""

import os
import shutil
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
STAY_HERE = ("tensorboard", "wandb")  # the latter in its offline mode
PROJECT = "dpost-lite"


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError if a tracker is not installed, or would use the network although --offline forbids it."""
    for name in names:
        if _is_offline() and name not in STAY_HERE:
            raise RecipeError(f"report_to: {name} does not work with --offline; {' and '.join(STAY_HERE)} do")
        if not any(find_spec(module) for module in MODULES[name]):
            raise RecipeError(
                f"report_to: {name} is not installed; run pip install {MODULES[name][0]}, or leave it out"
            )


def track(names: Sequence[str], out: Path) -> dict[str, Any]:
    """Prepare the environment of this process for a training in folder `out`; return its Trainer's arguments.

    What the user has set there (WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME …) is left as it is.
    """
    if not names:
        return {"report_to": "none"}
    run = next((parent for parent in out.parents if (parent / "run.json").is_file()), out.parent)
    stage = out.relative_to(run).as_posix().removesuffix(".partial")
    logs = run / "logs" / "tensorboard" / stage
    if not any(out.rglob("checkpoint-*")):  # a new start: do not mix it with the logs of an archived training
        shutil.rmtree(logs, ignore_errors=True)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(logs))
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)
    if _is_offline() and os.environ.get("WANDB_MODE") != "disabled":
        os.environ["WANDB_MODE"] = "offline"
    return {"report_to": list(names), "run_name": f"{run.name}/{stage}", "project": PROJECT}


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE") == "1"
