"""What the checks of a GPU found (`doctor --gpu`, pipeline/gpu_check.py), and which features are switched off for it.

Kept in the cache folder by device and versions of the packages that compute, so a new card or package is tested
again. Without a GPU nothing is read or written.
"""

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock

from dpost_lite.system.machine import cache_dir, version

PACKAGES = ("torch", "bitsandbytes", "transformers", "unsloth", "dpost-lite")

Feature = Literal["attention", "graphs", "engine", "4bit", "unsloth"]
State = Literal["ok", "note", "failed", "not applicable"]


@dataclass(frozen=True, slots=True)
class Result:
    """What one check found, as a sentence with its figure; `switches_off` what a failure takes out of use."""

    name: str
    state: State
    text: str
    switches_off: Feature | None = None


def switched_off() -> frozenset[Feature]:
    """Return the features that are switched off on this machine's GPU; none without a GPU, or before it was tested."""
    return frozenset(one.switches_off for one in results().values() if one.state == "failed" and one.switches_off)


def results() -> dict[str, Result]:
    """Return what is recorded for this machine's GPU and these versions, by the check's name."""
    name = device_name()
    if name is None:
        return {}
    found = _recorded().get(_key(name))
    return {one.name: one for one in map(_result, found if isinstance(found, list) else []) if one is not None}


def remember(result: Result) -> None:
    """Record a result next to the others; does nothing without a GPU. Errors in writing are ignored."""
    name = device_name()
    if name is None:
        return
    with contextlib.suppress(OSError):
        path().parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path().with_suffix(".lock")):
            here = {**results(), result.name: result}
            text = json.dumps({**_recorded(), _key(name): [asdict(one) for one in here.values()]}, indent=2)
            partial = path().with_name(path().name + ".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path())


def path() -> Path:
    """Return the file with the recorded results."""
    return cache_dir() / "gpu.json"


def device_name() -> str | None:
    """Return the name of the GPU that PyTorch takes, or None without one.

    Asked in a child process unless this one uses the GPU already, because a context takes half a gigabyte of its memory
    for as long as the process lives.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_initialized() else _name_in_child()


@cache
def _name_in_child() -> str | None:
    code = "import torch; print(torch.cuda.get_device_name())"
    child = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, errors="replace")
    return child.stdout.strip() or None


def _key(name: str) -> str:
    return ", ".join([name, *(f"{package} {version(package) or 'none'}" for package in PACKAGES)])


def _recorded() -> dict[str, Any]:
    try:
        found = json.loads(path().read_bytes())
    except (OSError, ValueError):  # none yet, or damaged: everything is tested again
        return {}
    return found if isinstance(found, dict) else {}


def _result(found: Any) -> Result | None:
    """Return a recorded result, or None for one that is damaged or was written by another version."""
    try:
        one = Result(**found)
    except TypeError:
        return None
    is_known = one.state in get_args(State) and one.switches_off in (None, *get_args(Feature))
    return one if is_known and isinstance(one.name, str) and isinstance(one.text, str) else None
