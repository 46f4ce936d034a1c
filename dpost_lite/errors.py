"""The errors a user can fix. Each message is one line that names the flag or key at fault and says what to do next.

    DpostError
    ├── RecipeError     a recipe file, key or value
    ├── DataError       problems that cannot be read, graded or split
    │   └── PromptTooLong   a prompt leaves no room for an answer in the model's context
    ├── ModelError      a base model or adapter that cannot be found or used
    ├── ExportError     a GGUF file that cannot be written or read
    ├── RunError        a run folder that belongs to another run, is locked, or is on a full disk
    │   ├── OtherSettings   a finished stage was made with different settings
    │   └── ProcessFailed   a child process died, hung, or hit a bug
    ├── SandboxError    code of a solution cannot be run here
    ├── OutOfMemory     work that needs more memory than this machine has
    └── DeliveryError   training and scoring succeeded, but the GGUF file could not be made or tested

The command line prints the message and exits with code 2 (3 for DeliveryError). Anything else is a bug and keeps its
traceback.
"""

import errno
from pathlib import Path


class DpostError(Exception):
    """Base of all errors the user can fix; the message names the cause and the remedy."""

    exit_code = 2


class RecipeError(DpostError):
    """A recipe has an unknown key or an invalid value."""


class DataError(DpostError):
    """Problems are missing or unreadable, or training and test questions overlap."""


class PromptTooLong(DataError):
    """A prompt leaves no room for an answer in the model's context."""


class ModelError(DpostError):
    """A model is missing, gated, damaged, or of an unsupported architecture."""


class ExportError(DpostError):
    """A GGUF file cannot be written, quantised or read."""


class RunError(DpostError):
    """A run folder belongs to another run, or cannot be written."""


class SandboxError(DpostError):
    """A sandbox is missing or does not work on this machine."""


class DeliveryError(DpostError):
    """A run was trained and scored, but its GGUF file could not be made or tested."""

    exit_code = 3


class OtherSettings(RunError):
    """A stage was made with settings that differ from those requested now."""


class ProcessFailed(RunError):
    """A child process died, hung, or hit a bug: `reason` says how, `last_line` is the last that it printed."""

    def __init__(self, reason: str, *, advice: str, log: Path, last_line: str) -> None:
        end = f"{log} ends: {last_line}" if last_line else f"{log} is empty"
        super().__init__(f"{reason}{advice}: {end}")
        self.reason, self.last_line = reason, last_line


OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class OutOfMemory(DpostError):
    """The work does not fit in memory, even at its smallest batch size."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. PyTorch has a type for its GPU allocator only; others match by message."""
    if isinstance(error, MemoryError | OutOfMemory) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


FULL = ("No space left on device", "Disk quota exceeded", "Not enough free space", " requested and ")


def of_disk(error: BaseException) -> RunError | None:
    """Turn a failed read or write into a RunError for the user; None if `error` is something else.

    Libraries that write from Rust or C++ report a full disk in the message alone; numpy says "N requested and M
    written".
    """
    text = " ".join(str(error).split())[:200]
    number, file, reason = None, text, text
    if isinstance(error, OSError):
        number, file, reason = error.errno, str(error.filename or text), error.strerror or text
    if number in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)) or any(words in text for words in FULL):
        return RunError(f"the disk is full ({text}); free some space, then run the same command to resume")
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return RunError(f"{file} cannot be written ({reason}); make its folder writable")
    if number == errno.EIO:
        return RunError(f"{file} cannot be read or written ({reason}): check the disk")
    return None


def nearest(word: str, choices: list[str] | tuple[str, ...]) -> str:
    """Return ` (did you mean 'x'?)` for the choice closest to `word`, or "" if none is close."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
