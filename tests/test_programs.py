"""Solutions with code, made from annotated rationales and checked by running them."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import pytest

from dpost_lite.problems import code_format
from dpost_lite.problems.grading import canonical_number, strict_answer
from dpost_lite.problems.programs import Program, Refusal, all_to_code, as_program
from dpost_lite.problems.records import Problem
from dpost_lite.problems.synthetic import generate
from dpost_lite.sandbox.base import Ran


class Direct:
    """A sandbox that runs each call at once, in an interpreter of its own."""

    def __init__(self, monty, pool) -> None:
        self.monty = monty
        self.pool = pool

    def run(self, earlier: Sequence[str], code: str) -> Future[Ran]:
        future: Future[Ran] = Future()
        printed = self.monty.CollectString(10_000)
        with self.pool.checkout() as session:
            for block in earlier:
                session.feed_run(block)
            session.feed_run(code, print_callback=printed)
        future.set_result(Ran(printed.output.rstrip(), ""))
        return future

    def close(self) -> None:
        pass


class Fake(Direct):
    """A sandbox in which all code prints `output`. It counts the calls."""

    def __init__(self, output: str) -> None:
        super().__init__(None, None)
        self.output = output
        self.num_calls = 0

    def run(self, earlier: Sequence[str], code: str) -> Future[Ran]:
        self.num_calls += 1
        future: Future[Ran] = Future()
        future.set_result(Ran(self.output, ""))
        return future


def to_code(problem: Problem, sandbox: Direct) -> Problem | Refusal:
    return next(all_to_code([problem], sandbox))[1]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Direct]:
    monty = pytest.importorskip("pydantic_monty")
    with monty.Monty() as pool:
        yield Direct(monty, pool)


def codes(*lines: str, answer: str = "0", question: str = "") -> list[str]:
    """The calculations of a program, without the lines that print."""
    program = as_program("\n".join((*lines, f"#### {answer}")), question)
    assert isinstance(program, Program), program
    return [line for step in program.steps for line in step.code.splitlines() if not line.startswith("print(")]


def text_of(line: str) -> str:
    program = as_program(f"{line}\n#### 1")
    assert isinstance(program, Program), program
    return program.steps[0].text.removesuffix("\n")


def solution(sandbox, *lines: str, answer: str, question: str = "") -> str | Refusal:
    """What becomes of a rationale that ends in `answer`."""
    result = to_code(Problem("p", question, answer, "\n".join((*lines, f"#### {answer}"))), sandbox)
    return result if isinstance(result, Refusal) else result.rationale or ""


NATALIA = Problem(
    "p", "Natalia sold clips to 48 of her friends in April, and half as many in May. How many did she sell?", "72",
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
)  # fmt: skip
NATALIA_CODE = """Natalia sold 48/2 clips in May.
```python
clips = 48/2
print(clips)
```
```output
24.0
```
Natalia sold 48+24 clips altogether in April and May.
```python
clips_2 = 48+clips
print(clips_2)
```
```output
72.0
```
#### 72"""


def test_a_rationale_becomes_a_solution_with_one_block_for_each_step(sandbox):
    result = to_code(NATALIA, sandbox)
    assert isinstance(result, Problem)
    assert result.rationale == NATALIA_CODE
    assert (result.id, result.question, result.answer) == (NATALIA.id, NATALIA.question, NATALIA.answer)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("She has 3+4=<<3+4=7>>7 cats.", "She has 3+4 cats."),
        ("She pays 3 * $4 = $<<3*4=12>>12.", "She pays 3 * $4."),
        ("3 cats + 4 cats = <<3+4=7>>7 cats in all, says Ann.", "3 cats + 4 cats, says Ann."),
        ("3 cats + 4 dogs = <<3+4=7>>7 pets worth $2.50 each. Fine.", "3 cats + 4 dogs. Fine."),
        ("The sum is $<<3+4=7>>7.", "The sum is $3+4."),
        ("Sum = <<3+4=7>>7", "Sum = 3+4"),
        ("They cost $<<500*3=1500>>1,500 in all.", "They cost $500*3 in all."),
        ("Half of 20% is 20/2=<<20/2=10>>10%.", "Half of 20% is 20/2%."),
        ("She picks 12 pears because 3 x 4 = <<3*4=12>>12", "She picks 3 x 4 pears"),
        ("She picks 12 pears because 3 x 4 = <<12=12>>12", "She picks 3 x 4 pears"),
    ],
)
def test_a_text_tells_what_is_calculated_but_not_the_result(line, text):
    assert text_of(line) == text


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["That is 1/2*48 = <<1/2*48=24>>24."], ["step_1 = 1/2*48"]),
        (["He pays .5*8 = $<<.5*8=4.00>>4.00."], ["dollars = 0.5*8"]),
        (["It is 3-8 = <<3-8=-5>>-5 degrees."], ["degrees = 3-8"]),
        (["It is -5+3 = <<-5+3=-2>>-2 now."], ["step_1 = -5+3"]),
        (["It is 10/20*100 = <<10/20*100=50>>50% of it."], ["percent = 10/20*100"]),
        (["It is 8/(4) = <<8/(4)=2>>2 lists."], ["lists = 8/4"]),
        (["It is 8/4 = <<8/4=2>>2 lambda."], ["step_1 = 8/4"]),  # a keyword
        (["It is 8/4 = <<8/4=2>>2 more square feet."], ["feet = 8/4"]),
        (["It is 05+2 = <<05+2=7>>7."], ["step_1 = 5+2"]),  # Python refuses 05
        (["He gets 3+4 = 7 pens."], ["pens = 3+4"]),  # equations without an annotation
        (["He gets 2,000 - $500 = $1,500."], ["dollars = 2000-500"]),
        (["He gets 6/2 = 3/1 or 3 pens, so 3+4 = 7 pens."], ["pens = 3+4"]),
        (["x + 3 = 7", "He gets 36 -8 = <<28=28>>28 pens."], ["pens = 36-8"]),
    ],
)
def test_code_of_a_calculation(lines, expected):
    assert codes(*lines) == expected


