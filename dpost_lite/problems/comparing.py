"""What graded answers say about a model beyond one accuracy: pass@k, maj@k, and whether one model beats another.

Gains in this field are 0.3 to 2 points, and one standard error on GSM8K's 1,319 problems is 1.3. Two models that answer
the same problems are therefore compared problem by problem: what both solve, or neither, tells nothing about which is
better, and is no noise either.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dpost_lite.errors import DataError
from dpost_lite.problems.grading import same_number
from dpost_lite.problems.records import Problem, Rationale, SampledScore

NUM_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models, a and b, on the same problems.

    `difference` is b's accuracy less a's, `low` and `high` its 95 % interval by paired bootstrap, and `p` the exact
    two-sided McNemar probability of a split at least as uneven if both were equally good.
    """

    num_problems: int
    a: float
    b: float
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    difference: float
    low: float
    high: float
    p: float


def compare(a: Mapping[str, bool], b: Mapping[str, bool]) -> Comparison:
    """Compare two models by which problems each solved; those that only one was asked are left out.

    Raises DataError if no problem is left.
    """
    shared = [problem_id for problem_id in a if problem_id in b]
    if not shared:
        raise DataError("--compare: the two have no problem in common; compare answers to the same set of problems")
    only_a = tuple(i for i in shared if a[i] and not b[i])
    only_b = tuple(i for i in shared if b[i] and not a[i])
    low, high = bootstrap_interval(len(only_b), len(only_a), len(shared))
    rate_a, rate_b = (sum(right[i] for i in shared) / len(shared) for right in (a, b))
    return Comparison(
        len(shared), rate_a, rate_b, only_a, only_b, rate_b - rate_a, low, high, mcnemar(len(only_b), len(only_a))
    )


def mcnemar(num_won: int, num_lost: int) -> float:
    """Return the exact two-sided p-value that wins and losses are equally likely (McNemar 1947)."""
    total, fewer = num_won + num_lost, min(num_won, num_lost)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total)


def bootstrap_interval(num_won: int, num_lost: int, num_problems: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of (won - lost) / problems, by paired bootstrap (Efron 1979).

    A problem is won, lost, or neither, so a resample is one draw of the multinomial. Seeded: the same counts give the
    same interval.
    """
    import numpy as np

    shares = np.array([num_won, num_lost, num_problems - num_won - num_lost]) / num_problems
    drawn = np.random.default_rng(0).multinomial(num_problems, shares, size=NUM_RESAMPLES)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / num_problems, [2.5, 97.5])
    return float(low), float(high)


def mean_difference(compared: Sequence[Comparison]) -> tuple[float, float, float]:
    """Return the mean difference of several trainings (seeds), and its 95 % interval.

    All answer the same problems, so a problem is drawn with all of its answers (a bootstrap of clusters, Davison and
    Hinkley 1997, section 3.8): 3 seeds on 400 problems are no 1,200 problems. The interval holds for these seeds.
    """
    import numpy as np

    counts = Counter(i for one in compared for i in one.only_b)
    counts.subtract(i for one in compared for i in one.only_a)
    (num_problems,) = {one.num_problems for one in compared}
    differences = np.zeros(num_problems)  # of most problems: solved by both, or by neither
    differences[: len(counts)] = [counts[i] / len(compared) for i in sorted(counts)]
    drawn = np.random.default_rng(0).integers(num_problems, size=(NUM_RESAMPLES, num_problems))
    low, high = np.percentile(differences[drawn].mean(axis=1), [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is right (Chen et al. 2021, equation 1).

    1 - C(n - c, k) / C(n, k): of the C(n, k) ways to pick k of the n samples, the share that holds a right one.
    """
    assert 0 <= num_right <= num_samples, (num_right, num_samples)
    assert 1 <= k <= num_samples, (k, num_samples)
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority(predictions: Iterable[str | None]) -> str | None:
    """Return the answer that most samples gave, the first of equals; samples without an answer have no vote.

    Self-consistency (Wang et al. 2023). Answers are canonical numbers, so that equal ones are equal text.
    """
    votes = Counter(prediction for prediction in predictions if prediction is not None)
    return max(votes, key=votes.__getitem__) if votes else None


def score_samples(
    name: str, samples: Sequence[Rationale], problems: Sequence[Problem], *, has_calculator: bool
) -> SampledScore:
    """Return pass@k for k = 1, 2, 5, 10 … up to the samples that every problem has, and maj@n.

    An unfinished sample is never right and has no vote.
    """
    by_problem: dict[str, list[Rationale]] = defaultdict(list)
    for sample in samples:
        by_problem[sample.problem_id].append(sample)
    num_samples = min(len(by_problem[problem.id]) for problem in problems)
    right = {problem.id: sum(sample.correct for sample in by_problem[problem.id]) for problem in problems}
    voted = [
        same_number(majority(s.predicted for s in by_problem[problem.id] if s.end == "stop"), problem.answer)
        for problem in problems
    ]
    return SampledScore(
        name=name,
        num_problems=len(problems),
        num_samples=num_samples,
        pass_at={
            k: sum(pass_at_k(len(by_problem[i]), num_right, k) for i, num_right in right.items()) / len(problems)
            for k in (*(k for k in (1, 2, 5, 10, 20, 50, 100) if k < num_samples), num_samples)
        },
        majority=sum(voted) / len(problems),
        calculator=has_calculator,
    )
