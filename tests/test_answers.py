r"""Which answer a solution gives: numbers after `####` or in a box, LaTeX, votes; the right answers of own files."""

import json
from pathlib import Path

import pytest

from dpost_lite.problems import answers
from dpost_lite.problems.answers import (
    flexible_prediction,
    is_number,
    is_right,
    majority,
    predicted_answer,
    stated_answer,
)
from dpost_lite.problems.datasets import Loaded, load
from dpost_lite.problems.latex_text import MAX_LATEX_CHARS, is_maths, last_boxed, normal, number_in, plain_number
from dpost_lite.problems.records import Problem, Rationale
from dpost_lite.problems.scoring import score

HALF = r"\frac{1}{2}"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{18}.", "18"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {x} }", "x"),
        (r"\fbox{3}", "3"),
        (r"{ \boxed{3}", "3"),
        (r"\boxed{$5$}", "5"),
        (r"\boxed{ 5. }", "5"),
        (r"\boxed{}", None),
        (r"\boxed 5", None),
        ("18", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"10,\!080", "10080"),
        (r"11,\! 111,\! 100", "11111100"),
        (r"10{,}080", "10080"),
        (r"10\,080", "10080"),
        (r"\$32,\!348", "32348"),
        ("$5$", "5"),
        ("58,500", "58500"),
        (".35625", "0.35625"),
        ("-2,1", None),  # two numbers
        ("1,2", None),
        ("1,23", None),
        (r"\frac{3}{4}", None),
        ("(-3)", None),
    ],
)
def test_plain_number(text, number):
    assert plain_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\frac{3}{4}", "0.75"),
        (r"-\dfrac34", "-0.75"),
        (r"\frac{-3}{4}", "-0.75"),
        ("7 1/2", "7.5"),
        (r"7\frac12", "7.5"),
        (r"-7\frac12", "-7.5"),
        ("71/2", "35.5"),
        ("(-3)", "-3"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"5 \text{ cm}", "5"),
        (r"15\mbox{ cm}^2", "15"),
        ("x = 5", "5"),
        (r"50\%", "50"),
        (r"\frac{1}{3}", None),
        (r"\frac{1}{0}", None),
        (r"5 \text{ million}", None),
        (r"\sqrt{4}", None),
        ("3 5", None),
        ("12. Wait, 13.", None),
        ("(1,2)", None),
        ("1,2", None),
        ("9" * (MAX_LATEX_CHARS + 1), None),
    ],
)
def test_number_in(text, number):
    assert number_in(text) == number


def test_normal_form_keeps_the_rows_of_a_matrix():
    assert normal(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}") == r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"


@pytest.mark.parametrize(
    ("text", "answer", "predicted"),
    [
        ("2*9=<<2*9=18>>18\n#### 18", "18", "18"),
        ("#### 18 apples", "18", "18"),
        (r"\boxed{17} #### 18", "18", "18"),  # with `####`, only that counts, as in the paper
        (r"\boxed{18} #### many", "18", None),
        (r"so \boxed{18}.", "18", "18"),
        (r"so \boxed{\$1,\!000}.", "1000", "1000"),
        (r"so \boxed{\frac{5}{4}}.", "1.25", "1.25"),
        (r"so \boxed{x^2}.", "18", None),
        ("The answer is 18", "18", None),
        (r"#### 1" "\n" r"so \boxed{\frac12}", HALF, r"\frac12"),
        ("#### $0.5$ of it\nindeed", HALF, "$0.5$ of it"),
        (r"#### $\frac12$." "\nindeed", HALF, r"\frac12"),
        ("####", HALF, None),
        ("one half", HALF, None),
        (rf"\boxed{{{'x' * (MAX_LATEX_CHARS + 1)}}}", HALF, None),
    ],
)
def test_predicted_answer(text, answer, predicted):
    assert predicted_answer(text, answer) == predicted


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("#### 18", "18"),
        (r"\boxed{18}", "18"),
        (r"\boxed{x^2}", "x^2"),
        ("#### x^2", "x^2"),
        ("18", None),
    ],
)
def test_stated_answer(text, stated):
    assert stated_answer(text) == stated


def test_numbers_are_canonical_and_the_rest_is_latex():
    assert is_number("18")
    assert is_number("-2.5")
    assert not any(is_number(text) for text in ("18.0", "-2,1", "1/3", "x=5", HALF, ""))


def test_only_finished_answers_are_right():
    assert is_right("18.0", "stop", "18")
    assert is_right("0.5", "stop", HALF)
    assert not is_right("0.5", "limit", HALF)
    assert not is_right(None, "stop", HALF)


def test_flexible_prediction():
    assert flexible_prediction(r"\boxed{\frac12} of 7", "18") == "7"
    assert flexible_prediction(r"\boxed{\frac12} of 7", HALF) == r"\frac12"
    assert flexible_prediction("it is 0.5", HALF) == "0.5"


def test_equal_latex_answers_are_one_vote():
    assert majority([r"\frac12", "2", "0.5", "2", r"\dfrac{1}{2}"]) == r"\frac12"
    assert majority(["18", "17", "17.0", "18"]) == "18"
    assert majority([None, None]) is None


