"""What a stage depends on, and how a training continues when memory runs out; no model is loaded."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dpost_lite.errors import OutOfMemory, RunError
from dpost_lite.models import hub
from dpost_lite.models.backend import FIRST_IMPORTS
from dpost_lite.pipeline import stage_runner, stages
from dpost_lite.pipeline.prepare import PrepareAlso, PrepareData
from dpost_lite.pipeline.rests import SampleRests
from dpost_lite.pipeline.settings import ADDED_KEYS, StageSettings
from dpost_lite.pipeline.stages import RunStages
from dpost_lite.pipeline.tasks import CompareDraws, GradeAnswers, SampleRationales, TrainDpo, TrainSft
from dpost_lite.pipeline.worker import Task
from dpost_lite.problems.records import (
    LabelledRationale,
    PreferencePair,
    Problem,
    Rationale,
    Rest,
    Score,
    read_jsonl,
    write_jsonl,
)
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.folder import UNFINISHED, Artifact, Run, WorkResult, read_json
from dpost_lite.runs.journal import read_events

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
    monkeypatch.setattr(stage_runner, "run_in_child", run_in_child)
    return names


def stages_of(folder: Path, *overrides: str) -> RunStages:
    recipe = load_recipe(None, list(overrides))
    stages = RunStages(recipe, Run.create(folder / "run", recipe))
    stages.data()
    return stages


@pytest.mark.parametrize(
    ("key", "values"),
    [("sampling.temperature", (0.8, 0.9)), ("sampling.top_p", (0.8, 0.9)), ("sampling.top_k", (8, 9))],
)
def test_how_is_sampled_changes_no_greedy_answer(works, tmp_path, key, values):
    before, after = (stages_of(tmp_path, f"{key}={value}") for value in values)
    before.score_base()
    after.score_base()
    assert works == ["PrepareData", "GradeAnswers"]
    before.sample_for_pairs(1, POLICY)
    with pytest.raises(
        RunError, match=rf"'round-1/samples-pairs' made with other settings \({key}: {values[0]} -> {values[1]}\)"
    ):
        after.sample_for_pairs(1, POLICY)


def test_keys_that_came_later_leave_older_stages_as_they_are():
    """At the value that means what was done before there was the key, a stage does not depend on it."""
    for (part, key), value in ADDED_KEYS.items():
        settings = StageSettings(load_recipe(None, []), Path("model")).of(part)
        assert key not in settings[part]
        others = {"True": "false", "False": "true", "None": "3", "1.0": "2", "0.0": "0.5", "jaccard": "equations"}
        other = {**others, "auto": "original"}[str(value)]
        changed = StageSettings(load_recipe(None, [f"{part}.{key}={other}"]), Path("model")).of(part)
        assert key in changed[part]


def test_further_test_sets_change_no_stage_but_their_own(works, tmp_path, monkeypatch):
    """They can be added to a run that was trained without them; the training and the other scores are kept."""
    assert (
        "also_test" not in StageSettings(load_recipe(None, ["data.also_test=svamp"]), Path("model")).of("data")["data"]
    )
    graded = []

    def run_in_child(task: Any, *_: Any, **__: Any) -> WorkResult:
        works.append(type(task).__name__)
        if isinstance(task, PrepareAlso):
            return WorkResult({"multiarith": 2, "svamp": 3}, ram_bytes=0)
        if isinstance(task, GradeAnswers):
            graded.append((task.policy_name, task.data_dir.name, task.parts))
            score = asdict(Score(task.policy_name, 1, 0, 0, 0, 1, 0, 0, 0))
            return WorkResult(dict.fromkeys(task.parts, score), ram_bytes=0)
        return answered(task)

    monkeypatch.setattr(stage_runner, "run_in_child", run_in_child)

    def carried_out(*overrides: str) -> RunStages:
        made = stages_of(tmp_path, *overrides)
        made.score_base()
        made.sft(0, LABELS)
        return made

    assert carried_out().also_scores == {}
    assert works == ["PrepareData", "GradeAnswers", "TrainSft", "GradeAnswers"]
    works.clear()
    made = carried_out("data.also_test=multiarith,svamp")
    assert works == ["PrepareAlso", "GradeAnswers", "GradeAnswers"]
    assert graded[2:] == [(name, "data-also", ("multiarith", "svamp")) for name in ("base", "sft-0")]
    assert list(made.also_scores) == ["multiarith", "svamp"]
    assert all([score.name for score in found] == ["base", "sft-0"] for found in made.also_scores.values())
    works.clear()
    carried_out()
    carried_out("data.also_test=multiarith,svamp")
    assert works == []
    with pytest.raises(RunError, match=r"also_test: .*--restart-from data-also"):
        carried_out("data.also_test=asdiv")
    archived = Run.open(tmp_path / "run").restart_from(["data-also"])
    assert archived == ["data-also", "score-also/base", "score-also/sft-0"]


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

    monkeypatch.setattr(stage_runner, "run_in_child", run_in_child)
    stages_of(tmp_path, "sft.batch_size=12", "sft.micro_batch_size=6").sft(0, LABELS)
    assert found == [(6, []), (3, ["checkpoint-1"]), (1, ["checkpoint-1", "checkpoint-2"])]


PAIRS = Artifact("round-1/pairs", Path("pairs"), "3", {"pairs": 1})
DRAWS = {"num_problems": 2, "distinct_right_before": 3, "difference": 0.5}


@pytest.mark.parametrize(
    ("setting", "found", "expected"),
    [
        ("off", None, "round-1/dpo"),
        ("0.05", {"distinct_right_after": 4, "low": 0.1, "high": 0.9}, "round-1/dpo"),
        ("0.05", {"distinct_right_after": 3, "low": 0.0, "high": 0.9}, "sft-0"),
        ("0.05", {"distinct_right_after": 1, "low": -0.9, "high": -0.1}, "sft-0"),
    ],
)
def test_a_round_goes_on_with_dpo_only_if_it_draws_more(works, tmp_path, monkeypatch, setting, found, expected):
    compared = []

    def run_in_child(task: Any, *_: Any, **__: Any) -> WorkResult:
        if isinstance(task, CompareDraws):
            compared.append((task.policy_dir, task.dpo_dir))
            return WorkResult({"goes_on_with": "", **DRAWS, **found}, ram_bytes=0)
        return WorkResult({"train": 9, "dev": 0, "test": 1}, ram_bytes=0)

    monkeypatch.setattr(stage_runner, "run_in_child", run_in_child)
    made = stages_of(tmp_path, f"dpo.gate={setting}")
    assert made.dpo(1, POLICY, PAIRS).name == expected
    assert compared == ([] if found is None else [(POLICY.path, tmp_path / "run" / "round-1" / "dpo")])


def test_a_trained_dpo_can_get_a_gate_or_lose_it_until_labels_are_drawn(works, tmp_path, monkeypatch):
    found = {"low": 0.0, "high": 0.0}
    ran = []

    def run_in_child(task: Any, *_: Any, **__: Any) -> WorkResult:
        ran.append(type(task))
        draws = {"goes_on_with": "", **DRAWS, "distinct_right_after": 1, **found}
        return WorkResult(draws if isinstance(task, CompareDraws) else {"train": 9, "dev": 0, "test": 1}, ram_bytes=0)

    def drawn(setting: str) -> str:
        made = stages_of(tmp_path, f"dpo.gate={setting}")
        policy = made.dpo(1, POLICY, PAIRS)
        made.sample_for_labels(1, policy)
        return policy.name

    monkeypatch.setattr(stage_runner, "run_in_child", run_in_child)
    assert stages_of(tmp_path, "dpo.gate=off").dpo(1, POLICY, PAIRS).name == "round-1/dpo"
    assert drawn("on") == "sft-0"
    assert ran == [PrepareData, TrainDpo, CompareDraws, SampleRationales]
    with pytest.raises(RunError, match=r"round-1/samples-labels"):
        drawn("off")
    Run.open(tmp_path / "run").restart_from(["round-1/gate"])  # and what was drawn after it
    found.update(low=0.1, high=0.2)
    assert drawn("on") == "round-1/dpo"


def test_a_comparison_for_the_report_alone_keeps_the_dpo_policy(works, tmp_path, monkeypatch):
    """`dpo.keep=always`: the labels do not depend on what was found, and it can be added to a run or left out."""

    def run_in_child(task: Any, *_: Any, **__: Any) -> WorkResult:
        draws = {"goes_on_with": "dpo", **DRAWS, "distinct_right_after": 0, "low": -2.0, "high": -1.0}
        return WorkResult(draws if isinstance(task, CompareDraws) else {"train": 9, "dev": 0, "test": 1}, ram_bytes=0)

    monkeypatch.setattr(stage_runner, "run_in_child", run_in_child)
    gate = tmp_path / "run/round-1/gate/done.json"
    for setting in ("dpo.gate=off", "dpo.keep=always", "dpo.gate=off"):
        made = stages_of(tmp_path, setting)
        policy = made.dpo(1, POLICY, PAIRS)
        assert policy.name == "round-1/dpo"
        assert {*read_json(made.sample_for_labels(1, policy).path / "done.json")["inputs"]} == {"round-1/dpo", "data"}
        assert gate.exists() or setting == "dpo.gate=off"
    Run.open(tmp_path / "run").restart_from(["round-1/gate"])
    stages_of(tmp_path, "dpo.keep=always").dpo(1, POLICY, PAIRS)
    assert gate.exists()
    with pytest.raises(RunError, match=r"round-1/gate"):  # it would now decide
        stages_of(tmp_path, "dpo.keep=better").dpo(1, POLICY, PAIRS)


def test_token_rewards_that_failed_are_told(works, tmp_path, monkeypatch):
    def run_in_child(task: Any, *_: Any, **__: Any) -> WorkResult:
        failed = {"rewards_failed": "ValueError: too long"} if isinstance(task, TrainDpo) else {}
        return WorkResult({"train": 9, "dev": 0, "test": 1, **failed}, ram_bytes=0)

    monkeypatch.setattr(stage_runner, "run_in_child", run_in_child)
    stages_of(tmp_path, "dpo.gate=off").dpo(1, POLICY, PAIRS)
    (notice,) = (event["text"] for event in read_events(tmp_path / "run") if event["kind"] == "notice")
    assert notice == "round-1/dpo: the report will lack its token rewards (ValueError: too long); see logs/"


def test_a_round_drawn_before_there_was_a_gate_keeps_its_labels(works, tmp_path):
    for setting in ("off", "on"):
        made = stages_of(tmp_path, f"dpo.gate={setting}")
        policy = made.dpo(1, POLICY, PAIRS)
        made.sample_for_labels(1, policy)
        assert policy.name == "round-1/dpo"
    assert "CompareDraws" not in works


def with_draws(monkeypatch, drawn: Callable[[SampleRationales], list[Rationale]], rests: list[Rest] | None = None):
    """Sampling stages of one problem write these rationales and rests."""

    def run_in_child(task: Any, out: Path, **_: Any) -> WorkResult:
        if isinstance(task, SampleRests):
            assert rests is not None
            write_jsonl(out / "rests.jsonl", rests)
            return WorkResult({"cuts": len(rests)}, ram_bytes=0)
        if isinstance(task, SampleRationales):
            write_jsonl(out / "rationales.jsonl", drawn(task))
            return WorkResult({}, ram_bytes=0)
        write_jsonl(out / "train.jsonl", [Problem("p", "How many?", "1")])
        write_jsonl(out / "labels.jsonl", [])
        return answered(task)

    monkeypatch.setattr(stage_runner, "run_in_child", run_in_child)


@pytest.mark.parametrize(("setting", "expected"), [("true", {"a", "b", "c"}), ("false", {"c"})])
def test_right_rationales_drawn_for_pairs_join_the_labels_if_asked(works, tmp_path, monkeypatch, setting, expected):
    """The paper's labels come from the DPO policy alone."""
    texts = {"round-1/samples-pairs": [("a", True), ("b", True), ("d", False)], "round-1/samples-labels": [("c", True)]}

    def drawn(task: SampleRationales) -> list[Rationale]:
        return [
            Rationale("p", i, text, (i,), (0,), 0.0, "stop", "1", correct)
            for i, (text, correct) in enumerate(texts[task.purpose])
        ]

    with_draws(monkeypatch, drawn)
    made = stages_of(
        tmp_path, f"labels.from_pairs={setting}", "labels.jaccard_threshold=1", "labels.cap_percentile=100"
    )
    made.sample_for_pairs(1, POLICY)
    labels = made.labels(1, [made.sample_for_labels(1, POLICY)])
    assert {label.text for label in read_jsonl(labels.path / "labels.jsonl", LabelledRationale)} == expected


