"""The gate after DPO: does the policy draw more distinct right rationales than the SFT policy it was made from?

DPO can raise its margins and still lower what is drawn, and self-training lives on what is drawn. So both policies
answer some training problems with the same random numbers, and the round goes on with the DPO policy only if its draws
are clearly better. Not in the paper, which always goes on with the DPO policy (`dpo.gate=off`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dpost_lite.problems.comparing import bootstrap_mean
from dpost_lite.problems.pairs import distinct_right
from dpost_lite.problems.records import LabelledRationale, Problem, Rationale

MIN_PROBLEMS = 64  # they show a gain of a fifth three times in four; 450, as for GSM8K, one of a tenth nine in ten
CONFIDENCE = 0.8  # of the interval that must lie above 0: one chance in ten of a gain where there is none


@dataclass(frozen=True, slots=True)
class Yields:
    """What two policies drew for the same problems: numbers of distinct right rationales that are not like a gold one.

    `difference` is after minus before, per problem; `low` and `high` its 80 % paired-bootstrap interval.
    """

    num_problems: int
    distinct_right_before: int
    distinct_right_after: int
    difference: float
    low: float
    high: float

    @property
    def is_better(self) -> bool:
        """Whether DPO pays: the interval lies above 0. In doubt it does not."""
        return self.low > 0


def num_compared(share: float, num_problems: int, samples_for_pairs: int, samples_for_labels: int) -> int:
    """Return the number of problems for the gate: so many that the draws of both policies, `samples_for_labels` for
    each problem, are about `share` of the round's; but at least 64, or all.
    """
    draws = share * num_problems * (samples_for_pairs + samples_for_labels)
    return min(num_problems, max(MIN_PROBLEMS, math.ceil(draws / (2 * samples_for_labels))))


def compare_yields(
    problems: Sequence[Problem],
    before: Iterable[Rationale],
    after: Iterable[Rationale],
    gold: Mapping[str, LabelledRationale],
    *,
    threshold: float | None,
) -> Yields:
    """Compare the draws of two policies, deduplicated (`pairs.deduplicate`) against gold and each other.

    Unlike pseudo-labels they are not pooled with other rounds, nor capped.
    """
    first, second = (distinct_right(problems, drawn, gold, threshold=threshold) for drawn in (before, after))
    differences = [second[problem.id] - first[problem.id] for problem in problems]
    low, high = bootstrap_mean(differences, confidence=CONFIDENCE)
    mean = sum(differences) / len(differences)
    return Yields(len(problems), sum(first.values()), sum(second.values()), mean, low, high)