def test_a_vote_waits_for_one_endless_comparison_at_most(monkeypatch):
    asked = []
    monkeypatch.setattr(answers, "num_given_up", lambda: len(asked))
    monkeypatch.setattr(answers, "same_latex", lambda *pair: asked.append(pair))
    assert majority(["a", "b", "c", "d", "c"]) == "c"
    assert asked == [("b", "a")]


def test_a_score_of_latex_answers():
    problems = [Problem(str(k), f"{k}?", HALF) for k in range(3)]
    texts = [r"\boxed{\dfrac12}", "It is 0.5", r"\boxed{0.6}"]
    graded = [
        Rationale(
            str(k), 0, text, (), (), 0.0, "stop", found := predicted_answer(text, HALF), is_right(found, "stop", HALF)
        )
        for k, text in enumerate(texts)
    ]
    scored = score("base", graded, problems, has_calculator=False)
    assert (scored.strict, scored.flexible, scored.num_unparsed) == (1 / 3, 2 / 3, 1)


# Own files


def load_rows(folder: Path, *rows: dict) -> Loaded:
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load(str(path))


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row below needs math-verify."""
    monkeypatch.setattr("dpost_lite.problems.datasets.check_installed", lambda: None)


@pytest.mark.parametrize(
    ("row", "answer", "is_labelled"),
    [
        ({"answer": r"So \boxed{18}."}, "18", True),
        ({"answer": r"So \boxed{10,\!080}."}, "10080", True),
        ({"answer": r"So \boxed{-2,1}."}, "-2,1", True),
        ({"answer": r"So \boxed{\frac12}."}, r"\frac12", True),
        ({"answer": r"So \boxed{\text{east}}."}, r"\text{east}", True),
        ({"answer": r"So \boxed{\frac12}.", "final": r"\dfrac{1}{2}"}, r"\dfrac{1}{2}", True),
        ({"answer": r"So \boxed{15\text{ cm}}.", "final": "15"}, "15", True),
        ({"answer": r"So \boxed{\sqrt{4}}.", "final": "2"}, "2", False),
        ({"answer": "One half.", "final": r"\frac12"}, r"\frac12", False),
        ({"answer": r"\frac12"}, r"\frac12", False),
        ({"answer": "(3, 4]"}, "(3, 4]", False),
        ({"answer": "1/3"}, "1/3", False),
        ({"answer": "So it is a third.\n#### 1/3"}, "1/3", True),
        ({"answer": "So it is a third.\n#### 1/3", "final": r"\frac13"}, r"\frac13", True),
        ({"answer": "1,2"}, "12", False),  # as ever without a box
        ({"solution": r"So \boxed{x=5}.", "answer": "x=5"}, "x=5", True),
        ({"solution": "So it is 5.", "answer": "5"}, "5", False),
        ({"solution": "So.\n#### 5", "answer": "5"}, "5", True),
        ({"solution": "ignored", "answer": "So.\n#### 5"}, "5", True),
        ({"solution": "", "answer": "5"}, "5", False),
    ],
)
def test_right_answers_of_own_files(tmp_path, row, answer, is_labelled):
    loaded = load_rows(tmp_path, {"problem": "How many?", **row} if "solution" in row else {"question": "?a", **row})
    assert loaded.refused == []
    (problem,) = loaded.problems
    assert problem.answer == answer
    worked = row["answer"] if "####" in row["answer"] or "boxed" in row["answer"] else row.get("solution")
    assert problem.rationale == (worked if is_labelled else None)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"answer": "one half"}, "no number in the answer"),
        ({"answer": "18kg"}, "and no LaTeX"),
        ({"answer": "2 or 3"}, "and no LaTeX"),
        ({"answer": "9:30"}, "and no LaTeX"),
        ({"answer": r"\frac{1}{2"}, "and no LaTeX"),
        ({"answer": "So.", "final": "one half"}, "no number in `final`"),
        ({"answer": r"So \boxed{3}.", "final": "4"}, r"ends in \boxed{3}, but its answer column has 4"),
        ({"answer": r"So \boxed{\frac13}.", "final": HALF}, r"ends in \boxed{\frac13}, but its"),
        ({"answer": "So.\n#### 1/3", "final": HALF}, "ends in 1/3, but its answer column has"),
        ({"answer": rf"\boxed{{{'x' * 501}}}"}, "more than 500 characters"),
    ],
)
def test_rows_without_an_answer_are_refused(tmp_path, row, why):
    loaded = load_rows(tmp_path, {"question": "Good?", "answer": "1"}, {"question": "How many?", **row})
    assert [problem.question for problem in loaded.problems] == ["Good?"]
    assert why in loaded.refused[0].reason


@pytest.mark.parametrize("text", [r"\frac12", "x=5", "2x+3", "(3,4]", "1,-2", r"\text{east}", r"3\pm\sqrt{2}", "-1/3"])
def test_maths(text):
    assert is_maths(text)


@pytest.mark.parametrize("text", ["", "?", "x", "east", "3 million", "It is 18 or 19.", "a. b", "1\n2", "12. Wait, 13"])
def test_prose_is_no_maths(text):
    assert not is_maths(text)
