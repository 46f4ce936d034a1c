"""Read problems from the user's own file: JSONL, JSON, CSV or Parquet, in any of the formats common trainers accept.

A bad row does not stop reading: it is returned as a `RefusedRow` with its location and the reason, so one broken line
in a million costs one problem. Three steps: `read_rows` (file to rows), `detect_format` (which columns hold question
and answer), `to_problems` (rows to problems). The paper trains on GSM8K only; own files are our addition.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice, product
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError
from dpost_lite.problems.latex_text import last_boxed
from dpost_lite.problems.records import Problem
from dpost_lite.problems.right_answers import UnusableRow, read_answer

NUM_ROWS_FOR_DETECTION = 20
MAX_QUESTION_CHARS = 20_000


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read; `where` is `file:line` (for CSV, the row's last line) or `file row N`."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that was left out, and why."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a problem: the columns it needs, and `read`, which returns (question, answer, final) from them.

    `answer` is a worked solution or just the answer, `final` the answer in a column of its own, or "".
    `read` raises `UnusableRow` if the columns do not hold text.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], tuple[str, str, str]]

    def fits(self, row: Row) -> bool:
        return all(column in row.values for column in self.columns)


def read_rows(path: Path) -> list[Row | RefusedRow]:
    """Read every row of a `.jsonl`, `.json`, `.csv` or `.parquet` file, in order; blank lines are skipped.

    Raises:
        DataError: the file is of another type, unreadable, or damaged as a whole.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: give one file in it ({', '.join(READERS)})")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown file type; the name must end in {', '.join(READERS)}")
    try:
        return list(reader(path))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}): check the file and its permissions"
        ) from error


def detect_format(rows: Iterable[Row | RefusedRow]) -> Format | None:
    """Return the format that fits most of the first rows (in a tie, the first in `FORMATS`), or None if none fits."""
    sample = list(islice((row for row in rows if isinstance(row, Row)), NUM_ROWS_FOR_DETECTION))
    num_fitting = {form.name: sum(form.fits(row) for row in sample) for form in FORMATS}
    best = max(FORMATS, key=lambda form: num_fitting[form.name])
    return best if num_fitting[best.name] else None


def text_of(value: Any, column: str) -> str:
    """Return a cell as text: numbers as plain digits (18.0, not 1.8e1), an absent cell as "".

    Raises:
        UnusableRow: the cell is neither text nor a number, or is not valid UTF-8.
    """
    if value is None:
        return ""
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return format(Decimal(str(value)), "f")
    if not isinstance(value, str):
        raise UnusableRow(f"`{column}` is neither text nor a number")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate: \ud83d in JSON, or a bad byte in CSV
        raise UnusableRow(f"`{column}` is not UTF-8") from None
    return value


# Readers: path -> rows


def _read_jsonl(path: Path) -> Iterator[Row | RefusedRow]:
    # Bytes: str.splitlines() would also break lines at U+2028 and the like inside a JSON string, and one line that is
    # not UTF-8 must not affect the others.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield _parse_line(f"{path.name}:{number}", line)


def _parse_line(where: str, line: bytes) -> Row | RefusedRow:
    try:
        return _as_row(where, json.loads(line.decode()))
    except UnicodeDecodeError:
        return RefusedRow(where, "not UTF-8")
    except (ValueError, RecursionError):  # RecursionError: a line with 100,000 brackets
        return RefusedRow(where, "broken JSON")


def _as_row(where: str, value: Any) -> Row | RefusedRow:
    return Row(where, value) if isinstance(value, dict) else RefusedRow(where, "not a JSON object")


def _read_json(path: Path) -> Iterator[Row | RefusedRow]:
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"["):  # many .json files are really JSONL
        yield from _read_jsonl(path)
        return
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not a JSON list ({error}): fix it, or write one object per line as .jsonl"
        ) from error
    for number, value in enumerate(values, start=1):
        yield _as_row(f"{path.name} row {number}", value)


def _read_csv(path: Path) -> Iterator[Row | RefusedRow]:
    csv.field_size_limit(2**31 - 1)  # with the default of 128 KiB, one long cell fails the whole file
    # surrogateescape passes bad bytes on to `text_of`, which refuses only their row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for values in reader:
                where = f"{path.name}:{reader.line_num}"
                if None in values:  # an unquoted comma would shift the answer into another column
                    yield RefusedRow(where, "more cells than the header (unquoted comma?)")
                else:
                    yield Row(where, values)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num} is not valid CSV ({error}): fix the file") from error


def _read_parquet(path: Path) -> Iterator[Row | RefusedRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in KNOWN_COLUMNS]
            for batch in file.iter_batches(columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path.name} row {number}", values)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a readable Parquet file ({reason}): write or download it again") from error


