"""Problems from named sets and own files: every form, every refusal, the split and the overlap check."""

import csv
import hashlib
import json
import os
import random
from pathlib import Path

import pytest

from dpost_lite.errors import DataError
from dpost_lite.problems import datasets as sources
from dpost_lite.problems.datasets import Loaded, check_overlap, load, normal_question, split_train_dev
from dpost_lite.problems.files import MAX_QUESTION_CHARS
from dpost_lite.problems.records import Problem

WORKED = "She has 3*6=<<3*6=18>>18 apples.\n#### 18"

needs_data = pytest.mark.skipif(not os.environ.get("DPOST_DATA_DIR"), reason="DPOST_DATA_DIR is not set")


@pytest.fixture
def data_dir() -> Path:
    return Path(os.environ["DPOST_DATA_DIR"])


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


def problems_of(*questions: str, name: str = "p") -> list[Problem]:
    return [Problem(f"{name}-{k}", question, str(k)) for k, question in enumerate(questions)]


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
    with pytest.raises(DataError, match=r'own\.jsonl has no usable row \(.+\); expected are rows such as {"question"'):
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


# Named sets


@pytest.mark.parametrize("name", ["multiarith", "asdiv", "svamp"])
def test_evaluation_sets_are_not_trained_on(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name} is for evaluation only"):
        load(name, split="train", data_dir=tmp_path)


def test_a_data_dir_without_the_set_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data-dir .* has no file gsm8k.train\.jsonl"):
        load("gsm8k", split="train", data_dir=tmp_path)


@needs_data
@pytest.mark.parametrize(
    ("name", "split", "num_problems", "num_rationales"),
    [
        ("gsm8k", "train", 7473, 7473),
        ("gsm8k", "test", 1319, 1319),
        ("multiarith", "test", 580, 0),
        ("asdiv", "test", 2095, 0),
        ("svamp", "test", 1000, 0),
    ],
)
def test_real_sets_are_read_whole(
    data_dir: Path, name: str, split: str, num_problems: int, num_rationales: int
) -> None:
    loaded = load(name, split=split, data_dir=data_dir)
    assert loaded.refused == []
    assert loaded.format == name
    assert len(loaded.problems) == num_problems
    assert sum(problem.rationale is not None for problem in loaded.problems) == num_rationales
    path = data_dir / (f"gsm8k/{split}.jsonl" if name == "gsm8k" else f"{name}.jsonl")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert [(p.id, p.question, p.answer) for p in loaded.problems] == [
        (r["id"], r["question"], r["final"]) for r in rows
    ]
    assert all(problem.rationale in (None, row["answer"]) for problem, row in zip(loaded.problems, rows, strict=True))


HUB_ROWS = {
    "gsm8k": [{"question": "How many?", "answer": WORKED}],
    "multiarith": [{"question": " How  many? ", "final_ans": "18"}, {"question": "How many?", "final_ans": "18"}],
    "asdiv": [
        {"body": "Ann has 9.", "question": "How many?", "answer": "9 (apples)", "formula": "9=9"},
        {"body": "Ann has 2.", "question": "Which?", "answer": "2 (apples); 3 (pears)"},
        {"body": "Ann has 9.", "question": "Who?", "answer": "Ann"},
        {"body": "Ann has 9.", "question": "When?", "answer": "9:30"},
        {"body": "Ann has 9.", "question": "How heavy?", "answer": "9.5 (kg)"},
    ],
    "svamp": [
        {"ID": "chal-1", "Body": "Ann has 9", "Question": "How many?", "Answer": "9.0", "Type": "Addition"},
        {"ID": "chal-2", "Body": "Ann has 8.", "Question": "How many?", "Answer": "8", "Type": "Addition"},
    ],
}
HUB_EXPECTED = {
    "gsm8k": [("How many?", "18", WORKED)],
    "multiarith": [("How many?", "18", None)],
    "asdiv": [("Ann has 9. How many?", "9", None), ("Ann has 2. Which?", "2", None)],
    "svamp": [("Ann has 9. How many?", "9", None), ("Ann has 8. How many?", "8", None)],
}
HUB_CALLS = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "multiarith": ("ChilleD/MultiArith", None, "train+test"),
    "asdiv": ("EleutherAI/asdiv", None, "validation"),
    "svamp": ("ChilleD/SVAMP", None, "train+test"),
}


@pytest.mark.parametrize("name", sources.NAMED)
def test_hub_columns_become_problems(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import datasets

    calls = []

    def load_dataset(path: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        calls.append((path, configuration, split))
        return datasets.Dataset.from_list(HUB_ROWS[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load(name)
    assert calls == [HUB_CALLS[name]]
    assert [(p.question, p.answer, p.rationale) for p in loaded.problems] == HUB_EXPECTED[name]
    assert loaded.problems[0].id == f"{name}-test-00001"


def test_hub_columns_that_changed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"Question": "How many?"}])
    with pytest.raises(DataError, match=r"no column 'question' any more: .*--data-dir"):
        load("gsm8k")


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), FileNotFoundError("gone"), RuntimeError()])
def test_an_unreachable_hub_points_to_data_dir(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"gsm8k cannot be had .*--data-dir DIR \(DIR/gsm8k/train\.jsonl\)") as caught:
        load("gsm8k", split="train")
    assert "\n" not in str(caught.value)


