"""The default sandbox under attack: each attack ends in a line for the model, and none costs another row its answer."""

import ast
import gc
import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("pydantic_monty")

import psutil
from hypothesis import given, settings
from hypothesis import strategies as st

from dpost_lite.errors import SandboxError
from dpost_lite.sandbox import monty
from dpost_lite.sandbox.base import (
    CRASHED,
    MAX_PRINTED,
    PRINTED_TOO_MUCH,
    Limits,
    Ran,
    Sandbox,
    keeps_state,
    ran,
    took_too_long,
    took_too_much_memory,
)
from dpost_lite.sandbox.choose import NOT_RUN, sandbox
from dpost_lite.sandbox.echo import with_echo

LIMITS = Limits(seconds=0.5)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with sandbox("monty", LIMITS) as opened:
        yield opened


def run(box: Sandbox, code: str, *earlier: str) -> Ran:
    return box.run(earlier, code).result(timeout=30)


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


TOO_LONG, TOO_BIG = took_too_long(LIMITS), took_too_much_memory(LIMITS)
ATTACKS = {
    "endless loop": ("while True: pass", TOO_LONG),
    "endless loop that catches": ("while True:\n  try:\n    while True: pass\n  except: pass", TOO_LONG),
    "recursion": ("def f(): return f()\nf()", "RecursionError"),
    "recursion that recurses again": ("def f():\n  try: f()\n  finally: f()\nf()", TOO_LONG),
    "memory bomb": ("x = [0] * 10**9", TOO_BIG),
    "growing list": ("x = [1]\nwhile True: x += x", TOO_BIG),
    "power tower": ("9**9**9", TOO_BIG),
    "a gigabyte in one piece": ("print('a' * 10**9)", TOO_BIG),
    "a gigabyte in pieces": ("while True: print('a' * 10**4)", PRINTED_TOO_MUCH),
    "wide format": ("f'{1:1000000000}'", TOO_BIG),
    "sleep": ("import time\ntime.sleep(1000)", TOO_LONG),
    "fork bomb": ("import os\nwhile True: os.fork()", "AttributeError"),
    "another process": ("import subprocess", "ModuleNotFoundError"),
    "the home folder": ("print(open(HOME).read())", "PermissionError"),
    "a listing": ("import os\nprint(os.listdir('/'))", "PermissionError"),
    "the environment": ("import os\nprint(os.environ['SECRET'])", "RuntimeError"),
    "the environment by getenv": ("import os\nprint(os.getenv('SECRET'))", "Error"),
    "writing a file": ("open(TARGET, 'w').write('x')", "PermissionError"),
    "writing by pathlib": ("from pathlib import Path\nPath(TARGET).write_text('x')", "PermissionError"),
    "a socket": ("import socket\nsocket.create_connection(('127.0.0.1', PORT))", "ModuleNotFoundError"),
    "the web": ("import urllib.request", "ModuleNotFoundError"),
    "a signal to the parent": ("import os\nos.kill(os.getppid(), 9)", "AttributeError"),
    "closing pipes": ("import os\nfor i in range(100): os.close(i)", "AttributeError"),
    "closing standard output": ("import sys\nsys.stdout.close()\nprint(1)", "Error"),
    "leaving": ("import sys\nsys.exit(3)", "AttributeError"),
    "leaving at once": ("import os\nos._exit(3)", "AttributeError"),
    "dunder attributes": ("print(().__class__.__bases__[0].__subclasses__())", "AttributeError"),
    "globals of a function": ("def f(): pass\nprint(f.__globals__['__builtins__'])", "AttributeError"),
    "attributes by format": ("print('{0.__class__.__mro__}'.format(1))", "Error"),
    "import by eval": ('eval(\'__import__("os").system("id")\')', "NameError"),
    "ctypes": ("import ctypes", "ModuleNotFoundError"),
    "loaded modules": ("import sys\nprint(sys.modules['os'])", "AttributeError"),
    "deep nesting": ("x = " + "[" * 3000 + "]" * 3000, "SyntaxError"),
    "long chain of signs": ("-" * 3000 + "1", "SyntaxError"),
    "a null byte": ("x = 1\0", "SyntaxError"),
    "input": ("input()", "NameError"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str, box: Sandbox, tmp_path, monkeypatch) -> None:
    code, expected = ATTACKS[name]
    monkeypatch.setenv("SECRET", "hunter2")
    secret, target = tmp_path / "secret", tmp_path / "target"
    secret.write_text("hunter2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        code = code.replace("HOME", repr(str(secret))).replace("TARGET", repr(str(target)))
        attack = box.run((), code.replace("PORT", str(server.getsockname()[1])))
        beside = [box.run((f"x = {number}",), "print(x * 2)") for number in range(20)]
        found = attack.result(timeout=30)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert expected in found.error
    assert found.error in found.text or len(found.text) > LIMITS.output_chars
    assert "hunter2" not in found.text
    assert len(found.text) < LIMITS.output_chars + 50
    assert not target.exists()
    assert [future.result(timeout=30).text for future in beside] == [str(2 * number) for number in range(20)]


def test_only_the_caller_parses_code(box: Sandbox) -> None:
    """Before Python 3.13, threads that parse at once make each other raise SystemError.

    They take turns while the garbage collector calls Python, as it does under hypothesis.
    """
    deep = "x = " + "(" * 80 + "1" + ")" * 80 + "+ 1" * 80

    def let_others_run(*_: object) -> None:
        time.sleep(0)

    threshold = gc.get_threshold()
    gc.callbacks.append(let_others_run)
    gc.set_threshold(10)
    try:
        running = [box.run((deep,) * 5, f"print(x + {number})") for number in range(40)]
        while not all(future.done() for future in running):
            ast.parse(deep)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(let_others_run)
    assert [future.result().text for future in running] == [str(81 + number) for number in range(40)]


def test_a_worker_that_is_killed_costs_no_answer(box: Sandbox) -> None:
    slow = [box.run((), f"for i in range(300000): x = i\nprint({number})") for number in range(4)]
    time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        if "monty" in process.name():
            os.kill(process.pid, signal.SIGKILL)
    assert [future.result(timeout=30).text for future in slow] == [str(number) for number in range(4)]


def test_an_interpreter_that_always_crashes_is_a_line_too(box: Sandbox, monkeypatch) -> None:
    class Died(Exception):
        timed_out = False

    def die(*_: object) -> None:
        raise Died

    monkeypatch.setattr(box._monty, "MontyCrashedError", Died)
    monkeypatch.setattr(box, "_in_session", die)
    assert run(box, "print(1)") == Ran(CRASHED, CRASHED)


def test_nothing_is_left_running() -> None:
    before = children()
    with sandbox("monty", LIMITS) as box:
        assert run(box, "print(1)").text == "1"
        assert children() > before
    assert children() == before


def test_blocks_of_a_solution_share_variables_and_no_others_do(box: Sandbox) -> None:
    assert run(box, "y * 2", "x = 5", "y = x + 1", "1/0").text == "12"
    assert "NameError" in run(box, "x").text


def test_equal_calls_give_equal_texts(box: Sandbox) -> None:
    code = (
        "import random, time, datetime\n"
        "print(random.random(), time.time(), datetime.datetime.now(), hash('a'), {'a', 'b', 'c'})\nobject()"
    )
    with sandbox("monty", LIMITS) as other:
        assert len({run(box, code).text for box in (box, box, other)}) == 1


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("1 + 1", "2"),
        ("x = 5\nx", "5"),
        ("x = 5; x", "5"),
        ("'a'", "'a'"),
        ("None", ""),
        ("print(3)", "3"),
        ("print('é'); 1 + \\\n 2", "é\n3"),
        ("(1 +\n 2)  # comment", "3"),
        ("x = 1\r\nx", "1"),
        ("x = 1\n\x0cx", "1"),
        ("x = 1\u2028", "SyntaxError"),
        ("x = 'a\u2028b'\nlen(x)", "3"),
        ("# only a comment", ""),
        ("", ""),
        ("if True:\n  5", ""),
        ("def f(x):\n  return x\nf(3)", "3"),
        ("for i in range(3): print(i)", "0\n1\n2"),
        ("10**5000", "ValueError"),
        ("print(1)\n1/0", "1\nZeroDivisionError: division by zero"),
        ("print(1", "SyntaxError"),
        ("a = []\na.append(a)\na", "[[...]]"),
    ],
)
def test_a_block_shows_what_a_notebook_shows(box: Sandbox, code: str, text: str) -> None:
    assert run(box, code).text.startswith(text)
    assert bool(text) == bool(run(box, code).text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_line(text: str) -> None:
    assert isinstance(with_echo(text), str)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="x=1+()[]\n'\"#:é\\\r; print", max_size=40))
