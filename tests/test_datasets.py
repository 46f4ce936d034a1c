"""The named sets, from files or the hub; the split into train and dev; the overlap check."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from dpost_lite.errors import DataError
from dpost_lite.problems import datasets as sources
from dpost_lite.problems.answers import is_number, is_right, predicted_answer
from dpost_lite.problems.datasets import check_overlap, load, normal_question, split_train_dev
from dpost_lite.problems.records import Problem

WORKED = "She has 3*6=<<3*6=18>>18 apples.\n#### 18"


def problems_of(*questions: str, name: str = "p") -> list[Problem]:
    return [Problem(f"{name}-{k}", question, str(k)) for k, question in enumerate(questions)]


# Named sets


@pytest.mark.parametrize("name", ["multiarith", "asdiv", "svamp", "math500"])
def test_evaluation_sets_are_not_trained_on(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name} is for evaluation only"):
        load(name, split="train", data_dir=tmp_path)


def test_a_data_dir_without_the_set_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data-dir .* has no file gsm8k.train\.jsonl"):
        load("gsm8k", split="train", data_dir=tmp_path)


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


def test_every_solution_of_math500_gives_its_own_answer(data_dir: Path) -> None:
    pytest.importorskip("math_verify")
    loaded = load("math500", data_dir=data_dir)
    assert (len(loaded.problems), loaded.refused) == (500, [])
    assert sum(is_number(problem.answer) for problem in loaded.problems) == 324
    for problem in loaded.problems:
        assert problem.rationale is not None, problem.id
        assert is_right(predicted_answer(problem.rationale, problem.answer), "stop", problem.answer), problem.id


def test_latex_answers_need_math_verify_when_they_are_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    row = {"id": "a", "question": "Half?", "answer": r"It is $\boxed{\frac12}$.", "final": r"\frac12"}
    (tmp_path / "math500.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r'not installed: pip install "dpost-lite\[math\]"'):
        load("math500", data_dir=tmp_path)
    (tmp_path / "math500.jsonl").write_text(json.dumps(row | {"answer": r"\boxed{2}", "final": "2"}) + "\n")
    assert load("math500", data_dir=tmp_path).problems[0].answer == "2"


BOXED = r"As $x = y$, it is $\boxed{\left(3, \frac{\pi}{2}\right)}$."
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
    "math500": [
        {
            "problem": "Which point?",
            "solution": BOXED,
            "answer": r"\left(3, \frac{\pi}{2}\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
    ],
}
HUB_EXPECTED = {
    "gsm8k": [("How many?", "18", WORKED)],
    "multiarith": [("How many?", "18", None)],
    "asdiv": [("Ann has 9. How many?", "9", None), ("Ann has 2. Which?", "2", None)],
    "svamp": [("Ann has 9. How many?", "9", None), ("Ann has 8. How many?", "8", None)],
    "math500": [("Which point?", r"\left(3, \frac{\pi}{2}\right)", BOXED)],
}
HUB_CALLS = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "multiarith": ("ChilleD/MultiArith", None, "train+test"),
    "asdiv": ("EleutherAI/asdiv", None, "validation"),
    "svamp": ("ChilleD/SVAMP", None, "train+test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
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
    assert loaded.problems[0].id == HUB_ROWS[name][0].get("unique_id", f"{name}-test-00001")


def test_hub_columns_that_changed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"Question": "How many?"}])
    with pytest.raises(DataError, match=r"no longer has a column 'question': .*--data-dir"):
        load("gsm8k")


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), FileNotFoundError("gone"), RuntimeError()])
def test_an_unreachable_hub_points_to_data_dir(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"gsm8k cannot be loaded .*--data-dir DIR \(DIR/gsm8k/train\.jsonl\)"
    ) as caught:
        load("gsm8k", split="train")
    assert "\n" not in str(caught.value)


def test_offline_asks_the_cache_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def no_network(*_: object, **__: object) -> None:
        pytest.fail("offline, yet the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=r"asdiv cannot be loaded .*--data-dir DIR \(DIR/asdiv\.jsonl\)"):
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
    with pytest.raises(DataError, match=rf"data\.dev_size={dev_size} leaves none of 2"):
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
        ({"train": [0, 1]}, "must be a JSON object with the lists"),
        ([0, 1], "must be a JSON object with the lists"),
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


def test_no_evaluation_set_overlaps_with_gsm8k_training(data_dir: Path) -> None:
    train = load("gsm8k", split="train", data_dir=data_dir).problems
    for name in sources.NAMED:
        check_overlap(train, load(name, data_dir=data_dir).problems, train_name="gsm8k", test_name=name)
