"""The exported GGUF file of a run, or one by itself, and how its solutions are written."""

from pathlib import Path
from typing import Any

from dpost_lite.errors import RunError
from dpost_lite.local.gguf import FORMAT_KEYS
from dpost_lite.local.header import read_header
from dpost_lite.recipe import Recipe, with_format
from dpost_lite.runs.folder import Run, read_json


def file_to_solve_with(source: str) -> tuple[Path, Recipe]:
    """Return the GGUF file `source`, or that of the finished run in folder `source`, and the recipe of its solutions.

    Raises RunError if the run has no exported model, ExportError if the file is damaged.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return path, recipe_of_file(path)
    run = Run.open(path)
    return path / "export" / finished_export(run)["file"], run.recipe


def recipe_of_file(path: Path) -> Recipe:
    """Return the defaults for a GGUF file, and how its solutions are written. Raises ExportError if it is damaged."""
    header = read_header(path)
    return with_format({key: header.get(f"dpost_lite.{key}") for key in FORMAT_KEYS})


def finished_export(run: Run) -> dict[str, Any]:
    """Return the metrics of a run's export stage: `policy`, and `file` in RUN/export. Raises RunError if not done."""
    done = run.path / "export" / "done.json"
    if not done.is_file():
        raise RunError(f"{run.path} has no exported model yet; run its `dpost-lite run` command again to finish it")
    return read_json(done)["metrics"]
