"""Turn rationales with calculator annotations into solutions with code, as first training data for them.

Each line with an annotation becomes a step: what is calculated, the code, and what the code printed. The line

    Natalia sold 48/2 = <<48/2=24>>24 clips in May.

becomes (the format is that of `code_format`)

    Natalia sold 48/2 clips in May.
    ```python
    clips = 48/2
    print(clips)
    ```
    ```output
    24.0
    ```

Lines without a calculation stay text, and `#### 72` follows the last output. One block for each step, rather than one
for the whole solution, lets preference pairs differ from any step on, and shows the model each result before it goes
on. It costs 12 to 15 tokens a step, most of them output, which the model does not write.

Numbers are printed as Python has them: a division gives `24.0`, and the answer after `####` is `24`. Writing `//` where
the result is whole would print `24`, but a model that cannot know the result beforehand would learn to round down.
Where binary fractions would show (`0.1+0.2`, `7/100*300`) or the result is endless (`10/3`), the variable is rounded to
two decimals, or to as many as the rationale has. Two steps in a thousand of GSM8K need it.

An earlier result is referred to by its variable, unless the number also stands in the question or is that of two
results: then nothing tells which one is meant.
"""

import ast
import builtins
import keyword
import operator
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction

from dpost_lite.problems.calculator import decimal_text, evaluate
from dpost_lite.problems.code_format import CODE_START, FENCE, inserted_text
from dpost_lite.problems.grading import MAX_NUMBER_CHARS, canonical_number, same_number, strict_answer
from dpost_lite.problems.records import Problem
from dpost_lite.sandbox.base import Ran, Sandbox

IN_FLIGHT = 64  # blocks that are given to the sandbox at the same time

_DIGITS = r"(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(_DIGITS)
_ANNOTATED = re.compile(
    r"(?P<equals>\s*=\s*)?(?P<unit>[$€£]?)\s*<<(?P<expression>[^<>=]*)=(?P<result>[^<>=]*)>>\s*"
    rf"(?P<shown>-?\$?{_DIGITS})?"
)
_BECAUSE = re.compile(
    rf"(?P<number>{_DIGITS})(?P<rest>[^0-9]*?) because (?P<calculation>[-0-9.,+*/x×÷−–()$ ]+?) *= *\$?"
    rf"(?P<annotation><<[^<>=]*=(?P<result>[^<>=]*)>>){_DIGITS}"
)  # 80 pages because 4*20 = <<4*20=80>>80
_NOT_CALCULATED = re.compile(r"<<[-+ ]*[0-9.]+ *=[^<>=]*>>")  # <<28=28>>
_EQUATION = re.compile(
    rf"(?P<left>[-0-9.,+*/x×÷−–()$ ]*[0-9)])(?P<equals>\s*=\s*\$?\s*)(?P<right>{_DIGITS})(?![0-9%/]|[.,][0-9])"
)
_AS_OPERATORS = str.maketrans({"x": "*", "×": "*", "÷": "/", "−": "-", "–": "-", "$": None, ",": None, " ": None})
_OPERAND = re.compile(r"[0-9]*\.?[0-9]+")
_NEEDLESS = re.compile(r"\(([0-9.]+)\)")  # parentheses
_WORD = re.compile(r"\s*([a-z]{2,})\b")
_REST_OF_CLAUSE = re.compile(r"(?:[^.,;:!?<=]|[.,:](?=[^ ]))*")

_NUMBER_WORDS = {
    word: Fraction(number)
    for number, words in {
        1: "one", 2: "two twice double doubled half pair", 3: "three thrice triple tripled third thirds",
        4: "four fourth quarter quarters", 5: "five fifth fifths", 6: "six sixth", 7: "seven week weeks", 8: "eight",
        9: "nine", 10: "ten tenth", 11: "eleven", 12: "twelve dozen year", 20: "twenty", 30: "thirty",
        60: "hour hours minute minutes",
    }.items()
    for word in words.split()
}  # fmt: skip
_SKIPPED = ("additional", "cubic", "extra", "fewer", "full", "less", "more", "new", "other", "square", "total", "whole")
_NOT_NOUNS = (  # noqa: SIM905
    "a about after all also altogether an and another are as at away be because before between but by combined "
    "different during each either every for from had has have he her him his if in is it its just left many most much "
    "now of off old on only or out over per plus she since so step still than that the their them then there therefore "
    "these they this those times to together under until up was were when which while who will with without"
).split()
_NOT_NAMES = frozenset((*_NOT_NOUNS, *keyword.kwlist, *keyword.softkwlist, *dir(builtins)))
_UNITS = {"$": "dollars", "%": "percent"}

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


class Refusal(StrEnum):
    """Why a rationale has no solution with code."""

    NO_RATIONALE = "there is no rationale"
    NO_ANSWER = "its last line is not #### and a number"
    FENCE = "it has code fences"
    NO_CALCULATION = "it has no calculation"
    NOT_READ = "it has an annotation that the calculator does not read"
    WRONG_RESULT = "a stated result is not that of its calculation"
    RESULT_FIRST = "a sentence states its result before it is calculated"
    OTHER_ANSWER = "its last result is not the answer"
    OTHER_OUTPUT = "its code prints something else"


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a program: `text`, `code`, and the numbers that the code has to print, one a line."""

    text: str
    code: str
    results: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A solution with code that has not been run: its steps, and the text after the last output."""

    steps: tuple[Step, ...]
    ending: str


