"""Keep library output off the user's terminal: progress bars, advice, warnings meant for developers."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def stderr_to(path: str | Path = os.devnull) -> Iterator[None]:
    """Within the block, redirect stderr of this process and its new children to `path` (appending).

    Works on the file descriptor, so output of C++ code and of children is redirected too.
    """
    with open(path, "a", encoding="utf-8", errors="replace") as file, contextlib.ExitStack() as restored:
        if sys.stderr is not None:
            sys.stderr.flush()
        try:
            before = os.dup(2)
        except OSError:  # no stderr at all
            before = None
        if before is not None:
            os.dup2(file.fileno(), 2)
            restored.callback(os.close, before)
            restored.callback(os.dup2, before, 2)
            if sys.stderr is not None:
                restored.callback(sys.stderr.flush)
        yield


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide progress bars and advice of transformers and bitsandbytes in a `with` block; errors still surface.

    In a stage's process, whose stderr is the stage's log, everything but the bars goes to the log.
    """
    from transformers.utils import logging

    is_stage = multiprocessing.parent_process() is not None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.nullcontext() if is_stage else stderr_to(os.devnull):
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
