"""Equality of LaTeX answers, and the child process that computes it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dpost_lite.errors import DataError
from dpost_lite.problems import latex, latex_child
from dpost_lite.problems.latex import Comparer, same_latex

ENDLESS = "9^{9^{9^{9}}}"
WITHOUT_ALGEBRA = [
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"7\frac{1}{2}", "7 1/2"),
    ("7.5", "7 1/2"),
    ("-3", "(-3)"),
    (r"10,\!080", "10080"),
    (r"\$32,\!348", "32348"),
    (r"90^\circ", "90"),
    (r"15\mbox{ cm}^2", "15"),
    ("x=5", "5"),
    ("x=5", "$x = 5$."),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    ("52_8", "52_{8}"),
    ("52_8", "52"),
    ("p - q", "p-q"),
    (r"11\sqrt2", r"11\sqrt{2}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]
BY_ALGEBRA = [
    (r"\sqrt{51}", "51^{1/2}"),
    (r"\frac{1}{3}", "0.33333333"),
    (r"\frac{1}{2}", r"50\%"),
    ("(a+5)(b+2)", "ab+2a+5b+10"),
    ("1,-2", "-2,1"),
    (r"\{1,2\}", "2, 1"),
    (r"1\pm\sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"\left(\frac35,\frac83\right]", r"(0.6,\frac{8}{3}]"),
    (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{bmatrix} 0.5 \\ 2 \end{bmatrix}"),
    ("x \\in [-2,7]", "[-2,7]"),
    ("y = 2x + 3", "y = 3 + 2x"),
    (r"12\pi", r"\pi \cdot 12"),
    (r"\cot x", r"\frac{1}{\tan x}"),
]
UNEQUAL_WITHOUT_ALGEBRA = [
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    (r"\frac{1}{3}", "0.333"),
    ("-3", "(3)"),
    ("7 1/2", "4"),  # math-verify reads 4
    ("52_8", "52_9"),
    ("x=5", "y=5"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "1,2"),
    ("(1,2)", r"\{1,2\}"),
    (r"\text{east}", "seat"),
    (r"\text{even}", r"\text{odd}"),
    ("5", r"5 \text{ million}"),
    (r"\frac{1}{2}", r"\frac{1}{2"),
    (r"\frac{1}{2}", ""),
    ("x", "(" * 60 + "x" + ")" * 60),
    ("x" * 501, "x" * 501),
]
UNEQUAL_BY_ALGEBRA = [
    ("-2,1", "-21"),
    ("12", "12. Wait, 13."),
    ("13", "12. Wait, 13."),
    (r"\pi", "3.14"),
    (r"\sqrt{16}", "7 1/2"),
    ("(1,2)", "(2,1)"),
    ("(3,4]", "(3,5]"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"),
    ("2x+3", "2x-3"),
    ("y = 2x + 3", "y = 2x"),
    ("5,6", "5"),
]


@pytest.mark.parametrize(("answer", "predicted"), WITHOUT_ALGEBRA)
def test_equal_without_algebra(monkeypatch, answer, predicted):
    monkeypatch.setattr(latex._comparer, "equal", None)
    assert same_latex(predicted, answer)
    assert same_latex(answer, predicted)


@pytest.mark.parametrize(("answer", "predicted"), UNEQUAL_WITHOUT_ALGEBRA)
def test_unequal_without_algebra(monkeypatch, answer, predicted):
    monkeypatch.setattr(latex._comparer, "equal", None)
    assert not same_latex(predicted, answer)
    assert not same_latex(answer, predicted)


@pytest.fixture(scope="module")
def _math_verify():
    pytest.importorskip("math_verify")


@pytest.mark.usefixtures("_math_verify")
@pytest.mark.parametrize(("answer", "predicted"), BY_ALGEBRA)
def test_equal_by_algebra(answer, predicted):
    before = latex._comparer.num_asked
    assert same_latex(predicted, answer)
    assert latex._comparer.num_asked == before + 1
    assert same_latex(predicted, answer)
    assert latex._comparer.num_asked == before + 1  # remembered


@pytest.mark.usefixtures("_math_verify")
@pytest.mark.parametrize(("answer", "predicted"), UNEQUAL_BY_ALGEBRA)
def test_unequal_by_algebra(answer, predicted):
    assert not same_latex(predicted, answer)


# The child process


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def comparer(_math_verify):
    notices: list[str] = []
    one = Comparer(deadline=1.0, warn=notices.append)
    one.notices = notices
    yield one
    one.close()


def test_it_starts_when_it_is_needed_and_stays(comparer):
    assert comparer.pid is None
    assert comparer.equal("2^{3}", r"\sqrt{64}")
    first = comparer.pid
    assert not comparer.equal("2^{3}", r"\sqrt{65}")
    assert comparer.pid == first is not None
    assert comparer.notices == []


def test_an_endless_comparison_is_given_up_and_told(comparer):
    comparer.equal("2^{3}", "8")
    first, started = comparer.pid, time.monotonic()
    assert not comparer.equal(ENDLESS, r"\pi")
    assert 0.9 < time.monotonic() - started < 10
    assert not is_running(first)
    assert comparer.num_given_up == 1
    assert comparer.notices == [f"LaTeX answers {ENDLESS!r} and '\\\\pi' count as not equal: no result in 1 s"]
    asked = comparer.num_asked
    assert not comparer.equal(ENDLESS, r"\pi")  # remembered
    assert comparer.num_asked == asked
    assert comparer.equal(r"\sqrt{8}", r"2\sqrt{2}")  # by a new child


def test_a_crash_is_counted_and_the_next_comparison_works(comparer, monkeypatch):
    comparer.equal("2^{3}", "8")
    running = comparer._running

    def killed():
        process = running()
        process.kill()
        process.wait()
        return process

    with monkeypatch.context() as patch:
        patch.setattr(comparer, "_running", killed)
        assert not comparer.equal(r"\sqrt{8}", r"2\sqrt{2}")
    assert (comparer.num_given_up, len(comparer.notices)) == (1, 1)
    assert "ended with its process" in comparer.notices[0]
    assert comparer.equal(r"2\sqrt{2}", r"\sqrt{8}")


def test_an_interruption_leaves_no_stale_answer(comparer, monkeypatch):
    comparer.equal("2^{3}", "8")
    pid = comparer.pid

    class Interrupting:
        def readline(self):
            raise KeyboardInterrupt

        def close(self):
            pass

    monkeypatch.setattr(comparer._process, "stdout", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        comparer.equal("2^{3}", r"\sqrt{64}")
    assert not is_running(pid)
    assert comparer.equal("2^{3}", r"\sqrt{64}")


def test_close_ends_the_child(comparer):
    comparer.equal("2^{3}", "8")
    pid = comparer.pid
    comparer.close()
    assert comparer.pid is None
    assert not is_running(pid)


PARENT = """
import sys, time
from dpost_lite.problems import latex
latex.same_latex("2^{3}", r"\\sqrt{64}")
print(latex._comparer.pid, flush=True)
if sys.argv[1] == "wait":
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.usefixtures("_math_verify")
@pytest.mark.parametrize("way", ["exit", "wait"])
def test_nothing_is_left_running_when_the_process_ends_or_is_killed(way):
    with subprocess.Popen([sys.executable, "-c", PARENT, way], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        if way == "wait":
            assert is_running(pid)
            parent.kill()
        parent.wait(30)
        deadline = time.monotonic() + 30
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not is_running(pid)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers of CPU time")
@pytest.mark.usefixtures("_math_verify")
def test_a_child_without_parent_ends_in_the_middle_of_a_comparison():
    assert 2 * latex.DEADLINE < latex_child.MAX_CPU_SECONDS < 60
    script = "from dpost_lite.problems import latex_child as c; c.MAX_CPU_SECONDS = 0.5; c.serve()"
    question = f'["{ENDLESS}", "1"]\n'
    done = subprocess.run([sys.executable, "-c", script], input=question, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("ready\n", -signal.SIGPROF)


def test_math_verify_missing_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert same_latex("0.5", r"\frac12")  # needs no algebra
    with pytest.raises(DataError, match=r'pip install "dpost-lite\[math\]"'):
        Comparer().equal("2^{3}", r"\sqrt{64}")


def test_a_child_that_does_not_start_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(latex, "check_installed", lambda: None)
    monkeypatch.setattr(latex, "PYTHON", (sys.executable, "-c", "print('No module named antlr4')"))
    with pytest.raises(DataError, match=r"does not start \(No module named antlr4\): pip install"):
        Comparer().equal("2^{3}", r"\sqrt{64}")
