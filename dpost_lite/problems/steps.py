"""The steps of a rationale as token offsets, and preference pairs that differ from a step on.

Step-controlled DPO (SCDPO, Lu et al. 2024, section 3): a right rationale keeps its first steps, its rest (what comes
after them) is sampled again at a high temperature until the answer is wrong, and DPO compares the two rests alone. DPO
on whole rationales also punishes the right steps of a wrong one.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Literal

from dpost_lite.problems.code_format import CODE_START, blocks, imitates_output
from dpost_lite.problems.pairs import num_steps
from dpost_lite.problems.records import PreferencePair, Rationale, Rest

CutRule = Literal["random", "every", "least-certain"]
SENTENCE_ENDS = (".", "!", "?")
NGRAM = 4
BOX = "\\boxed{"  # the answer of solutions in the style of MATH
MIN_DISTINCT = 0.5  # a rationale with a smaller fraction of distinct 4-grams repeats itself


def step_ends(token_ids: Sequence[int], text_of: Callable[[int], str]) -> list[int]:
    """Return the offsets of a rationale's tokens after which at least one more step follows.

    A step ends with its line, or in a rationale of one line with a sentence of two words or more; never inside `<<…>>`,
    and not after the answer (the line with `####`, or a box). If the token that ends it also begins the next step, that
    beginning belongs to the kept part. In a solution with code a step is a block: see `_block_ends`. `text_of` gives
    the text of one token in the middle of a line.
    """
    pieces = [text_of(token_id) for token_id in token_ids]
    if CODE_START in (whole := "".join(pieces)):
        return _block_ends(whole, pieces)
    text, lines, sentences = "", list[tuple[int, int]](), list[tuple[int, int]]()
    for offset, piece in enumerate(pieces, start=1):
        text += piece
        if text.rfind("<<") > text.rfind(">>"):
            continue
        following = pieces[offset] if offset < len(pieces) else ""
        if "\n" in piece:
            lines.append((offset, len(text) - len(piece) + piece.rindex("\n") + 1))
            if any(line.startswith("####") for line in text.split("\n")[:-1]):
                break
        elif piece.rstrip().endswith(SENTENCE_ENDS) and (piece[-1].isspace() or following[:1].isspace()):
            start = sentences[-1][1] if sentences else 0
            if " " in text[start:].strip():
                sentences.append((offset, len(text)))
    for ends in (lines, sentences):
        if found := [offset for offset, start in ends if _is_between_steps(text[:start], text[start:])]:
            return found
    return []


def _is_between_steps(before: str, after: str) -> bool:
    return bool(num_steps(before) and num_steps(after)) and BOX not in before


def _block_ends(text: str, pieces: Sequence[str]) -> list[int]:
    """Return the offsets after blocks of text and outputs, but not within the last two blocks (SCDPO's code).

    After the last output only the answer is left to write. Never after code, which its output has to follow.
    """
    offsets, position = dict[int, int](), 0
    for offset, piece in enumerate(pieces, start=1):
        position += len(piece)
        offsets.setdefault(position, offset)
    ends = [block.end for block in list(blocks(text))[:-2] if block.kind != "code"]
    return [offsets[end] for end in ends if end in offsets]


def choose_cuts(ends: Sequence[int], rule: CutRule, seed: int) -> list[int]:
    """Return the offsets to cut at: all (as in SCDPO's code), or one at random (as in its paper)."""
    return list(ends) if rule == "every" or not ends else [random.Random(seed).choice(ends)]


def least_certain(ends: Sequence[int], logprobs: Sequence[float | None]) -> int:
    """Return the one of `ends` before the step with the lowest mean log-probability, the earliest of equals.

    `logprobs` has each token's, or None where the policy did not choose it.
    """
    steps = [[p for p in logprobs[start:end] if p is not None] for start, end in pairwise((*ends, len(logprobs)))]
    means = [sum(step) / len(step) if step else 0.0 for step in steps]
    return ends[means.index(min(means))]


def is_repetitive(token_ids: Sequence[int]) -> bool:
    """Whether a rationale repeats itself: less than half of its 4-grams are distinct."""
    ngrams = list(zip(*(token_ids[i:] for i in range(NGRAM)), strict=False))
    return bool(ngrams) and len(set(ngrams)) < MIN_DISTINCT * len(ngrams)


def is_usable(rest: Rest) -> bool:
    """Whether a rest can be rejected: it ended by itself, with a wrong answer or none, and is not garbled.

    It is garbled if it repeats itself, or if the model wrote what its code printed.
    """
    is_garbled = is_repetitive(rest.token_ids) or imitates_output(rest.kept + rest.text)
    return not rest.correct and rest.end == "stop" and not is_garbled


def stepwise_pairs(questions: dict[str, str], rests: Iterable[Rest], *, max_pairs: int) -> list[PreferencePair]:
    """Return one pair for each cut, at most `max_pairs` for each problem: the own rest over the first usable wrong one.

    `questions` are the questions by problem id. Pairs with equal texts are dropped.
    """
    found: dict[tuple[str, tuple[int, ...], tuple[int, ...]], PreferencePair] = {}
    texts, counts = set(), Counter[str]()
    for rest in sorted(rests, key=lambda rest: (rest.problem_id, rest.sample, len(rest.kept_ids), rest.attempt)):
        cut = (rest.problem_id, rest.kept_ids, rest.right_ids)
        content = (rest.problem_id, rest.kept, rest.right, rest.text)
        is_full = counts[rest.problem_id] >= max_pairs
        if is_full or cut in found or content in texts or not is_usable(rest):
            continue
        texts.add(content)
        counts[rest.problem_id] += 1
        found[cut] = PreferencePair(
            rest.problem_id, questions[rest.problem_id], rest.right, rest.text, rest.right_ids, rest.token_ids,
            prefix=rest.kept, prefix_ids=rest.kept_ids,
        )  # fmt: skip
    return list(found.values())


def mixed(
    ordinary: Sequence[PreferencePair], stepwise: Sequence[PreferencePair], share: float, seed: int
) -> list[PreferencePair]:
    """Return the step-controlled pairs, and as many ordinary ones, at random, as make the former `share` of all.

    All ordinary pairs are returned if there are too few of them, or no step-controlled ones and `share` is below 1, or
    if `share` is 0: all pairs of both kinds, as in SCDPO. The order is that of the arguments.
    """
    if not share or (not stepwise and share < 1):
        return [*ordinary, *stepwise]
    number = min(len(ordinary), round(len(stepwise) * (1 - share) / share))
    kept = sorted(random.Random(seed).sample(range(len(ordinary)), number))
    return [*(ordinary[i] for i in kept), *stepwise]


def as_many(
    pairs_of: Callable[[int], list[PreferencePair]], number: int, max_pairs: int, seed: int
) -> list[PreferencePair]:
    """Return `number` ordinary pairs, at random, or all if there are fewer.

    `pairs_of` returns those with at most so many for each problem; the limit is raised from `max_pairs` until there are
    enough.
    """
    found = pairs_of(max_pairs)
    while len(found) < number and len(more := pairs_of(max_pairs := 2 * max_pairs)) > len(found):
        found = more
    kept = sorted(random.Random(seed).sample(range(len(found)), min(number, len(found))))
    return [found[i] for i in kept]


def as_rationale(rest: Rest) -> Rationale:
    """Return the whole rationale that a rest completes, for the pseudo-labels."""
    ids = (*rest.kept_ids, *rest.token_ids)
    return Rationale(
        rest.problem_id, rest.sample, rest.kept + rest.text, ids, (0,) * len(ids), 0.0, rest.end, rest.predicted,
        rest.correct,
    )  # fmt: skip
