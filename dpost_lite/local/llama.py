"""Open GGUF files with llama.cpp; nothing else in the package does.

llama.cpp can crash on one processor with a file that works on all others, and takes the process with it. So each type
of file is tried once per machine and version of llama-cpp-python, in a child process (`trial.py`), and what was found
is remembered. Its AMX kernels are known to crash on their first prompt (ggml-org/llama.cpp#20824). They are reached
through the "extra buffers" that llama.cpp repacks weights into, which can be turned off.
"""

import contextlib
import platform
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from dpost_lite.errors import ExportError, RunError
from dpost_lite.local.header import read_header
from dpost_lite.runs.folder import read_json, write_json
from dpost_lite.system.machine import cache_dir, cpu_name, version

PACKAGE = "llama-cpp-python"
PROBE = "Ann's 12 boxes hold 3.5 kg each; 15% is left.  How much?\n12*3.5=<<12*3.5=42>>42 kg — naïve.\n#### 1,042"
PYTHON_ERROR = 1  # the exit code of a child that raised an exception; any other but 0 is a crash
STOPPED = ("SIGINT", "SIGTERM", "SIGKILL")  # by the user, or for want of memory: nothing that llama.cpp did
PYTHON = (sys.executable, "-P", "-m")  # a module of the package, whatever lies in the user's folder
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Trial:
    """How one type of file fared on this machine. `crash` says how llama.cpp ended where it crashed (a signal's name or
    an exit code): on the way to an answer, or, where `works` is false, both ways."""

    works: bool
    extra_buffers: bool
    crash: str | None = None


def reports_amx() -> bool:
    """Whether llama.cpp was built with its AMX kernels."""
    return "AMX_INT8 = 1" in system_info()


def system_info() -> str:
    """Return the processor features that llama.cpp was built for, as it lists them."""
    import llama_cpp

    return llama_cpp.llama_print_system_info().decode(errors="replace").strip()


def open_gguf(path: Path, *, extra_buffers: bool, **options: Any) -> Any:
    """Return `llama_cpp.Llama(path, **options)`, with or without extra buffers, for which it has no argument.

    Raises ExportError if llama.cpp refuses the file.
    """
    import llama_cpp
    import llama_cpp.llama_cpp as bindings

    defaults = bindings.llama_model_default_params

    def params() -> Any:
        made = defaults()
        made.use_extra_bufts = extra_buffers
        return made

    with _LOCK:
        bindings.llama_model_default_params = params
        try:
            return llama_cpp.Llama(str(path), verbose=False, **options)
        except ValueError as error:
            raise ExportError(f"{path}: llama.cpp cannot load it ({error}); export it again") from error
        finally:
            bindings.llama_model_default_params = defaults


def uses_extra_buffers(path: Path) -> bool:
    """Return whether `path` is to be opened with extra buffers; a type of file that is new to this machine is tried.

    Raises ExportError if the file cannot be read, or crashes llama.cpp either way.
    """
    known = trials().get(file_type(path))
    return known.extra_buffers if known is not None and known.works else try_file(path)[0]


def try_file(path: Path, text: str = PROBE) -> tuple[bool, list[int]]:
    """Have llama.cpp read `text` in a child process, without extra buffers if it crashes with them.

    Returns whether to open it with extra buffers, and the token ids of `text`. Raises ExportError if it crashes either
    way, fails, or computes NaN.
    """
    kind = file_type(path)
    known = trials().get(kind)
    crash = known.crash if known else None
    avoids = reports_amx() or (known is not None and not known.extra_buffers)
    for extra_buffers in (False,) if avoids else (True, False):
        child = run_module("dpost_lite.local.trial", str(path), "on" if extra_buffers else "off", text=text)
        if child.returncode == 0:
            remember(kind, Trial(True, extra_buffers, crash))
            return extra_buffers, [int(word) for word in child.stdout.decode().splitlines()[-1].split()]
        if child.returncode == PYTHON_ERROR:
            name = path.name.removesuffix(".partial")
            raise ExportError(f"llama.cpp cannot use the {kind} file {name}: {last_words(child.stderr)}")
        crash = ended_by(child.returncode)
        if crash in STOPPED:
            raise ExportError(f"trying the {kind} file was stopped ({crash}); close other programs and try again")
    remember(kind, Trial(False, False, crash))
    raise ExportError(f"llama.cpp crashes with {kind} files on this machine ({crash}); {another_type(kind)}")


def another_type(kind: str) -> str:
    """Return the way out for a type of file that crashes llama.cpp."""
    other = "q8_0" if kind == "f16" else "f16"
    return f"give another type, such as {other}: --quant {other} to export, export.quant={other} to run"


def file_type(path: Path) -> str:
    """Return a GGUF file's type of weights, as `--quant` names it. Raises ExportError if the file cannot be read."""
    from gguf import LlamaFileType

    number = read_header(path).get("general.file_type", -1)
    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").lower()
    except (ValueError, TypeError):
        return "unknown"


def trials() -> dict[str, Trial]:
    """Return what is remembered of this machine and this version of llama-cpp-python, by type of file."""
    with contextlib.suppress(TypeError, AttributeError):  # a record of another version, or a damaged one
        return {kind: Trial(**found) for kind, found in _recorded().get(_machine(), {}).items()}
    return {}


def remember(kind: str, trial: Trial) -> None:
    """Note a trial, beside those of other machines that share the cache; a cache that cannot be written is no error."""
    with contextlib.suppress(OSError):
        record().parent.mkdir(parents=True, exist_ok=True)
        with FileLock(record().with_suffix(".lock")):
            here = {name: asdict(found) for name, found in {**trials(), kind: trial}.items()}
            write_json(record(), {**_recorded(), _machine(): here})


def run_module(module: str, *arguments: str, text: str = "") -> "subprocess.CompletedProcess[bytes]":
    """Run a module of the package in a child process that Ctrl-C does not reach, with `text` as its standard input."""
    return subprocess.run(
        [*PYTHON, module, *arguments], input=text.encode(), capture_output=True, start_new_session=True
    )


def ended_by(returncode: int) -> str:
    """Say how a process ended: by which signal, or with which exit code."""
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"exit code {returncode}"


def last_words(output: bytes) -> str:
    """Return the last lines of what a process wrote, as one."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-300:] or "no message"


def record() -> Path:
    """Return the file that holds the trials; without it, all types are tried again."""
    return cache_dir() / "llama.cpp.json"


def _recorded() -> dict[str, Any]:
    try:
        found = read_json(record())
    except (OSError, RunError):
        return {}
    return found if isinstance(found, dict) else {}


@cache
def _machine() -> str:
    return f"{cpu_name()}, {platform.machine()}, {PACKAGE} {version(PACKAGE)}, {system_info()}"
