"""A run's folder: its stages, and the journal of what happened.

Resuming is all in `run.stage(name, work, ...)`. A stage writes into `NAME.partial`; when it is done, its record is
written and the folder renamed, so a folder without `.partial` is complete. The same command finds the folder and skips
the work. The record holds a fingerprint of the stage's settings (its part of the recipe, the base's weights, versions
of packages) and of its inputs: if it differs, that is an error, never silent reuse.

    RUN/run.json           recipe, version, and the --gpu-mem it was planned for
    RUN/events.jsonl       one JSON object per event, append-only (see journal.py)
    RUN/STAGE/done.json    fingerprint, settings, seconds, peak memory, metrics
    RUN/STAGE.partial/     an unfinished stage; unfinished/ in it holds what is needed to resume
    RUN/STAGE-before-…/    an archived stage, replaced by another export or by --restart-from
    RUN/manifest.json      inputs and outputs of a finished run (see manifest.py)
"""

import contextlib
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
from dpost_lite.runs.fingerprint import difference, differs_beyond, fingerprint
from dpost_lite.system import interrupt

UNFINISHED = "unfinished"  # folder in an unfinished stage with what its work needs to resume; removed at its end
FORMAT_FILE = "dpost_lite.json"  # beside a policy: its precision, and how its solutions are written unless as text
BEGUN = f"{UNFINISHED}/begun.json"  # its settings, inputs and fingerprint, and the seconds spent on it so far
Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished stage: the folder with its files, its fingerprint, and the figures it reported."""

    name: str
    path: Path
    fingerprint: str
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkResult:
    """What a stage's work returned: its metrics, and the peak memory of the process that did it, in bytes."""

    metrics: dict[str, Any]
    ram_bytes: int
    gpu_bytes: int | None = None

    @property
    def used(self) -> dict[str, int]:
        """Peak memory as it is recorded, by name."""
        gpu = {} if self.gpu_bytes is None else {"gpu_bytes": self.gpu_bytes}
        return {"ram_bytes": self.ram_bytes, **gpu}


