"""No parser crashes, hangs or takes memory without bound, whatever it is given."""

import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parsers import PARSERS

from dpost_lite.problems.calculator import Calculator

HUGE = [
    text * (100_000 // len(text))
    for text in (
        "1+", "(", ")", "9", "-", "1,", "1.", "#### ", "####", "<<", "<<1+1=", ">>", "$ ", "[", "{", '"', "&a [*a, ",
        "\\boxed{", "\\boxed{1}", "}", "- ", "a: ", "\n", ",", "\x1b[", "\ud800", "\0", "=", " ",
    )
]  # fmt: skip
SNIPPETS = st.sampled_from(
    [
        "<<", ">>", "=", "#### ", "1", "23.50", "1,000", "-", "+", "//", "(", ")", "$", "%", "\n", '"', "{", "}", "[",
        "]", ":", "question", "answer", "messages", "role", "user", "content", "sft.", "epochs", "model", "null",
        "true", "&a", "*a", "!!python/object:os.system", "\u2028", "\x00", "GGUF", "PAR1", "\ufeff", "1e999",
        "\x1b]0;title\x07", "\\boxed{", "\\frac12", "\\!",
    ]
)  # fmt: skip
TEXTS = st.lists(SNIPPETS | st.text(max_size=4), max_size=30).map("".join)


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
@given(data=TEXTS.map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=200))
@example(data=b"")
@example(data=b'{"messages": [{"role": "user", "content": "1+1?"}], "seed": -1%d, "n": 16, "top_p": 0}' % 10**300)
@settings(deadline=2000)  # milliseconds; the first call imports a library
def test_no_parser_does_more_than_refuse(parse, data):
    parse(data)


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
def test_a_hundred_thousand_characters_are_soon_done_with(parse):
    for text in HUGE:
        data = text.encode(errors="surrogatepass")
        started = time.perf_counter()
        parse(data)
        assert time.perf_counter() - started < 5, text[:20]


@pytest.mark.parametrize("text", HUGE)
def test_a_huge_expression_takes_no_memory(text):
    """Nor time, for it is refused by its length (tests/test_calculator.py)."""
    calculate = Calculator()
    tracemalloc.start()
    assert calculate(text) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000


@pytest.mark.slow
def test_a_fuzzer_guided_by_coverage_finds_nothing():
    pytest.importorskip("atheris", reason="atheris runs on Linux and macOS")
    script = Path(__file__).with_name("fuzz.py")
    # By a shell: a process takes over the peak memory of the one that starts it, and libFuzzer limits that peak.
    shell = ["sh", "-c", '"$@"; exit $?', "fuzz"]
    command = [*shell, sys.executable, str(script), "-max_total_time=8", "-seed=1", "-print_final_stats=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=script.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stat::number_of_executed_units" in done.stderr
