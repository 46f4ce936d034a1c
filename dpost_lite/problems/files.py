"""A user's own file, row by row: JSONL, JSON, CSV or Parquet, in any of the forms that trainers accept.

A bad row never stops the reading: it comes back as `Refused`, with its place and the reason, so that one broken line
in a million costs one problem. Three steps: `read_rows` (bytes to rows), `detect_format` (which column is
the question), `to_problems` (what the answer is worth). The paper trains on GSM8K alone; own files are our addition.
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
from dpost_lite.problems.grading import canonical_number, same_number, strict_answer
from dpost_lite.problems.records import Problem

NUM_ROWS_FOR_DETECTION = 20
MAX_QUESTION_CHARS = 20_000


class UnusableRow(Exception):
    """A row that gives no problem; the message is the reason, in the words of `Refused.reason`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as its file holds it; `where` is `file:line` (in CSV its last line) or `file row N`."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that was left out, and why."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a problem: the columns it needs, and how they give the texts of question and answer.

    `read` raises `UnusableRow` for a row that has the columns but not the texts.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], tuple[str, str]]

    def fits(self, row: Row) -> bool:
        return all(column in row.values for column in self.columns)


def read_rows(path: Path) -> list[Row | Refused]:
    """Read every row of a `.jsonl`, `.json`, `.csv` or `.parquet` file, in order; blank lines are no rows.

    Raises:
        DataError: another kind of file, or one that is damaged as a whole.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: name one file in it ({', '.join(READERS)})")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot tell what kind of file this is; its name must end in {', '.join(READERS)}")
    try:
        return list(reader(path))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}): check the file and its permissions"
        ) from error


def detect_format(rows: Iterable[Row | Refused]) -> Format | None:
    """Return the format that fits most of the first rows (the first of `FORMATS` in a tie), or None."""
    sample = list(islice((row for row in rows if isinstance(row, Row)), NUM_ROWS_FOR_DETECTION))
    num_fitting = {form.name: sum(form.fits(row) for row in sample) for form in FORMATS}
    best = max(FORMATS, key=lambda form: num_fitting[form.name])
    return best if num_fitting[best.name] else None


def text_of(value: Any, column: str) -> str:
    """Return a cell as text: a number as plain digits (18.0, not 1.8e1), an absent cell as "".

    Raises:
        UnusableRow: the cell is neither text nor a number, or not UTF-8.
    """
    if value is None:
        return ""
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return format(Decimal(str(value)), "f")
    if not isinstance(value, str):
        raise UnusableRow(f"`{column}` is neither text nor a number")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair: an escape like \ud83d in JSON, or a bad byte in a CSV file
        raise UnusableRow(f"`{column}` is not UTF-8") from None
    return value


# Readers: path -> rows


def _read_jsonl(path: Path) -> Iterator[Row | Refused]:
    # Bytes, since a text file's universal newlines and str.splitlines() see line ends (U+2028 …) inside a JSON string;
    # and since one line that is not UTF-8 must not take the others with it.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield _parse_line(f"{path.name}:{number}", line)


def _parse_line(where: str, line: bytes) -> Row | Refused:
    try:
        return _as_row(where, json.loads(line.decode()))
    except UnicodeDecodeError:
        return Refused(where, "not UTF-8")
    except (ValueError, RecursionError):  # RecursionError: a line of a hundred thousand brackets
        return Refused(where, "broken JSON")


def _as_row(where: str, value: Any) -> Row | Refused:
    return Row(where, value) if isinstance(value, dict) else Refused(where, "not a JSON object")


def _read_json(path: Path) -> Iterator[Row | Refused]:
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"["):  # many a .json file is JSONL
        yield from _read_jsonl(path)
        return
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not a JSON list ({error}): mend it, or write one object a line as .jsonl"
        ) from error
    for number, value in enumerate(values, start=1):
        yield _as_row(f"{path.name} row {number}", value)


def _read_csv(path: Path) -> Iterator[Row | Refused]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB stops the whole file at one long cell
    # surrogateescape lets a bad byte through to `text_of`, which refuses its row alone.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for values in reader:
                where = f"{path.name}:{reader.line_num}"
                if None in values:  # an unquoted comma in the question would shift the answer into another column
                    yield Refused(where, "more cells than the header (is a comma unquoted?)")
                else:
                    yield Row(where, values)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num} is not CSV ({error}): mend the file") from error


def _read_parquet(path: Path) -> Iterator[Row | Refused]:
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
        raise DataError(f"{path} is not a readable Parquet file ({reason}): write it again") from error


READERS: dict[str, Callable[[Path], Iterator[Row | Refused]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# Formats: row -> question, answer


def _two_columns(question: str, answer: str) -> Format:
    def read(values: Mapping[str, Any]) -> tuple[str, str]:
        return text_of(values[question], question), text_of(values[answer], answer)

    return Format(f"{question}/{answer}", (question, answer), read)


def _read_alpaca(values: Mapping[str, Any]) -> tuple[str, str]:
    instruction = text_of(values["instruction"], "instruction")
    context = text_of(values.get("input"), "input")
    question = f"{instruction}\n{context}" if context.strip() else instruction
    return question, text_of(values["output"], "output")


def _dialogue(column: str, *, speaker: str, said: str) -> Format:
    """A list of turns, of which exactly one is the user's (the question) and one the assistant's (the answer)."""

    def read(values: Mapping[str, Any]) -> tuple[str, str]:
        turns = values[column]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise UnusableRow(f"`{column}` is not a list of turns")
        questions = [turn.get(said) for turn in turns if turn.get(speaker) in ("user", "human")]
        answers = [turn.get(said) for turn in turns if turn.get(speaker) in ("assistant", "gpt", "model")]
        if len(questions) != 1 or len(answers) != 1:
            raise UnusableRow(f"`{column}` is not one question and one answer")
        return text_of(questions[0], said), text_of(answers[0], said)

    return Format(column, (column,), read)


QUESTION_ANSWER = _two_columns("question", "answer")

# Plain columns come first: a file that has them beside `messages` holds the same problem twice.
FORMATS: tuple[Format, ...] = (
    *(_two_columns(question, answer) for question, answer in product(("question", "problem"), ("answer", "solution"))),
    _two_columns("prompt", "completion"),
    Format("alpaca", ("instruction", "output"), _read_alpaca),
    _dialogue("messages", speaker="role", said="content"),
    _dialogue("conversations", speaker="from", said="value"),
)
KNOWN_COLUMNS = {column for form in FORMATS for column in form.columns} | {"id", "final", "input"}
EXPECTED_FORM = (
    'rows such as {"question": "…", "answer": "… #### 18"} or {"question": "…", "answer": 18}; '
    "also prompt/completion, problem/solution, Alpaca, messages or conversations"
)


# Rows to problems


def to_problems(rows: Sequence[Row | Refused], form: Format, *, id_prefix: str) -> tuple[list[Problem], list[Refused]]:
    """Turn rows into problems with unique ids and questions; the first of two alike is kept."""
    problems: list[Problem] = []
    refused: list[Refused] = []
    seen: dict[tuple[str, str], str] = {}
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Refused):
            refused.append(row)
            continue
        try:
            problem = _to_problem(row, form, default_id=f"{id_prefix}-{number:05d}")
            _refuse_repeat(problem, row.where, seen)
        except UnusableRow as unusable:
            refused.append(Refused(row.where, str(unusable)))
        else:
            problems.append(problem)
    return problems, refused


def _refuse_repeat(problem: Problem, where: str, seen: dict[tuple[str, str], str]) -> None:
    # Digits matter here ("1.5 kg" is not "15 kg"), so the question counts as it stands but for white space and case.
    marks = {"question": " ".join(problem.question.casefold().split()), "id": problem.id}
    for kind, mark in marks.items():
        if (kind, mark) in seen:
            raise UnusableRow(f"same {kind} as {seen[kind, mark]}")
    seen.update({(kind, mark): where for kind, mark in marks.items()})


def _to_problem(row: Row, form: Format, *, default_id: str) -> Problem:
    if not form.fits(row):
        raise UnusableRow(f"no {' and '.join(f'`{column}`' for column in form.columns)}")
    question, answer = form.read(row.values)
    question = question.strip()
    if not normal_question(question):
        raise UnusableRow("empty question")
    if len(question) > MAX_QUESTION_CHARS:
        raise UnusableRow(f"question of more than {MAX_QUESTION_CHARS:,} characters")
    number, rationale = _read_answer(answer.strip(), text_of(row.values.get("final"), "final").strip())
    return Problem(text_of(row.values.get("id"), "id").strip() or default_id, question, number, rationale)


def _read_answer(answer: str, final: str) -> tuple[str, str | None]:
    """Return the number and, where `answer` is a worked solution that ends in `#### N`, the rationale."""
    _, mark, end = answer.rpartition("####")
    worked = strict_answer(mark + end) if mark and "\n" not in end else None
    number = canonical_number(final) if final else worked or canonical_number(answer)
    if number is None:
        raise UnusableRow("no number in `final`" if final else "no number in the answer (`… #### 18` or just `18`)")
    if worked is not None and not same_number(worked, number):
        raise UnusableRow(f"the answer ends in #### {worked}, but `final` is {number}")
    return number, answer if worked is not None else None


def normal_question(text: str) -> str:
    """Return the letters and digits of `text` alone, case-folded: what two spellings of a question have in common."""
    return "".join(filter(str.isalnum, text.casefold()))