@pytest.mark.parametrize(
    ("calculation", "result", "code", "output"),
    [
        ("0.1+0.2", "0.3", "round(0.1+0.2, 2)", "0.3"),
        ("7/100*300", "21", "round(7/100*300, 2)", "21.0"),
        ("10/3", "3.33", "round(10/3, 2)", "3.33"),
        ("10/3", "3.333", "round(10/3, 3)", "3.333"),
        ("12/60", "0.2", "12/60", "0.2"),
        ("12/60", ".20", "12/60", "0.2"),
        ("7//2", "3", "7//2", "3"),
    ],
)
def test_binary_fractions_do_not_show(sandbox, calculation, result, code, output):
    line = f"That is {calculation} = <<{calculation}={result}>>{result}."
    text = solution(sandbox, line, answer=result)
    assert f"step_1 = {code}\n" in text
    assert f"```output\n{output}\n```" in text


def test_later_steps_refer_to_earlier_results():
    lines = ["It is 2*9 = <<2*9=18>>18 pens.", "It is 18-18/3 = <<18-18/3=12>>12 pens."]
    assert codes(*lines) == ["pens = 2*9", "pens_2 = pens-pens/3"]


@pytest.mark.parametrize("question", ["She has 18 cups.", "She has $18.00.", "A dozen eggs and 18 hens."])
def test_a_number_of_the_question_is_not_a_variable(question):
    lines = ["It is 2*9 = <<2*9=18>>18 pens.", "It is 18+5 = <<18+5=23>>23 pens."]
    assert codes(*lines, question=question)[1] == "pens_2 = 18+5"


def test_a_number_word_of_the_question_is_not_a_variable():
    lines = ["It is 2+1 = <<2+1=3>>3 pens.", "It is 3*5 = <<3*5=15>>15 pens."]
    assert codes(*lines, question="Three cats.")[1] == "pens_2 = 3*5"
    assert codes(*lines, question="Two cats.")[1] == "pens_2 = pens*5"


def test_an_ambiguous_result_is_not_a_variable():
    lines = ["It is 2*9 = <<2*9=18>>18 pens.", "It is 3*6 = <<3*6=18>>18 cups.", "So 18+18 = <<18+18=36>>36."]
    assert codes(*lines)[2] == "step_3 = 18+18"


def test_the_100_of_a_percentage_is_not_a_variable():
    lines = ["It is 2*50 = <<2*50=100>>100 pens.", "So 20/100*100 = <<20/100*100=20>>20."]
    assert codes(*lines)[1] == "step_2 = 20/100*pens"


def test_several_calculations_in_a_line_share_a_block(sandbox):
    text = solution(
        sandbox, "He buys 2*3 = <<2*3=6>>6 pens and 4*5 = <<4*5=20>>20 cups.", "So 6+20 = <<6+20=26>>26.", answer="26"
    )
    assert text.startswith(
        "He buys 2*3 pens and 4*5 cups.\n```python\npens = 2*3\nprint(pens)\ncups = 4*5\nprint(cups)"
    )
    assert "```output\n6\n20\n```\n" in text
    assert "step_3 = pens+cups\n" in text


def test_lines_without_a_calculation_stay_text(sandbox):
    text = solution(sandbox, "Let us see.", "It is 3+4 = <<3+4=7>>7.", "", "  That is all.", answer="7")
    assert text == (
        "Let us see.\nIt is 3+4.\n```python\nstep_1 = 3+4\nprint(step_1)\n```\n```output\n7\n```\nThat is all.\n#### 7"
    )


