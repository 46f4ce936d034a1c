"""A run's folder: its stages, and the journal of what happened.

`run.stage(name, work, ...)` is the whole resume story. A stage writes into `NAME.partial`; when it is done its record
is written and the folder renamed, so a folder without `.partial` is complete. Giving the same command again finds the
folder and skips the work. The record holds a fingerprint over the stage's settings (its part of the recipe, the base's
weights, versions of packages) and the fingerprints of its inputs: if they differ, that is an error, never silent reuse.

    RUN/run.json           recipe and version, and the --gpu-mem that it was planned for
    RUN/events.jsonl       one JSON object per event, append-only (see journal.py)
    RUN/STAGE/done.json    fingerprint, settings, seconds, peak memory, metrics
    RUN/STAGE.partial/     an unfinished stage; what it needs to go on lies in unfinished/
    RUN/STAGE-before-…/    one that was put aside, for another export or by --restart-from
    RUN/manifest.json      what a finished run was made of and made (see manifest.py)
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpost_lite import __version__
from dpost_lite.errors import OtherSettings, RunError, nearest
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import validate
from dpost_lite.system import interrupt

UNFINISHED = "unfinished"  # in the folder of an unfinished stage: what its work needs to go on; removed when it is done
BEGUN = f"{UNFINISHED}/begun.json"  # its settings, inputs and fingerprint, and the seconds that went into it
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

    def __init__(
        self,
        path: Path,
        listeners: tuple[Listener, ...] = (),
        recipe: Recipe | None = None,
        planned_for: str | None = None,
    ) -> None:
        self.path = path
        self._planned_for = planned_for
        self._listeners = listeners
        self._recipe = recipe
        self._epoch = time.time() - time.monotonic()  # a clock that is set meanwhile does not reach the journal

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
    def create(
        cls, path: Path, recipe: Recipe, listeners: tuple[Listener, ...] = (), *, planned_for: str | None = None
    ) -> "Run":
        """Open `path` as the folder of this run, new or to be continued. `planned_for` is what --gpu-mem was given.

        Raises RunError if it holds something else or cannot be written.
        """
        if path.exists() and not (path / "run.json").exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"--out: {path} exists and is not a run folder; name another")
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, listeners, recipe, planned_for)
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
        file = self.path / "run.json"
        try:
            values = read_json(file)["recipe"]
        except (KeyError, TypeError) as error:
            raise RunError(f"{file} is not a run's (no recipe in it); put it back from a copy") from error
        return validate(values, where=str(file))

    @property
    def planned_for(self) -> str | None:
        """What --gpu-mem was given when the newest stage was made, if it was."""
        return read_json(self.path / "run.json").get("planned_for")

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
        memory, by name) is kept apart from them. With `renew`, a stage whose inputs or `export` settings alone changed
        (a run with more rounds exports another policy) is done again; the old folder is kept aside. With `resumes`,
        work that was stopped finds its folder as it left it. Raises OtherSettings, with the difference, if the stage is
        finished, or has something to go on with, under other settings or inputs; and KeyboardInterrupt before work
        begins, if the user asked to stop.
        """
        settings = json.loads(json.dumps(settings, default=str))
        given: dict[str, Any] = {"settings": settings, "inputs": {a.name: a.fingerprint for a in inputs}}
        given["fingerprint"] = fingerprint = _fingerprint(name, given)
        folder = self.path / name
        partial = folder.with_name(folder.name + ".partial")
        if (finished := self._finished(name, given, renew=renew)) is not None:
            return finished
        if interrupt.asked():
            raise KeyboardInterrupt
        before = self._seconds_begun(name, partial, given) if resumes else None
        if before is None:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / UNFINISHED).mkdir(parents=True)
        self._record_recipe()
        (self.path / "manifest.json").unlink(missing_ok=True)  # of a run that ended earlier than this one will
        self.emit("stage_started", stage=name, resumed=before is not None)
        started = time.monotonic() - (before or 0.0)
        write_json(partial / BEGUN, {**given, "seconds": before or 0.0})
        try:
            metrics = work(partial) or {}
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk shall not hide what happened
                write_json(partial / BEGUN, {**given, "seconds": time.monotonic() - started})
                self.emit("stage_stopped", stage=name)
            raise
        took = {"seconds": round(time.monotonic() - started, 1), **metrics.pop("used", {})}
        write_json(partial / "done.json", {**given, **took, "metrics": metrics})
        partial.rename(folder)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        self.emit("stage_finished", stage=name, **took, metrics=metrics)
        return Artifact(name, folder, fingerprint, metrics)

    def restart_from(self, names: Sequence[str]) -> list[str]:
        """Put stages, and all that was made from them, aside; return the names of all. Nothing is removed.

        Raises RunError if the folder does not hold one of them; then all stay where they are.
        """
        stages = {**dict(stages_begun(self.path)), **dict(stages_done(self.path))}
        for name in names:
            if name not in stages:
                raise RunError(
                    f"--restart-from: {self.path} holds no stage '{name}'{nearest(name, list(stages))}; "
                    f"it holds {', '.join(sorted(stages)) or 'none'}"
                )
        aside = set(names)
        while more := {other for other, record in stages.items() if aside & record["inputs"].keys()} - aside:
            aside |= more
        for name in sorted(aside):
            for folder in (self.path / name, self.path / f"{name}.partial"):
                if folder.exists():
                    _put_aside(folder, stages[name]["fingerprint"])
        (self.path / "manifest.json").unlink(missing_ok=True)
        return sorted(aside)

    def emit(self, kind: str, **fields: Any) -> None:
        """Append an event to the journal and tell the listeners."""
        event = {"time": round(self._epoch + time.monotonic(), 3), "kind": kind, **fields}
        if kind != "progress" or fields["unit"] == "steps":  # of progress the journal holds a training's curves
            with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(event, ensure_ascii=False) + "\n")
        for listener in self._listeners:
            listener(event)

    def progress(self, done: float, total: float, unit: str, **metrics: Any) -> None:
        """Tell the live view how far the running stage is; `unit` names what `done` counts."""
        self.emit("progress", done=done, total=total, unit=unit, metrics=metrics)

    def _record_recipe(self) -> None:
        if self._recipe is not None:
            values = {"version": __version__, "recipe": self._recipe.model_dump(mode="json")}
            write_json(self.path / "run.json", {**values, "planned_for": self._planned_for})

    def _finished(self, name: str, given: dict[str, Any], *, renew: bool) -> Artifact | None:
        """A stage that is done with these settings and inputs, or None.

        Raises RunError if it was done with others; with `renew` and equal settings it is put aside instead.
        """
        folder, partial = self.path / name, self.path / f"{name}.partial"
        if (partial / "done.json").exists() and not folder.exists():
            partial.rename(folder)  # all that was left to do
        if not (folder / "done.json").exists():
            return None
        done = read_json(folder / "done.json")
        if done["fingerprint"] == given["fingerprint"]:
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            self.emit("stage_skipped", stage=name, seconds=done["seconds"], metrics=done["metrics"])
            return Artifact(name, folder, done["fingerprint"], done["metrics"])
        if not renew or _but_export(done["settings"]) != _but_export(given["settings"]):
            raise OtherSettings(self._difference(name, done, given))
        _put_aside(folder, done["fingerprint"])
        return None

    def _seconds_begun(self, name: str, partial: Path, given: dict[str, Any]) -> float | None:
        """Seconds that went into an unfinished stage, as far as it noted them; None where there is none to go on with.

        Raises RunError if there is one, of other settings or inputs.
        """
        if not (partial / BEGUN).is_file():
            return None
        begun = read_json(partial / BEGUN)
        if begun["fingerprint"] == given["fingerprint"]:
            return begun["seconds"]
        if any(path.is_file() and path != partial / BEGUN for path in partial.rglob("*")):
            raise OtherSettings(self._difference(name, begun, given))
        return None

    def _difference(self, name: str, made: dict[str, Any], given: dict[str, Any]) -> str:
        changed = [f"{key}: {old} -> {new}" for key, old, new in _changes(made["settings"], given["settings"])]
        inputs = [key for key, _, _ in _changes(made["inputs"], given["inputs"])]
        what = "; ".join(changed) or f"its input {', '.join(inputs)} changed"
        return (
            f"--out: {self.path} holds stage '{name}' made with other settings ({what}); give the same command again, "
            f"name another --out folder, or put the stage and what follows aside with --restart-from {name}"
        )


