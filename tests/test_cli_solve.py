"""The command `solve` with a stand-in that answers by a script, and a conversation on a pseudo-terminal."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from command_line import a_run, dpost_lite
from rich.console import Console
from test_gguf import save_model

from dpost_lite.cli import solve as command
from dpost_lite.errors import DataError, PromptTooLong
from dpost_lite.local import gguf, llama
from dpost_lite.local.llama import Trial
from dpost_lite.local.request import Piece, Request, Solution


def solution(text: str, *, end: str = "stop") -> Solution:
    stated = text.rpartition("#### ")[2].strip() if "#### " in text else None
    return Solution(text, stated, stated, 1, 0, end, 10, 20)


class ScriptedSolver:
    """Stands in for the solver process; answers with what it was made with and asked, and keeps the requests."""

    requests: ClassVar[list[Request]] = []
    made: ClassVar[dict[str, Any]] = {}
    answers: ClassVar[list[str]] = []  # of the next requests, in place of the usual one
    end: ClassVar[str] = "stop"

    def __init__(self, path: Path, **options: Any) -> None:
        self.made.update(path=str(path), **options)

    def __enter__(self) -> "ScriptedSolver":
        return self

    def __exit__(self, *_: object) -> None: ...

    def pieces(self, request: Request) -> Iterator[Piece]:
        self.requests.append(request)
        if self.answers:
            yield Piece(self.answers.pop(0))
            return
        (message,) = request.messages
        yield from (Piece(f"{message.content}\x1b[1m <<1+1="), Piece("2>>2", True), Piece("\n#### "), Piece("2"))

    def stream(self, request: Request) -> Iterator[Piece | Solution]:
        pieces = list(self.pieces(request))
        yield from pieces
        yield solution("".join(piece.text for piece in pieces), end=self.end)

    def solve_all(self, requests: list[Request]) -> Iterator[Solution]:
        for request in requests:
            if "too long" in request.messages[0].content:
                raise PromptTooLong("the question has 9000 tokens")
            yield solution("".join(piece.text for piece in self.pieces(request)), end=self.end)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, cwd: Path) -> type[ScriptedSolver]:
    """Let a stand-in solve."""
    monkeypatch.setattr("dpost_lite.local.solver_process.SolverProcess", ScriptedSolver)
    monkeypatch.setattr("dpost_lite.local.solver.read_header", lambda path: {})
    for name, empty in (("requests", []), ("made", {}), ("answers", []), ("end", "stop")):
        monkeypatch.setattr(ScriptedSolver, name, empty)
    return ScriptedSolver


def test_the_answer_is_streamed_and_stands_on_a_line_of_its_own(cwd: Path, scripted: type[ScriptedSolver]) -> None:
    a_run(cwd)
    out = dpost_lite("solve", "run", "How many?").stdout
    assert out == "How many?�[1m <<1+1=2>>2\n#### 2\nanswer: 2\n"
    assert scripted.made["path"] == "run/export/model-q4_k_m.gguf"
    assert scripted.made["tools"].calculator is not None
    assert scripted.made["num_parallel"] == 1
    assert scripted.requests[0].temperature == 0


@pytest.mark.parametrize("text", ["12\n", "12\n\n", "12"])
def test_line_feeds_at_the_end_leave_no_empty_line(scripted: type[ScriptedSolver], text: str) -> None:
    scripted.answers = [f"a\n\nb\n#### {text}"]
    assert dpost_lite("solve", "m.gguf", "?").stdout.splitlines()[-2:] == ["#### 12", "answer: 12"]


def test_without_an_answer_there_is_a_line_that_says_why(scripted: type[ScriptedSolver]) -> None:
    scripted.answers = ["I do not know."]
    assert dpost_lite("solve", "m.gguf", "?").stdout.endswith("\nno answer: the solution does not end in one\n")
    scripted.end = "limit"
    scripted.answers = ["2 and 2 and #### 2"]
    assert dpost_lite("solve", "m.gguf", "?").stdout.endswith("no answer: the solution was cut off after 20 tokens\n")


def test_what_the_calculator_wrote_is_marked_on_a_terminal_alone(
    scripted: type[ScriptedSolver], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = {}
    for name, options in {
        "pipe": {"force_terminal": False},
        "terminal": {"force_terminal": True, "color_system": "standard"},
        "no colour": {"force_terminal": True, "color_system": "standard", "no_color": True},
    }.items():
        console = Console(highlight=False, **options)
        command._Asking(ScriptedSolver(Path("m.gguf")), console, 1, None, None, False).answer("?")
        shown[name] = capsys.readouterr().out
    assert "<<1+1=\x1b[1;32m2>>2\x1b[0m\n#### 2\n" in shown["terminal"]
    assert "\x1b[" not in shown["pipe"]
    assert "\x1b[1m2>>2\x1b[0m" in shown["no colour"]
    assert "32m" not in shown["no colour"]


def test_many_questions_from_standard_input_are_solved_side_by_side(scripted: type[ScriptedSolver]) -> None:
    out = dpost_lite("solve", "m.gguf", "--no-calculator", stdin="One?\n\n  Two?  \n").stdout
    assert out == "One?�[1m <<1+1=2>>2\n#### 2\nanswer: 2\n\nTwo?�[1m <<1+1=2>>2\n#### 2\nanswer: 2\n"
    assert scripted.made["tools"].calculator is None
    assert scripted.made["num_parallel"] == 8


def test_of_many_questions_the_one_that_is_too_long_is_named(scripted: type[ScriptedSolver]) -> None:
    scripted.answers = ["#### 1"]
    done = dpost_lite("solve", "m.gguf", "--json", stdin="One?\ntoo long\nThree?\n")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["answer"] == "1"
    assert "question 2: the question has 9000 tokens" in done.stderr
    assert "question 1" not in dpost_lite("solve", "m.gguf", "--json", "too long").stderr


def test_json_is_one_object_per_question(scripted: type[ScriptedSolver]) -> None:
    scripted.answers = ["a 48/2=<<48/2=24>>24 b\n3 <<3*1.5=4.5>> naïve\n#### 24", "none"]
    first, second = map(json.loads, dpost_lite("solve", "m.gguf", "--json", stdin="One?\nTwo?\n").stdout.splitlines())
    assert first.pop("seconds") >= 0
    assert first == {
        "question": "One?",
        "text": "a 48/2=<<48/2=24>>24 b\n3 <<3*1.5=4.5>> naïve\n#### 24",
        "steps": ["a 48/2=<<48/2=24>>24 b", "3 <<3*1.5=4.5>> naïve"],
        "calculations": [{"expression": "48/2", "result": "24"}, {"expression": "3*1.5", "result": "4.5"}],
        "answer": "24",
        "is_finished": True,
        "tokens": 20,
    }
    assert (second["answer"], second["steps"], "votes" in second) == (None, ["none"], False)


def test_samples_are_put_to_the_vote(scripted: type[ScriptedSolver]) -> None:
    scripted.answers = ["x\n#### 7", "y\n#### 9", "no idea", "z\n#### 9"]
    out = dpost_lite("solve", "m.gguf", "?", "--samples", "4", "--seed", "5").stdout
    assert out == "y\n#### 9\nvotes: 9 (2), 7 (1), no answer (1)\nanswer: 9\n"
    assert [(r.seed, r.temperature) for r in scripted.requests] == [(5, 0.7), (6, 0.7), (7, 0.7), (8, 0.7)]
    assert scripted.made["num_parallel"] == 4
    scripted.answers = ["x\n#### 7", "y\n#### 9"]
    out = dpost_lite("solve", "m.gguf", "?", "--samples", "2", "--temperature", "0.4").stdout
    assert out == "x\n#### 7\nvotes: 7 (1), 9 (1); of equal numbers the first drawn wins\nanswer: 7\n"
    assert scripted.requests[-1].temperature == 0.4
    scripted.answers = ["x\n#### 7", "y\n#### 9", "z\n#### 9"]
    found = json.loads(dpost_lite("solve", "m.gguf", "?", "--samples", "3", "--json").stdout)
    assert (found["votes"], found["answer"], found["text"], found["tokens"]) == ({"9": 2, "7": 1}, "9", "y\n#### 9", 60)
    scripted.answers = ["one", "two"]
    assert "votes: no answer (2)\nno answer" in dpost_lite("solve", "m.gguf", "?", "--samples", "2").stdout


def test_answers_vary_unless_a_seed_is_given(scripted: type[ScriptedSolver]) -> None:
    def seeds(*options: str) -> list[int]:
        scripted.requests.clear()
        dpost_lite("solve", "m.gguf", "--temperature", "0.7", *options, stdin="One?\nTwo?\n")
        return [request.seed for request in scripted.requests]

    assert len({*seeds(), *seeds()}) == 4
    assert seeds("--seed", "5") == seeds("--seed", "5") == [5, 6]
    assert seeds("--seed", "5", "--samples", "2") == [5, 6, 7, 8]


def test_a_conversation_goes_on_after_ctrl_c_and_after_a_mistake(
    scripted: type[ScriptedSolver], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DPOST_LITE_CACHE", "cache")
    lines: list[Any] = ["One?", " ", KeyboardInterrupt(), "long", "Two?", EOFError()]
    failures = {"One?": KeyboardInterrupt(), "long": DataError("too long; shorten it")}

    def typed(prompt: str) -> str:
        line = lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    class Failing(ScriptedSolver):
        def stream(self, request: Request) -> Iterator[Piece | Solution]:
            error = failures.get(request.messages[0].content)
            if isinstance(error, DataError):
                raise error
            yield Piece("begun")
            if error:
                raise error
            yield solution("begun #### 3")

    monkeypatch.setattr("builtins.input", typed)
    command._converse(command._Asking(Failing(Path("m.gguf")), Console(), 1, None, None, False))
    told = capsys.readouterr()
    assert told.out == "begun\n(stopped)\n\nbegun\nanswer: 3\n\n"
    assert "too long; shorten it" in told.err


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
def test_a_conversation_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command on a pseudo-terminal: an answer, the end, and the history."""
    import pty

    monkeypatch.setenv("DPOST_LITE_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "model", "llama", "smollm")
    file = gguf.write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    llama.remember("f16", Trial(True, False))
    main, terminal = pty.openpty()
    arguments = [sys.executable, "-m", "dpost_lite", "solve", str(file)]
    process = subprocess.Popen(
        arguments, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        env={**os.environ, "TERM": "dumb", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    os.close(terminal)
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([main], [], [], 1)[0]:
                try:
                    seen += os.read(main, 4096).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert text in seen, seen
        seen = seen.partition(text)[2]

    try:
        wait_for("Ctrl-D ends")
        wait_for("> ")
        os.write(main, b"How many?\n")
        wait_for("answer")
        wait_for("> ")
        os.write(main, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
    assert (tmp_path / "cache" / "questions").read_text().endswith("How many?\n")