def as_program(rationale: str, question: str = "") -> Program | Refusal:
    """Return the program of an annotated rationale; `question` tells which numbers it gives."""
    if FENCE in rationale:
        return Refusal.FENCE
    *lines, last = [stripped for line in rationale.split("\n") if (stripped := line.strip())] or [""]
    if not last.startswith("####") or strict_answer(last) is None:
        return Refusal.NO_ANSWER
    writer = _Writer(question)
    for line in lines:
        if refusal := writer.add(line):
            return refusal
    if not writer.steps:
        return Refusal.NO_CALCULATION
    return Program(tuple(writer.steps), "".join(f"{line}\n" for line in writer.texts) + f"#### {strict_answer(last)}")


def all_to_code(
    problems: Iterable[Problem], sandbox: Sandbox, *, in_flight: int = IN_FLIGHT
) -> Iterator[tuple[Problem, Problem | Refusal]]:
    """Yield every problem with a copy whose rationale is a solution with code, or why there is none, in order.

    A program is kept if its outputs agree with its rationale and its last one with the answer. About `in_flight` blocks
    run ahead. Raises SandboxError if the sandbox does not work.
    """
    waiting: deque[tuple[Problem, Program | Refusal, list[Future[Ran]]]] = deque()
    num_blocks = 0
    for problem in problems:
        program = as_program(problem.rationale, problem.question) if problem.rationale else Refusal.NO_RATIONALE
        waiting.append((problem, program, [] if isinstance(program, Refusal) else _started(program, sandbox)))
        num_blocks += len(waiting[-1][2])
        while waiting and num_blocks >= in_flight:
            num_blocks -= len(waiting[0][2])
            yield _finished(*waiting.popleft())
    while waiting:
        yield _finished(*waiting.popleft())


def _started(program: Program, sandbox: Sandbox) -> list[Future[Ran]]:
    codes = [step.code for step in program.steps]
    return [sandbox.run(codes[:number], code) for number, code in enumerate(codes)]


def _finished(
    problem: Problem, program: Program | Refusal, outputs: list[Future[Ran]]
) -> tuple[Problem, Problem | Refusal]:
    if isinstance(program, Refusal):
        return problem, program
    solution = _checked(program, outputs, problem.answer)
    return problem, solution if isinstance(solution, Refusal) else replace(problem, rationale=solution)


def _checked(program: Program, futures: list[Future[Ran]], answer: str) -> str | Refusal:
    """Return the solution with its outputs, or why it is not kept."""
    outputs = [future.result().text for future in futures]
    for step, output in zip(program.steps, outputs, strict=True):
        if [canonical_number(line) for line in output.split("\n")] != list(step.results):
            return Refusal.OTHER_OUTPUT
    last = program.steps[-1].results[-1]
    if not same_number(last, answer) or not same_number(strict_answer(program.ending), answer):
        return Refusal.OTHER_ANSWER
    parts = [
        f"{step.text}{CODE_START}{step.code}{FENCE}{inserted_text(output)}"
        for step, output in zip(program.steps, outputs, strict=True)
    ]
    return "".join((*parts, program.ending))


