"""A user's own file: every form and kind of file, and every reason to refuse a row."""

import csv
import json
from pathlib import Path

import pytest

from dpost_lite.errors import DataError
from dpost_lite.problems.datasets import Loaded, load
from dpost_lite.problems.files import MAX_QUESTION_CHARS
from dpost_lite.problems.records import Problem

WORKED = "She has 3*6=<<3*6=18>>18 apples.\n#### 18"


def write_lines(path: Path, *rows: dict | bytes) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def load_rows(folder: Path, *rows: dict | bytes) -> Loaded:
    return load(write_lines(folder / "own.jsonl", *rows))


def one_problem(folder: Path, row: dict) -> Problem:
    loaded = load_rows(folder, row)
    assert loaded.refused == []
    (problem,) = loaded.problems
    return problem


def reason(folder: Path, row: dict | bytes) -> str:
    """The reason for which `row` is refused beside a good row."""
    loaded = load_rows(folder, {"question": "How many are 9 and 9?", "answer": "18"}, row)
    assert [problem.answer for problem in loaded.problems] == ["18"]
    (refused,) = loaded.refused
    assert refused.where == "own.jsonl:2"
    return refused.reason


# Formats

TURNS = [("system", "Think."), ("user", "How many?"), ("assistant", WORKED)]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"question": "How many?", "answer": WORKED}, "question/answer"),
        ({"question": "How many?", "solution": WORKED}, "question/solution"),
        ({"problem": "How many?", "answer": WORKED}, "problem/answer"),
        ({"problem": "How many?", "solution": WORKED}, "problem/solution"),
        ({"prompt": "How many?", "completion": WORKED}, "prompt/completion"),
        ({"instruction": "How many?", "output": WORKED}, "alpaca"),
        ({"instruction": "How many?", "input": "", "output": WORKED}, "alpaca"),
        ({"messages": [{"role": role, "content": text} for role, text in TURNS]}, "messages"),
        (
            {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": WORKED}]},
            "conversations",
        ),
    ],
)
def test_each_format_is_detected(tmp_path: Path, row: dict, name: str) -> None:
    loaded = load_rows(tmp_path, row)
    assert loaded.format == name
    assert loaded.problems == [Problem("own-00001", "How many?", "18", WORKED)]


def test_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Solve.", "input": "What is 2 + 2?", "output": 4}
    assert one_problem(tmp_path, row) == Problem("own-00001", "Solve.\nWhat is 2 + 2?", "4")


def test_format_is_that_of_most_of_the_first_rows(tmp_path: Path) -> None:
    odd = {"prompt": "Odd one out?", "completion": "1"}
    loaded = load_rows(tmp_path, odd, *({"question": f"What is {k}?", "answer": k} for k in range(3)))
    assert loaded.format == "question/answer"
    assert [problem.answer for problem in loaded.problems] == ["0", "1", "2"]
    assert loaded.refused[0].reason == "no `question` and `answer`"


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("18", "18"),
        (" $1,234.50 ", "1234.5"),
        (18, "18"),
        (18.0, "18"),
        (-2.5, "-2.5"),
        (1e16, "10000000000000000"),
        (0.00001, "0.00001"),
        ("#### 18", "18"),
    ],
)
def test_answer_may_be_just_the_number(tmp_path: Path, answer: str | float, number: str) -> None:
    problem = one_problem(tmp_path, {"question": "How many?", "answer": answer})
    assert problem.answer == number
    assert problem.rationale == (answer if "####" in str(answer) else None)


def test_final_is_the_answer_and_a_worked_answer_the_rationale(tmp_path: Path) -> None:
    loaded = load_rows(
        tmp_path,
        {"id": "a", "question": "Worked?", "answer": WORKED, "final": "18.0"},
        {"id": 7, "question": "Prose?", "answer": "It is eighteen.", "final": 18},
        {"id": "c", "question": "Final alone?", "answer": "", "final": "18"},
    )
    assert loaded.problems == [
        Problem("a", "Worked?", "18", WORKED),
        Problem("7", "Prose?", "18"),
        Problem("c", "Final alone?", "18"),
    ]


# Refusals


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"question": "", "answer": "1"}, "empty question"),
        ({"question": " ?! ", "answer": "1"}, "empty question"),
        ({"question": None, "answer": "1"}, "empty question"),
        ({"question": "x" * (MAX_QUESTION_CHARS + 1), "answer": "1"}, "question of more than 20,000 characters"),
        ({"question": ["How many?"], "answer": "1"}, "`question` is neither text nor a number"),
        ({"question": "How many?", "answer": True}, "`answer` is neither text nor a number"),
        ({"question": "How many?"}, "no `question` and `answer`"),
        ({"question": "How many?", "answer": ""}, "no number in the answer"),
        ({"question": "How many?", "answer": "eighteen"}, "no number in the answer"),
        ({"question": "How many?", "answer": "It is 18 or 19."}, "no number in the answer"),
        ({"question": "How many?", "answer": "#### 18\nor so"}, "no number in the answer"),
        ({"question": "How many?", "answer": "#### 18\n#### none"}, "no number in the answer"),
        ({"question": "How many?", "answer": float("nan")}, "no number in the answer"),
        ({"question": "How many?", "answer": WORKED, "final": "many"}, "no number in `final`"),
        ({"question": "How many?", "answer": WORKED, "final": "20"}, "ends in #### 18, but `final` is 20"),
        ({"question": "how  many are 9 AND 9?", "answer": "1"}, "same question as own.jsonl:1"),
        ({"id": "own-00001", "question": "How many?", "answer": "1"}, "same id as own.jsonl:1"),
        (b'{"question": "How many?", "answer": "1"', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"question": "How many?", "answer": ' + b"1" * 5_000 + b"}", "broken JSON"),
        (b'["How many?", "1"]', "not a JSON object"),
        (b'{"question": "How many caf\xe9s?", "answer": "1"}', "not UTF-8"),
        (b'{"question": "How many \\ud83d?", "answer": "1"}', "`question` is not UTF-8"),
    ],
)
def test_a_bad_row_is_refused_and_the_others_stay(tmp_path: Path, row: dict | bytes, why: str) -> None:
    assert why in reason(tmp_path, row)


