"""Every error a user can cause, each saying what to do next.

    DpostError
    ├── RecipeError     a recipe file, key or value
    ├── DataError       problems that cannot be read, graded or split
    ├── ModelError      a base model or adapter that cannot be had or used
    ├── ExportError     a GGUF file that cannot be written or read
    ├── RunError        the run folder: another run's, locked, full
    │   └── OtherSettings   a stage of it was made with other settings
    ├── OutOfMemory     work that needs more memory than there is
    └── DeliveryError   everything was trained and scored, but the GGUF file could not be made or tried

The command line prints the message as one line and exits with code 2, DeliveryError's 3; a bug stays a traceback.
"""

import errno


class DpostError(Exception):
    """Base of all errors that a user can mend; the message names the cause and the way out."""

    exit_code = 2


class RecipeError(DpostError):
    """A recipe holds an unknown key or a value that does not fit."""


class DataError(DpostError):
    """Problems are missing, unreadable, or overlap between training and test."""


class ModelError(DpostError):
    """A model is missing, gated, of an unknown architecture, or damaged."""


class ExportError(DpostError):
    """A GGUF file cannot be written, quantised or read."""


class RunError(DpostError):
    """A run folder belongs to another run, or cannot be written."""


class DeliveryError(DpostError):
    """A run was trained and scored, but its GGUF file could not be made or tried."""

    exit_code = 3


class OtherSettings(RunError):
    """A stage was made with other settings than it is asked for now."""


OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class OutOfMemory(DpostError):
    """Work needs more memory than there is, however it is cut."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: PyTorch has a type for its own of a GPU's memory, and only words for all others."""
    if isinstance(error, MemoryError | OutOfMemory) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


FULL = ("No space left on device", "Disk quota exceeded", "Not enough free space", " requested and ")


def of_disk(error: BaseException) -> RunError | None:
    """Return what to tell the user if a file could not be written; None if `error` is something else.

    Libraries that write in Rust or C++ have only words for a full disk; numpy says "N requested and M written".
    """
    text = " ".join(str(error).split())[:200]
    number, file, reason = None, text, text
    if isinstance(error, OSError):
        number, file, reason = error.errno, str(error.filename or text), error.strerror or text
    if number in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)) or any(words in text for words in FULL):
        return RunError(f"the disk is full ({text}); free some space, and the same command goes on")
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return RunError(f"{file} cannot be written ({reason}); make its folder writable")
    if number == errno.EIO:
        return RunError(f"{file} cannot be read or written ({reason}): check the disk")
    return None


def nearest(word: str, choices: list[str] | tuple[str, ...]) -> str:
    """Return ` (did you mean 'x'?)` for the choice closest to `word`, or an empty string when none is close."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
