"""Open GGUF files with llama.cpp; the only module that does.

On some processors llama.cpp crashes, and takes the process down, with a file that works elsewhere. So each file type is
tested once per machine and version of llama-cpp-python in a child process (`trial.py`), and the result is cached. Its
AMX kernels are known to crash on the first prompt (ggml-org/llama.cpp#20824). They are used through the "extra buffers"
into which llama.cpp repacks weights, and which can be turned off.
"""

import contextlib
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
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
PYTHON_ERROR = 1  # exit code of a child that raised an exception; any other nonzero code is a crash
STOPPED = ("SIGINT", "SIGTERM", "SIGKILL")  # by the user, or out of memory: not llama.cpp's fault
PYTHON = (sys.executable, "-P", "-m")  # -P: never import from the user's current folder
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Trial:
    """How one file type fared on this machine: whether it works, and with or without extra buffers.

    `crash` is the signal or exit code of a crash: with extra buffers if `works`, else with and without them.
    """

    works: bool
    extra_buffers: bool
    crash: str | None = None


def reports_amx() -> bool:
    """Whether llama.cpp was built with AMX kernels."""
    return "AMX_INT8 = 1" in system_info()


@cache
def system_info() -> str:
    """Return llama.cpp's own list of the processor features it was built for.

    Asked in a child process, because a library that was built for another processor kills the process that loads it.
    Raises ExportError if it cannot be loaded.
    """
    child = run_module("dpost_lite.local.trial")
    if child.returncode:
        raise ExportError(
            f"{PACKAGE} cannot be loaded ({ended_by(child.returncode)}: {last_lines(child.stderr)}); build it for this "
            f"machine: pip install --force-reinstall --no-cache-dir --no-binary {PACKAGE} {PACKAGE}"
        )
    return child.stdout.decode(errors="replace").strip()


def open_gguf(path: Path, *, extra_buffers: bool, num_sequences: int = 1, **options: Any) -> Any:
    """Return `llama_cpp.Llama(path, **options)` with two things for which it has no argument.

    With or without extra buffers, and with a context of `n_ctx` cells for up to `num_sequences` sequences, any of which
    may use any cell. Raises ExportError if llama.cpp cannot load the file, or has too little memory for the context.
    """
    import llama_cpp
    import llama_cpp.llama_cpp as bindings

    model_defaults, context_defaults = bindings.llama_model_default_params, bindings.llama_context_default_params

    def model_params() -> Any:
        made = model_defaults()
        made.use_extra_bufts = extra_buffers
        return made

    def context_params() -> Any:
        made = context_defaults()
        made.n_seq_max, made.kv_unified = num_sequences, num_sequences > 1
        return made

    with _LOCK:
        bindings.llama_model_default_params = model_params
        bindings.llama_context_default_params = context_params
        try:
            return llama_cpp.Llama(str(path), verbose=False, **options)
        except ValueError as error:
            if "llama_context" in str(error):
                how_many = f"{num_sequences} answers side by side" if num_sequences > 1 else "one answer"
                fewer = ", or give `serve` a lower --parallel" if num_sequences > 1 else ""
                raise ExportError(
                    f"{path}: llama.cpp has no memory for {how_many} ({error}); close other programs{fewer}"
                ) from error
            raise ExportError(f"{path}: llama.cpp cannot load it ({error}); export it again") from error
        finally:
            bindings.llama_model_default_params = model_defaults
            bindings.llama_context_default_params = context_defaults


def read_prompt(llm: Any, token_ids: Sequence[int]) -> list[int]:
    """Return what the decoder reads before an answer: of an encoder–decoder, the token that all answers start with.

    Its encoder reads the prompt here. Every other model reads the prompt itself.
    """
    start = start_ids(llm)
    if start:
        encode(llm, token_ids)
    return start or list(token_ids)


def start_ids(llm: Any) -> list[int]:
    """Return the tokens that the decoder of an encoder–decoder reads before an answer; none for other models."""
    import llama_cpp

    is_split = llama_cpp.llama_model_has_encoder(llm.model)
    return [llama_cpp.llama_model_decoder_start_token(llm.model)] if is_split else []