@pytest.mark.parametrize(
    ("rationale", "reason"),
    [
        ("It is 3+4 = <<3+4=8>>8.\n#### 8", Refusal.WRONG_RESULT),
        ("It is 3+4 = <<3+4=7>>8.\n#### 7", Refusal.WRONG_RESULT),
        ("It is 10/3 = <<10/3=3.5>>3.5.\n#### 3.5", Refusal.WRONG_RESULT),
        ("It is <<1/(10000000000000000.5-10000000000000000)=2>>2.\n#### 2", Refusal.WRONG_RESULT),
        ("So 7 of them: 3+4 = <<3+4=7>>7.\n#### 7", Refusal.RESULT_FIRST),
        ("It is 3x4 = <<3x4=12>>12.\n#### 12", Refusal.NOT_READ),
        ("It is 3/0 = <<3/0=12>>12.\n#### 12", Refusal.NOT_READ),
        ("It is 3+4 = <<3+4=seven>>7.\n#### 7", Refusal.NOT_READ),
        ("It is 3+4 = <<3+4.\n#### 7", Refusal.NOT_READ),
        ("x = <<7=7>>7\n#### 7", Refusal.NO_CALCULATION),
        ("It is 7.\n#### 7", Refusal.NO_CALCULATION),
        ("It is 3+4 = <<3+4=7>>7.", Refusal.NO_ANSWER),
        ("It is 3+4 = <<3+4=7>>7.\n#### seven", Refusal.NO_ANSWER),
        ("", Refusal.NO_ANSWER),
        ("```python\nIt is 3+4 = <<3+4=7>>7.\n#### 7", Refusal.FENCE),
    ],
)
def test_a_rationale_that_lies_or_cannot_be_read_is_refused(rationale, reason):
    assert as_program(rationale) == reason


def test_single_backticks_are_harmless(sandbox):
    text = solution(sandbox, "`It` is 3+4 = <<3+4=7>>7 `pens`.", answer="7")
    assert [block.kind for block in code_format.blocks(text)] == ["text", "code", "output", "text"]


def test_the_last_result_and_the_stated_answer_have_to_be_the_problem_s(sandbox):
    rationale = "It is 3+4 = <<3+4=7>>7.\n#### {}"
    assert to_code(Problem("p", "", "8", rationale.format(8)), sandbox) is Refusal.OTHER_ANSWER
    assert to_code(Problem("p", "", "7", rationale.format(8)), sandbox) is Refusal.OTHER_ANSWER
    assert to_code(Problem("p", "", "7"), sandbox) is Refusal.NO_RATIONALE
    assert isinstance(to_code(Problem("p", "", "7", rationale.format("$7.00")), sandbox), Problem)


@pytest.mark.parametrize("output", ["8", "7\n7", "", "7.0000000001", "NameError: no", "7 pens"])
def test_an_output_that_disagrees_is_refused(output):
    problem = Problem("p", "", "7", "It is 3+4 = <<3+4=7>>7.\n#### 7")
    assert to_code(problem, Fake(output)) is Refusal.OTHER_OUTPUT
    right = to_code(problem, Fake("7"))
    assert isinstance(right, Problem)
    assert right.rationale == ("It is 3+4.\n```python\nstep_1 = 3+4\nprint(step_1)\n```\n```output\n7\n```\n#### 7")


def test_built_in_problems_all_convert(sandbox):
    problems = generate(200, seed=3)
    for before, (problem, result) in zip(problems, all_to_code(problems, sandbox), strict=True):
        assert problem is before
        assert isinstance(result, Problem), (problem.rationale, result)
        _check_shape(problem, result.rationale or "")


def _check_shape(problem: Problem, text: str) -> None:
    parts = list(code_format.blocks(text))
    num_steps = (problem.rationale or "").count("<<")
    assert [part.kind for part in parts] == ["text", "code", "output"] * num_steps + ["text"]
    assert "".join(text[part.start : part.end] for part in parts) == text
    assert strict_answer(text) == problem.answer
    assert canonical_number(parts[-2].content) == problem.answer
    stated = re.findall(r"=([^=<>]*)>>", problem.rationale or "")
    assert [canonical_number(part.content) for part in parts if part.kind == "output"] == stated


def test_blocks_run_ahead_but_not_far():
    sandbox = Fake("7")
    problem = Problem("p", "", "7", "It is 3+4 = <<3+4=7>>7.\n#### 7")
    results = all_to_code((problem for _ in range(1000)), sandbox, in_flight=10)
    next(results)
    assert sandbox.num_calls == 10
    assert len(list(results)) == 999


def test_names_are_distinct_and_no_names_of_python():
    words = ["pens", "print", "pens", "in all", "pens", "steps", "step", "of them", "round"]
    lines = [f"So {i}+{i} = <<{i}+{i}={2 * i}>>{2 * i} {word}." for i, word in enumerate(words, start=30)]
    names = [code.split(" = ")[0] for code in codes(*lines)]
    assert names == ["pens", "step_2", "pens_2", "step_4", "pens_3", "steps", "step_7", "step_8", "step_9"]


@pytest.mark.parametrize(
    "line", ["<<>>", "<<=>>", "3=<<=3>>3", "<<3+4=7", "3+4=<<3+4==7>>7", "= = 3 = 1/0 = 5", "<<3+4=1/3>>7"]
)
def test_any_text_gets_an_answer(line):
    assert isinstance(as_program(f"{line}\n#### 7"), Program | Refusal)
