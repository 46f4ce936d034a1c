"""A stage that needs a model: carried out in a child process, and tried again with less if memory runs out."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dpost_lite.errors import OutOfMemory
from dpost_lite.models.backend import FIRST_IMPORTS
from dpost_lite.pipeline.rests import SampleRests
from dpost_lite.pipeline.tasks import CompareDraws, GradeAnswers, SampleRationales, TrainDpo, TrainSft
from dpost_lite.pipeline.worker import Task, run_in_child
from dpost_lite.recipe import Recipe
from dpost_lite.runs.folder import Artifact, Run, WorkResult
from dpost_lite.runs.stage_names import StageName
from dpost_lite.system.machine import ram_share_gib

LEAST_GIB = 0.1  # for the cache and logits of a sampling stage
Section = Literal["sft", "dpo"]
UNITS: dict[Section, str] = {"sft": "rationale", "dpo": "pair"}


class StageRunner:
    """Carries out the tasks of a run's stages. `memory_share` is the share of the GPU's memory that one may take."""

    def __init__(self, recipe: Recipe, run: Run, memory_share: float | None) -> None:
        self._recipe = recipe
        self._run = run
        self._memory_share = memory_share

    def sampled(
        self,
        name: StageName,
        task: SampleRationales | SampleRests | CompareDraws | GradeAnswers,
        *inputs: Artifact,
        settings: dict[str, Any],
    ) -> Artifact:
        """Run a stage that samples. If it runs out of memory, try again with half the memory for cache and logits."""
        while True:
            try:
                return self.in_child(name, task, *inputs, settings=settings, resumes=True)
            except OutOfMemory as error:
                task = replace(task, memory_gib=(task.memory_gib or ram_share_gib()) / 2)
                assert task.memory_gib is not None
                if task.memory_gib < LEAST_GIB:
                    raise
                self._run.emit(
                    "notice",
                    text=f"{name}: out of memory ({error}); continuing with sampling.memory_gib={task.memory_gib:.2f}",
                )

    def train(
        self,
        name: StageName,
        section: Section,
        task: TrainSft | TrainDpo,
        *inputs: Artifact,
        settings: dict[str, Any],
    ) -> Artifact:
        """Run a training stage. If it runs out of memory, continue from its last checkpoint with micro-batches of half
        the size; the effective batch stays.
        """
        batch_size = getattr(self._recipe, section).batch_size
        first_import = FIRST_IMPORTS[task.backend]
        while True:
            try:
                return self.in_child(name, task, *inputs, settings=settings, resumes=True, first_import=first_import)
            except OutOfMemory as error:
                if task.micro_batch_size == 1:
                    raise OutOfMemory(
                        f"{name} ran out of memory with one {UNITS[section]} at a time ({error}); "
                        f"lower {section}.max_length, or take a smaller model"
                    ) from error
                half = task.micro_batch_size // 2
                micro = max(n for n in range(1, half + 1) if batch_size % n == 0)
                task = replace(task, micro_batch_size=micro)
                self._run.emit(
                    "notice",
                    text=f"{name}: out of memory ({error}); continuing with {section}.micro_batch_size={micro}, "
                    f"{batch_size // micro} micro-batches per step",
                )

    def in_child(
        self,
        name: StageName,
        task: Task,
        *inputs: Artifact,
        settings: dict[str, Any],
        renew: bool = False,
        resumes: bool = False,
        first_import: str | None = None,
    ) -> Artifact:
        """Run a stage whose task needs a process of its own."""

        def work(out: Path) -> WorkResult:
            return run_in_child(
                task,
                out,
                log=self._run.path / "logs" / f"{str(name).replace('/', '-')}.log",
                progress=self._run.progress,
                memory_share=self._memory_share,
                first_import=first_import,
            )

        return self._run.stage(str(name), work, *inputs, settings=settings, renew=renew, resumes=resumes)