Work = Callable[[Path], "WorkResult | dict[str, Any] | None"]


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
        """Open `path` as the folder of this run, new or to resume. `planned_for` is the value of --gpu-mem.

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
        work: Work,
        *inputs: Artifact,
        settings: dict[str, Any],
        renew: bool = False,
        resumes: bool = False,
    ) -> Artifact:
        """Call `work(folder)`, or load the stage if it is finished with the same settings and inputs.

        `work` writes its files into the folder and may return metrics. With `renew`, a stage is made again if only its
        inputs or `export` settings changed (a run with more rounds exports another policy), and the old one archived.
        With `resumes`, work that was stopped finds its folder as it left it. Raises OtherSettings, with the difference,
        if the stage was finished, or left something to resume, with other settings or inputs; KeyboardInterrupt before
        work starts, if the user asked to stop.
        """
        settings = json.loads(json.dumps(settings, default=str))
        given: dict[str, Any] = {"settings": settings, "inputs": {a.name: a.fingerprint for a in inputs}}
        given["fingerprint"] = fingerprint(name, given)
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
            result = work(partial)
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk must not hide the first error
                write_json(partial / BEGUN, {**given, "seconds": time.monotonic() - started})
                self.emit("stage_stopped", stage=name)
            raise
        metrics = (result.metrics if isinstance(result, WorkResult) else result) or {}
        used = result.used if isinstance(result, WorkResult) else {}
        took = {"seconds": round(time.monotonic() - started, 1), **used}
        write_json(partial / "done.json", {**given, **took, "metrics": metrics})
        partial.rename(folder)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        self.emit("stage_finished", stage=name, **took, metrics=metrics)
        return Artifact(name, folder, given["fingerprint"], metrics)

    def restart_from(self, names: Sequence[str]) -> list[str]:
        """Archive stages and everything made from them; return all their names. Nothing is deleted.

        Raises RunError, and archives none, if the folder does not hold one of them.
        """
        stages = {**dict(stages_begun(self.path)), **dict(stages_done(self.path))}
        for name in names:
            if name not in stages:
                raise RunError(
                    f"--restart-from: {self.path} has no stage '{name}'{nearest(name, list(stages))}; "
                    f"it holds {', '.join(sorted(stages)) or 'none'}"
                )
        archived = set(names)
        while more := {other for other, record in stages.items() if archived & record["inputs"].keys()} - archived:
            archived |= more
        for name in sorted(archived):
            for folder in (self.path / name, self.path / f"{name}.partial"):
                if folder.exists():
                    _archive(folder, stages[name]["fingerprint"])
        (self.path / "manifest.json").unlink(missing_ok=True)
        return sorted(archived)

    def emit(self, kind: str, **fields: Any) -> None:
        """Append an event to the journal and call the listeners."""
        event = {"time": round(self._epoch + time.monotonic(), 3), "kind": kind, **fields}
        if kind != "progress" or fields["unit"] == "steps":  # of progress, the journal keeps only training curves
            with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(event, ensure_ascii=False) + "\n")
        for listener in self._listeners:
            listener(event)

    def progress(self, done: float, total: float, unit: str, **metrics: Any) -> None:
        """Report how far the running stage is; `unit` names what `done` counts."""
        self.emit("progress", done=done, total=total, unit=unit, metrics=metrics)

    def _record_recipe(self) -> None:
        if self._recipe is not None:
            values = {"version": __version__, "recipe": self._recipe.model_dump(mode="json")}
            write_json(self.path / "run.json", {**values, "planned_for": self._planned_for})

    def _finished(self, name: str, given: dict[str, Any], *, renew: bool) -> Artifact | None:
        """A stage that is done with these settings and inputs, or None.

        Raises OtherSettings if it was done with others; with `renew`, and settings that are equal except for `export`,
        it is archived instead.
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
        if not renew or differs_beyond(("export",), done, given):
            raise self._other_settings(name, done, given)
        _archive(folder, done["fingerprint"])
        return None

    def _seconds_begun(self, name: str, partial: Path, given: dict[str, Any]) -> float | None:
        """Return the seconds spent on an unfinished stage so far, or None if there is nothing to resume.

        Raises OtherSettings if it was started with other settings or inputs.
        """
        if not (partial / BEGUN).is_file():
            return None
        begun = read_json(partial / BEGUN)
        if begun["fingerprint"] == given["fingerprint"]:
            return begun["seconds"]
        if any(path.is_file() and path != partial / BEGUN for path in partial.rglob("*")):
            raise self._other_settings(name, begun, given)
        return None

    def _other_settings(self, name: str, made: dict[str, Any], given: dict[str, Any]) -> OtherSettings:
        return OtherSettings(
            f"--out: {self.path} holds stage '{name}' made with other settings ({difference(made, given)}); repeat the "
            f"earlier command, name another --out folder, or archive the stage and all that follows from it with "
            f"--restart-from {name}"
        )


def stages_done(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, record) of each finished stage of a run's folder, except archived ones."""
    return _stages(run, "done.json")


def stages_begun(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, record) of each unfinished stage of a run's folder, except archived ones."""
    return (
        (name.removesuffix(".partial"), record) for name, record in _stages(run, BEGUN) if name.endswith(".partial")
    )


def is_archived(path: Path) -> bool:
    """Whether a path, relative to a run's folder, is in an archived stage."""
    return any("-before-" in part for part in path.parts)


def _stages(run: Path, record: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(run.rglob(record)):
        folder = run / path.relative_to(run).as_posix().removesuffix(f"/{record}")
        name = folder.relative_to(run)
        if not is_archived(name) and (record == BEGUN or not name.name.endswith(".partial")):
            yield name.as_posix(), read_json(path)


def _archive(folder: Path, fingerprint: str) -> None:
    target = folder.with_name(f"{folder.name.removesuffix('.partial')}-before-{fingerprint[:8]}")
    others = (target.with_name(f"{target.name}-{number}") for number in itertools.count(2))
    while target.exists():
        target = next(others)
    folder.rename(target)


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
