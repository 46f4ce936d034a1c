"""Graded rationales -> chosen/rejected pairs for DPO, and pseudo-labels for the next SFT (DPO-ST, Algorithm 2).

Both begin by thinning out near-repeats: a model asked five times often says the same thing in almost the same words,
and five copies of one easy rationale would drown the rest. Likeness is the Jaccard index of the two sets of token ids.

Departures from the paper's code: unfinished rationales are set aside (the paper counts them as wrong), the gold
rationale is optional (there it always leads), and every tie is broken by the text, so the order of sampling changes
nothing. Pooling of earlier rounds is the caller's: it passes the rationales of all of them.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product
from typing import Protocol, TypeVar

from dpost_lite.problems.records import LabelledRationale, PreferencePair, Problem, Rationale


class Tokenised(Protocol):
    """A text with its token ids: a `Rationale` or a `LabelledRationale`."""

    @property
    def text(self) -> str: ...

    @property
    def token_ids(self) -> tuple[int, ...]: ...


Item = TypeVar("Item", bound=Tokenised)


def jaccard(a: Collection[int], b: Collection[int]) -> float:
    """Return |A ∩ B| / |A ∪ B| of two collections as sets: 1 for equal sets (two empty ones too), 0 for disjoint."""
    first, second = frozenset(a), frozenset(b)  # a frozenset passes through without a copy
    num_shared = len(first & second)
    num_all = len(first) + len(second) - num_shared
    return num_shared / num_all if num_all else 1.0


def deduplicate(items: Iterable[Item], *, threshold: float, kept: Sequence[Item] = ()) -> list[Item]:
    """Return `kept`, then each item of a new text whose Jaccard index with every one before it is at most `threshold`.

    Greedy over the texts in lexicographic order, as in the paper's code; one of several items with the same text stands
    for all, the one with the smallest token ids. A threshold of 1 leaves out repeated texts only.
    """
    result = list(kept)
    texts = {item.text for item in result}
    id_sets = [frozenset(item.token_ids) for item in result]
    for item in sorted(items, key=lambda item: (item.text, item.token_ids)):
        ids = frozenset(item.token_ids)
        if item.text in texts or any(jaccard(ids, other) > threshold for other in id_sets):
            continue
        result.append(item)
        texts.add(item.text)
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
) -> list[PreferencePair]:
    """Return at most `max_pairs` pairs for each problem, in the order of `problems`.

    Chosen are right, finished rationales, with the problem's gold one (`gold`, by problem id) in front if `gold_first`;
    rejected are wrong ones, unreadable answers included, unfinished ones among them only if `unfinished_rejected`.
    Both sides are deduplicated on their own. Of all their combinations those least alike are kept, least alike first;
    among equals, the earlier chosen (gold, then by text), then the earlier rejected (by text).
    """
    sampled = _by_problem(rationales)
    pairs: list[PreferencePair] = []
    for problem in problems:
        right = [r for r in sampled[problem.id] if _is_right(r)]
        wrong = [r for r in sampled[problem.id] if not r.correct and (r.end == "stop" or unfinished_rejected)]
        first = [gold[problem.id]] if gold_first and problem.id in gold else []
        chosen = deduplicate(_labelled(problem, right), threshold=threshold, kept=first)
        rejected = deduplicate(wrong, threshold=threshold)
        pairs += _least_alike(problem, chosen, rejected)[:max_pairs]
    return pairs


def make_labels(
    problems: Iterable[Problem],
    rationales: Iterable[Rationale],
    gold: Mapping[str, LabelledRationale],
    *,
    threshold: float,
    cap_percentile: int = 90,
    max_per_problem: int = 100,
) -> list[LabelledRationale]:
    """Return what SFT trains on: per problem its gold rationale, then the pseudo-labels, in the order of `problems`.

    Pseudo-labels are right, finished rationales, deduplicated against the gold one and each other, by text. No problem
    gives more than the `cap_percentile`-th percentile of the counts (gold included), nor more than `max_per_problem`:
    else the easy problems would crowd out the hard ones. The percentile is numpy's default, linear between ranks, then
    rounded down. It is taken over the problems with at least one rationale: in the paper that is all of them.
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


def _by_problem(rationales: Iterable[Rationale]) -> defaultdict[str, list[Rationale]]:
    groups: defaultdict[str, list[Rationale]] = defaultdict(list)
    for rationale in rationales:
        groups[rationale.problem_id].append(rationale)
    return groups


def _is_right(rationale: Rationale) -> bool:
    return rationale.correct and rationale.end == "stop"


def _labelled(problem: Problem, rationales: Iterable[Rationale]) -> list[LabelledRationale]:
    return [LabelledRationale(problem.id, problem.question, r.text, r.token_ids, is_gold=False) for r in rationales]


def _least_alike(problem: Problem, chosen: Sequence[Tokenised], rejected: Sequence[Tokenised]) -> list[PreferencePair]:
    """Return every pairing of the two sides, the least similar first."""
    combinations = sorted(product(chosen, rejected), key=lambda pair: jaccard(pair[0].token_ids, pair[1].token_ids))
    return [
        PreferencePair(problem.id, problem.question, win.text, lose.text, win.token_ids, lose.token_ids)
        for win, lose in combinations
    ]


def _percentile(counts: Sequence[int], percent: int) -> int:
    """Return the percentile, linear between the nearest ranks, rounded down; in integers, so without float error."""
    ordered = sorted(counts)
    below, hundredths = divmod((len(ordered) - 1) * percent, 100)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * hundredths // 100
