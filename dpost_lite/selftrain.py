"""DPO-augmented self-training (Wang, Li, Lu; ACL 2024), Algorithm 2 on one page.

    f = the base model; L = labelled problems; U = the same training problems with their answers only

What each line does is in `pipeline/stages.py`. A line is one or more stages of the run's folder (`runs/folder.py`), so
running it again continues. It departs from the paper in what one consumer GPU needs, adapters on a 4-bit base in place
of full fine-tuning, and in what line 4 returns: f_d only if it clearly draws more than f_i-1 (`dpo.gate`). A method
without DPO leaves out lines 3 and 4, which gives the paper's Algorithm 1; `sft` is line 1 alone.
"""

from typing import Protocol

from dpost_lite.methods import Method
from dpost_lite.runs.folder import Artifact


def self_train(stages: "Stages", labelled: Artifact, method: Method, max_rounds: int) -> list[Artifact]:
    """Return the SFT policies f_0 ... f_n, in order. `labelled` holds L as gold labels."""
    for_pairs: list[Artifact] = []  # samples of every round so far, since pairs and labels may pool them
    for_labels: list[Artifact] = []
    policies = [stages.sft(0, labelled)]  # 1: fine-tune f on L to get f_0
    for i in range(1, (max_rounds if method.has_rounds else 0) + 1):  # 2: repeat
        teacher = policies[-1]
        if method.has_dpo:
            for_pairs.append(stages.sample_for_pairs(i, teacher))  # 3: sample from f_i-1 on U ...
            pairs = stages.pairs(i, teacher, for_pairs)  # ... and pair right rationales (chosen) with wrong ones
            teacher = stages.dpo(i, teacher, pairs)  # 4: tune f_i-1 on the pairs to get f_d, with f_i-1 as reference
        for_labels.append(stages.sample_for_labels(i, teacher))  # 5: sample from f_d on U
        labels = stages.labels(i, for_labels)  # 6: select the right rationales; 7: add them to L
        policies.append(stages.sft(i, labels))  # 8: fine-tune f, the base again, on L to get f_i
        if stages.has_converged():  # 9: until convergence or the last round
            break
    return policies


def prefer(stages: "Stages", labelled: Artifact) -> list[Artifact]:
    """Return f_0 and f_0 after DPO, on ordinary and step-controlled pairs: the second paper's training (SCDPO, 3)."""
    policy = stages.sft(0, labelled)
    pairs = stages.pairs(1, policy, [stages.sample_for_pairs(1, policy)])
    return [policy, stages.dpo(1, policy, pairs)]


def whole_run(stages: "Stages", method: Method, max_rounds: int) -> None:
    """Algorithm 2 and what a run adds to it: data, the base's score, and the best policy as a file that was tried."""
    labelled = stages.data()
    stages.score_base()
    if method.has_dpo and not method.has_rounds:
        policies = prefer(stages, labelled)
    else:
        policies = self_train(stages, labelled, method, max_rounds)
    stages.solve(stages.export(stages.best_policy(policies)))


class Stages(Protocol):
    """What the lines above ask for. `pipeline.stages.RunStages` runs it; `planner.recorder.Recorder` lists the names.

    The first argument of most is the round; 0 is the warm-up. Each returns the stage's artifact.
    """

    def data(self) -> Artifact:
        """Load, split and check the problems; U and L are their training part. Called before all others."""

    def score_base(self) -> None:
        """Score the base on the test problems, to compare with."""

    def sft(self, number: int, labels: Artifact) -> Artifact:
        """Fine-tune the base on labels; score the policy on dev and test."""

    def sample_for_pairs(self, number: int, policy: Artifact) -> Artifact:
        """Sample rationales for every training problem from an SFT policy, and grade them."""

    def pairs(self, number: int, policy: Artifact, samples: list[Artifact]) -> Artifact:
        """Make preference pairs of graded rationales.

        For step-controlled pairs the policy samples their rests again first (SCDPO, section 3.2).
        """

    def dpo(self, number: int, policy: Artifact, pairs: Artifact) -> Artifact:
        """Train a policy on preference pairs, with itself as the reference.

        Returns the policy to go on with: the given one if there are no pairs, or if the trained one does not clearly
        draw more (`dpo.gate`; not in the paper). Without rounds there is no gate, and the trained policy is scored.
        """

    def sample_for_labels(self, number: int, policy: Artifact) -> Artifact:
        """Sample K rationales for every training problem, and grade them."""

    def labels(self, number: int, samples: list[Artifact]) -> Artifact:
        """Select right rationales, deduplicate, cap, and join them with the gold ones."""

    def has_converged(self) -> bool:
        """Whether dev accuracy stopped rising."""

    def best_policy(self, policies: list[Artifact]) -> Artifact:
        """The policy with the best dev accuracy."""

    def export(self, policy: Artifact) -> Artifact:
        """Write a policy as a GGUF file."""

    def solve(self, export: Artifact) -> Artifact:
        """Solve a few test problems with the exported file."""
