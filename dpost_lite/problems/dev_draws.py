"""What DPO changes in the answers to the dev problems: samples of the policies before and after it, compared in pairs.

The paper's Figure 6 shows the same of one round: accuracy, pass@K and the number of distinct right rationales.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dpost_lite.problems.comparing import bootstrap_mean, pass_at_k
from dpost_lite.problems.pairs import distinct_right, num_steps
from dpost_lite.problems.records import Problem, Rationale

Draws = Mapping[str, Sequence[Rationale]]
"""Rationales by the id of their problem."""


@dataclass(frozen=True, slots=True)
class Change:
    """A figure of two policies on the same problems. `difference` is after minus before, `low` and `high` its 95 %
    paired-bootstrap interval over the problems.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class DevDraws:
    """Both policies drew `num_samples` (K) rationales for each of `num_problems` dev problems.

    `pass_at_1`, `pass_at_k` and `unfinished` are in 0..1. pass@k is the unbiased estimate of Chen et al. 2021, equation
    1, from K samples: at k = 1 the share of right samples, at k = K the share of problems with a right one.
    `distinct_right` counts right rationales without near-duplicates, over all problems. `steps` and `tokens` are means
    over the finished rationales of a problem, and over the problems for which both policies finished one; None if there
    are none.
    """

    num_problems: int
    num_samples: int
    pass_at_1: Change
    pass_at_k: Change
    distinct_right: Change
    steps: Change | None
    tokens: Change | None
    unfinished: Change

    @classmethod
    def from_metrics(cls, values: Mapping[str, Any]) -> "DevDraws":
        """Build it from what `dataclasses.asdict` made of it."""
        given: dict[str, Any] = {
            name: Change(**value) if isinstance(value, Mapping) else value for name, value in values.items()
        }
        return cls(**given)


def compare_draws(
    problems: Sequence[Problem],
    before: Sequence[Rationale],
    after: Sequence[Rationale],
    *,
    num_samples: int,
    threshold: float | None,
) -> DevDraws:
    """Compare two policies' samples, `num_samples` for each problem.

    Right ones are deduplicated against each other (`pairs.deduplicate`), not against gold ones: dev problems have none.
    """
    draws = _by_problem(before), _by_problem(after)
    distinct = [distinct_right(problems, drawn, {}, threshold=threshold) for drawn in (before, after)]

    def each(figure: Callable[[Sequence[Rationale]], float]) -> Change:
        return _change(*([figure(drawn[problem.id]) for problem in problems] for drawn in draws))

    return DevDraws(
        num_problems=len(problems),
        num_samples=num_samples,
        pass_at_1=each(lambda drawn: pass_at_k(num_samples, _num_right(drawn), 1)),
        pass_at_k=each(lambda drawn: pass_at_k(num_samples, _num_right(drawn), num_samples)),
        distinct_right=_change(*([found[problem.id] for problem in problems] for found in distinct), is_sum=True),
        steps=_of_finished(*draws, lambda rationale: num_steps(rationale.text)),
        tokens=_of_finished(*draws, lambda rationale: len(rationale.token_ids)),
        unfinished=each(lambda drawn: fmean(rationale.end == "limit" for rationale in drawn)),
    )


def _by_problem(rationales: Iterable[Rationale]) -> Draws:
    groups: defaultdict[str, list[Rationale]] = defaultdict(list)
    for rationale in rationales:
        groups[rationale.problem_id].append(rationale)
    return groups


def _num_right(drawn: Sequence[Rationale]) -> int:
    return sum(rationale.correct for rationale in drawn)


def _of_finished(before: Draws, after: Draws, size: Callable[[Rationale], int]) -> Change | None:
    """Compare the mean size of finished rationales, on the problems for which both policies finished one."""
    first, second = (
        {name: fmean(sizes) for name, drawn in draws.items() if (sizes := [size(r) for r in drawn if r.end == "stop"])}
        for draws in (before, after)
    )
    shared = [name for name in first if name in second]
    return _change(*([means[name] for name in shared] for means in (first, second))) if shared else None


def _change(before: Sequence[float], after: Sequence[float], *, is_sum: bool = False) -> Change:
    """Compare figures by problem, in the same order: their means, or with `is_sum` their sums."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    figures = fmean(before), fmean(after), fmean(differences), *bootstrap_mean(differences)
    return Change(*(figure * (len(before) if is_sum else 1) for figure in figures))
