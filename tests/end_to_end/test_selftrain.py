"""The whole loop, from a user's file to a GGUF file that answers, on a tiny random model.

The problems are made so easy that even this model gets some right after the warm-up and some wrong: every stage has
something to do, and nothing of it is faked.
"""

import errno
import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from easy import SETTINGS, write_problems
from typer.testing import CliRunner

from dpost_lite.cli.app import app
from dpost_lite.errors import DataError, ExportError, ModelError, OutOfMemory, RecipeError, RunError
from dpost_lite.evaluation.baselines import adopt, shared_stages
from dpost_lite.evaluation.targets import policies_of
from dpost_lite.local.engine import Engine
from dpost_lite.local.request import Request
from dpost_lite.models import loading
from dpost_lite.pipeline.run import Outcome, execute
from dpost_lite.pipeline.stages import RunStages
from dpost_lite.pipeline.tasks import TrainSft
from dpost_lite.pipeline.worker import _context
from dpost_lite.problems.dev_draws import DevDraws
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import LabelledRationale, PreferencePair, Problem, Rationale, read_jsonl
from dpost_lite.problems.tools import Tools
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.report import health
from dpost_lite.report.page import write_report
from dpost_lite.runs.folder import UNFINISHED, Run, read_json
from dpost_lite.runs.manifest import MUTABLE
from dpost_lite.runs.stage_names import policy_name

WARM_UP = shared_stages(Recipe(method="dpo-st"), Recipe(method="st"))
ROUND = {
    "dpo-st": ["samples-pairs", "pairs", "dpo", "gate", "samples-labels", "labels", "sft"],
    "st": ["samples-labels", "labels", "sft"],
}


NO_OUTCOME: Any = None  # of a run that was stopped


@dataclass
class Finished:
    """A run that came to its end, or was stopped before a stage, with the events that its listeners heard."""

    recipe: Recipe
    path: Path
    outcome: Outcome
    events: list[dict[str, Any]]

    def stages(self, kind: str) -> list[str]:
        return [event["stage"] for event in self.events if event["kind"] == kind]

    def records(self, name: str, kind: type) -> list[Any]:
        return list(read_jsonl(self.path / name, kind))


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    return write_problems(tmp_path_factory.mktemp("data") / "mine.jsonl")


@pytest.fixture(scope="module")
def start(base_dir, problems):
    """A function that runs a recipe in a folder, or continues it."""

    def run(path: Path, *overrides: str, listener: Any = lambda event: None, until: str | None = None) -> Finished:
        recipe = load_recipe(None, [*SETTINGS, f"model.name={base_dir}", f"data.train={problems}", *overrides])
        events: list[dict[str, Any]] = []

        def stop(event: dict[str, Any]) -> None:
            if event["kind"] == "stage_started" and event["stage"] == until:
                raise KeyboardInterrupt

        started = Run.create(path, recipe, (events.append, listener, stop))
        if until is None:
            return Finished(recipe, path, execute(recipe, started), events)
        with pytest.raises(KeyboardInterrupt):
            execute(recipe, started)
        assert events[-1]["stage"] == until
        return Finished(recipe, path, NO_OUTCOME, events)

    return run


@pytest.fixture(scope="module")
def dpo_st(start, tmp_path_factory) -> Finished:
    return start(tmp_path_factory.mktemp("dpo-st") / "run")


@pytest.fixture(scope="module")
def st(start, tmp_path_factory) -> Finished:
    return start(tmp_path_factory.mktemp("st") / "run", "method=st", "rounds=1")


@pytest.fixture(scope="module")
def sft(start, tmp_path_factory) -> Finished:
    return start(tmp_path_factory.mktemp("sft") / "run", "method=sft")


@pytest.fixture(params=["dpo_st", "st", "sft"])
def finished(request) -> Finished:
    return request.getfixturevalue(request.param)


def same_rationales(run: Finished, other: Finished, name: str) -> None:
    """The same token by token; log-probabilities are sums in float32, whose last digits other processes round."""
    drawn, expected = (r.records(name, Rationale) for r in (run, other))
    assert [replace(r, logprob=0.0) for r in drawn] == [replace(r, logprob=0.0) for r in expected]
    assert [r.logprob for r in drawn] == pytest.approx([r.logprob for r in expected], abs=1e-3)


