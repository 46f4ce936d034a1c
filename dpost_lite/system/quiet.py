"""Keep what libraries print away from the user's terminal: bars, advice, warnings that are meant for developers."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def stderr_to(path: str | Path = os.devnull) -> Iterator[None]:
    """Within the block, append what this process and its new children write to stderr to `path`.

    Works below Python too: what C++ prints and what a child inherits go there as well.
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