READERS: dict[str, Callable[[Path], Iterator[Row | RefusedRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# Formats: row -> question, answer, final


def _final(values: Mapping[str, Any]) -> str:
    return text_of(values.get("final"), "final")


def _two_columns(question: str, answer: str) -> Format:
    def read(values: Mapping[str, Any]) -> tuple[str, str, str]:
        return text_of(values[question], question), text_of(values[answer], answer), _final(values)

    return Format(f"{question}/{answer}", (question, answer), read)


def _with_solution(question: str) -> Format:
    """A solution and an answer, as in the sets made from MATH; a worked `answer` goes before `solution`."""

    def read(values: Mapping[str, Any]) -> tuple[str, str, str]:
        solution, answer = text_of(values["solution"], "solution"), text_of(values["answer"], "answer")
        if "####" in answer or last_boxed(answer):
            return text_of(values[question], question), answer, _final(values)
        return text_of(values[question], question), solution, _final(values) or answer

    return Format(f"{question}/solution/answer", (question, "solution", "answer"), read)


def _read_alpaca(values: Mapping[str, Any]) -> tuple[str, str, str]:
    instruction = text_of(values["instruction"], "instruction")
    context = text_of(values.get("input"), "input")
    question = f"{instruction}\n{context}" if context.strip() else instruction
    return question, text_of(values["output"], "output"), _final(values)


def _dialogue(column: str, *, speaker: str, content: str) -> Format:
    """A list of turns with exactly one by the user (the question) and one by the assistant (the answer)."""

    def read(values: Mapping[str, Any]) -> tuple[str, str, str]:
        turns = values[column]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise UnusableRow(f"`{column}` is not a list of turns")
        questions = [turn.get(content) for turn in turns if turn.get(speaker) in ("user", "human")]
        answers = [turn.get(content) for turn in turns if turn.get(speaker) in ("assistant", "gpt", "model")]
        if len(questions) != 1 or len(answers) != 1:
            raise UnusableRow(f"`{column}` is not one question and one answer")
        return text_of(questions[0], content), text_of(answers[0], content), _final(values)

    return Format(column, (column,), read)


QUESTION_ANSWER = _two_columns("question", "answer")

# Plain columns first: a file with both these and `messages` holds each problem twice.
FORMATS: tuple[Format, ...] = (
    _with_solution("question"),
    _with_solution("problem"),
    *(_two_columns(question, answer) for question, answer in product(("question", "problem"), ("answer", "solution"))),
    _two_columns("prompt", "completion"),
    Format("alpaca", ("instruction", "output"), _read_alpaca),
    _dialogue("messages", speaker="role", content="content"),
    _dialogue("conversations", speaker="from", content="value"),
)
KNOWN_COLUMNS = {column for form in FORMATS for column in form.columns} | {"id", "final", "input"}
EXPECTED_FORM = (
    'rows such as {"question": "…", "answer": "… #### 18"} or {"question": "…", "answer": 18}; '
    r'LaTeX as in {"question": "…", "answer": "… \boxed{\frac{1}{2}}"}; '
    "also prompt/completion, problem/solution, Alpaca, messages or conversations"
)


# Rows to problems


def to_problems(
    rows: Sequence[Row | RefusedRow], form: Format, *, id_prefix: str
) -> tuple[list[Problem], list[RefusedRow]]:
    """Return the problems in `rows`, with unique ids and questions (the first of duplicates), and the refused rows."""
    problems: list[Problem] = []
    refused: list[RefusedRow] = []
    seen: dict[tuple[str, str], str] = {}
    for number, row in enumerate(rows, start=1):
        if isinstance(row, RefusedRow):
            refused.append(row)
            continue
        try:
            problem = _to_problem(row, form, default_id=f"{id_prefix}-{number:05d}")
            _refuse_repeat(problem, row.where, seen)
        except UnusableRow as unusable:
            refused.append(RefusedRow(row.where, str(unusable)))
        else:
            problems.append(problem)
    return problems, refused


def _refuse_repeat(problem: Problem, where: str, seen: dict[tuple[str, str], str]) -> None:
    # Punctuation matters here ("1.5 kg" is not "15 kg"), so only white space and case are ignored.
    marks = {"question": " ".join(problem.question.casefold().split()), "id": problem.id}
    for kind, mark in marks.items():
        if (kind, mark) in seen:
            raise UnusableRow(f"same {kind} as {seen[kind, mark]}")
    seen.update({(kind, mark): where for kind, mark in marks.items()})


def _to_problem(row: Row, form: Format, *, default_id: str) -> Problem:
    if not form.fits(row):
        raise UnusableRow(f"no {' and '.join(f'`{column}`' for column in form.columns)}")
    question, answer, final = form.read(row.values)
    question = question.strip()
    if not normal_question(question):
        raise UnusableRow("empty question")
    if len(question) > MAX_QUESTION_CHARS:
        raise UnusableRow(f"question of more than {MAX_QUESTION_CHARS:,} characters")
    right, rationale = read_answer(answer.strip(), final.strip())
    return Problem(text_of(row.values.get("id"), "id").strip() or default_id, question, right, rationale)


def normal_question(text: str) -> str:
    """Return only the letters and digits of `text`, case-folded, so that spellings of one question compare equal."""
    return "".join(filter(str.isalnum, text.casefold()))
