"""Which stages a run goes through: `selftrain.whole_run` is followed with a recorder in place of the real stages."""

from pathlib import Path

from dpost_lite.methods import METHODS
from dpost_lite.recipe import Recipe
from dpost_lite.runs.folder import Artifact
from dpost_lite.runs.stage_names import BASE, StageName, policy_name
from dpost_lite.selftrain import whole_run


def planned_stages(recipe: Recipe) -> list[StageName]:
    """Return the stages of a run in order, assuming that no round is left out."""
    recorder = Recorder(recipe)
    whole_run(recorder, METHODS[recipe.method], recipe.rounds)
    return recorder.names


class Recorder:
    """`selftrain.Stages` that do nothing but note their names, in `names`."""

    def __init__(self, recipe: Recipe) -> None:
        self.names: list[StageName] = []
        self._recipe = recipe
        self._method = METHODS[recipe.method]

    def data(self) -> Artifact:
        data = self._note(StageName("data"))
        if self._recipe.data.also_test:
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
        if self._method.samples_rests(self._recipe.pairs.stepwise):
            self._note(StageName("rests", number))
        return self._note(StageName("pairs", number))

    def dpo(self, number: int, policy: Artifact, pairs: Artifact) -> Artifact:
        policy = self._note(StageName("dpo", number))
        if not self._method.has_rounds:
            self._score(policy_name(number))
        elif self._recipe.dpo.gate:
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
        if self._recipe.data.also_test:
            self._note(StageName.score(policy, also=True))

    def _note(self, name: StageName) -> Artifact:
        self.names.append(name)
        return Artifact(str(name), Path(), "")