def stages_done(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, record) of each finished stage of a run's folder, but for those put aside."""
    return _stages(run, "done.json")


def stages_begun(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, record) of each unfinished stage of a run's folder, but for those put aside."""
    return (
        (name.removesuffix(".partial"), record) for name, record in _stages(run, BEGUN) if name.endswith(".partial")
    )


def is_aside(path: Path) -> bool:
    """Whether a path, relative to a run's folder, lies in a folder that was put aside."""
    return any("-before-" in part for part in path.parts)


def _stages(run: Path, record: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(run.rglob(record)):
        folder = run / path.relative_to(run).as_posix().removesuffix(f"/{record}")
        name = folder.relative_to(run)
        if not is_aside(name) and (record == BEGUN or not name.name.endswith(".partial")):
            yield name.as_posix(), read_json(path)


def _but_export(settings: dict[str, Any]) -> dict[str, Any]:
    """A stage's settings without how its file is stored, which a user may change in a finished run."""
    return {key: value for key, value in settings.items() if key != "export"}


def _put_aside(folder: Path, fingerprint: str) -> None:
    target = folder.with_name(f"{folder.name.removesuffix('.partial')}-before-{fingerprint[:8]}")
    others = (target.with_name(f"{target.name}-{number}") for number in itertools.count(2))
    while target.exists():
        target = next(others)
    folder.rename(target)


def _fingerprint(name: str, given: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([name, given], sort_keys=True).encode()).hexdigest()[:16]


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
    """Read a JSON file. Raises RunError if it holds something else."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        is_of_stage = path.name in ("done.json", "begun.json") or path.parent.name.startswith("checkpoint-")
        way_out = "remove its folder to have it made again" if is_of_stage else "put it back from a copy"
        raise RunError(f"{path} is damaged (no JSON); {way_out}") from error