class _Writer:
    """A program under construction: its steps, the lines of text since the last one, and its variables."""

    def __init__(self, question: str) -> None:
        self.steps: list[Step] = []
        self.texts: list[str] = []
        self.given = _numbers(question) | {
            _NUMBER_WORDS[word] for word in re.findall("[a-z]+", question.lower()) if word in _NUMBER_WORDS
        }
        self.results: dict[str, Fraction] = {}  # as the rationale states them
        self.values: dict[str, float] = {}  # as Python computes them

    def add(self, line: str) -> Refusal | None:
        """Add a line: a step if it has calculations, else text."""
        line = _BECAUSE.sub(_calculation_first, _with_annotations(line))
        found = list(_ANNOTATED.finditer(line))
        if line.count("<<") != len(found):
            return Refusal.NOT_READ
        self.texts.append(_without_results(line, found))
        if not found:
            return None
        if refusal := self._check(found):
            return refusal
        statements = [self._statement(line, match) for match in found]
        if None in statements:
            return Refusal.WRONG_RESULT
        results = tuple(canonical_number(match["result"]) or "" for match in found)
        self.steps.append(Step("".join(f"{text}\n" for text in self.texts), "".join(map(str, statements)), results))
        self.texts.clear()
        return None

    def _check(self, found: list[re.Match[str]]) -> Refusal | None:
        """Check what the line states: the results, and that its text tells none of them."""
        known = self.given | set(self.results.values())
        results = set()
        for match in found:
            value = evaluate(match["expression"])
            if value is None or canonical_number(match["result"]) is None:
                return Refusal.NOT_READ
            if match["shown"] and not same_number(match["shown"], match["result"]):
                return Refusal.WRONG_RESULT
            known |= _numbers(match["expression"])
            results.add(abs(Fraction(canonical_number(match["result"]) or "")))
        told = set().union(*map(_numbers, self.texts))
        return Refusal.RESULT_FIRST if told & (results - known) else None

    def _statement(self, line: str, match: re.Match[str]) -> str | None:
        """Return the code of one calculation, or None if its result is another one than stated."""
        expression = self._with_variables(match["expression"].replace(" ", ""))
        result = canonical_number(match["result"]) or ""
        try:
            value = _float_value(ast.parse(expression, mode="eval").body, self.values)
        except ZeroDivisionError:  # the calculator is exact, binary fractions are not
            return None
        if canonical_number(repr(value)) != result:
            num_decimals = max(2, len(result.partition(".")[2]))
            value, expression = round(value, num_decimals), f"round({expression}, {num_decimals})"
            if canonical_number(repr(value)) != result:
                return None
        name = self._new_name(match["unit"], line[match.end() :])
        self.results[name], self.values[name] = Fraction(result), value
        return f"{name} = {expression}\nprint({name})\n"

    def _with_variables(self, expression: str) -> str:
        """Return an expression with variables for earlier results, and its other numbers as Python reads them."""

        def operand(match: re.Match[str]) -> str:
            value = Fraction(match[0])
            names = [name for name, result in self.results.items() if result == value]
            is_percent = value == 100 and match.string[: match.start()].endswith("/")
            if len(names) == 1 and value not in self.given and not is_percent:
                return names[0]
            return decimal_text(value, MAX_NUMBER_CHARS) or match[0]

        return _OPERAND.sub(operand, _NEEDLESS.sub(r"\1", expression))

    def _new_name(self, unit: str, following: str) -> str:
        """Return a name for a result: the word after it or its unit, else `step_1`."""
        name = _UNITS.get(unit) or _UNITS.get(following[:1]) or _noun(following)
        if name is None:
            return f"step_{len(self.results) + 1}"
        number = 1 + sum(re.fullmatch(rf"{name}(_[0-9]+)?", other) is not None for other in self.results)
        return name if number == 1 else f"{name}_{number}"


def _with_annotations(line: str) -> str:
    """Annotate the equations of a line that has no calculation: `38-18 = 20` -> `38-18 = <<38-18=20>>20`."""
    line = _NOT_CALCULATED.sub("", line)
    return line if "<<" in line else _EQUATION.sub(_annotated, line)


def _annotated(match: re.Match[str]) -> str:
    expression = match["left"].translate(_AS_OPERATORS).lstrip("+*/).")
    if not re.search("[-+*/]", expression[1:]) or evaluate(expression) != Fraction(match["right"].replace(",", "")):
        return match[0]
    return f"{match['left']}{match['equals']}<<{expression}={match['right'].replace(',', '')}>>{match['right']}"


def _calculation_first(match: re.Match[str]) -> str:
    """`80 pages because 4*20 = <<4*20=80>>80` -> `4*20 = <<4*20=80>>80 pages`."""
    if not same_number(match["number"], match["result"]):
        return match[0]
    return f"{match['calculation'].lstrip('$')} = {match['annotation']}{match['number']}{match['rest']}"


def _without_results(line: str, found: Iterable[re.Match[str]]) -> str:
    """Return a line with its calculations but without their results.

    If the text has the calculation, `= 24` goes: `48/2 = <<48/2=24>>24 clips` -> `48/2 clips`; and if that ends in a
    word, the rest of the clause goes too: `3 cats + 4 cats = <<3+4=7>>7 cats` -> `3 cats + 4 cats`. Otherwise the
    calculation takes the place of its result: `The sum is <<3+4=7>>7` -> `The sum is 3+4`.
    """
    text, position = "", 0
    for match in found:
        before = line[position : match.start()]
        position = match.end()
        tail = before.rpartition("=")[2]
        if match["equals"] and _numbers(tail) & _numbers(match["expression"]):
            text += before
            if before[-1:].isalpha() and (rest := _REST_OF_CLAUSE.match(line, position)):
                position = rest.end()
        else:
            text += f"{before}{match['equals'] or ''}{match['unit']}{match['expression']}"
    return (text + line[position:]).strip()


def _noun(following: str) -> str | None:
    """Return the word after a result if it can name it: `24 more clips in May` -> `clips`."""
    while (word := _WORD.match(following)) and word[1] in _SKIPPED:
        following = following[word.end() :]
    return word[1] if word and word[1] not in _NOT_NAMES else None


def _numbers(text: str) -> set[Fraction]:
    return {Fraction(number.replace(",", "")) for number in _NUMBER.findall(text)}


def _float_value(node: ast.AST, values: Mapping[str, float]) -> float:
    """Return what Python computes for an expression of numbers and variables. Raises ZeroDivisionError."""
    if isinstance(node, ast.Constant):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_float_value(node.operand, values))
    assert isinstance(node, ast.BinOp), ast.dump(node)
    return _OPERATORS[type(node.op)](_float_value(node.left, values), _float_value(node.right, values))
