"""Fuzz the parsers with atheris, guided by coverage: `python tests/fuzz.py -max_total_time=60 [-seed=1]`.

The first byte of an input picks the parser. Ends with a traceback and the input at the first thing that a parser may
not do, an input that takes longer than 5 seconds included.
"""

import sys

import atheris

with atheris.instrument_imports(include=["dpost_lite"]):
    from parsers import PARSERS

SEEDS = (
    b"12*(3+4.5)//7", b"so 3.\n#### -1,234.50", b"48/2=<<48/2=24>>24 <<1+1=", b"sft.epochs=3",
    b"sft:\n  epochs: 2\n", b'{"question": "1+1?", "answer": "#### 2"}\n', b'[{"prompt": "1+1?", "completion": "2"}]',
    b"question,answer\na,2\n", b"PAR1",
    b"GGUF\3\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0", b'{"problem_id": "1"}\n', b"\x1b[31mred",
    b"so $\\boxed{\\frac{1}{2}}$",
)  # fmt: skip


def one_input(data: bytes) -> None:
    if data:
        PARSERS[data[0] % len(PARSERS)](data[1:])


if __name__ == "__main__":
    for number, seed in enumerate(SEEDS):
        one_input(bytes([number]) + seed)
    atheris.Setup([*sys.argv, "-timeout=5", "-rss_limit_mb=3000", "-max_len=4096"], one_input)
    atheris.Fuzz()
