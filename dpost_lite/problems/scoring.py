"""Score graded greedy answers: accuracy with its confidence interval."""

from collections.abc import Sequence

from dpost_lite.problems.answers import flexible_prediction, same_answer
from dpost_lite.problems.grading import wilson_interval
from dpost_lite.problems.records import GradedAnswer, Problem, Rationale, Score


def score(
    name: str,
    answers: Sequence[Rationale] | Sequence[GradedAnswer],
    problems: Sequence[Problem],
    *,
    has_calculator: bool,
    has_code: bool = False,
) -> Score:
    """Return a Score with strict accuracy (`predicted_answer`) and flexible accuracy (last number), in 0..1.

    Unfinished answers are wrong under the strict rule; under the flexible rule their last number counts, or their
    prediction if the right answer is LaTeX. Raises DataError as `same_answer` does.
    """
    expected = {problem.id: problem.answer for problem in problems}
    num_strict = sum(answer.correct for answer in answers)
    num_flexible = sum(_is_flexibly_right(answer, expected[answer.problem_id]) for answer in answers)
    low, high = wilson_interval(num_strict, len(answers))
    return Score(
        name=name,
        num_problems=len(answers),
        strict=num_strict / len(answers),
        flexible=num_flexible / len(answers),
        low=low,
        high=high,
        num_unfinished=sum(answer.end == "limit" for answer in answers),
        num_calculated=sum(answer.num_calculated for answer in answers),
        num_refused=sum(answer.num_refused for answer in answers),
        calculator=has_calculator,
        code=has_code,
        num_unparsed=sum(answer.predicted is None for answer in answers),
        num_characters=sum(len(answer.text) for answer in answers),
    )


def _is_flexibly_right(answer: Rationale | GradedAnswer, expected: str) -> bool:
    return answer.correct or same_answer(flexible_prediction(answer.text, expected), expected)
