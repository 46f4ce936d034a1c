"""DPO-augmented self-training (Wang, Li, Lu; ACL 2024), Algorithm 2 on one page.

    L = labelled problems, U = the same training problems with answers only, f = the base model

Departs from the paper in what a single consumer GPU needs: adapters on a 4-bit base instead of full fine-tuning. What
each line does stands in `pipeline/stages.py`; each line is a stage of the run folder, so running again continues.

With `method: st` lines 4 to 6 fall away, which is plain self-training (Algorithm 1); with `method: sft` the loop does.
"""

from dataclasses import dataclass

from dpost_lite.errors import DpostError, OtherSettings, of_disk
from dpost_lite.pipeline.stages import Stages
from dpost_lite.planner.eta import Clock
from dpost_lite.planner.plan import Plan
from dpost_lite.problems.records import Score
from dpost_lite.recipe import Recipe
from dpost_lite.report import alarms
from dpost_lite.runs.folder import Artifact, Run


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run leaves behind: scores of the base and of every policy on test, and of the policies on dev, the best
    policy, its exported file, and problems solved with it. `failure` says why the last two are missing, if they are.
    """

    scores: list[Score]
    dev_scores: list[Score]
    best: str
    export: Artifact | None = None
    solved: Artifact | None = None
    failure: DpostError | None = None


def self_train(recipe: Recipe, run: Run, plan: Plan | None = None) -> Outcome:
    """Run the recipe in the run folder, or continue it, and return what came out.

    What needs a model runs in child processes, so a script that calls this needs `if __name__ == "__main__"`. `plan`
    gives the limit of the GPU's memory, and the estimates that are kept beside the truth.
    """
    run.listen(alarms.watch(run.path, run.emit))
    if plan is not None:
        run.listen(Clock(plan, run.emit))
    stages = Stages(recipe, run, memory_share=plan.device.memory_share if plan else None)
    data = stages.data()
    stages.score("base", None, data)
    policies = [stages.sft("sft-0", data)]  # 1: f_0 <- SFT(f, L)
    stages.score("sft-0", policies[0], data)
    sampled: list[Artifact] = []
    drawn: list[Artifact] = []
    for i in range(1, stages.num_rounds + 1):  # 2: repeat
        teacher = policies[-1]
        if recipe.method == "dpo-st":
            sampled.append(stages.sample_for_pairs(f"round-{i}/samples-pairs", teacher, data))  # 3: sample from f_i-1
            pairs = stages.pairs(f"round-{i}/pairs", sampled, data)  # 4: right ones win, wrong ones lose
            teacher = stages.dpo(f"round-{i}/dpo", teacher, pairs)  # 5: f_d <- DPO(f_i-1), reference f_i-1
        drawn.append(stages.sample_for_labels(f"round-{i}/samples-labels", teacher, data))  # 6: sample from f_d
        labels = stages.labels(f"round-{i}/labels", drawn, data)  # 7: keep right ones, deduplicate; 8: L <- L + S
        policies.append(stages.sft(f"round-{i}/sft", labels))  # 9: f_i <- SFT(f, L), from the base again
        stages.score(f"round-{i}", policies[-1], data)
        if stages.has_converged():  # 10: until dev accuracy stops rising
            break
    return _deliver(stages, stages.best_policy(policies), data)


def _deliver(stages: Stages, best: Artifact, data: Artifact) -> Outcome:
    """Export the best policy and solve problems with the file. A failure here takes nothing from what was trained."""
    export = solved = failure = None
    try:
        export = stages.export(best)
        solved = stages.solve(export, data)
    except OtherSettings:  # nothing failed: the command asks for something else
        raise
    except (DpostError, OSError) as error:
        failure = error if isinstance(error, DpostError) else of_disk(error)
        if failure is None:
            raise
    return Outcome(stages.test_scores, stages.dev_scores, best.name, export, solved, failure)