@pytest.mark.parametrize("turns", ["text", [1], [], [{"role": "user", "content": "a"}] * 2])
def test_a_dialogue_that_is_not_one_question_and_one_answer_is_refused(tmp_path: Path, turns: object) -> None:
    good = {"messages": [{"role": role, "content": text} for role, text in TURNS]}
    (refused,) = load_rows(tmp_path, good, {"messages": turns}).refused
    assert refused.reason.startswith("`messages` is not")


def test_digits_tell_questions_apart(tmp_path: Path) -> None:
    rows = ({"question": f"How much are {weight} kg?", "answer": "1"} for weight in ("1.5", "15"))
    assert len(load_rows(tmp_path, *rows).problems) == 2


@pytest.mark.parametrize(
    "rows", [[], [b"{", b"["], [{"text": "How many?"}], [{"question": "How many?", "answer": "?"}]]
)
def test_a_file_without_a_usable_row_says_what_is_expected(tmp_path: Path, rows: list) -> None:
    with pytest.raises(DataError, match=r'own\.jsonl has no usable row \(.+\); expected rows such as {"question"'):
        load_rows(tmp_path, *rows)


# Kinds of file


def test_jsonl_splits_at_line_feeds_only(tmp_path: Path) -> None:
    question = "How\u2028many\u0085are\u000bleft?"
    source = write_lines(
        tmp_path / "own.jsonl", {"question": question, "answer": "1"}, b"", {"question": "b", "answer": 2}
    )
    loaded = load(source)
    assert [problem.question for problem in loaded.problems] == [question, "b"]
    assert loaded.refused == []


def test_every_kind_of_file_gives_the_same_problems(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"id": "a", "question": 'Ann, "the" first:\nhow many?', "answer": WORKED},
        {"id": "b", "question": "How\u2028much?", "answer": "$1,000"},
    ]
    write_lines(tmp_path / "lines.jsonl", *rows)
    (tmp_path / "bom.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (tmp_path / "lines.jsonl").read_bytes().replace(b"\n", b"\r\n")
    )
    write_lines(tmp_path / "lines.json", *rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    with (tmp_path / "table.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["id", "question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")

    expected = [Problem("a", rows[0]["question"], "18", WORKED), Problem("b", rows[1]["question"], "1000")]
    for path in sorted(tmp_path.iterdir()):
        assert load(str(path)) == Loaded(expected, [], "question/answer"), path.name


def test_parquet_holds_numbers_and_dialogues(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    turns = [{"role": role, "content": text} for role, text in TURNS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "chat.parquet")
    assert load(str(tmp_path / "chat.parquet")).problems[0].rationale == WORKED
    rows = [{"question": "How many?", "answer": 18.0}, {"question": None, "answer": 1.0}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "numbers.parquet")
    loaded = load(str(tmp_path / "numbers.parquet"))
    assert [problem.answer for problem in loaded.problems] == ["18"]
    assert [(row.where, row.reason) for row in loaded.refused] == [("numbers.parquet row 2", "empty question")]


def test_csv_refuses_single_rows(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(
        b"question,answer\n"
        b"How many?,18\n"
        b"Ann, Bob and Cy?,3\n"  # unquoted commas
        b"How many caf\xe9s?,4\n"
        b"No answer?\n" + b"x" * 200_000 + b",5\n"  # longer than the csv module's default limit
    )
    loaded = load(str(path))
    assert [problem.question for problem in loaded.problems] == ["How many?"]
    assert [(row.where, row.reason.split(" (")[0]) for row in loaded.refused] == [
        ("own.csv:3", "more cells than the header"),
        ("own.csv:4", "`question` is not UTF-8"),
        ("own.csv:5", "no number in the answer"),
        ("own.csv:6", "question of more than 20,000 characters"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("own.json", b'[{"question": "a"', "is not a JSON list"),
        ("own.parquet", b"PAR1 not really", "is not a readable Parquet file"),
        ("own.xlsx", b"PK", r"must end in \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_a_damaged_or_unknown_file_is_one_line(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=why) as caught:
        load(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "suggestion"), [("gsm8", "gsm8k"), ("SVAMP", "svamp"), ("multi-arith", "multiarith")]
)
def test_an_unknown_source_suggests_the_nearest_set(source: str, suggestion: str) -> None:
    with pytest.raises(DataError, match=f"did you mean '{suggestion}'"):
        load(source)


@pytest.mark.parametrize("source", ["no/such/file.jsonl", "x" * 5000, "a\0b", "~nobody-here/file.csv"])
def test_a_missing_file_is_a_data_error(source: str) -> None:
    with pytest.raises(DataError, match="there is no file or set"):
        load(source)