def encode(llm: Any, token_ids: Sequence[int], num_sequences: int = 1) -> None:
    """Have the encoder read a question, at most `llm.n_batch` tokens, for the answers in all sequences.

    llama.cpp keeps one question, and no answers to the one before.
    """
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), False)
    batch = llama_cpp.llama_batch_init(len(token_ids), 0, num_sequences)
    try:
        batch.n_tokens = len(token_ids)
        for place, token_id in enumerate(token_ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token_id, place, True
            batch.n_seq_id[place] = num_sequences
            for sequence in range(num_sequences):
                batch.seq_id[place][sequence] = sequence
        code = llama_cpp.llama_encode(llm.ctx, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if code:
        raise RuntimeError(f"llama_encode returned {code}")


def uses_extra_buffers(path: Path) -> bool:
    """Return whether to open `path` with extra buffers; tests file types that are new to this machine.

    Raises ExportError if the file cannot be read, or crashes llama.cpp with and without them.
    """
    known = trials().get(file_type(path))
    return known.extra_buffers if known is not None and known.works else try_file(path)[0]


def try_file(path: Path, text: str = PROBE) -> tuple[bool, list[int]]:
    """Test a file: have llama.cpp read `text` in a child process, without extra buffers if it crashes with them.

    Returns whether to use extra buffers, and the token ids of `text`. Raises ExportError if llama.cpp crashes with and
    without them, fails, or computes NaN.
    """
    kind = file_type(path)
    known = trials().get(kind)
    crash = known.crash if known else None
    skip_extra = reports_amx() or (known is not None and not known.extra_buffers)
    for extra_buffers in (False,) if skip_extra else (True, False):
        child = run_module("dpost_lite.local.trial", str(path), "on" if extra_buffers else "off", text=text)
        if child.returncode == 0:
            remember(kind, Trial(True, extra_buffers, crash))
            return extra_buffers, [int(word) for word in child.stdout.decode().splitlines()[-1].split()]
        if child.returncode == PYTHON_ERROR:
            name = path.name.removesuffix(".partial")
            reason = last_lines(child.stderr)
            raise ExportError(f"llama.cpp cannot use the {kind} file {name} ({reason}); export it again")
        crash = ended_by(child.returncode)
        if crash in STOPPED:
            raise ExportError(f"testing the {kind} file was stopped ({crash}); close other programs and try again")
    remember(kind, Trial(False, False, crash))
    raise ExportError(f"llama.cpp crashes with {kind} files on this machine ({crash}); {another_type(kind)}")


def another_type(kind: str) -> str:
    """Return the advice for a file type that crashes llama.cpp."""
    other = "q8_0" if kind == "f16" else "f16"
    return f"choose another type, such as {other}: `export --quant {other}`, or `run export.quant={other}`"


def file_type(path: Path) -> str:
    """Return a GGUF file's quantisation as named by `--quant`. Raises ExportError if the file cannot be read."""
    from gguf import LlamaFileType

    number = read_header(path).get("general.file_type", -1)
    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").lower()
    except (ValueError, TypeError):
        return "unknown"


def trials() -> dict[str, Trial]:
    """Return the cached results for this machine and version of llama-cpp-python, by file type."""
    with contextlib.suppress(TypeError, AttributeError):  # the cache is from another version, or damaged
        return {kind: Trial(**found) for kind, found in _recorded().get(_machine(), {}).items()}
    return {}


def remember(kind: str, trial: Trial) -> None:
    """Cache a result next to those of other machines that share the cache; errors in writing it are ignored."""
    with contextlib.suppress(OSError):
        record().parent.mkdir(parents=True, exist_ok=True)
        with FileLock(record().with_suffix(".lock")):
            here = {name: asdict(found) for name, found in {**trials(), kind: trial}.items()}
            write_json(record(), {**_recorded(), _machine(): here})


def run_module(module: str, *arguments: str, text: str = "") -> "subprocess.CompletedProcess[bytes]":
    """Run a module of the package in a child process shielded from Ctrl-C, with `text` as its standard input."""
    return subprocess.run(
        [*PYTHON, module, *arguments], input=text.encode(), capture_output=True, start_new_session=True
    )


def ended_by(returncode: int) -> str:
    """Return how a process ended: the name of a signal, or the exit code."""
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"exit code {returncode}"


def last_lines(output: bytes) -> str:
    """Return the last lines of a process's output, joined into one."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-300:] or "no message"


def record() -> Path:
    """Return the file with the cached results; delete it to have all types tested again."""
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
