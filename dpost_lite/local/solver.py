"""Solve word problems from Python: `from dpost_lite import Solver`."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from dpost_lite.errors import RecipeError
from dpost_lite.local.gguf import FORMAT_KEYS
from dpost_lite.local.header import read_header
from dpost_lite.local.request import Request, Solution
from dpost_lite.local.solver_process import SolverProcess
from dpost_lite.problems.answers import count_votes
from dpost_lite.problems.tools import Tools
from dpost_lite.recipe import Recipe, with_format

NUM_PARALLEL = 8
SAMPLE_TEMPERATURE = 0.7  # as the papers sample

_CALCULATION = re.compile(r"<<([^<>=\n]+)=([^<>\n]*)>>")


@dataclass(frozen=True, slots=True)
class Calculation:
    """One annotation of a solution, `<<48/2=24>>`: expression "48/2", result "24"."""

    expression: str
    result: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A worked solution. `answer` is what it states, in canonical form if it is a number ("18"); None if it states
    nothing, or is cut off (`is_finished`).

    With several samples, `votes` counts the answers of the finished ones, most frequent first, and the text is that of
    the first sample with the elected answer. `num_tokens` is that of all samples.
    `seconds` count from the start of the call, so those of questions that were solved side by side overlap.
    """

    question: str
    text: str
    answer: str | None
    is_finished: bool
    votes: dict[str, int] | None
    num_tokens: int
    seconds: float

    @property
    def steps(self) -> list[str]:
        """The lines of the solution, without the one that only gives the answer (`#### 18`)."""
        lines = (line.strip() for line in self.text.splitlines())
        return [line for line in lines if line and not line.startswith("####")]

    @property
    def calculations(self) -> list[Calculation]:
        """The annotations in the text, in order. Without the calculator their results are the model's own."""
        return [Calculation(*found) for found in _CALCULATION.findall(self.text)]

    def as_dict(self) -> dict[str, Any]:
        """Return values for JSON; `votes` only where there are samples."""
        return {
            "question": self.question,
            "text": self.text,
            "steps": self.steps,
            "calculations": [{"expression": c.expression, "result": c.result} for c in self.calculations],
            "answer": self.answer,
            "is_finished": self.is_finished,
            **({} if self.votes is None else {"votes": self.votes}),
            "tokens": self.num_tokens,
            "seconds": round(self.seconds, 3),
        }


class Solver:
    """Solves word problems with an exported GGUF file; use it in a `with` block, or call `close`.

    How the solutions are written is read from the file. Without `calculator` the model computes by itself; code in
    solutions is run, in a sandbox, only with `allow_code`. Up to `num_parallel` questions or samples are computed side
    by side in a process of its own. The cache takes `CELLS_PER_SEQUENCE` tokens for each (see `GgufModel`).
    Raises ExportError if the file is missing, damaged, or crashes llama.cpp; SandboxError if code cannot be run.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        calculator: bool = True,
        allow_code: bool = False,
        max_new_tokens: int | None = None,
        num_parallel: int = NUM_PARALLEL,
    ) -> None:
        recipe = recipe_of_file(Path(path))
        tools = replace(Tools.from_recipe(recipe), runs_code=allow_code)
        self._process = SolverProcess(
            Path(path),
            tools=tools if calculator else replace(tools, calculator=None),
            max_new_tokens=max_new_tokens or recipe.sampling.max_new_tokens,
            num_parallel=num_parallel,
        )

    def __enter__(self) -> "Solver":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._process.close(at_once=error is not None)

    def close(self) -> None:
        """End the process and free its memory."""
        self._process.close()

    @overload
    def solve(self, question: str, *, samples: int = 1, temperature: float | None = None, seed: int = 0) -> Answer: ...
    @overload
    def solve(
        self, question: list[str], *, samples: int = 1, temperature: float | None = None, seed: int = 0
    ) -> list[Answer]: ...
    def solve(
        self, question: str | list[str], *, samples: int = 1, temperature: float | None = None, seed: int = 0
    ) -> Answer | list[Answer]:
        """Answer one question, or each of several.

        `temperature` None is 0 (greedy decoding) for a single sample, and 0.7 for several, which are put to the vote
        (self-consistency). Samples of one question have the seeds `seed`, `seed + 1`, … Raises DataError if a question
        is too long for the model, ExportError if llama.cpp crashes, RecipeError if `samples` is less than 1.
        """
        questions = [question] if isinstance(question, str) else question
        answers = list(
            solve_all(self._process, questions, samples=samples, temperature=temperature, seeds=[seed] * len(questions))
        )
        return answers[0] if isinstance(question, str) else answers


def solve_all(
    process: SolverProcess, questions: Sequence[str], *, samples: int, temperature: float | None, seeds: Sequence[int]
) -> Iterator[Answer]:
    """Yield the answers to questions that are computed side by side, in order. Arguments and errors: `Solver.solve`."""
    started = time.monotonic()
    requests = [
        request
        for question, seed in zip(questions, seeds, strict=True)
        for request in requests_for(question, samples=samples, temperature=temperature, seed=seed)
    ]
    solutions = process.solve_all(requests)
    for question in questions:
        drawn = [next(solutions) for _ in range(samples)]
        yield answer_of(question, drawn, seconds=time.monotonic() - started)


def requests_for(question: str, *, samples: int, temperature: float | None, seed: int) -> list[Request]:
    """Return the requests for the samples of one question. Arguments and errors: `Solver.solve`."""
    if samples < 1:
        raise RecipeError(f"samples: {samples}; give 1 or more")
    if seed < 0:
        raise RecipeError(f"seed: {seed}; give 0 or more")
    if temperature is None:
        temperature = SAMPLE_TEMPERATURE if samples > 1 else 0.0
    return [Request.of(question, temperature=temperature, seed=seed + sample) for sample in range(samples)]


def answer_of(question: str, drawn: Sequence[Solution], *, seconds: float) -> Answer:
    """Return the answer that one solution gives, or that several elect; a tie is won by the answer drawn first."""
    given = [solution.strict if solution.end == "stop" else None for solution in drawn]
    votes = count_votes(given)
    ranked = sorted(votes, key=lambda answer: -votes[answer])  # of equals, the first one drawn
    elected = ranked[0] if ranked else None
    shown = drawn[given.index(elected)] if elected else drawn[0]
    return Answer(
        question=question,
        text=shown.text,
        answer=elected,
        is_finished=shown.end == "stop",
        votes=None if len(drawn) == 1 else {answer: votes[answer] for answer in ranked},
        num_tokens=sum(solution.num_tokens for solution in drawn),
        seconds=seconds,
    )


def recipe_of_file(path: Path) -> Recipe:
    """Return the defaults for a GGUF file, and how its solutions are written. Raises ExportError if it is damaged."""
    header = read_header(path)
    return with_format({key: header.get(f"dpost_lite.{key}") for key in FORMAT_KEYS})