def test_any_code_ends(box: Sandbox, code: str) -> None:
    assert isinstance(run(box, code), Ran)


def test_long_outputs_lose_their_middle() -> None:
    found = ran("a" * 300 + "b" * 300, "", Limits(output_chars=100))
    assert found.text == "a" * 50 + "\n[500 characters cut]\n" + "b" * 50
    assert ran("1 \n\n", "", LIMITS).text == "1"
    assert ran("1\n", "KeyError: 2\n", LIMITS).text == "1\nKeyError: 2"


def test_a_block_that_prints_too_much_keeps_its_head(box: Sandbox) -> None:
    found = run(box, f"print('start')\nprint('a' * {MAX_PRINTED})")
    assert found.text.startswith("start\naaa")
    assert found.error == PRINTED_TOO_MUCH


def test_variables_are_kept_unless_a_limit_stopped_the_block() -> None:
    assert keeps_state(Ran("", ""), LIMITS)
    assert keeps_state(Ran("KeyError: 1", "KeyError: 1"), LIMITS)
    for error in (TOO_LONG, TOO_BIG, PRINTED_TOO_MUCH, CRASHED):
        assert not keeps_state(Ran(error, error), LIMITS)


def test_a_missing_package_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydantic_monty", None)
    with pytest.raises(SandboxError, match=r'pip install "dpost-lite\[code\]"'):
        monty.MontySandbox(LIMITS)


def test_without_permission_nothing_runs() -> None:
    with sandbox(None, LIMITS) as box:
        assert run(box, "print(1)") == Ran(NOT_RUN, NOT_RUN)
    assert "--allow-code" in NOT_RUN
