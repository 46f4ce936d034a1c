"""Processes that take turns: a lock that goes round, and never keeps anybody from working for good."""

import errno
import itertools
import subprocess
import sys
import threading
import time

import pytest

from dpost_lite.system import turns as module
from dpost_lite.system.turns import Turns

pytest.importorskip("fcntl")

WORKER = """
import sys, time
from pathlib import Path
from dpost_lite.system.turns import Turns
turns, until = Turns(Path(sys.argv[1])), time.monotonic() + float(sys.argv[2])
print("ready", flush=True)
while time.monotonic() < until:
    turns.take()
    print(f"{time.monotonic():.6f}", flush=True)
    time.sleep(0.01)
if sys.argv[3] == "hang":
    time.sleep(60)
"""


def worker(folder, seconds: float, then: str = "end") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(seconds), then], stdout=subprocess.PIPE, text=True
    )


def steps(process: subprocess.Popen[str]) -> list[float]:
    out, _ = process.communicate(timeout=60)
    return [float(line) for line in out.split()[1:]]


def test_two_processes_work_one_after_the_other_and_both_get_on(tmp_path):
    found = [steps(process) for process in [worker(tmp_path, 4), worker(tmp_path, 4)]]
    both = [(at, who) for who, times in enumerate(found) for at in times]
    together = [(at, who) for at, who in sorted(both) if max(f[0] for f in found) < at < min(f[-1] for f in found)]
    changes = sum(a != b for (_, a), (_, b) in itertools.pairwise(together))
    assert 4 <= changes <= 30  # turns of 0.25 s, not of a step
    counts = [sum(who == one for _, who in together) for one in (0, 1)]
    assert min(counts) > 0.25 * max(counts)


def test_alone_nothing_is_waited_for(tmp_path):
    turns = Turns(tmp_path)
    turns.take()
    started = time.perf_counter()
    for _ in range(1000):
        turns.take()
    assert time.perf_counter() - started < 0.1
    turns._since -= 9  # a long turn, and nobody waits
    started = time.perf_counter()
    turns.take()
    assert time.perf_counter() - started < module.POLL_SECONDS


def test_a_turn_of_a_process_that_died_is_free(tmp_path):
    process = worker(tmp_path, 0.2, "hang")
    process.stdout.readline(), process.stdout.readline()
    process.kill()
    process.wait()
    turns = Turns(tmp_path)
    started = time.perf_counter()
    turns.take()
    assert turns._since is not None
    assert time.perf_counter() - started < 1


def test_who_keeps_a_turn_forever_is_worked_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    first, second = Turns(tmp_path), Turns(tmp_path)
    first.take()
    started = time.perf_counter()
    second.take()
    assert 0.1 <= time.perf_counter() - started < 1
    started = time.perf_counter()
    second.take()  # does not wait again
    assert time.perf_counter() - started < 0.05
    second.end()  # nothing to give up
    first.end()


def test_an_end_lets_the_other_go_on(tmp_path):
    first, second = Turns(tmp_path), Turns(tmp_path)
    first.take()
    first.end()
    started = time.perf_counter()
    second.take()
    assert time.perf_counter() - started < module.POLL_SECONDS


def test_a_turn_lasts_as_long_as_was_waited_for_it(tmp_path):
    """Beside a training, whose pieces take seconds, a sampler gets as much time."""
    first, second = Turns(tmp_path), Turns(tmp_path)
    first.take()
    threading.Timer(0.6, first.end).start()
    second.take()
    assert 0.5 < second._length < 2
    second.end()
    second.take()
    assert second._length == module.TURN_SECONDS


def test_turns_do_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_TURN_SECONDS", 0.3)
    first, second = Turns(tmp_path), Turns(tmp_path)
    first.take()
    threading.Timer(0.6, first.end).start()
    second.take()
    assert second._length == 0.3


def test_a_lock_that_fails_stops_nobody(tmp_path, monkeypatch):
    turns = Turns(tmp_path)

    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", flock)
    turns.take()
    turns.take()
    turns.end()
    assert turns._since is None


def test_own_threads_take_no_turns(monkeypatch, tmp_path):
    monkeypatch.setenv("DPOST_LITE_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert module.turns.__wrapped__() is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert module.turns.__wrapped__()._has_locks


def test_without_locks_nobody_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    (tmp_path / "file").touch()
    first, second = (Turns(tmp_path / "file" / "folder") for _ in range(2))
    started = time.perf_counter()
    first.take(), second.take(), first.end()
    assert time.perf_counter() - started < 0.05
