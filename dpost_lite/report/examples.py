"""Select example rationales and preference pairs of a run, split into pieces that the page can highlight."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal

from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.grading import same_number
from dpost_lite.problems.records import GradedAnswer, PreferencePair, RewardedRationale, read_jsonl
from dpost_lite.report import results
from dpost_lite.runs.stage_names import StageName, rounds_in

NUM_RATIONALES = 10
NUM_PAIRS = 4
SATURATED = 0.05  # fraction of the tokens whose rewards lie beyond the ends of the scale
LINE_END, ANSWER_END = "↵", "∎"
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


@dataclass(frozen=True, slots=True)
class ShadedToken:
    """A token of a rejected rationale as it is shown; `shade` is its reward as a part of the scale, -1 to 1."""

    text: str
    reward: float
    shade: float


@dataclass(frozen=True, slots=True)
class RewardExample:
    """A rejected rationale with the rewards of its tokens. `kept` are its first steps if they have none."""

    question: str
    answer: str
    kept: str
    tokens: list[ShadedToken]


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


def rewards(run: Path) -> dict[int, list[RewardedRationale]]:
    """Return the rejected rationales with token rewards by round; older runs and full fine-tunings have none."""
    files = {number: run / str(StageName("dpo", number)) / "rewards.jsonl" for number in rounds_in(run)}
    return {number: list(read_jsonl(file, RewardedRationale)) for number, file in files.items() if file.is_file()}


def reward_scale(shown: Iterable[RewardedRationale]) -> float:
    """Return the reward at the end of the colour scale: all but a few of the largest lie within; 0 if all are 0."""
    sizes = sorted(abs(reward) for rationale in shown for reward in rationale.rewards)
    return sizes[int((1 - SATURATED) * (len(sizes) - 1))] or sizes[-1] if sizes else 0.0


def shaded(rationale: RewardedRationale, scale: float) -> RewardExample:
    """Return a rationale as it is shown; the ends of lines and of the answer become visible."""
    tokens = [
        ShadedToken(
            text.replace("\n", f"{LINE_END}\n") or ANSWER_END, reward, max(-1.0, min(1.0, reward / (scale or 1.0)))
        )
        for text, reward in zip(rationale.tokens, rationale.rewards, strict=True)
    ]
    return RewardExample(rationale.question, rationale.answer, rationale.kept, tokens)


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