def expected_stages(recipe: Recipe) -> list[str]:
    stages = ["data", "score/base", "sft-0", "score/sft-0"]
    for i in range(1, recipe.rounds + 1) if recipe.method != "sft" else ():
        stages += [f"round-{i}/{name}" for name in ROUND[recipe.method]] + [f"score/round-{i}"]
    return [*stages, "export", "solved"]


# Every method


def test_every_stage_of_the_algorithm_runs_in_its_order(finished):
    assert finished.stages("stage_started") == finished.stages("stage_finished") == expected_stages(finished.recipe)
    assert finished.stages("stage_skipped") == []
    assert not [event for event in finished.events if event["kind"] == "notice"]
    assert not list(finished.path.rglob("*.partial"))
    journal = [json.loads(line) for line in (finished.path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert journal == [event for event in finished.events if event.get("unit", "steps") == "steps"]
    units = {event["unit"] for event in finished.events if event["kind"] == "progress"}
    assert units == {"steps", "rationales", "answers"}  # the last: of the exported file


def test_the_outcome_has_a_score_for_the_base_and_every_policy(finished):
    scores, recipe = finished.outcome.scores, finished.recipe
    rounds = [] if recipe.method == "sft" else [f"round-{i}" for i in range(1, recipe.rounds + 1)]
    assert [score.name for score in scores] == ["base", "sft-0", *rounds]
    tests = {problem.id: problem for problem in finished.records("data/test.jsonl", Problem)}
    for score in scores:
        answers = finished.records(f"score/{score.name}/test.jsonl", Rationale)
        assert {answer.problem_id for answer in answers} == set(tests)
        assert score.num_problems == len(tests) == len(answers)
        assert score.strict == sum(a.correct for a in answers) / len(answers)
        assert score.low <= score.strict <= score.high
        assert score.calculator


def test_the_best_policy_on_dev_is_exported(finished):
    names = [score.name for score in finished.outcome.scores[1:]]
    dev = {name: read_json(finished.path / f"score/{name}/done.json")["metrics"]["dev"]["strict"] for name in names}
    best = max(names, key=dev.__getitem__)  # the first of equals
    policy = best if best == "sft-0" else f"{best}/sft"
    assert finished.outcome.best == policy
    assert finished.outcome.export.metrics["policy"] == policy


def test_the_exported_file_answers(finished, base_dir):
    export = finished.outcome.export
    path = export.path / export.metrics["file"]
    assert path.stat().st_size == export.metrics["bytes"] > 50_000
    assert sorted(p.name for p in export.path.iterdir()) == ["done.json", path.name]  # no merged weights left behind
    engine = Engine(path, tools=Tools.from_recipe(finished.recipe), max_new_tokens=24, num_threads=1)
    tests = finished.records("data/test.jsonl", Problem)
    solved = read_json(finished.outcome.solved.path / "solved.json")
    assert [entry["id"] for entry in solved] == [problem.id for problem in tests[:3]]
    for problem, entry in zip(tests, solved, strict=False):
        (solution,) = engine.run([Request.of(problem.question)])
        assert solution.text == entry["solution"]["text"] != ""
    assert engine.model.prompt_ids(Request.of("Ann in 2?")) == list(
        Prompter(loading.load_tokenizer(base_dir), "plain").prompt_ids("Ann in 2?")
    )


def test_the_warm_up_learned_something(dpo_st):
    """Else the rounds would have had nothing to work with."""
    metrics = read_json(dpo_st.path / "sft-0" / "done.json")["metrics"]
    assert metrics["last_loss"] < 0.5 * metrics["first_loss"]


# The rounds


def test_pairs_are_right_over_wrong_in_sampled_ids(dpo_st):
    rationales = [
        rationale
        for i in (1, 2)
        for rationale in dpo_st.records(f"round-{i}/samples-pairs/rationales.jsonl", Rationale)
    ]
    gold = {label.problem_id: label for label in dpo_st.records("data/labels.jsonl", LabelledRationale)}
    right = {(r.problem_id, r.token_ids) for r in rationales if r.correct}
    right |= {(label.problem_id, label.token_ids) for label in gold.values()}
    wrong = {(r.problem_id, r.token_ids) for r in rationales if not r.correct and r.end == "stop"}
    for i in (1, 2):
        pairs = dpo_st.records(f"round-{i}/pairs/pairs.jsonl", PreferencePair)
        assert pairs
        assert {(pair.problem_id, pair.chosen_ids) for pair in pairs} <= right
        assert {(pair.problem_id, pair.rejected_ids) for pair in pairs} <= wrong
    assert any(pair.problem_id not in gold for pair in pairs)  # a problem without rationale found its own


def test_labels_are_gold_and_right_ones_of_all_rounds(dpo_st):
    train = {problem.id: problem for problem in dpo_st.records("data/train.jsonl", Problem)}
    gold = dpo_st.records("data/labels.jsonl", LabelledRationale)
    assert {label.problem_id for label in gold} == {p.id for p in train.values() if p.rationale}
    right: set[tuple[str, tuple[int, ...]]] = set()
    for i in (1, 2):
        drawn = dpo_st.records(f"round-{i}/samples-labels/rationales.jsonl", Rationale)
        assert len(drawn) == 3 * len(train)
        right |= {(r.problem_id, r.token_ids) for r in drawn if r.correct}
        labels = dpo_st.records(f"round-{i}/labels/labels.jsonl", LabelledRationale)
        assert [label for label in labels if label.is_gold] == gold
        pseudo = {(label.problem_id, label.token_ids) for label in labels if not label.is_gold}
        assert pseudo
        assert pseudo <= right
        assert read_json(dpo_st.path / f"round-{i}/sft/done.json")["metrics"]["num_rationales"] == len(labels)


def test_labels_are_drawn_from_the_policy_that_the_gate_chose(dpo_st):
    """Both policies answered the same problems, each as often as for labels."""
    for i in (1, 2):
        found = read_json(dpo_st.path / f"round-{i}/gate/done.json")["metrics"]
        before, after = (dpo_st.records(f"round-{i}/gate/{name}.jsonl", Rationale) for name in ("before", "after"))
        assert {(r.problem_id, r.sample) for r in before} == {(r.problem_id, r.sample) for r in after}
        assert len(before) == 3 * found["num_problems"] == 3 * len(dpo_st.records("data/train.jsonl", Problem))
        assert before != after
        inputs = read_json(dpo_st.path / f"round-{i}/samples-labels/done.json")["inputs"]
        teacher = {"dpo": f"round-{i}/dpo", "sft": "sft-0" if i == 1 else f"round-{i - 1}/sft"}[found["goes_on_with"]]
        assert {*inputs} == {teacher, "data", f"round-{i}/gate"}


def test_health_compares_the_dev_problems_before_and_after_dpo(dpo_st):
    for one in health.rounds(dpo_st.path):
        answers = dpo_st.records(f"round-{one.number}/gate/dev.jsonl", Rationale)
        dev = dpo_st.records("data/dev.jsonl", Problem)
        assert [answer.problem_id for answer in answers] == [problem.id for problem in dev]
        assert one.dpo_on_dev.num_problems == len(dev)
        assert one.dpo_on_dev.b == sum(answer.correct for answer in answers) / len(dev)
        before = read_json(dpo_st.path / f"score/{policy_name(one.number - 1)}/done.json")["metrics"]["dev"]["strict"]
        assert one.dpo_on_dev.a == before


def test_health_compares_what_both_policies_draw_on_dev(dpo_st):
    dev = {problem.id for problem in dpo_st.records("data/dev.jsonl", Problem)}
    for one in health.rounds(dpo_st.path):
        before, after = (
            dpo_st.records(f"round-{one.number}/gate/dev-{name}.jsonl", Rationale) for name in ("before", "after")
        )
        assert [(r.problem_id, r.sample) for r in before] == [(r.problem_id, r.sample) for r in after]
        assert before != after
        assert {(r.problem_id, r.sample) for r in before} == {(i, sample) for i in dev for sample in range(3)}
        found = one.dev_draws
        assert (found.num_problems, found.num_samples) == (len(dev), 3)
        for drawn, name in ((before, "before"), (after, "after")):
            assert getattr(found.pass_at_1, name) == pytest.approx(sum(r.correct for r in drawn) / len(drawn))
            solved = {r.problem_id for r in drawn if r.correct}
            assert getattr(found.pass_at_k, name) == pytest.approx(len(solved) / len(dev))
        (event,) = (
            e for e in dpo_st.events if e["kind"] == "stage_finished" and e["stage"] == f"round-{one.number}/gate"
        )
        assert DevDraws.from_metrics(event["metrics"]["dev_draws"]) == found


def test_dpo_starts_from_the_policy_it_refers_to(dpo_st):
    for i in (1, 2):
        assert read_json(dpo_st.path / f"round-{i}/dpo/done.json")["metrics"]["first_loss"] == pytest.approx(
            0.693147, abs=1e-4
        )


def test_the_methods_share_their_warm_up(dpo_st, st, sft):
    """They differ in what follows: the same file, seed and base give the same first policy."""
    weights = [(run.path / "sft-0" / "adapter_model.safetensors").read_bytes() for run in (dpo_st, st, sft)]
    assert weights[0] == weights[1] == weights[2]
    assert len({run.outcome.scores[1] for run in (dpo_st, st, sft)}) == 1


# Again


def test_the_same_command_again_does_nothing_again(finished, start):
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.name not in MUTABLE}
    again = start(finished.path, f"method={finished.recipe.method}", f"rounds={finished.recipe.rounds}")
    assert {event["kind"] for event in again.events} == {"stage_skipped"}
    assert again.stages("stage_skipped") == expected_stages(finished.recipe)
    assert again.outcome == finished.outcome
    after = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.name not in MUTABLE}
    assert {path for path in before if before[path] != after[path] and path.is_file()} == set()


