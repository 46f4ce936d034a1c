"""An engine in a process of its own: whatever ends llama.cpp ends that process, and not the command.

The child is `python -m dpost_lite.local.solver_process FILE SETTINGS`. Both sides write lines of JSON, and answers come
in any order:

    to the child     ["start", [[number, request], …]]   ["cancel", number]
    from the child   ["ready", {…}]  ["piece", number, {…}]  ["solved", number, {…}]  ["error", number, [name, text]]

An error without a number is one of the start. What llama.cpp prints goes to a temporary file, whose end is shown if it
crashes.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpost_lite import errors
from dpost_lite.errors import DpostError, ExportError
from dpost_lite.local import llama
from dpost_lite.local.engine import Engine
from dpost_lite.local.request import Message, Piece, Request, Solution
from dpost_lite.problems.tools import Tools

SECONDS_TO_END = 10

Told = Piece | Solution | DpostError
Tell = Callable[[Told], None]


class SolverProcess:
    """Answers requests as `Engine` does, for all threads at once. Use it in a `with` block, which ends the process.

    `num_context` is the most tokens that a prompt and its answer may have together.
    Raises ExportError if the file is missing or broken, carries no chat template, or crashes llama.cpp; SandboxError as
    `Engine` does.
    """

    def __init__(self, gguf_path: Path, *, tools: Tools, max_new_tokens: int = 300, num_parallel: int = 1) -> None:
        self.max_new_tokens = max_new_tokens
        self.num_parallel = num_parallel
        self._path = gguf_path
        self._kind = llama.file_type(gguf_path)  # read now: the file may be gone when it is needed
        self._extra_buffers = llama.uses_extra_buffers(gguf_path)
        settings = {
            "tools": tools.as_dict(),
            "max_new_tokens": max_new_tokens,
            "num_parallel": num_parallel,
            "extra_buffers": self._extra_buffers,
        }
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [*llama.PYTHON, "dpost_lite.local.solver_process", str(gguf_path), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed, text=True, encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches a whole group; this process decides
        )  # fmt: skip
        self._lock = threading.Lock()  # of what follows, and of the child's standard input
        self._tell: dict[int, Tell] = {}
        self._num_started = 0
        self._ended: DpostError | None = None  # why the child answers no more
        self._reader = threading.Thread(target=self._read, daemon=True)
        try:
            self.num_context: int = self._ready()["num_context"]
        except BaseException:
            self.close(at_once=True)
            raise
        self._reader.start()

    def __enter__(self) -> "SolverProcess":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(at_once=error is not None)

    @property
    def is_alive(self) -> bool:
        """Whether it still answers: it has neither crashed nor been closed."""
        return self._ended is None

    def start(self, request: Request, tell: Tell) -> int:
        """Queue a request; return its number.

        `tell` is called from another thread: with each piece as it is written, and at the end with the Solution or the
        error, a DataError for a request that cannot be answered, or the ExportError that all unfinished requests get if
        the process dies. It must neither block nor raise. Raises the ExportError itself if the process is dead already.
        """
        (number,) = self._start_all([(request, tell)])
        return number

    def _start_all(self, started: list[tuple[Request, Tell]]) -> list[int]:
        """Queue requests before any of them is computed; return their numbers. Raises as `start`."""
        with self._lock:
            if self._ended:
                raise self._ended
            numbers = range(self._num_started + 1, self._num_started + 1 + len(started))
            self._num_started += len(started)
            self._tell.update((number, tell) for number, (_, tell) in zip(numbers, started, strict=True))
            self._write(["start", [[n, asdict(request)] for n, (request, _) in zip(numbers, started, strict=True)]])
            return list(numbers)

    def cancel(self, number: int) -> None:
        """Stop computing an answer. Its last event is a Solution with `end` "cancelled", unless it has ended before."""
        with self._lock:
            self._write(["cancel", number])

    def stream(self, request: Request) -> Iterator[Piece | Solution]:
        """Yield the answer as it is written, at last the Solution. An iterator that is dropped cancels the request.

        Raises DataError if the prompt is too long, ExportError if the process dies.
        """
        told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        number = self.start(request, told.put)
        event: Told | None = None
        try:
            while not isinstance(event, Solution):
                event = told.get()
                if isinstance(event, DpostError):
                    raise event
                yield event
        finally:
            if not isinstance(event, (Solution, DpostError)):
                self.cancel(number)

    def solve(self, question: str, *, temperature: float = 0.0, seed: int = 0) -> Solution:
        """Return the answer to one question, greedy or sampled at `temperature`. Raises as `stream` does."""
        (solution,) = self.solve_all([Request.of(question, temperature=temperature, seed=seed)])
        return solution

    def solve_all(self, requests: Iterable[Request]) -> Iterator[Solution]:
        """Yield the answers in the order of the requests. Raises as `stream` does.

        All are queued before any is computed, so the same requests alone in a process always give the same answers
        (where no code runs: what it prints comes when it comes).
        """
        waiting: list[tuple[Request, queue.SimpleQueue[Told]]] = [
            (request, queue.SimpleQueue()) for request in requests
        ]
        numbers = self._start_all([(request, told.put) for request, told in waiting])
        started = list(zip(numbers, (told for _, told in waiting), strict=True))
        try:
            while started:
                event = started[0][1].get()
                if isinstance(event, DpostError):
                    raise event
                if isinstance(event, Solution):
                    started.pop(0)
                    yield event
        finally:
            for number, _ in started:
                self.cancel(number)

    def close(self, *, at_once: bool = False) -> None:
        """End the process; `at_once` in the middle of an answer. Unfinished requests get an ExportError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._ended = self._ended or ExportError("the solver was closed")
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(0 if at_once else SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._reader.ident is not None and self._reader is not threading.current_thread():
            self._reader.join()
        self._process.stdout.close()
        self._printed.close()

    def _write(self, words: list[Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has crashed, which `_read` tells, or was closed
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()

    def _ready(self) -> dict[str, Any]:
        """Return the child's first line; raise the error that it names, or ExportError if it has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._crashed()
        kind, value = json.loads(line)
        if kind == "error":
            raise _error(value)
        return value

    def _read(self) -> None:
        """Tell what the child writes, until it ends; then tell all who wait."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):
                kind, number, value = json.loads(line)
                event: Told = _EVENTS[kind](value)
                with self._lock:
                    tell = self._tell[number] if kind == "piece" else self._tell.pop(number)
                tell(event)
        with self._lock:
            self._ended = ended = self._ended or self._crashed()
            waiting, self._tell = list(self._tell.values()), {}
        for tell in waiting:
            tell(ended)

    def _crashed(self) -> ExportError:
        code, kind = self._process.wait(), self._kind
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


def _error(value: list[str]) -> DpostError:
    made: DpostError = getattr(errors, value[0])(value[1])
    return made


_EVENTS: dict[str, Callable[[Any], Told]] = {
    "piece": lambda value: Piece(**value),
    "solved": lambda value: Solution(**value),
    "error": _error,
}


def _request(values: dict[str, Any]) -> Request:
    messages = tuple(Message(**message) for message in values.pop("messages"))
    return Request(messages=messages, stop=tuple(values.pop("stop")), **values)


class _Child:
    """The child's side: one thread reads what is asked, the main thread computes."""

    def __init__(self, engine: Engine, answers: Any) -> None:
        self._engine = engine
        self._answers = answers
        self._asked: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        self._numbers: dict[int, int] = {}  # the engine's number of a request -> the parent's
        threading.Thread(target=self._listen, daemon=True).start()

    def serve(self) -> None:
        """Answer until standard input ends."""
        while self._take_all():
            for number, event in self._engine.step():
                if isinstance(event, Piece):
                    self._tell("piece", self._numbers[number], asdict(event))
                else:
                    self._tell("solved", self._numbers.pop(number), asdict(event))
            self._answers.flush()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._asked.put(json.loads(line))
        self._asked.put(None)

    def _take_all(self) -> bool:
        """Do what is asked, after a wait if there is nothing to compute; return False at the end of the input."""
        while not self._engine.has_unfinished() or not self._asked.empty():
            asked = self._asked.get()
            if asked is None:
                return False
            kind, value = asked
            if kind == "start":
                for number, request in value:
                    self._start(number, request)
            else:
                self._cancel(value)
            self._answers.flush()
        return True

    def _start(self, number: int, request: dict[str, Any]) -> None:
        try:
            self._numbers[self._engine.add_request(_request(request))] = number
        except DpostError as error:
            self._tell("error", number, [type(error).__name__, str(error)])

    def _cancel(self, number: int) -> None:
        for inner, outer in list(self._numbers.items()):
            if outer == number and (solution := self._engine.cancel(inner)):
                del self._numbers[inner]
                self._tell("solved", number, asdict(solution))

    def _tell(self, *words: Any) -> None:
        self._answers.write(json.dumps(words) + "\n")


def _serve(path: Path, settings: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    try:
        engine = Engine(path, tools=Tools.from_dict(settings.pop("tools")), **settings)
    except DpostError as error:
        print(json.dumps(["error", [type(error).__name__, str(error)]]), file=answers, flush=True)
        return
    print(json.dumps(["ready", {"num_context": engine.model.num_context}]), file=answers, flush=True)
    with contextlib.closing(engine), contextlib.suppress(BrokenPipeError):  # the parent is gone
        _Child(engine, answers).serve()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    try:
        _serve(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except Exception:
        traceback.print_exc()
        os._exit(llama.PYTHON_ERROR)  # Python's own way out aborts where a thread is reading standard input
