"""What a stage depends on, and how a training continues when memory runs out; no model is loaded."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dpost_lite.errors import OutOfMemory, RunError
from dpost_lite.models import hub
from dpost_lite.models.backend import FIRST_IMPORTS
from dpost_lite.pipeline import stages
from dpost_lite.pipeline.stages import RunStages
from dpost_lite.pipeline.tasks import PrepareData, TrainDpo, TrainSft
from dpost_lite.pipeline.worker import Task
from dpost_lite.problems.records import Score
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.folder import UNFINISHED, Artifact, Run, WorkResult

LABELS = Artifact("data", Path("data"), "1")
POLICY = Artifact("sft-0", Path("sft-0"), "2")


def answered(task: Task) -> WorkResult:
    """What a task returns where there are no dev problems and one test problem."""
    score = asdict(Score("base", 1, 0, 0, 0, 1, 0, 0, 0))
    return WorkResult({"dev": 0, "test": 1} if isinstance(task, PrepareData) else {"test": score}, ram_bytes=0)


@pytest.fixture
def works(monkeypatch, tmp_path) -> list[str]:
    """Collect the names of the tasks for child processes; nothing is done."""
    names: list[str] = []

    def run_in_child(task: Task, *_: Any, **__: Any) -> WorkResult:
        names.append(type(task).__name__)
        return answered(task)

    monkeypatch.setattr(stages, "preflight", lambda *_: tmp_path)
    monkeypatch.setattr(hub, "fingerprint", lambda _: "a base")
    monkeypatch.setattr(stages, "run_in_child", run_in_child)
    return names


def stages_of(folder: Path, *overrides: str) -> RunStages:
    recipe = load_recipe(None, list(overrides))
    stages = RunStages(recipe, Run.create(folder / "run", recipe))
    stages.data()
    return stages


@pytest.mark.parametrize("key", ["sampling.temperature", "sampling.top_p"])
def test_how_is_sampled_changes_no_greedy_answer(works, tmp_path, key):
    before, after = (stages_of(tmp_path, f"{key}={value}") for value in (0.8, 0.9))
    before.score_base()
    after.score_base()
    assert works == ["PrepareData", "GradeAnswers"]
    before.sample_for_pairs(1, POLICY)
    with pytest.raises(RunError, match=rf"'round-1/samples-pairs' made with other settings \({key}: 0.8 -> 0.9\)"):
        after.sample_for_pairs(1, POLICY)


def test_a_shorter_limit_changes_greedy_answers(works, tmp_path):
    stages_of(tmp_path).score_base()
    with pytest.raises(RunError, match=r"sampling\.max_new_tokens: 300 -> 200"):
        stages_of(tmp_path, "sampling.max_new_tokens=200").score_base()


def test_where_memory_ran_out_a_training_finds_its_checkpoint(works, tmp_path, monkeypatch):
    found = []

    def run_in_child(task: Any, out: Path, **_: Any) -> WorkResult:
        if not isinstance(task, TrainSft):
            return answered(task)
        micro_batch_size = task.micro_batch_size
        found.append((micro_batch_size, sorted(path.name for path in (out / UNFINISHED).glob("checkpoint-*"))))
        if micro_batch_size > 1:
            (out / UNFINISHED / f"checkpoint-{len(found)}").mkdir()
            raise OutOfMemory("CUDA out of memory")
        return WorkResult({}, ram_bytes=0)

    monkeypatch.setattr(stages, "run_in_child", run_in_child)
    stages_of(tmp_path, "sft.batch_size=12", "sft.micro_batch_size=6").sft(0, LABELS)
    assert found == [(6, []), (3, ["checkpoint-1"]), (1, ["checkpoint-1", "checkpoint-2"])]


@pytest.mark.parametrize("backend", ["plain", "unsloth"])
def test_a_training_imports_first_what_its_backend_needs(works, tmp_path, monkeypatch, backend):
    found = []

    def run_in_child(task: Any, *_: Any, first_import: str | None, **__: Any) -> WorkResult:
        if isinstance(task, TrainSft | TrainDpo):
            found.append((task.backend, first_import))
        return answered(task)

    monkeypatch.setattr(stages, "choose_backend", lambda _: backend)
    monkeypatch.setattr(stages, "run_in_child", run_in_child)
    made = stages_of(tmp_path)
    made.sft(0, LABELS)
    made.dpo(1, POLICY, Artifact("round-1/pairs", Path("pairs"), "3", {"pairs": 1}))
    assert found == [(backend, FIRST_IMPORTS[backend])] * 2
