"""A run's folder: its stages, and the journal of what happened.

`run.stage(name, work, ...)` is the whole resume story. A stage writes into `NAME.partial`; when it is done its record
is written and the folder renamed, so a folder without `.partial` is complete. Giving the same command again finds the
folder and skips the work. The record holds a fingerprint over the stage's part of the recipe and the fingerprints of
its inputs: if they differ, that is an error, never silent reuse.

    RUN/run.json           recipe and version
    RUN/events.jsonl       one JSON object per event, append-only (see report/)
    RUN/STAGE/done.json    fingerprint, settings, seconds, peak memory, metrics
    RUN/STAGE.partial/     an unfinished stage; sampling goes on with what it holds
    RUN/manifest.json      what a finished run was made of and made (see manifest.py)
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpost_lite import __version__
from dpost_lite.errors import RunError
from dpost_lite.recipe import Recipe, validate

BEGUN = "begun.json"  # in the folder of an unfinished stage: its fingerprint, and seconds that went into it
Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished stage: the folder with its files, its fingerprint, and the figures it reported."""

    name: str
    path: Path
    fingerprint: str
    metrics: dict[str, Any] = field(default_factory=dict)


class Run:
    """One run folder. `listeners` are called with every event as it is written to the journal."""

    def __init__(self, path: Path, listeners: tuple[Listener, ...] = (), recipe: Recipe | None = None) -> None:
        self.path = path
        self._listeners = listeners
        self._recipe = recipe

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from running in the folder. The system frees the lock of a process that died, however it died.

        Raises RunError if another process works in it.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise RunError(
                f"--out: another process works in {self.path}; wait for it, or name another folder"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every event from now on."""
        self._listeners = (*self._listeners, listener)

    @classmethod
    def create(cls, path: Path, recipe: Recipe, listeners: tuple[Listener, ...] = ()) -> "Run":
        """Open `path` as the folder of this run, new or to be continued.

        Raises RunError if it holds something else or cannot be written.
        """
        if path.exists() and not (path / "run.json").exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"--out: {path} exists and is not a run folder; name another")
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, listeners, recipe)
            if not (path / "run.json").exists():
                run._record_recipe()
        except OSError as error:
            raise RunError(f"--out: {path} cannot be written ({error.strerror}); name another folder") from error
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open a run folder to read from it; RunError if it is none."""
        if not (path / "run.json").is_file():
            raise RunError(f"{path} is not a run folder (no run.json); give the folder that `dpost-lite run` wrote")
        return cls(path)

    @property
    def recipe(self) -> Recipe:
        """The recipe that the newest stage was made with; that of a refused command leaves no trace."""
        return validate(read_json(self.path / "run.json")["recipe"], where=str(self.path / "run.json"))

    def stage(
        self,
        name: str,
        work: Callable[[Path], dict[str, Any] | None],
        *inputs: Artifact,
        settings: dict[str, Any],
        renew: bool = False,
        resumes: bool = False,
    ) -> Artifact:
        """Do `work(folder)` once, and never again: a finished stage of the same settings and inputs is loaded.

        `work` writes its files into the folder it is given and may return metrics; what it says under "used" (peak
        memory, by name) is kept apart from them. With `renew`, a stage whose inputs alone changed (a run that was given
        more rounds exports another policy) is done again; the old folder is kept aside. With `resumes`, work that was
        stopped finds its folder as it left it, if settings and inputs are the same. Raises RunError, with the
        difference, if the stage was finished with other settings or inputs.
        """
        settings = json.loads(json.dumps(settings, default=str))
        given = {"settings": settings, "inputs": {a.name: a.fingerprint for a in inputs}}
        fingerprint = hashlib.sha256(json.dumps([name, given], sort_keys=True).encode()).hexdigest()[:16]
        folder = self.path / name
        if (folder / "done.json").exists():
            done = read_json(folder / "done.json")
            if done["fingerprint"] == fingerprint:
                self.emit("stage_skipped", stage=name, seconds=done["seconds"], metrics=done["metrics"])
                return Artifact(name, folder, fingerprint, done["metrics"])
            if not renew or done["settings"] != settings:
                raise RunError(self._difference(name, done, given))
            folder.rename(folder.with_name(f"{folder.name}-before-{done['fingerprint'][:8]}"))
        partial = folder.with_name(folder.name + ".partial")
        before = _seconds_begun(partial, fingerprint) if resumes else None
        if before is None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._record_recipe()
        (self.path / "manifest.json").unlink(missing_ok=True)  # of a run that ended earlier than this one will
        self.emit("stage_started", stage=name, resumed=before is not None)
        started = time.monotonic() - (before or 0.0)
        write_json(partial / BEGUN, {"fingerprint": fingerprint, "seconds": before or 0.0})
        try:
            metrics = work(partial) or {}
        except BaseException:
            write_json(partial / BEGUN, {"fingerprint": fingerprint, "seconds": time.monotonic() - started})
            raise
        took = {"seconds": round(time.monotonic() - started, 1), **metrics.pop("used", {})}
        write_json(partial / "done.json", {"fingerprint": fingerprint, **given, **took, "metrics": metrics})
        partial.rename(folder)
        (folder / BEGUN).unlink()
        self.emit("stage_finished", stage=name, **took, metrics=metrics)
        return Artifact(name, folder, fingerprint, metrics)

    def emit(self, kind: str, **fields: Any) -> None:
        """Append an event to the journal and tell the listeners."""
        event = {"time": round(time.time(), 3), "kind": kind, **fields}
        if kind != "progress":  # progress is for the live view; the journal holds what lasts
            with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(event, ensure_ascii=False) + "\n")
        for listener in self._listeners:
            listener(event)

    def progress(self, done: float, total: float, unit: str, **metrics: Any) -> None:
        """Tell the live view how far the running stage is; `unit` names what `done` counts."""
        self.emit("progress", done=done, total=total, unit=unit, metrics=metrics)

    def _record_recipe(self) -> None:
        if self._recipe is not None:
            write_json(self.path / "run.json", {"version": __version__, "recipe": self._recipe.model_dump(mode="json")})

    def _difference(self, name: str, done: dict[str, Any], given: dict[str, Any]) -> str:
        changed = [f"{key}: {old} -> {new}" for key, old, new in _changes(done["settings"], given["settings"])]
        inputs = [key for key, _, _ in _changes(done["inputs"], given["inputs"])]
        what = "; ".join(changed) or f"its input {', '.join(inputs)} changed"
        return (
            f"--out: {self.path} holds stage '{name}' made with other settings ({what}); "
            "give the same command again, or name another --out folder"
        )


def _seconds_begun(partial: Path, fingerprint: str) -> float | None:
    """Seconds that went into an unfinished stage with this fingerprint, as far as it could note them; None if new."""
    begun = read_json(partial / BEGUN) if (partial / BEGUN).is_file() else {}
    return begun["seconds"] if begun.get("fingerprint") == fingerprint else None


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, old value, new value) of what differs; None stands for a key that is not there."""
    old, new = dict(flatten(before)), dict(flatten(after))
    return [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested values as (dotted key, value) pairs in sorted order."""
    pairs: list[tuple[str, Any]] = []
    for key in sorted(values):
        value = values[key]
        pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON through a temporary file, flushed and renamed."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
