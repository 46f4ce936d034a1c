"""Names of a run's stages, which are also its folders: built and parsed here, for every module.

data                        problems, split and checked
data-also                   the further test sets of data.also_test, if there are any
sft-0                       the warm-up
round-N/samples-pairs       rationales to make preference pairs of
round-N/rests               rests of right rationales, sampled again, for step-controlled pairs
round-N/pairs               preference pairs
round-N/dpo
round-N/gate                rationales of the policies before and after DPO, to choose the one to go on with
round-N/samples-labels      rationales to make pseudo-labels of
round-N/labels              gold rationales and pseudo-labels
round-N/sft
score/POLICY                greedy answers on dev and test, where POLICY is base, sft-0 or round-N (round-1 is the DPO
                            policy of a method without rounds)
score-also/POLICY           greedy answers on the further test sets
export, solved              the best policy as a GGUF file, and a few problems solved with it
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

Kind = Literal[
    "data",
    "data-also",
    "sft",
    "samples-pairs",
    "rests",
    "pairs",
    "dpo",
    "gate",
    "samples-labels",
    "labels",
    "score",
    "score-also",
    "export",
    "solved",
]

BASE = "base"
WARM_UP = "sft-0"
_IN_ROUND = re.compile(r"round-(\d+)/(samples-pairs|rests|pairs|dpo|gate|samples-labels|labels|sft)")
_SCORE = re.compile(r"(score|score-also)/(base|sft-0|round-\d+)")


@dataclass(frozen=True, slots=True)
class StageName:
    """One stage; `str` gives its folder. Round 0 is before the first round. `policy` is what a score stage scores."""

    kind: Kind
    round: int = 0
    policy: str = ""

    @classmethod
    def parse(cls, name: str) -> "StageName | None":
        """Return the stage that a folder's name stands for, or None if it is no stage's."""
        if match := _IN_ROUND.fullmatch(name):
            return cls(cast(Kind, match[2]), int(match[1]))
        if match := _SCORE.fullmatch(name):
            return cls.score(match[2], also=match[1] == "score-also")
        if name in ("data", "data-also", "export", "solved"):
            return cls(cast(Kind, name))
        return cls("sft") if name == WARM_UP else None

    @classmethod
    def score(cls, policy: str, *, also: bool = False) -> "StageName":
        """Return the stage that scores a policy: on dev and test, or with `also` on the further test sets."""
        return cls("score-also" if also else "score", _round_of(policy), policy)

    def __str__(self) -> str:
        if self.policy:
            return f"{self.kind}/{self.policy}"
        if self.round:
            return f"round-{self.round}/{self.kind}"
        return WARM_UP if self.kind == "sft" else self.kind

    def beside(self, kind: Kind) -> "StageName":
        """Return another stage of the same round."""
        return StageName(kind, self.round)


def policy_name(number: int) -> str:
    """Return the name of the SFT policy of a round; round 0 is the warm-up."""
    return f"round-{number}" if number else WARM_UP


def policy_of(stage: str) -> str:
    """Return the name of the policy that a stage trained: `round-1/sft` -> `round-1`; without rounds `round-1/dpo`."""
    return stage.removesuffix("/sft").removesuffix("/dpo")


def is_round(policy: str) -> bool:
    """Whether a policy is a round's, and neither the base nor the warm-up."""
    return _round_of(policy) > 0


def rounds_in(folder: Path) -> list[int]:
    """Return the numbers of the `round-N` folders in `folder`, ascending."""
    return sorted(number for path in folder.glob("round-*") if (number := _round_of(path.name)))


def _round_of(policy: str) -> int:
    match = re.fullmatch(r"round-(\d+)", policy)
    return int(match[1]) if match else 0
