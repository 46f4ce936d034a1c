"""Does a token's reward after DPO point at the error? A number for what SCDPO (Lu et al. 2024) shows in pictures.

A right solution gets one wrong number, in one of its steps, so that the place of the error is known. A score (the
token's reward, or its log-probability) finds the error if it is lower in that step than in the others of the same
solution: the area under the ROC curve (AUROC), 1 if all of the step lies lowest, 0.5 at chance.

The later steps still use the right number, which does not follow from the wrong one, and that surprises a model too:
among whole steps, a low log-probability points at them as well. The wrong result alone is a sharper target: the number
inside `<<…>>`, for the one behind it is a faithful copy, which no model finds surprising.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from dpost_lite.errors import DataError
from dpost_lite.problems.comparing import bootstrap_mean
from dpost_lite.problems.records import Problem
from dpost_lite.problems.steps import step_ends

Level = Literal["tokens", "steps", "result"]
LEVELS: tuple[Level, ...] = ("tokens", "steps", "result")

_CALCULATED = re.compile(r"=(?P<result>-?\d+(?:\.\d+)?)>>(?P=result)(?!\d|[.,]\d)")
_ANSWER = re.compile(r"^####", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class CorruptedSolution:
    """A solution in which the result of one step is `wrong`; `text` is all of it, `step` counts from 0.

    In an intact one, the control, that result is the right one.
    """

    problem_id: str
    question: str
    text: str
    step: int
    wrong: str


@dataclass(frozen=True, slots=True)
class ErrorPlace:
    """Token offsets in a corrupted solution: of each step (start, end), and of the wrong result in `<<…>>`."""

    spans: list[tuple[int, int]]
    step: int
    result: list[int]


@dataclass(frozen=True, slots=True)
class MeanAuroc:
    """A mean over solutions, of AUROCs in 0..1 or of their differences, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def corrupt(problem: Problem, seed: int, *, intact: bool = False) -> CorruptedSolution | None:
    """Make the calculator's result wrong in one step, chosen at random; None if there is none, or only one step.

    In `<<2*3=6>>6` both numbers become the same other one of as many digits. Nothing else changes: later steps still
    use the right number. With `intact`, the control, nothing changes, and the same place is chosen.
    """
    dice = random.Random(f"{seed} {problem.id}")
    lines = (problem.rationale or "").split("\n")
    steps = [i for i, line in enumerate(lines) if line.strip() and not line.startswith("####")]
    calculated = [i for i in steps if _CALCULATED.search(lines[i])]
    if len(steps) < 2 or not calculated:
        return None
    place = dice.choice(calculated)
    match = dice.choice(list(_CALCULATED.finditer(lines[place])))
    wrong = match["result"] if intact else wrong_number(match["result"], dice)
    lines[place] = f"{lines[place][: match.start()]}={wrong}>>{wrong}{lines[place][match.end() :]}"
    return CorruptedSolution(problem.id, problem.question, "\n".join(lines), steps.index(place), wrong)


def wrong_number(number: str, dice: random.Random) -> str:
    """Return another number with as many digits, its sign and its point in the same places."""
    while True:
        digits = [dice.choice("0123456789") if c.isdigit() else c for c in number]
        first = number.startswith("-")
        if number[first : first + 2] == "0.":
            digits[first] = "0"
        elif digits[first] == "0":
            continue
        if float(wrong := "".join(digits)) != float(number):
            return wrong


def corrupted(problems: Iterable[Problem], number: int, *, seed: int, intact: bool = False) -> list[CorruptedSolution]:
    """Return the first `number` solutions that can be corrupted. Raises DataError if there are fewer."""
    found = [one for problem in problems if (one := corrupt(problem, seed, intact=intact))]
    if len(found) < number:
        raise DataError(f"--problems: only {len(found)} solutions have 2 steps and a calculation; ask for no more")
    return found[:number]


def step_spans(token_ids: Sequence[int], text_of: Callable[[int], str]) -> list[tuple[int, int]]:
    """Return where each step of a solution begins and ends as token offsets, without the line with the answer.

    `text_of` gives the text of one token in the middle of a line.
    """
    pieces = [text_of(token_id) for token_id in token_ids]
    text = "".join(pieces)
    answer = match.start() if (match := _ANSWER.search(text)) else len(text)
    end = length = 0
    while end < len(pieces) and length + len(pieces[end]) <= answer:
        length += len(pieces[end])
        end += 1
    while end and not pieces[end - 1]:  # special tokens
        end -= 1
    return list(pairwise((0, *step_ends(token_ids, text_of), end)))


def error_place(solution: CorruptedSolution, token_ids: Sequence[int], text_of: Callable[[int], str]) -> ErrorPlace:
    """Return where the error of a solution with these tokens is. A token that holds any of the result counts."""
    spans = step_spans(token_ids, text_of)
    start, end = spans[solution.step]
    owners = [i for i in range(start, end) for _ in text_of(token_ids[i])]  # of each character of the step
    text = "".join(text_of(token_ids[i]) for i in range(start, end))
    first = text.index(f"={solution.wrong}>>{solution.wrong}") + 1
    return ErrorPlace(spans, solution.step, sorted({*owners[first : first + len(solution.wrong)]}))


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Return the chance that one of `positives` lies below one of `negatives`; equal ones count half.

    Mann and Whitney 1947.
    """
    import numpy as np

    difference = np.subtract.outer(np.asarray(negatives, dtype=float), np.asarray(positives, dtype=float))
    return float((np.sign(difference).mean() + 1) / 2)


def solution_auroc(scores: Sequence[float], place: ErrorPlace, level: Level) -> float:
    """Return the AUROC of low scores against the place of the error in one solution.

    `scores` has one number per token of the solution. "tokens": the corrupted step's tokens against those of the other
    steps; "steps": the step's mean score against theirs; "result": the wrong result's tokens against those of the
    other steps.
    """
    parts = [list(scores[start:end]) for start, end in place.spans]
    if level == "steps":
        parts = [[sum(part) / len(part)] for part in parts]
    others = [score for i, part in enumerate(parts) if i != place.step for score in part]
    return auroc([scores[i] for i in place.result] if level == "result" else parts[place.step], others)


def mean_auroc(values: Sequence[float]) -> MeanAuroc:
    """Return the mean of the solutions' values; the interval resamples solutions."""
    return MeanAuroc(sum(values) / len(values), *bootstrap_mean(values))


def mean_difference(values: Sequence[float], others: Sequence[float]) -> MeanAuroc:
    """Return the mean of `values` minus `others`, paired by solution."""
    return mean_auroc([value - other for value, other in zip(values, others, strict=True)])
