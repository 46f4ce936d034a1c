"""What a finished run was made of and made: `manifest.json`, and the verb `verify`.

Holds the command, the recipe in full, versions, hardware and commit, time and peak memory of each stage, and SHA-256
of the data files, of the base's weights, and of every file that the run left, but for its journal, logs and report.
Written when the last stage is done; a stage that is done afterwards removes it.
"""

import hashlib
import subprocess
import time
from pathlib import Path

from dpost_lite.errors import RunError
from dpost_lite.recipe import Recipe
from dpost_lite.runs.folder import Run, is_archived, read_json, stages_done, write_json
from dpost_lite.system.machine import describe

NAME = "manifest.json"
CHANGING = {NAME, "events.jsonl", ".lock"}  # by commands that leave the run as it is
TAKEN = ("seconds", "ram_bytes", "gpu_bytes")


def write_manifest(run: Run, recipe: Recipe, model_dir: Path, command: list[str]) -> None:
    """Write the manifest of a finished run. `model_dir` holds the base, `command` is what the user typed."""
    weights = sorted(model_dir.glob("*.safetensors"))
    write_json(
        run.path / NAME,
        {
            "command": command,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": _commit(),
            "machine": describe(),
            "recipe": recipe.model_dump(mode="json"),
            "data": read_json(run.path / "data" / "done.json")["settings"]["files"],  # as they were when they were read
            "base": {file.name: _sha256(file) for file in weights},
            "stages": {name: {key: done[key] for key in TAKEN if key in done} for name, done in stages_done(run.path)},
            "files": {name: _sha256(run.path / name) for name in _files(run.path)},
        },
    )


def verify(folder: Path) -> list[str]:
    """Return what is not as the manifest of a run says: a line for each file that was changed or is missing.

    Files that were added, by `export` for instance, do no harm.

    Raises RunError if the folder holds no manifest that can be read.
    """
    try:
        recorded = dict(read_json(folder / NAME)["files"])
    except FileNotFoundError as error:
        raise RunError(f"{folder} holds no {NAME}: its run is not finished; give its command again") from error
    except (OSError, RunError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder / NAME} cannot be read, so nothing can be verified; remove it and give the run's command again"
        ) from error
    found = set(_files(folder))
    lines = [f"missing: {name}" for name in sorted(recorded.keys() - found)]
    both = sorted(found & recorded.keys())
    return lines + [f"changed: {name}" for name in both if _sha256(folder / name) != recorded[name]]


def _files(folder: Path) -> list[str]:
    """Names of a run's files that stay as they are, relative to its folder."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if path.parts[0] not in ("logs", "report")
        and path.as_posix() not in CHANGING
        and not is_archived(path)
        and not _is_partial(path)
    )


def _is_partial(path: Path) -> bool:
    return any(part.endswith(".partial") for part in path.parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit() -> str | None:
    """The commit of this source tree, if it is one; an installed package may lie in somebody else's."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
