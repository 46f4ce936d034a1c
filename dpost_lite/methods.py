"""The methods a run can use: one object each, so that a new one is added here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MethodName = Literal["dpo-st", "st", "sft", "dpo", "scdpo", "dpo-equal"]
PairKinds = Literal["by share", "ordinary", "both", "as many"]
"""Preference pairs of a method: ordinary and step-controlled ones by `pairs.stepwise`; ordinary ones alone; all of both
(SCDPO, section 3.3); or as many ordinary ones as `both` has. `pairs.stepwise` has no effect on the last three."""


@dataclass(frozen=True, slots=True)
class Method:
    """What `selftrain.whole_run` does for one `recipe.method`."""

    name: MethodName
    summary: str
    has_rounds: bool
    """Whether rounds of self-training follow the warm-up (Algorithm 2, lines 2 to 9)."""
    has_dpo: bool
    """Whether each round trains on preference pairs before it samples for labels (lines 3 and 4); without rounds,
    whether the warm-up is trained on them.
    """
    pairs: PairKinds = "by share"

    @property
    def title(self) -> str:
        """What trains the warm-up further, as in a sentence."""
        return "self-training" if self.has_rounds else "DPO" if self.pairs != "both" else "step-controlled DPO"

    def samples_rests(self, share: float) -> bool:
        """Whether rests are sampled again for step-controlled pairs; `share` is `pairs.stepwise`."""
        return self.pairs in ("both", "as many") or (self.pairs == "by share" and share > 0)

    def num_trained(self, rounds: int) -> dict[str, int]:
        """Return how many policies a run of at most `rounds` rounds trains, by section of the recipe."""
        rounds = rounds if self.has_rounds else 0
        return {"sft": 1 + rounds, "dpo": max(1, rounds) if self.has_dpo else 0}

    def num_samples_for_labels(self, for_labels: int, for_pairs: int, *, beside: "Sequence[Method]") -> int:
        """Return the samples per problem to draw for labels in a comparison with the methods `beside`.

        Self-training without DPO draws as many as DPO-ST draws for pairs and labels together, so that no method has an
        advantage from drawing more.
        """
        draws_less = self.has_rounds and not self.has_dpo and any(m.has_rounds and m.has_dpo for m in beside)
        return for_labels + for_pairs if draws_less else for_labels


METHODS: dict[MethodName, Method] = {
    method.name: method
    for method in (
        Method("dpo-st", "the paper's method (Algorithm 2)", has_rounds=True, has_dpo=True),
        Method("st", "self-training without DPO (Algorithm 1)", has_rounds=True, has_dpo=False),
        Method("sft", "the warm-up alone", has_rounds=False, has_dpo=False),
        Method("dpo", "DPO of the warm-up", has_rounds=False, has_dpo=True, pairs="ordinary"),
        Method("scdpo", "step-controlled DPO of the warm-up (SCDPO)", has_rounds=False, has_dpo=True, pairs="both"),
        Method("dpo-equal", "dpo on as many pairs as scdpo", has_rounds=False, has_dpo=True, pairs="as many"),
    )
}
