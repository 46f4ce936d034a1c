"""Select example rationales and preference pairs of a run, split into pieces that the page can highlight."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal

from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.grading import same_number
from dpost_lite.problems.records import GradedAnswer, PreferencePair, read_jsonl
from dpost_lite.report import results
from dpost_lite.runs.stage_names import StageName

NUM_RATIONALES = 10
NUM_PAIRS = 4
_ANNOTATED = re.compile(r"<<([^<>=\n]+)=([^<>=\n]*)>>")
_WORDS = re.compile(r"\s+|[^\s]+")

Kind = Literal["right", "wrong", "repaired"]
Mark = Literal["", "calculated", "miscalculated", "differs"]
Pieces = list[tuple[str, Mark]]


@dataclass(frozen=True, slots=True)
class Example:
    """One graded answer; `kind` "repaired" means right where the previous policy was wrong."""

    kind: Kind
    question: str
    answer: str
    pieces: Pieces
    was_cut_off: bool


@dataclass(frozen=True, slots=True)
class PairExample:
    """A preference pair; words on one side only are marked "differs"."""

    question: str
    chosen: Pieces
    rejected: Pieces


def rationales(run: Path, name: str, before: str | None) -> list[Example]:
    """Return ten answers of one policy to test problems: if available, four repaired, three wrong, three right.

    `before` is the policy to compare with; if None, no answer counts as repaired.
    """
    was_right = results.right(run, before) if before else {}
    problems = {problem.id: problem for problem in results.problems(run)}
    settings = results.recipe_of(run)["calculator"]
    calculator = Calculator(settings["max_decimals"], settings["rounded_decimals"])
    kinds: dict[Kind, list[Example]] = {"repaired": [], "wrong": [], "right": []}
    for answer in read_jsonl(run / "score" / name / "test.jsonl", GradedAnswer):
        kind: Kind = "right" if answer.correct else "wrong"
        if answer.correct and not was_right.get(answer.problem_id, True):
            kind = "repaired"
        problem = problems[answer.problem_id]
        kinds[kind].append(
            Example(
                kind, problem.question, problem.answer, marked(answer.text.strip(), calculator), answer.end == "limit"
            )
        )
    picked = {kind: found[:most] for (kind, found), most in zip(kinds.items(), (4, 3, 3), strict=True)}
    for name_of_kind, found in kinds.items():  # if there are too few of one kind, show more of another
        room = NUM_RATIONALES - sum(map(len, picked.values()))
        picked[name_of_kind] = found[: len(picked[name_of_kind]) + room]
    return [example for some in picked.values() for example in some]


def marked(text: str, calculator: Calculator) -> Pieces:
    """Split a rationale into pieces; in `<<expression=result>>`, a result that `calculator` confirms is "calculated".

    Results of expressions that the calculator leaves to the model are not marked.
    """
    pieces: Pieces = []
    end = 0
    for match in _ANNOTATED.finditer(text):
        if (result := calculator(match[1])) is None:
            continue
        mark: Mark = "calculated" if same_number(result, match[2]) else "miscalculated"
        pieces += [(text[end : match.start(2)], ""), (match[2], mark)]
        end = match.end(2)
    return [(piece, mark) for piece, mark in [*pieces, (text[end:], "")] if piece]


def pairs(run: Path, number: int) -> list[PairExample]:
    """Return a few preference pairs of a round, each of a different problem."""
    shown: dict[str, PairExample] = {}
    for pair in read_jsonl(run / str(StageName("pairs", number)) / "pairs.jsonl", PreferencePair):
        if pair.problem_id not in shown:
            sides = ((pair.prefix + side).strip() for side in (pair.chosen, pair.rejected))
            shown[pair.problem_id] = PairExample(pair.question, *diff(*sides))
        if len(shown) == NUM_PAIRS:
            break
    return list(shown.values())


def diff(a: str, b: str) -> tuple[Pieces, Pieces]:
    """Split two texts into pieces of whole words; pieces that only one of them has are marked "differs"."""
    first, second = _WORDS.findall(a), _WORDS.findall(b)
    blocks = SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    return (
        list(_pieces(first, [(block.a, block.size) for block in blocks])),
        list(_pieces(second, [(block.b, block.size) for block in blocks])),
    )


def _pieces(words: Sequence[str], shared: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Mark]]:
    end = 0
    for start, size in shared:
        if start > end:
            yield "".join(words[end:start]), "differs"
        if size:
            yield "".join(words[start : start + size]), ""
        end = start + size
