"""The manifest of a finished run, `manifest.json`, and the check behind `dpost-lite verify`.

It records the command, the full recipe, versions, hardware and commit, time and peak memory of each stage, and the
SHA-256 of the data files, the base's weights and every file of the run except its journal, logs and report. It is
written when the last stage finishes; any stage that runs later removes it.
"""

import hashlib
import subprocess
import time
from pathlib import Path

from dpost_lite.errors import RunError
from dpost_lite.recipe import Recipe
from dpost_lite.runs.folder import Run, is_archived, read_json, stages_done, write_json
from dpost_lite.system.machine import machine_info

NAME = "manifest.json"
REWRITTEN = ("export/README.md", "export/Modelfile")  # by every `export`
MUTABLE = {NAME, "events.jsonl", ".lock", *REWRITTEN}  # may change without changing the run
STAGE_KEYS = ("seconds", "ram_bytes", "gpu_bytes")


def write_manifest(run: Run, recipe: Recipe, model_dir: Path, command: list[str]) -> None:
    """Write the manifest of a finished run. `model_dir` is the base model's folder, `command` the command line."""
    weights = sorted(model_dir.glob("*.safetensors"))
    write_json(
        run.path / NAME,
        {
            "command": command,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": _commit(),
            "machine": machine_info(),
            "recipe": recipe.model_dump(mode="json"),
            "data": {
                path: digest
                for name, done in stages_done(run.path)
                if name in ("data", "data-also")
                for path, digest in done["settings"]["files"].items()
            },
            "base": {file.name: _sha256(file) for file in weights},
            "stages": {
                name: {key: done[key] for key in STAGE_KEYS if key in done} for name, done in stages_done(run.path)
            },
            "files": {name: _sha256(run.path / name) for name in _files(run.path)},
        },
    )


def verify(folder: Path) -> list[str]:
    """Compare a run's files with its manifest; return one line per changed or missing file.

    Added files, for instance by `export`, are ignored.

    Raises RunError if the manifest is missing or unreadable.
    """
    try:
        recorded = dict(read_json(folder / NAME)["files"])
    except FileNotFoundError as error:
        raise RunError(f"{folder} has no {NAME}: the run is not finished; run its command again") from error
    except (OSError, RunError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder / NAME} cannot be read; delete it and run the run's command again to rewrite it"
        ) from error
    found = set(_files(folder))
    lines = [f"missing: {name}" for name in sorted(recorded.keys() - found)]
    both = sorted(found & recorded.keys())
    return lines + [f"changed: {name}" for name in both if _sha256(folder / name) != recorded[name]]


def _files(folder: Path) -> list[str]:
    """Names of a run's immutable files, relative to its folder."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if path.parts[0] not in ("logs", "report")
        and path.as_posix() not in MUTABLE
        and not is_archived(path)
        and not _is_partial(path)
    )


def _is_partial(path: Path) -> bool:
    return any(part.endswith(".partial") for part in path.parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit() -> str | None:
    """The commit of this source tree; None for an installed package, which may lie in another repository."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
