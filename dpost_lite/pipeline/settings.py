"""What a stage was made with, for its fingerprint: its parts of the recipe, the base, packages and compute type."""

import platform
from pathlib import Path
from typing import Any

from dpost_lite.models import hardware, hub
from dpost_lite.models.family import family_of
from dpost_lite.recipe import Recipe
from dpost_lite.sandbox.choose import packages
from dpost_lite.system.machine import minor_version

MODEL_PARTS = ("model", "calculator")
# packages whose minor version may change results
PACKAGES = ("dpost-lite", "torch", "transformers", "trl", "peft", "bitsandbytes")
MACHINE_KEYS = (
    ("model", "backend"),
    ("sft", "micro_batch_size"),
    ("dpo", "micro_batch_size"),
    ("sampling", "weights"),
    ("sampling", "max_rows"),
    ("sampling", "memory_gib"),
)
"""They fit the work to a machine and change no result."""

ADDED_KEYS: dict[tuple[str, str], Any] = {
    ("sft", "max_steps"): None,
    ("sft", "calculated_in_loss"): True,
    ("dpo", "calculated_in_loss"): True,
    ("dpo", "epochs"): 1.0,
    ("dpo", "max_logp_drop"): None,
    ("sampling", "top_k"): None,
    ("pairs", "equal_steps"): False,
    ("pairs", "stepwise"): 0.0,
    ("labels", "duplicates"): "jaccard",
    ("export", "max_loss"): 1.0,
    ("export", "merge"): "auto",  # older files keep the merge that they have
}
"""Keys added later, with the value that does what was done before: at it, older stages keep their fingerprint."""


class StageSettings:
    """Settings of one run's stages, by parts of the recipe."""

    def __init__(self, recipe: Recipe, model_dir: Path) -> None:
        self._recipe = recipe
        self._base = hub.fingerprint(model_dir)
        dtype = hardware.compute_dtype(recipe.model.compute_dtype, float16=family_of(model_dir).uses_float16)
        self._compute_dtype = str(dtype).removeprefix("torch.")
        self._packages = {name: minor_version(name) for name in PACKAGES}

    def of(self, *parts: str) -> dict[str, Any]:
        """Return the parts of the recipe that a stage depends on, without the keys that fit the work to a machine."""
        values = self._recipe.model_dump(mode="json")
        for part, key in MACHINE_KEYS:
            values[part].pop(key)
        for (part, key), before in ADDED_KEYS.items():
            if values[part][key] == before:
                values[part].pop(key)
        if self._recipe.labels.threshold is None:
            values["labels"].pop("jaccard_threshold")  # without effect
        values["model"]["compute_dtype"] = self._compute_dtype
        for key in ("gate", "keep"):  # of the stage after the training
            values["dpo"].pop(key)
        values["data"].pop("also_test")  # of stages of their own, so that a finished run can be given more test sets
        for key in ("from_pairs", "from_rests"):  # the stage's inputs show it
            values["labels"].pop(key)
        for key in ("samples_for_pairs", "samples_for_labels"):  # only sampling stages depend on these
            values["sampling"].pop(key)
        made_by = {"base": self._base, "packages": self._packages} if "model" in parts else {}
        with_code = self._with_code(values, parts) if self._recipe.solutions == "code" else {}
        return {"seed": values["seed"], **made_by, **{part: values[part] for part in parts}, **with_code}

    def _with_code(self, values: dict[str, Any], parts: tuple[str, ...]) -> dict[str, Any]:
        """Return what is added for solutions with code: the format, and for stages that run some, what runs it."""
        runs_code = "calculator" in parts or "data" in parts
        if not runs_code:
            return {"solutions": "code"}
        name = self._recipe.code.sandbox
        made_by = {package: minor_version(package) for package in packages(name)}
        if name != "monty":
            made_by["python"] = ".".join(platform.python_version_tuple()[:2])
        return {"solutions": "code", "code": values["code"], "sandbox": made_by}
