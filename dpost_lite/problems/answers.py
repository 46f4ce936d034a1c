r"""The one place that decides which answer a solution gives, and whether it is right.

A problem's answer is a number in canonical form ("18"), or else LaTeX (`\frac{\pi}{2}`).

- Number: the prediction is the number after the last `####`, as in the paper. Only if the text has no `####` at all, it
  is the number in the last `\boxed{…}`, which is how solutions end where the training data is in the style of MATH.
  Models that are trained on GSM8K write `####`, so that their figures are those of the paper's rule. A model that was
  not trained on such data and ends in `\boxed{18}` is right here and without an answer by the paper's.
- LaTeX: the prediction is the content of the last `\boxed{…}` with balanced braces, or else what follows the last
  `####` on its line. latex.py compares.
"""

from collections.abc import Iterable

from dpost_lite.problems.code_format import prose
from dpost_lite.problems.grading import canonical_number, flexible_answer, same_number, strict_answer
from dpost_lite.problems.latex import num_given_up, same_latex
from dpost_lite.problems.latex_text import MAX_LATEX_CHARS, after_mark, last_boxed, number_in


def is_number(answer: str) -> bool:
    """Return whether a problem's answer is a number in canonical form, not LaTeX ("-2,1" are two numbers)."""
    return canonical_number(answer) == answer


def predicted_answer(text: str, answer: str) -> str | None:
    """Return the answer that `text` gives to a problem with this right answer, or None if it gives none.

    Code and its outputs do not count. Numbers are in canonical form. LaTeX of more than `MAX_LATEX_CHARS` characters
    is none.
    """
    text = prose(text)
    if is_number(answer):
        return _number(text)
    found = last_boxed(text) or after_mark(text)
    return found if found and len(found) <= MAX_LATEX_CHARS else None


def stated_answer(text: str) -> str | None:
    """Return the answer that `text` gives to a problem whose right answer is not known, a number if there is one."""
    return _number(prose(text)) or predicted_answer(text, "")


def flexible_prediction(text: str, answer: str) -> str | None:
    """Return the last number of `text`; if the right answer is LaTeX, the prediction comes first."""
    found = None if is_number(answer) else predicted_answer(text, answer)
    return found or flexible_answer(prose(text))


def same_answer(predicted: str | None, answer: str) -> bool:
    """Return whether a prediction equals the right answer: numbers by `same_number`, LaTeX by `same_latex`.

    Raises:
        DataError: LaTeX has to be compared, and math-verify is not installed.
    """
    if predicted is None:
        return False
    return same_number(predicted, answer) if is_number(answer) else same_latex(predicted, answer)


def is_right(predicted: str | None, end: str, answer: str) -> bool:
    """Return whether an answer is right: finished (`end` is "stop"), and with the right prediction.

    DPO-ST, section 4.1. An unfinished answer is never right. Raises DataError as `same_answer` does.
    """
    return end == "stop" and same_answer(predicted, answer)


def majority(predictions: Iterable[str | None]) -> str | None:
    """Return the most frequent answer, the first one in a tie. Voting and errors: `count_votes`."""
    votes = count_votes(predictions)
    return max(votes, key=votes.__getitem__) if votes else None


def count_votes(predictions: Iterable[str | None]) -> dict[str, int]:
    """Return how many samples give each answer, in the order of the first ones; samples without an answer do not vote.

    Self-consistency (Wang et al. 2023). Numbers are in canonical form, so equal ones are equal strings; a LaTeX answer
    votes for the first one that it equals. After a comparison without a result (2 seconds), only equal strings count
    as equal in this vote. Raises DataError as `same_answer` does.
    """
    votes: dict[str, int] = {}
    given_up = num_given_up()
    for prediction in predictions:
        if prediction is not None:
            choice = prediction if prediction in votes else _first_equal(prediction, votes, given_up)
            votes[choice] = votes.get(choice, 0) + 1
    return votes


def _first_equal(prediction: str, others: Iterable[str], given_up: int) -> str:
    for other in others:
        if num_given_up() > given_up:
            break
        if not (is_number(prediction) and is_number(other)) and same_latex(prediction, other):
            return other
    return prediction


def _number(text: str) -> str | None:
    if "####" in text:
        return strict_answer(text)
    found = last_boxed(text)
    return number_in(found) if found else None
