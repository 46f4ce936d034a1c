r"""Read the right answer of a row, and whether its solution is a worked one that ends in that answer.

Numbers stay as they were: a row of a word problem has a number in `final`, after the last `####`, or as its whole
answer. LaTeX is accepted in two places:

1. the content of the solution's last `\boxed{…}`, or, if the row has an answer column of its own, that column (the two
   have to agree);
2. without a box: an answer column, the text after `####` on the last line, or a whole answer, if it is written as maths
   and not as prose (`is_maths`): `\frac{1}{2}`, "x = 5" and "(3, 4]", but not "18kg" or "2 or 3".

Where the solution has a box, "1,2" are two numbers; elsewhere it is 12, as ever. All other rows are refused.
"""

from dpost_lite.problems.grading import canonical_number, same_number, strict_answer
from dpost_lite.problems.latex import same_latex
from dpost_lite.problems.latex_text import (
    MAX_LATEX_CHARS,
    is_balanced,
    is_maths,
    last_boxed,
    number_in,
    plain_number,
    trimmed,
)


class UnusableRow(Exception):
    """A row that yields no problem; the message becomes `RefusedRow.reason`."""


def read_answer(answer: str, final: str) -> tuple[str, str | None]:
    r"""Return the right answer, and `answer` if it is a worked solution ending in `#### …` or holding a `\boxed{…}`.

    `final` is the answer in a column of its own, or "". The right answer is a number in canonical form, else LaTeX.

    Raises:
        UnusableRow: there is no answer, or the two places disagree.
        DataError: they have to be compared as formulas, and math-verify is not installed.
    """
    worked = strict_answer(answer) if _ends_in_mark(answer) else None
    if worked is None and (boxed := last_boxed(answer)) is not None:
        return _from_box(answer, boxed, final)
    number = canonical_number(final) if final else worked or canonical_number(answer)
    if number is None:
        return _as_maths(answer, final, worked)
    if worked is not None and not same_number(worked, number):
        raise UnusableRow(f"the answer ends in #### {worked}, but `final` is {number}")
    return number, answer if worked is not None else None


def _ends_in_mark(answer: str) -> bool:
    _, mark, end = answer.rpartition("####")
    return bool(mark) and "\n" not in end and strict_answer(mark + end) is not None


def _from_box(solution: str, boxed: str, final: str) -> tuple[str, str | None]:
    shown = trimmed(final) or boxed
    if len(shown) > MAX_LATEX_CHARS or not is_balanced(shown):
        raise UnusableRow(f"the LaTeX answer has more than {MAX_LATEX_CHARS} characters, or a brace without the other")
    number = plain_number(shown)
    if number is None:
        is_same = not final or same_latex(boxed, shown)
    elif (found := number_in(boxed)) is None:
        return number, None  # a model that learned to write such a box would get no answer
    else:
        is_same = same_number(found, number)
    if not is_same:
        raise UnusableRow(f"the solution ends in \\boxed{{{boxed[:50]}}}, but its answer column has {shown[:50]}")
    return number or shown, solution


def _as_maths(answer: str, final: str, worked: str | None) -> tuple[str, str | None]:
    """Read LaTeX that is in no box."""
    _, mark, end = answer.rpartition("####")
    ending = trimmed(end if mark else answer)
    ending = ending if is_maths(ending) else ""
    shown = trimmed(final) or ending
    if final and (worked is not None or not is_maths(shown)):
        raise UnusableRow("no number in `final`, and no LaTeX")
    if not shown:
        raise UnusableRow(
            "no number in the answer (`… #### 18` or just `18`), and no LaTeX (`… \\boxed{\\frac{1}{2}}`)"
        )
    if ending and not same_latex(ending, shown):
        raise UnusableRow(f"the answer ends in {ending[:50]}, but its answer column has {shown[:50]}")
    return shown, answer if mark and ending else None
