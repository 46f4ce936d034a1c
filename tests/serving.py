"""For tests of the server: a solver that writes what a script says, and a server that listens."""

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from dpost_lite.errors import DpostError, ExportError, PromptTooLong
from dpost_lite.local.request import Piece, Request, Solution
from dpost_lite.server.app import create_app
from dpost_lite.server.async_solver import AsyncSolver
from dpost_lite.server.gate import Access
from dpost_lite.server.run import Server, listen, url_of
from dpost_lite.server.schema import Defaults

Tell = Callable[[Piece | Solution | DpostError], None]
MODEL = "model-q8_0"
PIECES = (
    Piece("The total is 4*7=<<4*7="), Piece("28>>", is_inserted=True), Piece("28", is_inserted=True),
    Piece(" miles, “naïve”.\n#### 28"),
)  # fmt: skip
TEXT = "".join(piece.text for piece in PIECES)


def solution(text: str, *, end: Any = "stop") -> Solution:
    answer = text.partition("#### ")[2] or None
    return Solution(text, answer, answer, 1, 0, end, num_prompt_tokens=11, num_tokens=len(text.split()))


@dataclass
class ScriptedSolver:
    """Answers with `PIECES`, each request in a thread. The last message asks for something else by a word: "endless"
    writes until it is cancelled, "crash" ends the solver, "long" does not fit, "hang" writes nothing, "html" is markup;
    "seed" is answered with the seed. Where `num_rows` are being answered, others are not begun.
    """

    pieces: tuple[Piece, ...] = PIECES
    asked: list[Request] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    running: dict[int, Tell] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)
    num_rows: int = 100
    alive: bool = True
    closed: bool = False

    def __post_init__(self) -> None:
        self._numbers = itertools.count()

    def start(self, request: Request, tell: Tell) -> int:
        number = next(self._numbers)
        self.asked.append(request)
        self.running[number] = tell
        if len(self.running) <= self.num_rows:
            threading.Thread(target=self._write, args=(number, request, tell), daemon=True).start()
        return number

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        if tell := self.running.pop(number, None):
            tell(solution("on and " if number in self.begun else "", end="cancelled"))

    @property
    def is_alive(self) -> bool:
        return self.alive

    def close(self, *, at_once: bool = False) -> None:
        self.alive, self.closed = False, True

    def _write(self, number: int, request: Request, tell: Tell) -> None:
        asked = request.messages[-1].content if request.prompt is None else request.prompt
        pieces = self.pieces
        if "crash" in asked:
            self.alive = False
            for outstanding in list(self.running.values()):
                outstanding(ExportError("llama.cpp crashed while it answered (SIGSEGV)"))
            return
        if "long" in asked:
            tell(PromptTooLong("the question has 9000 tokens with its template, the model reads 4096; shorten it"))
            return
        if "seed" in asked:
            pieces = (Piece(f"#### {request.seed % 3}"),)
        if "html" in asked:
            pieces = (Piece("<b id=bold>7</b><script>document.title = 'run'</script>\n#### 7"),)
        while "hang" in asked and number in self.running:
            time.sleep(0.01)
        while "endless" in asked and number in self.running:
            tell(Piece("on and "))
            self.begun.add(number)
            time.sleep(0.01)
        if number not in self.running:
            return
        for piece in pieces:
            tell(piece)
        del self.running[number]
        tell(solution("".join(piece.text for piece in pieces), end="limit" if "cut" in asked else "stop"))


@dataclass
class Serving:
    """A server that runs in a thread; `solvers` are those that were opened, in order."""

    url: str
    solvers: list[ScriptedSolver]
    server: Server

    @property
    def solver(self) -> ScriptedSolver:
        return self.solvers[-1]


@contextmanager
def serving(
    *, open_solver: Callable[[], Any] = ScriptedSolver, access: Access | None = None, max_outstanding: int = 8,
    max_seconds: float = 30, tools: str = "calculator",
) -> Iterator[Serving]:  # fmt: skip
    """Serve `open_solver`'s solvers on a free port."""
    solvers: list[Any] = []

    def opened() -> Any:
        solvers.append(open_solver())
        return solvers[-1]

    solver = AsyncSolver(opened, max_outstanding=max_outstanding, max_seconds=max_seconds)
    app = create_app(solver, model=MODEL, tools=tools, defaults=Defaults(300, 0.7), access=access or Access())
    with closing(listen("127.0.0.1", 0)) as listening:
        server = Server(app, solver)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Serving(url_of(listening), solvers, server)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def wait_until(is_so: Callable[[], bool], *, seconds: float = 10) -> None:
    """Wait until `is_so`; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def send_raw(url: str, text: bytes) -> socket.socket:
    """Send bytes to the server at `url`; return the open connection."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(text)
    return connection