def test_offline_asks_the_cache_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def no_network(*_: object, **__: object) -> None:
        pytest.fail("offline, yet the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=r"asdiv cannot be had .*--data-dir DIR \(DIR/asdiv\.jsonl\)"):
        load("asdiv", offline=True)
    assert datasets.config.HF_HUB_OFFLINE is False


# Split


def test_the_rule_does_not_depend_on_the_order_of_rows() -> None:
    problems = problems_of(*(f"Question {k}?" for k in range(100)))
    train, dev = split_train_dev(problems, dev_size=30)
    shuffled = random.Random(0).sample(problems, k=100)
    shuffled_train, shuffled_dev = split_train_dev(shuffled, dev_size=30)
    assert set(train) == set(shuffled_train)
    assert set(dev) == set(shuffled_dev)
    assert train == [problem for problem in problems if problem not in dev]
    assert shuffled_dev == [problem for problem in shuffled if problem in dev]


def test_the_rule_is_the_smallest_sha256() -> None:
    problems = problems_of("a", "b", "c", "d")
    smallest = min(problems, key=lambda problem: hashlib.sha256(problem.question.encode()).hexdigest())
    assert split_train_dev(problems, dev_size=1)[1] == [smallest]
    assert split_train_dev(problems, dev_size=0) == (problems, [])


@pytest.mark.parametrize("dev_size", [2, 3])
def test_a_dev_size_that_leaves_no_training_is_refused(dev_size: int) -> None:
    with pytest.raises(DataError, match=rf"data\.dev_size={dev_size} leaves nothing"):
        split_train_dev(problems_of("a", "b"), dev_size=dev_size)


def test_a_split_file_is_followed(tmp_path: Path) -> None:
    problems = problems_of("a", "b", "c", "d")
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": [3, 0, 2], "dev": [1]}))
    train, dev = split_train_dev(problems, dev_size=99, split_file=path)
    assert [problem.question for problem in train] == ["a", "c", "d"]
    assert [problem.question for problem in dev] == ["b"]


@pytest.mark.parametrize(
    ("split", "why"),
    [
        ({"train": [0], "dev": [2]}, "does not name each of these 3 problems once"),
        ({"train": [0, 1], "dev": [1, 2]}, "does not name each"),
        ({"train": [0, 1], "dev": [3]}, "does not name each"),
        ({"train": [0, True], "dev": [2]}, "does not name each"),
        ({"train": [0, 1], "dev": ["2"]}, "does not name each"),
        ({"train": [], "dev": [0, 1, 2]}, "leaves no problem to train on"),
        ({"train": [0, 1], "dev": [2], "questions_sha256": {"dev": "0" * 64}}, "was made for other dev questions"),
        ({"train": [0, 1]}, "is no split file"),
        ([0, 1], "is no split file"),
    ],
)
def test_a_split_file_of_other_data_is_refused(tmp_path: Path, split: object, why: str) -> None:
    path = tmp_path / "split.json"
    path.write_text(json.dumps(split))
    with pytest.raises(DataError, match=why):
        split_train_dev(problems_of("a", "b", "c"), dev_size=1, split_file=path)


def test_a_missing_split_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        split_train_dev(problems_of("a", "b"), dev_size=1, split_file=tmp_path / "none.json")


@needs_data
def test_gsm8k_is_split_6705_to_768(data_dir: Path) -> None:
    problems = load("gsm8k", split="train", data_dir=data_dir).problems
    for split_file in (None, data_dir / "gsm8k" / "dpost_split.json"):
        train, dev = split_train_dev(problems, dev_size=768, split_file=split_file)
        assert (len(train), len(dev)) == (6705, 768)
        assert sorted(train + dev, key=lambda problem: problem.id) == problems
    named = json.loads((data_dir / "gsm8k" / "dpost_split.json").read_bytes())
    assert {problem.id for problem in dev} == {f"gsm8k-train-{k + 1:04d}" for k in named["dev"]}
    with pytest.raises(DataError, match="was made for other train questions"):
        split_train_dev(problems[::-1], dev_size=768, split_file=split_file)


# Overlap


def test_overlap_is_seen_through_spelling() -> None:
    train = problems_of("How many apples has Ann: 5 or 6?", "Another?", name="train")
    test = problems_of("Unseen?", "how many apples has ANN (5 or 6)", name="test")
    with pytest.raises(
        DataError, match=r"1 of 2 test questions of tests are also .* mine \(such as test-1 = train-0\)"
    ):
        check_overlap(train, test, train_name="mine", test_name="tests")
    check_overlap(train, test[:1], train_name="mine", test_name="tests")


def test_normal_question_keeps_letters_and_digits() -> None:
    assert normal_question("  Straße №5:\u2028½ of “3.5” kg?\n") == "strasse5½of35kg"


@needs_data
def test_no_evaluation_set_overlaps_with_gsm8k_training(data_dir: Path) -> None:
    train = load("gsm8k", split="train", data_dir=data_dir).problems
    for name in sources.NAMED:
        check_overlap(train, load(name, data_dir=data_dir).problems, train_name="gsm8k", test_name=name)
