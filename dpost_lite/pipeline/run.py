"""Carry out a recipe in a run's folder: the stages of `selftrain.py`, with alarms and estimated times beside them."""

from dataclasses import dataclass, field

from dpost_lite.errors import DpostError, OtherSettings, of_disk
from dpost_lite.methods import METHODS
from dpost_lite.pipeline.stages import RunStages
from dpost_lite.planner.eta import Eta
from dpost_lite.planner.plan import Plan
from dpost_lite.problems.records import Score
from dpost_lite.recipe import Recipe
from dpost_lite.report import alarms
from dpost_lite.runs.folder import Artifact, Run
from dpost_lite.selftrain import whole_run


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run produced: scores of the base and of every policy on test, and of the policies on dev, the best policy,
    its exported file, and the problems solved with it. `failure` says why the last two are missing, if they are.
    `also_scores` are those on the further test sets, by set.
    """

    scores: list[Score]
    dev_scores: list[Score]
    best: str
    export: Artifact | None = None
    solved: Artifact | None = None
    failure: DpostError | None = None
    also_scores: dict[str, list[Score]] = field(default_factory=dict)


def execute(recipe: Recipe, run: Run, plan: Plan | None = None) -> Outcome:
    """Run the recipe in the run's folder, or resume it.

    What needs a model runs in child processes, so a script that calls this needs `if __name__ == "__main__"`. `plan`
    gives the limit of the GPU's memory, and the estimates that are logged next to the measurements. Raises the errors
    of errors.py; one after training, in export or solving, is returned as `Outcome.failure` (except OtherSettings).
    """
    run.listen(alarms.watch(run.path, run.emit))
    if plan is not None:
        run.listen(Eta(plan, run.emit))
    stages = RunStages(recipe, run, memory_share=plan.device.memory_share if plan else None)
    failure = None
    try:
        whole_run(stages, METHODS[recipe.method], recipe.rounds)
    except OtherSettings:  # nothing failed: the command asks for something else
        raise
    except (DpostError, OSError) as error:
        failure = error if isinstance(error, DpostError) else of_disk(error)
        if failure is None or stages.best is None:
            raise
    assert stages.best is not None
    name, files = stages.best.name, (stages.exported, stages.solved)
    return Outcome(stages.test_scores, stages.dev_scores, name, *files, failure, stages.also_scores)
