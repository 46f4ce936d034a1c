"""Statistics on graded answers: pass@k, maj@k, and paired comparison of two models.

Typical gains are 0.3 to 2 points, while one standard error on GSM8K's 1,319 problems is 1.3. Two models are therefore
compared problem by problem on the same problems: those that both solve, or neither, carry no information about which
is better, and add no noise.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from dpost_lite.errors import DataError
from dpost_lite.problems.answers import majority, same_answer
from dpost_lite.problems.records import Problem, Rationale, SampledScore

_DRAWN_AT_ONCE = 2**20  # numbers, to bound memory
NUM_RESAMPLES = 10_000
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantiles of Student's t by freedom


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models, a and b, on the same problems.

    `a` and `b` are accuracies in 0..1; `only_a` and `only_b` the ids of the problems that one alone solves.
    `difference` is b minus a, `low` and `high` its 95 % paired-bootstrap interval, `p` the two-sided exact McNemar
    p-value.
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
    """Compare two models by whether each problem, by id, was solved; only problems in both are used.

    Raises DataError if they share none.
    """
    shared = [problem_id for problem_id in a if problem_id in b]
    if not shared:
        raise DataError("--compare: the two have no problems in common; compare answers to the same problems")
    only_a = tuple(i for i in shared if a[i] and not b[i])
    only_b = tuple(i for i in shared if b[i] and not a[i])
    low, high = bootstrap_interval(len(only_b), len(only_a), len(shared))
    rate_a, rate_b = (sum(right[i] for i in shared) / len(shared) for right in (a, b))
    return Comparison(
        len(shared), rate_a, rate_b, only_a, only_b, rate_b - rate_a, low, high, mcnemar(len(only_b), len(only_a))
    )


def mcnemar(num_won: int, num_lost: int) -> float:
    """Return the exact two-sided p-value of the hypothesis that wins and losses are equally likely (McNemar 1947)."""
    total, fewer = num_won + num_lost, min(num_won, num_lost)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total)


def bootstrap_interval(num_won: int, num_lost: int, num_problems: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of (won - lost) / problems, by paired bootstrap (Efron 1979).

    A problem is won, lost or neither, so a resample is one multinomial draw. The seed is fixed: equal counts give equal
    intervals.
    """
    import numpy as np

    shares = np.array([num_won, num_lost, num_problems - num_won - num_lost]) / num_problems
    resamples = np.random.default_rng(0).multinomial(num_problems, shares, size=NUM_RESAMPLES)
    low, high = np.percentile((resamples[:, 0] - resamples[:, 1]) / num_problems, [2.5, 97.5])
    return float(low), float(high)


def mean_difference(compared: Sequence[Comparison]) -> tuple[float, float, float]:
    """Return the mean difference over several seeds and its 95 % interval (low, high).

    All seeds answer the same problems, so a problem is resampled with all of its answers (cluster bootstrap, Davison
    and Hinkley 1997, section 3.8): 3 seeds on 400 problems are not 1,200 problems. The interval is conditional on these
    seeds: it leaves out what other rationales drawn, and other batches, would have changed (`interval_over_seeds`).
    """
    import numpy as np

    counts = Counter(i for one in compared for i in one.only_b)
    counts.subtract(i for one in compared for i in one.only_a)
    (num_problems,) = {one.num_problems for one in compared}
    differences = np.zeros(num_problems)  # zero where both models, or neither, solve the problem
    differences[: len(counts)] = [counts[i] / len(compared) for i in sorted(counts)]
    return float(differences.mean()), *bootstrap_mean(differences)


def interval_over_seeds(compared: Sequence[Comparison]) -> tuple[float, float]:
    """Return the 95 % interval (low, high) of the mean difference over two seeds or more, by Student's t.

    It is about other seeds on these problems: what a method gains, whatever is drawn. It is wide for few seeds.
    """
    differences = [one.difference for one in compared]
    freedom = min(len(differences) - 1, len(T_975))
    half = T_975[freedom - 1] * stdev(differences) / math.sqrt(len(differences))
    return fmean(differences) - half, fmean(differences) + half


def bootstrap_mean(values: Any, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of the mean of `values`, a sequence of numbers (Efron 1979). The seed is fixed."""
    import numpy as np

    array, tail, dice = np.asarray(values, dtype=float), 50 * (1 - confidence), np.random.default_rng(0)
    at_once = max(1, _DRAWN_AT_ONCE // len(array))
    sizes = [min(at_once, NUM_RESAMPLES - start) for start in range(0, NUM_RESAMPLES, at_once)]
    means = [array[dice.integers(len(array), size=(number, len(array)))].mean(axis=1) for number in sizes]
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is right (Chen et al. 2021, equation 1).

    1 - C(n - c, k) / C(n, k): the share of the C(n, k) subsets of k samples that contain a right one.
    """
    assert 0 <= num_right <= num_samples, (num_right, num_samples)
    assert 1 <= k <= num_samples, (k, num_samples)
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def score_samples(
    name: str,
    samples: Sequence[Rationale],
    problems: Sequence[Problem],
    *,
    has_calculator: bool,
    has_code: bool = False,
) -> SampledScore:
    """Return pass@k for k = 1, 2, 5, 10 … up to the number n of samples that every problem has, and maj@n.

    An unfinished sample counts as wrong and does not vote. Raises DataError as `same_answer` does.
    """
    by_problem: dict[str, list[Rationale]] = defaultdict(list)
    for sample in samples:
        by_problem[sample.problem_id].append(sample)
    num_samples = min(len(by_problem[problem.id]) for problem in problems)
    right = {problem.id: sum(sample.correct for sample in by_problem[problem.id]) for problem in problems}
    voted = [
        same_answer(majority(s.predicted for s in by_problem[problem.id] if s.end == "stop"), problem.answer)
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
        code=has_code,
    )
