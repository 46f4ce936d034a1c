"""Keep library output off the user's terminal: progress bars, advice, warnings meant for developers."""

import contextlib
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