REST = Rest("p", 0, 0, "kept ", "right", "wrong", (9,), (8,), (7, 6), "stop", "2", correct=False)


@pytest.mark.parametrize(
    ("settings", "rests", "pairs", "labels"),
    [
        (("pairs.stepwise=0.5",), [REST], {("a", "d"), ("right", "wrong")}, {"a"}),
        (("pairs.stepwise=1",), [REST], {("right", "wrong")}, {"a"}),
        (("pairs.stepwise=0.5",), [], {("a", "d")}, {"a"}),
        (("pairs.stepwise=1",), [], set(), {"a"}),
        (
            ("pairs.stepwise=1", "labels.from_rests=true"),
            [REST, replace(REST, attempt=1, text="so right", token_ids=(5,), correct=True)],
            {("right", "wrong")},
            {"a", "kept so right"},
        ),
        ((), None, {("a", "d")}, {"a"}),
    ],
)
def test_rests_become_pairs_and_labels(works, tmp_path, monkeypatch, settings, rests, pairs, labels):
    """Where no rest could be used, ordinary pairs alone are the pairs, if they were wanted at all."""
    right = Rationale("p", 0, "a", (0,), (0,), 0.0, "stop", "1", correct=True)
    drawn = [right, replace(right, sample=1, text="d", token_ids=(1,), correct=False)]

    with_draws(monkeypatch, lambda _: drawn, rests)
    made = stages_of(tmp_path, *settings, "labels.jaccard_threshold=1", "labels.cap_percentile=100")
    notices = []
    made._run.listen(lambda event: notices.append(event["text"]) if event["kind"] == "notice" else None)
    found = made.pairs(1, POLICY, [made.sample_for_pairs(1, POLICY)])
    pair = read_jsonl(found.path / "pairs.jsonl", PreferencePair)
    assert {(one.chosen, one.rejected) for one in pair} == pairs
    expected = [f"round-1/rests: {stages.NO_CUTS}"]
    assert notices == (expected if rests == [] else [])
    kept = made.labels(1, [made.sample_for_labels(1, POLICY)])
    assert {label.text for label in read_jsonl(kept.path / "labels.jsonl", LabelledRationale)} == labels


@pytest.mark.parametrize("backend", ["plain", "unsloth"])
def test_a_training_imports_first_what_its_backend_needs(works, tmp_path, monkeypatch, backend):
    found = []

    def run_in_child(task: Any, *_: Any, first_import: str | None, **__: Any) -> WorkResult:
        if isinstance(task, TrainSft | TrainDpo):
            found.append((task.backend, first_import))
        return answered(task)

    monkeypatch.setattr(stages, "choose_backend", lambda *_: backend)
    monkeypatch.setattr(stage_runner, "run_in_child", run_in_child)
    made = stages_of(tmp_path, "dpo.gate=off")
    made.sft(0, LABELS)
    made.dpo(1, POLICY, PAIRS)
    assert found == [(backend, FIRST_IMPORTS[backend])] * 2
