"""The format of solutions with code: its parts, what is inserted, and what is kept out of pairs and answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpost_lite.problems.answers import flexible_prediction, predicted_answer
from dpost_lite.problems.code_data import NO_ANSWER, OTHER_FENCES, TOO_MUCH_CODE, with_code
from dpost_lite.problems.code_format import blocks, imitates_output, inserted_text, inserted_tokens, is_clean, prose
from dpost_lite.problems.pairs import equations, make_labels, make_pairs, num_steps
from dpost_lite.problems.programs import Refusal
from dpost_lite.problems.records import Problem, Rationale
from dpost_lite.recipe import CodeRecipe
from dpost_lite.sandbox.base import Limits
from dpost_lite.sandbox.choose import sandbox

SOLUTION = "Half.\n```python\nx = 48/2\nprint(x)\n```\n```output\n24.0\n```\nSo 24.\n#### 24"


def kinds(text: str) -> str:
    return "".join(block.kind[0] for block in blocks(text))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (SOLUTION, "tcot"),
        ("", ""),
        ("only text", "t"),
        ("```python\n```", "c"),
        ("```python\n```\n```output\n```\n", "co"),
        ("```python\nx\n```\ntext", "ct"),
        ("```python\nx\n", "t"),
        ("a ```python\nx\n```", "t"),
        ("```c\nx\n```", "t"),
        ("```output\n1\n```\n", "t"),
        (SOLUTION + "\n" + SOLUTION, "tcottcot".replace("tt", "t")),
    ],
)
def test_the_parts_of_a_solution(text: str, found: str) -> None:
    assert kinds(text) == found


@given(st.lists(st.sampled_from(["```", "python", "output", "\n", "x", "```python\n", "\n```\n", "```output\n"])))
def test_the_parts_cover_any_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = list(blocks(text))
    assert "".join(text[block.start : block.end] for block in found) == text
    assert len(inserted_tokens(range(len(pieces)), pieces.__getitem__)) == len(pieces)


@given(st.text(max_size=40))
def test_what_is_inserted_is_one_output_whatever_was_printed(printed: str) -> None:
    text = "```python\nx\n```" + inserted_text(printed) + "#### 1"
    assert kinds(text) == "cot"
    assert predicted_answer(text, "1") == "1"


@pytest.mark.parametrize("cut", range(2, len(inserted_text("24.0"))))
def test_an_output_that_the_limit_cuts_off_is_no_text(cut: int) -> None:
    text = "Half.\n```python\nprint(24.0)\n```"
    whole = text + inserted_text("24.0")[:cut]
    assert kinds(whole) == "tco"
    assert inserted_tokens(range(len(whole)), whole.__getitem__) == [False] * len(text) + [True] * cut


def test_what_imitates_an_output_is_no_label() -> None:
    faked = Rationale("p", 1, "We guess.\n```output\n9\n```\n#### 9", (1,), (0,), 0.0, "stop", "9", True)
    assert make_labels([Problem("p", "q", "9")], [faked], {}, threshold=0.7) == []
    assert not is_clean(faked.text)


def test_code_and_outputs_give_no_answer() -> None:
    text = "```python\n#### 5\nprint('#### 7')\n```" + inserted_text("#### 7") + "That is it."
    assert predicted_answer(text, "7") is None
    assert flexible_prediction(SOLUTION.replace("24.\n#### 24", "it is."), "24") is None
    assert prose(SOLUTION) == "Half.\n\nSo 24.\n#### 24"
    assert prose("no code #### 3") == "no code #### 3"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (SOLUTION, True),
        (SOLUTION.replace("24.0", "NameError: name 'y' is not defined"), False),
        (SOLUTION.replace("Half.", "I apologize."), False),
        ("I apologize for the error.\n#### 3", True),
    ],
)
def test_a_preferred_solution_is_clean(text: str, clean: bool) -> None:
    assert is_clean(text) == clean


def test_a_model_may_not_write_outputs() -> None:
    assert not imitates_output(SOLUTION)
    assert imitates_output("Half.\n```output\n24\n```\n#### 24")


def test_blocks_are_the_steps_and_the_equations() -> None:
    assert num_steps(SOLUTION) == 1
    assert equations(SOLUTION) == equations(SOLUTION.replace("Half.", "48 by two.")) == ("x = 48/2\nprint(x)\n",)


def test_a_pair_prefers_no_solution_with_an_error() -> None:
    failed = SOLUTION.replace("24.0", "NameError: name 'y' is not defined")
    wrong = SOLUTION.replace("#### 24", "#### 25")

    def drawn(sample: int, text: str, *, correct: bool) -> Rationale:
        return Rationale("p", sample, text, (sample, 100 + sample), (0, 0), 0.0, "stop", "24", correct)

    def pairs(*rationales: Rationale) -> list[str]:
        made = make_pairs(
            [Problem("p", "q", "24")], rationales, {}, threshold=0.7, max_pairs=9, gold_first=True,
            unfinished_rejected=False,
        )  # fmt: skip
        return [pair.chosen for pair in made]

    assert pairs(drawn(1, failed, correct=True), drawn(2, wrong, correct=False)) == []
    found = pairs(drawn(1, failed, correct=True), drawn(2, wrong, correct=False), drawn(3, SOLUTION, correct=True))
    assert found == [SOLUTION]


def test_data_of_all_kinds() -> None:
    pytest.importorskip("pydantic_monty")
    two = "```python\nx = 2\n```\nand\n```python\nprint(x)\n```\n#### 24"
    failing = "```python\nboom\n```"
    rationales = {
        "own": SOLUTION,
        "no output": SOLUTION.replace("```output\n24.0\n```\n", ""),
        "other output": SOLUTION.replace("24.0", "25.0"),
        "blank line": SOLUTION.replace("\n```output", "\n\n```output"),
        "windows": SOLUTION.replace("\n", "\r\n"),
        "spaces": SOLUTION.replace("\n```", "\n  ```").replace("```\n", "``` \n"),
        "two": two,
        "no answer": "```python\nprint(2)\n```",
        "other answer": SOLUTION.replace("#### 24", "#### 25"),
        "output not closed": SOLUTION.replace("24.0\n```\n", "24.0\n"),
        "fails": failing + "\n#### 24",
        "fails as shown": failing + inserted_text("NameError: name 'boom' is not defined") + "Again.\n#### 24",
        "not closed": "```python\nprint(1)\n#### 1",
        "nine blocks": "```python\n1\n```\n" * 9 + "#### 1",
        "annotated": "It is 48/2=<<48/2=24>>24.\n#### 24",
        "plain": "It is 24.\n#### 24",
        "none": None,
    }
    problems = [Problem(name, "q", "24", text) for name, text in rationales.items()]
    with sandbox("monty", Limits()) as box:
        made, reasons = with_code(problems, box, CodeRecipe())
    found = {problem.id: problem.rationale for problem in made}
    assert list(found) == list(rationales)
    for name in ("own", "no output", "other output", "blank line", "windows", "spaces"):
        assert found[name] == SOLUTION, name
    assert found["two"] == two.replace("x = 2\n```", "x = 2\n```\n```output\n```").replace(
        "print(x)\n```", "print(x)\n```\n```output\n2\n```"
    )
    assert found["fails as shown"] == rationales["fails as shown"]
    assert kinds(found["annotated"] or "") == "tcot"
    assert all(found[name] is None for name in ("fails", "not closed", "nine blocks", "plain", "none"))
    assert all(found[name] is None for name in ("no answer", "other answer", "output not closed"))
    assert reasons == {
        "a block of its code fails (NameError)": 1, OTHER_FENCES: 1, TOO_MUCH_CODE: 1, Refusal.NO_CALCULATION: 1,
        NO_ANSWER: 3,
    }  # fmt: skip
