"""Which stages a run goes through: `selftrain.whole_run` is followed with a recorder in place of the real stages."""

from pathlib import Path

from dpost_lite.methods import METHODS, Method
from dpost_lite.recipe import Recipe
from dpost_lite.runs.folder import Artifact
from dpost_lite.runs.stage_names import BASE, StageName, policy_name
from dpost_lite.selftrain import whole_run


def planned_stages(recipe: Recipe) -> list[StageName]:
    """Return the stages of a run in order, assuming that no round is left out."""
    method, has_rests = METHODS[recipe.method], METHODS[recipe.method].samples_rests(recipe.pairs.stepwise)
    has_gate, has_also = recipe.dpo.gate > 0, bool(recipe.data.also_test)
    recorder = Recorder(method, has_rests=has_rests, has_gate=has_gate, has_also=has_also)
    whole_run(recorder, method, recipe.rounds)
    return recorder.names


class Recorder:
    """`selftrain.Stages` that do nothing but note their names, in `names`."""

    def __init__(self, method: Method, *, has_rests: bool, has_gate: bool, has_also: bool) -> None:
        self.names: list[StageName] = []
        self._method = method
        self._has_rests = has_rests
        self._has_gate = has_gate
        self._has_also = has_also

    def data(self) -> Artifact:
        data = self._note(StageName("data"))
        if self._has_also:
            self._note(StageName("data-also"))
        return data

    def score_base(self) -> None:
        self._score(BASE)

    def sft(self, number: int, labels: Artifact) -> Artifact:
        policy = self._note(StageName("sft", number))
        self._score(policy_name(number))
        return policy

    def sample_for_pairs(self, number: int, policy: Artifact) -> Artifact:
        return self._note(StageName("samples-pairs", number))

    def pairs(self, number: int, policy: Artifact, samples: list[Artifact]) -> Artifact:
        if self._has_rests:
            self._note(StageName("rests", number))
        return self._note(StageName("pairs", number))

    def dpo(self, number: int, policy: Artifact, pairs: Artifact) -> Artifact:
        policy = self._note(StageName("dpo", number))
        if not self._method.has_rounds:
            self._score(policy_name(number))
        elif self._has_gate:
            self._note(StageName("gate", number))
        return policy

    def sample_for_labels(self, number: int, policy: Artifact) -> Artifact:
        return self._note(StageName("samples-labels", number))

    def labels(self, number: int, samples: list[Artifact]) -> Artifact:
        return self._note(StageName("labels", number))

    def has_converged(self) -> bool:
        return False

    def best_policy(self, policies: list[Artifact]) -> Artifact:
        return policies[-1]

    def export(self, policy: Artifact) -> Artifact:
        return self._note(StageName("export"))

    def solve(self, export: Artifact) -> Artifact:
        return self._note(StageName("solved"))

    def _score(self, policy: str) -> None:
        self._note(StageName.score(policy))
        if self._has_also:
            self._note(StageName.score(policy, also=True))

    def _note(self, name: StageName) -> Artifact:
        self.names.append(name)
        return Artifact(str(name), Path(), "")
