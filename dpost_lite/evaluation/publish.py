"""Find what to export, and write what stands beside the GGUF file: a model card for the hub, a Modelfile for Ollama."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpost_lite.errors import ExportError, RecipeError, RunError
from dpost_lite.evaluation.model_card import MARK, Release, costs, model_card
from dpost_lite.evaluation.targets import Target, find_target, finished_export, policies_of, policy_dir
from dpost_lite.local.modelfile import write_modelfile
from dpost_lite.models import adapters, hub
from dpost_lite.problems.records import file_name
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import validate
from dpost_lite.runs.folder import Run

_KINDS = ("run.json", "adapter_config.json", "config.json")
CARD, MODELFILE = "README.md", "Modelfile"
_MODELFILE_MARK = "Written by dpost-lite. Serve the model with: ollama create NAME -f Modelfile"


def find_release(
    source: str,
    settings: Mapping[str, Any],
    *,
    policy: str | None = None,
    base: str | None = None,
    out: Path | None = None,
) -> Release:
    """Return what to export: the best policy of the run in folder `source`, or `policy`; or else an adapter or a model.

    `base` overrides the base that an adapter names. The file is `out`, or RUN/export/model-QUANT.gguf, or for an
    adapter or model exports/NAME/model-QUANT.gguf. `settings` replace those of the recipe's `export`, unless None.
    Raises RunError if `source` is nothing that can be exported, or `policy` or `base` does not apply; RecipeError for a
    wrong setting; ModelError if the base is missing.
    """
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        raise RunError(f"export: {source} is a GGUF file already; give the run, adapter or model that it was made from")
    if path.is_dir() and not any((path / name).is_file() for name in _KINDS):
        raise RunError(f"export: {source} is not a run, an adapter or a model (no {', '.join(_KINDS)})")
    target = find_target(source, policy, base=base)
    recipe = target.recipe
    for key, value in settings.items():
        if value is not None:
            changed = {**recipe.export.model_dump(), key: value}
            recipe = validate({**recipe.model_dump(), "export": changed}, where=f"--{key.replace('_', '-')}")
    target = replace(target, recipe=recipe)
    name = "-".join(["model", *(policy.split("/") if policy else []), recipe.export.quant])
    if target.run is None:
        ((known, folder),) = target.policies.items()
        file = out or Path("exports", file_name(path.resolve().name if path.is_dir() else source), f"{name}.gguf")
    else:
        known, folder = _policy_of(target.run, policy, is_named=out is not None)
        file = out or path / "export" / f"{name}.gguf"
    if settings.get("merge") and not adapters.has_two_merges(recipe.model, folder):
        recipe = _with_merge(target, folder)
        target = replace(target, recipe=recipe)
    return Release(file, target, known, folder, hub.find(recipe.model.name))


def _with_merge(target: Target, folder: Path | None) -> Recipe:
    """Return the recipe for an adapter that is said to be of a 4-bit base. Raises RecipeError if it cannot be."""
    recipe = target.recipe
    if target.run is not None or folder is None:
        raise RecipeError(f"--merge: no adapter of a 4-bit base is exported ({recipe.model.precision}); leave it out")
    if recipe.export.merge == "auto":
        raise RecipeError("--merge auto: no run is given, whose dev problems decide; give dequantized or original")
    precision = "4bit" if recipe.export.merge == "dequantized" else recipe.model.precision
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"precision": precision})})


def _policy_of(run: Run, policy: str | None, *, is_named: bool) -> tuple[str, Path | None]:
    """Return a policy of a run, or its best, by the name it was scored under if there is one."""
    finished = {} if policy and is_named else finished_export(run)
    folder = policy_dir(run, policy or finished["policy"])
    named = {folder: name for name, folder in policies_of(run).items()}
    return named.get(folder, policy or ""), folder


def describe_run(run: Path) -> list[Path]:
    """Write both beside the file that a finished run exported. Raises as `find_release` and `write_beside`."""
    return write_beside(find_release(str(run), {}, out=run / "export" / finished_export(Run.open(run))["file"]))


def write_beside(release: Release) -> list[Path]:
    """Write the model card and the Modelfile beside the GGUF file, over those of an earlier export; return their paths.

    Without the Modelfile if Ollama cannot run the model.
    A README.md or Modelfile of another origin stays: ours is then named after the GGUF file. Raises ExportError if they
    cannot be written.
    """
    try:
        card, modelfile = (_own(release.file, *named) for named in ((CARD, MARK), (MODELFILE, _MODELFILE_MARK)))
        card.write_text(model_card(release, modelfile=modelfile.name), encoding="utf-8")
        if not release.runs_elsewhere:
            return [card]
        notes = [_MODELFILE_MARK, *costs(release)]
        limit = release.recipe.sampling.max_new_tokens
        write_modelfile(release.file, modelfile, notes=notes, max_new_tokens=limit)
    except OSError as error:
        raise ExportError(f"{release.file.parent} cannot be written ({error.strerror}); give another --out") from error
    return [card, modelfile]


def _own(file: Path, name: str, mark: str) -> Path:
    """Return the path beside `file` to write `name` to: another one if there is a file of somebody else."""
    path = file.with_name(name)
    is_ours = not path.exists() or mark in path.read_text(encoding="utf-8", errors="replace")
    return path if is_ours else file.with_name(f"{file.stem}.{name}")
