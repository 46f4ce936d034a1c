"""A solver in a process of its own: whatever ends llama.cpp ends that process, and not the command.

The child is `python -m dpost_lite.local.solver_process FILE SETTINGS`. Questions and answers are lines of JSON, on its
standard input and output; what llama.cpp prints goes to a temporary file, whose end is shown if it crashes.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpost_lite import errors
from dpost_lite.errors import DpostError, ExportError
from dpost_lite.local import llama
from dpost_lite.local.solver import Solution, Solver
from dpost_lite.problems.tools import Tools

SECONDS_TO_END = 10


class SolverProcess:
    """Answers questions as `Solver` does, one at a time. Use it in a `with` block, which ends the process.

    Raises ExportError if the file is missing or broken, carries no chat template, or crashes llama.cpp; SandboxError as
    `Solver` does.
    """

    def __init__(self, gguf_path: Path, *, tools: Tools, max_new_tokens: int = 300) -> None:
        self._path = gguf_path
        self._extra_buffers = llama.uses_extra_buffers(gguf_path)
        settings = {
            "tools": tools.as_dict(),
            "max_new_tokens": max_new_tokens,
            "extra_buffers": self._extra_buffers,
        }
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [*llama.PYTHON, "dpost_lite.local.solver_process", str(gguf_path), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed, text=True, encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches a whole group; this process decides
        )  # fmt: skip
        try:
            self._answer()
        except BaseException:
            self.close(at_once=True)
            raise

    def __enter__(self) -> "SolverProcess":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(at_once=error is not None)

    def solve(self, question: str, *, temperature: float = 0.0, seed: int = 0) -> Solution:
        """Answer as `Solver.solve` does. Raises DataError as it does, and ExportError if llama.cpp crashes."""
        self._ask(question, temperature, seed, streams=False)
        return Solution(**self._answer())

    def stream(self, question: str, *, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """Yield the answer in pieces as `Solver.stream` does, to be read to its end. Raises as `solve`."""
        self._ask(question, temperature, seed, streams=True)
        while (piece := self._answer()) is not None:
            yield piece

    def close(self, *, at_once: bool = False) -> None:
        """End the process; `at_once` in the middle of an answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(0 if at_once else SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._printed.close()

    def _ask(self, question: str, temperature: float, seed: int, *, streams: bool) -> None:
        assert self._process.stdin is not None
        asked = {"question": question, "temperature": temperature, "seed": seed, "streams": streams}
        with contextlib.suppress(OSError):  # it has crashed; `_answer` says how
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> Any:
        """Return the value of the child's next line; raise the error that it names, or ExportError if it has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._crashed()
        kind, value = json.loads(line)
        if kind == "error":
            raise getattr(errors, value[0])(value[1])
        return value

    def _crashed(self) -> ExportError:
        code, kind = self._process.wait(), llama.file_type(self._path)
        how = llama.ended_by(code)
        self._printed.seek(0)
        words = llama.last_lines(self._printed.read())
        if code == llama.PYTHON_ERROR:
            return ExportError(f"the solver failed with {self._path} ({words}), which is a bug; please report it")
        if how in llama.STOPPED:
            way_out = "close other programs and try again"
        elif self._extra_buffers:
            llama.remember(kind, llama.Trial(True, False, how))
            way_out = "the same command tries again without its extra buffers"
        else:
            way_out = llama.another_type(kind)
        return ExportError(f"llama.cpp crashed while it answered with {self._path} ({how}: {words}); {way_out}")


def _serve(path: Path, settings: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what llama.cpp prints is no answer

    def tell(kind: str, value: Any) -> None:
        answers.write(json.dumps([kind, value]) + "\n")
        answers.flush()

    try:
        solver = Solver(path, tools=Tools.from_dict(settings.pop("tools")), **settings)
        atexit.register(solver.close)
    except DpostError as error:
        tell("error", [type(error).__name__, str(error)])
        return
    tell("ready", None)
    for line in sys.stdin:
        asked = json.loads(line)
        streams = asked.pop("streams")
        try:
            if streams:
                for piece in solver.stream(**asked):
                    tell("piece", piece)
                tell("end", None)
            else:
                tell("solved", asdict(solver.solve(**asked)))
        except DpostError as error:
            tell("error", [type(error).__name__, str(error)])


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    _serve(Path(sys.argv[1]), json.loads(sys.argv[2]))