def test_other_settings_in_the_same_folder_are_refused(dpo_st, start):
    with pytest.raises(RunError, match=r"stage 'sft-0' made with other settings \(sft\.epochs: 12\.0 -> 13\.0\)"):
        start(dpo_st.path, "sft.epochs=13")
    assert Run.open(dpo_st.path).recipe == dpo_st.recipe


def test_an_interrupted_run_goes_on_and_ends_like_an_unbroken_one(sft, start, tmp_path):
    """Stopped in the middle of the warm-up's training; the repetition trains it again and ends the same."""

    def interrupt(event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and event["unit"] == "steps" and event["done"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", "method=sft", listener=interrupt)
    assert not (tmp_path / "run" / "sft-0").exists()
    resumed = start(tmp_path / "run", "method=sft", until="export")
    assert resumed.stages("stage_skipped") == ["data", "score/base"]
    same_rationales(resumed, sft, "score/sft-0/test.jsonl")
    name = "sft-0/adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (sft.path / name).read_bytes()


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_sampling_goes_on_to_the_sample(dpo_st, start, tmp_path, how):
    """What was drawn is kept, only what is missing is drawn, and the rationales are those of an unbroken run."""
    name = "round-1/samples-pairs"
    if how == "killed" and _context().get_start_method() != "forkserver":
        pytest.skip("the stage's process is looked for below a fork server")
    is_stopped = False

    def stop(event: dict[str, Any]) -> None:
        nonlocal is_stopped
        if is_stopped or event.get("unit") != "rationales" or event["done"] < 20 or event["total"] < 50:
            return
        is_stopped = True
        if how == "interrupted":
            raise KeyboardInterrupt
        (server,) = (child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline()))
        for stage in server.children():
            stage.kill()

    adopt(dpo_st.path, tmp_path / "run", map(str, WARM_UP))  # its warm-up, which would be the same
    if how == "killed":  # as by a system without memory: the stage goes on by itself, with less
        resumed = start(tmp_path / "run", "rounds=1", "sampling.max_rows=2", listener=stop, until="round-1/pairs")
        (notice,) = (event["text"] for event in resumed.events if event["kind"] == "notice")
        assert notice.startswith(f"{name}: out of memory (the system killed the process")
        assert "continuing with sampling.memory_gib=" in notice
        same_rationales(resumed, dpo_st, f"{name}/rationales.jsonl")
        return
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", "rounds=1", "sampling.max_rows=2", listener=stop)
    shard = tmp_path / "run" / f"{name}.partial" / UNFINISHED / "rationales.jsonl"
    kept = shard.read_text(encoding="utf-8")
    assert kept.count("\n") >= 20
    shard.write_text(kept + kept[:40], encoding="utf-8")  # a line that was being written
    begun: list[float] = []

    def watch(event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and event["unit"] == "rationales" and event["total"] > 50:
            begun.append(event["done"])

    resumed = start(tmp_path / "run", "rounds=1", listener=watch, until="round-1/pairs")
    assert begun[0] == kept.count("\n") + 1
    same_rationales(resumed, dpo_st, f"{name}/rationales.jsonl")
    assert not list((resumed.path / name).rglob(UNFINISHED))


GATE_FILES = ("before", "dev-before", "after", "dev-after", "dev")


@pytest.mark.parametrize("part", ["dev-before", "dev-after"])
def test_a_gate_that_was_stopped_in_any_part_goes_on(dpo_st, start, tmp_path, part):
    """Parts that were done are kept, that in which it was stopped is continued, and the figures are the same."""
    gate = "round-1/gate"
    lengths = [len(dpo_st.records(f"{gate}/{name}.jsonl", Rationale)) for name in GATE_FILES]
    done = sum(lengths[: GATE_FILES.index(part)])
    running: list[str] = []

    def stop(event: dict[str, Any]) -> None:
        running.extend([event["stage"]] if event["kind"] == "stage_started" else [])
        if event.get("unit") == "rationales" and running[-1] == gate and event["done"] == done + 2:
            raise KeyboardInterrupt

    stages = [name for name in dpo_st.stages("stage_finished") if not name.startswith("round-2")]
    adopt(dpo_st.path, tmp_path / "run", stages[: stages.index(gate)])
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", "rounds=1", "sampling.max_rows=2", listener=stop)
    partial = tmp_path / "run" / f"{gate}.partial"
    whole = {path.stem: path.read_bytes() for path in partial.glob("*.jsonl")}
    assert [*sorted(whole)] == sorted(GATE_FILES[: GATE_FILES.index(part)])
    assert (partial / UNFINISHED / f"{part}.jsonl").read_text(encoding="utf-8").count("\n") >= 2

    resumed = start(tmp_path / "run", "rounds=1", until="round-1/samples-labels")
    for name in GATE_FILES:
        same_rationales(resumed, dpo_st, f"{gate}/{name}.jsonl")
    assert {name: (tmp_path / "run" / gate / f"{name}.jsonl").read_bytes() for name in whole} == whole
    one, other = (read_json(path / gate / "done.json") for path in (resumed.path, dpo_st.path))
    assert one["metrics"] == other["metrics"]


def test_a_gate_of_an_older_version_is_neither_refused_nor_misread(dpo_st, start, tmp_path):
    """It drew nothing on dev for the report: those figures are missing, and all else is as it was."""
    shutil.copytree(dpo_st.path, tmp_path / "run")
    gate = tmp_path / "run" / "round-1" / "gate"
    for name in ("dev-before", "dev-after"):
        (gate / f"{name}.jsonl").unlink()
    record = read_json(gate / "done.json")
    del record["metrics"]["dev_draws"]
    (gate / "done.json").write_text(json.dumps(record), encoding="utf-8")
    again = start(tmp_path / "run")
    assert {event["kind"] for event in again.events} == {"stage_skipped"}
    first, second = health.rounds(tmp_path / "run")
    assert first.dev_draws is None
    assert second.dev_draws is not None
    assert first.dpo_on_dev == health.rounds(dpo_st.path)[0].dpo_on_dev
    html = write_report(tmp_path / "run", tmp_path / "report", [])[0].read_text(encoding="utf-8")
    table = html.partition("<h2>DPO on the dev problems</h2>")[2].partition("<h2>")[0]
    old, new = table.split("<h3>round 2")
    assert "greedy accuracy" in old
    assert "pass@" not in old
    assert "greedy accuracy" in new
    assert f"pass@{dpo_st.recipe.sampling.samples_for_labels}" in new


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_same_seed_elsewhere_gives_the_same_files(dpo_st, start, tmp_path, compute):
    """One round is enough to see it, on every machine in both types."""
    if compute == "bfloat16":
        dpo_st = start(tmp_path / "here", "rounds=1", "model.compute_dtype=bfloat16", until="export")
        settings = read_json(dpo_st.path / "sft-0" / "done.json")["settings"]
        assert settings["model"]["compute_dtype"] == "bfloat16"
    other = start(tmp_path / "elsewhere", "rounds=1", f"model.compute_dtype={compute}", until="export")
    for name in (
        "data/train.jsonl",
        "data/labels.jsonl",
        "round-1/pairs/pairs.jsonl",
        "round-1/labels/labels.jsonl",
    ):
        assert (other.path / name).read_bytes() == (dpo_st.path / name).read_bytes(), name
    for name in ("round-1/samples-pairs/rationales", "round-1/samples-labels/rationales", "score/round-1/test"):
        same_rationales(other, dpo_st, f"{name}.jsonl")


# What fails when all is trained


def a_run_of(sft: Finished, folder: Path, *more: str) -> list[str]:
    """The words of a command that has only to export and to solve what `sft` trained."""
    adopt(sft.path, folder, map(str, WARM_UP))
    settings = [setting for setting in SETTINGS if not setting.startswith("rounds")]
    model, data = sft.recipe.model.name, sft.recipe.data.train
    return ["run", "--out", str(folder), "--model", model, "--data", data, *settings, "rounds=2", "method=sft", *more]


@pytest.mark.parametrize(
    ("stage", "error", "says"),
    [
        ("export", ExportError("llama.cpp crashes with the q8_0 file (SIGSEGV); give another type"), "another type"),
        ("export", OSError(errno.ENOSPC, "No space left on device", "model.gguf"), "the disk is full"),
        ("solve", ExportError("llama.cpp crashed while it answered (SIGABRT)"), "(SIGABRT)"),
    ],
)
def test_a_late_failure_takes_nothing_away(sft, tmp_path, monkeypatch, stage, error, says):
    command = a_run_of(sft, tmp_path / "run")

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(RunStages, stage, fail)
        failed = CliRunner().invoke(app, command)
    assert failed.exit_code == 3, failed.output
    (line,) = failed.stderr.splitlines()
    assert says in line
    assert "; everything else is done" in line
    assert line.count("the same command") == 1
    assert re.search(r"sft-0 +on +[\d.]+%", failed.stdout)
    assert f"{tmp_path / 'run' / 'sft-0'}: {'the best' if stage == 'export' else 'its'} LoRA adapter" in failed.stdout
    assert ("model-q8_0.gguf" in failed.stdout.partition("written")[2]) == (stage == "solve")
    assert not (tmp_path / "run" / "manifest.json").exists()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    started = [line.partition(":")[0] for line in again.stdout.splitlines() if ": started" in line]
    assert started == (["export", "solved"] if stage == "export" else ["solved"])
    assert (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_another_type_of_file_is_the_way_out_when_solving_crashes(sft, tmp_path, monkeypatch, dies):
    """Processes of llama.cpp really die; what the error line advises is done; the first file is kept aside."""
    monkeypatch.setenv("DPOST_LITE_CACHE", str(tmp_path / "cache"))
    dies()
    crashed = CliRunner().invoke(app, a_run_of(sft, tmp_path / "run"))
    assert crashed.exit_code == 3, crashed.output
    assert "crashes with q8_0 files on this machine (SIGSEGV)" in crashed.stderr
    assert "run export.quant=f16`; everything else is done" in crashed.stderr
    assert "sft-0" in crashed.stdout
    monkeypatch.delenv("PYTHONPATH")
    again = CliRunner().invoke(app, a_run_of(sft, tmp_path / "run", "export.quant=f16"))
    assert again.exit_code == 0, again.output
    assert (tmp_path / "run" / "export" / "model-f16.gguf").is_file()
    assert len(list((tmp_path / "run").glob("export-before-*/model-q8_0.gguf"))) == 1
    refused = CliRunner().invoke(app, a_run_of(sft, tmp_path / "run", "calculator.max_decimals=3"))
    assert refused.exit_code == 2
    assert "made with other settings" in refused.stderr


# Memory that runs out, and other ends of a stage's process


def test_micro_batches_shrink_until_they_fit_and_the_result_stays(sft, start, tmp_path, monkeypatch):
    from dpost_lite.pipeline import stage_runner

    real, micro_batches = stage_runner.run_in_child, []

    def small_memory(task: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(task, TrainSft):
            micro_batches.append(task.micro_batch_size)
            if task.micro_batch_size > 2:
                raise OutOfMemory("CUDA out of memory")
        return real(task, *arguments, **options)

    monkeypatch.setattr(stage_runner, "run_in_child", small_memory)
    finished = start(tmp_path / "run", "method=sft", until="score/sft-0")
    assert micro_batches == [8, 4, 2]
    notices = [event["text"] for event in finished.events if event["kind"] == "notice"]
    assert notices[-1] == (
        "sft-0: out of memory (CUDA out of memory); continuing with sft.micro_batch_size=2, 4 micro-batches per step"
    )
    steps = "steps", "num_rationales"
    done, expected = (read_json(run.path / "sft-0" / "done.json")["metrics"] for run in (finished, sft))
    assert [done[name] for name in steps] == [expected[name] for name in steps]
    assert done["first_loss"] == pytest.approx(expected["first_loss"], rel=1e-3)


def test_when_one_row_does_not_fit_the_way_out_is_named(start, tmp_path, monkeypatch):
    from dpost_lite.pipeline import stage_runner

    real = stage_runner.run_in_child

    def no_memory(task: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(task, TrainSft):
            raise OutOfMemory("CUDA out of memory")
        return real(task, *arguments, **options)

    monkeypatch.setattr(stage_runner, "run_in_child", no_memory)
    with pytest.raises(OutOfMemory, match=r"^sft-0 ran out of memory with one rationale at a time .*sft\.max_length"):
        start(tmp_path / "run", "method=sft")


def test_stages_say_what_memory_they_took(dpo_st):
    for stage in ("sft-0", "round-1/samples-pairs", "round-1/dpo", "score/base", "export"):
        assert 2**28 < read_json(dpo_st.path / stage / "done.json")["ram_bytes"] < 2**33


def test_all_weights_can_be_trained(start, tmp_path, monkeypatch):
    """The papers' design: no adapter, no quantisation. The gate compares a part of the problems here."""
    monkeypatch.setattr("dpost_lite.problems.gate.MIN_PROBLEMS", 4)
    finished = start(tmp_path / "run", "model.precision=full", "rounds=1", "dpo.learning_rate=1e-5")
    for policy in ("sft-0", "round-1/dpo", "round-1/sft"):
        assert (finished.path / policy / "model.safetensors").is_file()
        assert not (finished.path / policy / "adapter_config.json").exists()
    assert read_json(finished.path / "round-1/dpo/done.json")["metrics"]["first_loss"] == pytest.approx(
        0.6931, abs=1e-3
    )
    assert list(policies_of(Run.open(finished.path))) == ["base", "sft-0", "round-1"]
    assert finished.outcome.export.metrics["bytes"] > 0
    before, after = (finished.records(f"round-1/gate/{name}.jsonl", Rationale) for name in ("before", "after"))
    assert [(r.problem_id, r.sample) for r in before] == [(r.problem_id, r.sample) for r in after]
    assert len({r.problem_id for r in before}) == 4
    assert len(before) == 12


# Nothing to prefer


def test_without_pairs_dpo_is_skipped_with_a_notice(start, tmp_path):
    """A model that learned nothing gets nothing right, and without the gold rationale there is nothing to choose."""
    overrides = ("sft.learning_rate=1e-9", "sft.epochs=1", "pairs.gold_first=false", "rounds=1")
    finished = start(tmp_path / "run", *overrides)
    assert finished.records("round-1/pairs/pairs.jsonl", PreferencePair) == []
    notices = [event["text"] for event in finished.events if event["kind"] == "notice"]
    assert len(notices) == 1
    assert notices[0].startswith("round-1/dpo: no preference pairs, so DPO is skipped")
    assert finished.stages("stage_finished") == [
        s for s in expected_stages(finished.recipe) if s not in ("round-1/dpo", "round-1/gate")
    ]
    labels = finished.records("round-1/labels/labels.jsonl", LabelledRationale)
    assert labels == finished.records("data/labels.jsonl", LabelledRationale)
    assert len(finished.outcome.scores) == 3


# What is told before anything is trained


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("dpo.loss=sigmoyd", RecipeError, "did you mean 'sigmoid'"),
        ("model.name=nowhere", ModelError, "there is no folder nowhere"),
        ("data.train=nowhere.jsonl", DataError, "nowhere.jsonl"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(start, tmp_path, override, error, says):
    with pytest.raises(error, match=says):
        start(tmp_path / "run", override)
    assert not list(tmp_path.rglob("done.json"))


def test_problems_without_any_rationale_are_refused(start, tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} and 1?", "answer": str(i + 1)}) + "\n" for i in range(12)))
    with pytest.raises(DataError, match="no problem has a worked solution ending in '#### N'"):
        start(tmp_path / "run", f"data.train={path}")
    assert not list(tmp_path.rglob("done.json"))
