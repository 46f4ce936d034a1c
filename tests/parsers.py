"""Every parser of the package as a function of bytes, for the fuzzers: each may refuse, none may do anything else.

What a model wrote, a data set, a recipe or a file from a stranger goes through these.
"""

import contextlib
import re
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

from dpost_lite.errors import DataError, ExportError, RecipeError
from dpost_lite.local.header import read_header
from dpost_lite.problems import answers as right
from dpost_lite.problems import grading, latex_text
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.files import detect_format, read_rows, to_problems
from dpost_lite.problems.forcing import Forcer
from dpost_lite.problems.records import Rationale, resume_jsonl
from dpost_lite.recipe_files import load_recipe
from dpost_lite.report.terminal import printable
from dpost_lite.server.errors import ApiError
from dpost_lite.server.schema import ChatCompletion, Defaults, TextCompletion, parsed

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?")
FOLDER = Path(tempfile.mkdtemp(prefix="dpost-lite-fuzz-"))
MAX_PUSHED = 2_000  # characters that a row of the sampler is given


def calculator(data: bytes) -> None:
    result = Calculator()(_text(data))
    assert result is None or NUMBER.fullmatch(result)


def answers(data: bytes) -> None:
    text = _text(data)
    for found in (grading.strict_answer(text), grading.flexible_answer(text), grading.canonical_number(text)):
        assert found is None or NUMBER.fullmatch(found)
    grading.without_annotations(text)


def latex(data: bytes) -> None:
    """What needs no algebra; the child process is not asked."""
    text = _text(data)
    for answer in ("18", r"\frac{1}{2}"):
        found = right.predicted_answer(text, answer)
        assert found is None or (0 < len(found) <= latex_text.MAX_LATEX_CHARS)
    assert not (number := right.predicted_answer(text, "18")) or NUMBER.fullmatch(number)
    assert not latex_text.is_maths(text) or len(latex_text.normal(text)) <= 2 * latex_text.MAX_LATEX_CHARS
    latex_text.key(text[: latex_text.MAX_LATEX_CHARS])


def annotations(data: bytes) -> None:
    """As the sampler follows a row, a character to a token; what is forced completes the annotation."""
    row = Forcer(chr, lambda text: [ord(c) for c in text], Calculator()).row()
    for character in _text(data)[:MAX_PUSHED]:
        forced = row.push(ord(character))
        assert forced is None or re.fullmatch(r"=?-?[0-9.]+>>-?[0-9.]+", "".join(map(chr, forced)))


def recipe_key(data: bytes) -> None:
    with contextlib.suppress(RecipeError):
        load_recipe(None, [_text(data)])


def recipe_file(data: bytes) -> None:
    with contextlib.suppress(RecipeError):
        load_recipe(_file("recipe.yaml", data))


def jsonl(data: bytes) -> None:
    _problems("problems.jsonl", data)


def json(data: bytes) -> None:
    _problems("problems.json", data)


def csv(data: bytes) -> None:
    _problems("problems.csv", data)


def parquet(data: bytes) -> None:
    _problems("problems.parquet", data)


def gguf(data: bytes) -> None:
    with contextlib.suppress(ExportError):
        read_header(_file("model.gguf", data))


def shard(data: bytes) -> None:
    """What is left of a shard can be read again, and nothing of it is cut then."""
    path = _file("shard.jsonl", data)
    kept = resume_jsonl(path, Rationale)
    assert resume_jsonl(path, Rationale) == kept


def terminal(data: bytes) -> None:
    shown = printable(_text(data))
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]


def request(data: bytes) -> None:
    """What a client of `serve` sends; the solver gets numbers within bounds."""
    for kind in (ChatCompletion, TextCompletion):
        with contextlib.suppress(ApiError):
            for made in parsed(data, kind).requests(Defaults(300, 0.7)):
                assert 0 <= made.temperature <= 2
                assert 0 < made.top_p <= 1
                assert 1 <= made.max_new_tokens <= 300
                assert 0 <= made.seed < 2**32


PARSERS: tuple[Callable[[bytes], None], ...] = (
    calculator, answers, annotations, recipe_key, recipe_file, jsonl, json, csv, parquet, gguf, shard, terminal, latex,
    request,
)  # fmt: skip


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogateescape")


def _file(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def _problems(name: str, data: bytes) -> None:
    with contextlib.suppress(DataError):
        rows = read_rows(_file(name, data))
        form = detect_format(rows)
        if form is not None:
            problems, _ = to_problems(rows, form, id_prefix="fuzz")
            for problem in problems:
                assert NUMBER.fullmatch(problem.answer) or len(problem.answer) <= latex_text.MAX_LATEX_CHARS
                problem.question.encode()
