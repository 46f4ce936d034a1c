"""Build preference pairs for DPO, and pseudo-labels for the next SFT, from graded rationales (DPO-ST, Algorithm 2).

Both start by removing near-duplicates: five samples of one problem often have almost the same wording, and copies of
one easy rationale would dominate the training data. Similarity is the Jaccard index of the sets of token ids.

Departures from the paper's code: unfinished rationales are ignored (the paper counts them as wrong), the gold rationale
is optional (there it always comes first), and ties are broken by text, so the order of sampling does not matter. To
pool earlier rounds, the caller passes the rationales of all of them.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product
from typing import Protocol, TypeVar

from dpost_lite.problems.code_format import blocks, imitates_output, is_clean
from dpost_lite.problems.records import LabelledRationale, PreferencePair, Problem, Rationale


class Tokenised(Protocol):
    """Text with its token ids: a `Rationale` or a `LabelledRationale`."""

    @property
    def text(self) -> str: ...

    @property
    def token_ids(self) -> tuple[int, ...]: ...


Item = TypeVar("Item", bound=Tokenised)


def jaccard(a: Collection[int], b: Collection[int]) -> float:
    """Return |A ∩ B| / |A ∪ B| of two collections as sets: 1 if equal (or both empty), 0 if disjoint."""
    first, second = frozenset(a), frozenset(b)  # no copy if it is a frozenset already
    num_shared = len(first & second)
    num_all = len(first) + len(second) - num_shared
    return num_shared / num_all if num_all else 1.0


def equations(text: str) -> tuple[str, ...]:
    """Return the calculations of a rationale in order, without spaces; of a rationale without any, its text.

    Of a solution with code they are its blocks.
    """
    if code := _code(text):
        return code
    found = tuple("".join(equation.split()) for equation in re.findall("<<(.*?)>>", text))
    return found or (text,)


def num_steps(text: str) -> int:
    """Return the number of steps of a rationale: its blocks of code, or its lines without the one with the answer."""
    if code := _code(text):
        return len(code)
    lines = (line.strip() for line in text.split("\n"))
    return sum(bool(line) and not line.startswith("####") for line in lines)


def _code(text: str) -> tuple[str, ...]:
    return tuple(block.content for block in blocks(text) if block.kind == "code")


def deduplicate(items: Iterable[Item], *, threshold: float | None, kept: Sequence[Item] = ()) -> list[Item]:
    """Return `kept` plus each item that is unlike all before it: their Jaccard indices are at most `threshold`.

    Greedy over the texts in lexicographic order, as in the paper's code. Of items with the same text, the one with the
    smallest token ids is kept. A threshold of 1 removes only repeated texts; None removes repeated equations instead
    (RFT, Yuan et al. 2023).
    """
    result = list(kept)
    key_of = equations if threshold is None else str
    keys = {key_of(item.text) for item in result}
    id_sets = [frozenset(item.token_ids) for item in result]
    for item in sorted(items, key=lambda item: (item.text, item.token_ids)):
        key, ids = key_of(item.text), frozenset(item.token_ids)
        if key in keys or (threshold is not None and any(jaccard(ids, other) > threshold for other in id_sets)):
            continue
        result.append(item)
        keys.add(key)
        id_sets.append(ids)
    return result


def make_pairs(
    problems: Iterable[Problem],
    rationales: Iterable[Rationale],
    gold: Mapping[str, LabelledRationale],
    *,
    threshold: float,
    max_pairs: int,
    gold_first: bool,
    unfinished_rejected: bool,
    equal_steps: bool = False,
) -> list[PreferencePair]:
    """Return at most `max_pairs` pairs for each problem, in the order of `problems`.

    Chosen: right, finished rationales (those with code only if no block failed), preceded by the problem's gold one
    (`gold`, by problem id) if `gold_first`.
    Rejected: wrong ones, including those without a readable answer; unfinished ones only if `unfinished_rejected`.
    Each side is deduplicated separately. Of all combinations, the least similar are kept, least similar first; ties go
    to the earlier chosen (gold, then by text), then to the earlier rejected (by text). With `equal_steps`, a smaller
    difference in the number of steps goes before.
    """
    sampled = _by_problem(rationales)
    pairs: list[PreferencePair] = []
    for problem in problems:
        right = [r for r in sampled[problem.id] if _is_right(r) and is_clean(r.text)]
        wrong = [r for r in sampled[problem.id] if not r.correct and (r.end == "stop" or unfinished_rejected)]
        first = [gold[problem.id]] if gold_first and problem.id in gold else []
        chosen = deduplicate(_labelled(problem, right), threshold=threshold, kept=first)
        rejected = deduplicate(wrong, threshold=threshold)
        pairs += _ordered(problem, chosen, rejected, equal_steps=equal_steps)[:max_pairs]
    return pairs


def make_labels(
    problems: Iterable[Problem],
    rationales: Iterable[Rationale],
    gold: Mapping[str, LabelledRationale],
    *,
    threshold: float | None,
    cap_percentile: int = 90,
    max_per_problem: int = 100,
) -> list[LabelledRationale]:
    """Return the SFT data: for each problem in order, its gold rationale if any, then its pseudo-labels.

    Pseudo-labels are right, finished rationales, deduplicated against the gold one and each other (`deduplicate`). To
    keep easy problems from crowding out hard ones, a problem contributes at most the `cap_percentile`-th percentile of
    the counts (gold included), and at most `max_per_problem`. The percentile is numpy's default (linear interpolation),
    rounded down, over the problems with at least one rationale; in the paper, all problems have one.
    """
    sampled = _by_problem(rationales)
    labels: list[list[LabelledRationale]] = []
    for problem in problems:
        first = [gold[problem.id]] if problem.id in gold else []
        right = [r for r in sampled[problem.id] if _is_right(r)]
        labels.append(deduplicate(_labelled(problem, right), threshold=threshold, kept=first))
    counts = [len(group) for group in labels if group]
    cap = max(1, min(_percentile(counts, cap_percentile), max_per_problem)) if counts else 0
    return [label for group in labels for label in group[:cap]]


def distinct_right(
    problems: Iterable[Problem],
    rationales: Iterable[Rationale],
    gold: Mapping[str, LabelledRationale],
    *,
    threshold: float | None,
) -> dict[str, int]:
    """Return for each problem, by id, how many pseudo-labels its rationales give before any cap."""
    sampled = _by_problem(rationales)
    counts = {}
    for problem in problems:
        first = [gold[problem.id]] if problem.id in gold else []
        right = [r for r in sampled[problem.id] if _is_right(r)]
        counts[problem.id] = len(deduplicate(_labelled(problem, right), threshold=threshold, kept=first)) - len(first)
    return counts


def _by_problem(rationales: Iterable[Rationale]) -> defaultdict[str, list[Rationale]]:
    groups: defaultdict[str, list[Rationale]] = defaultdict(list)
    for rationale in rationales:
        groups[rationale.problem_id].append(rationale)
    return groups


def _is_right(rationale: Rationale) -> bool:
    return rationale.correct and rationale.end == "stop" and not imitates_output(rationale.text)


def _labelled(problem: Problem, rationales: Iterable[Rationale]) -> list[LabelledRationale]:
    return [LabelledRationale(problem.id, problem.question, r.text, r.token_ids, is_gold=False) for r in rationales]


def _ordered(
    problem: Problem, chosen: Sequence[Tokenised], rejected: Sequence[Tokenised], *, equal_steps: bool
) -> list[PreferencePair]:
    """Return all pairs of the two sides, the least similar first; with `equal_steps`, by difference in steps first."""

    def order(pair: tuple[Tokenised, Tokenised]) -> tuple[int, float]:
        win, lose = pair
        difference = abs(num_steps(win.text) - num_steps(lose.text)) if equal_steps else 0
        return difference, jaccard(win.token_ids, lose.token_ids)

    combinations = sorted(product(chosen, rejected), key=order)
    return [
        PreferencePair(problem.id, problem.question, win.text, lose.text, win.token_ids, lose.token_ids)
        for win, lose in combinations
    ]


def _percentile(counts: Sequence[int], percent: int) -> int:
    """Return the percentile (linear interpolation, rounded down) in integer arithmetic, free of float error."""
    ordered = sorted(counts)
    below, hundredths = divmod((len(ordered) - 1) * percent, 100)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * hundredths // 100
