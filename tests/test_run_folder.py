"""The run folder: finished stages are loaded, changed ones refused, broken ones done again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpost_lite.errors import RunError, of_disk
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.fingerprint import flatten
from dpost_lite.runs.folder import UNFINISHED, Artifact, Run, read_json, stages_done, write_json

SETTINGS = {"seed": 1, "sft": {"epochs": 2, "learning_rate": 1e-4}}


class Work:
    """A stage's work that counts how often it is done."""

    def __init__(self, text: str = "made") -> None:
        self.text = text
        self.num_calls = 0

    def __call__(self, folder: Path) -> dict[str, int]:
        self.num_calls += 1
        (folder / "file.txt").write_text(self.text)
        return {"calls": self.num_calls}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path / "run", Recipe())


def again(run: Run) -> Run:
    """The same command, given once more."""
    return Run.create(run.path, Recipe())


def events(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.path / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def test_two_processes_do_not_run_in_one_folder(run):
    code = f"""
from pathlib import Path
from dpost_lite.runs.folder import Run
with Run(Path({str(run.path)!r})).locked():
    pass
"""
    command = [sys.executable, "-c", code]
    with run.locked():
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "RunError: --out: another process works in" in refused.stderr
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_the_lock_of_a_killed_process_is_free(run):
    code = f"""
import os, signal
from pathlib import Path
from dpost_lite.runs.folder import Run
with Run(Path({str(run.path)!r})).locked():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    with run.locked():
        pass


def stopped(out: Path) -> dict:
    """Work that is stopped the first time, and then finds what it left."""
    shard = out / UNFINISHED / "shard"
    if shard.exists():
        return {"found": shard.read_text()}
    shard.write_text("half")
    raise OSError("the disk is full")


def test_work_that_can_go_on_finds_what_it_left(run):
    with pytest.raises(OSError, match="disk is full"):
        run.stage("samples", stopped, settings=SETTINGS, resumes=True)
    made = again(run).stage("samples", stopped, settings=SETTINGS, resumes=True)
    assert made.metrics == {"found": "half"}
    assert [path.name for path in made.path.iterdir()] == ["done.json"]
    assert [event["resumed"] for event in events(run) if event["kind"] == "stage_started"] == [False, True]


def test_what_other_settings_left_is_neither_used_nor_thrown_away(run):
    with pytest.raises(OSError, match="disk is full"):
        run.stage("samples", stopped, settings=SETTINGS, resumes=True)
    with pytest.raises(RunError, match=r"'samples' made with other settings \(seed: 1 -> 2\).* --restart-from samples"):
        run.stage("samples", stopped, settings={**SETTINGS, "seed": 2}, resumes=True)
    assert run.stage("samples", stopped, settings=SETTINGS, resumes=True).metrics == {"found": "half"}


def test_a_stage_that_left_nothing_to_go_on_with_may_begin_under_other_settings(run):
    def broke(out: Path) -> dict:
        raise OSError("before anything was made")

    with pytest.raises(OSError, match="before anything"):
        run.stage("samples", broke, settings=SETTINGS, resumes=True)
    run.stage("samples", Work(), settings={**SETTINGS, "seed": 2}, resumes=True)


def test_a_stage_that_was_killed_before_it_got_its_name(run):
    work = Work()
    made = run.stage("sft", work, settings=SETTINGS)
    (made.path / UNFINISHED).mkdir()
    made.path.rename(run.path / "sft.partial")
    assert again(run).stage("sft", work, settings=SETTINGS) == made
    assert work.num_calls == 1
    assert sorted(path.name for path in made.path.iterdir()) == ["done.json", "file.txt"]


def test_work_does_not_begin_when_the_user_asked_to_stop(run, monkeypatch):
    work = Work()
    run.stage("data", work, settings=SETTINGS)
    monkeypatch.setattr("dpost_lite.system.interrupt.asked", lambda: True)
    run.stage("data", work, settings=SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run.stage("sft", work, settings=SETTINGS)
    assert work.num_calls == 1


# Beginning again at a stage


def chain(run: Run, *, seed: int = 1) -> list[Artifact]:
    """Four stages, of which the last stands on the second alone."""
    data = run.stage("data", Work(), settings={})
    sft = run.stage("sft-0", Work(), data, settings={"seed": seed})
    pairs = run.stage("round-1/pairs", Work(), data, sft, settings={})
    return [data, sft, pairs, run.stage("score/sft-0", Work(), sft, settings={})]


def test_a_stage_and_what_was_made_from_it_are_put_aside(run):
    _, sft, pairs, _ = chain(run)
    with pytest.raises(RunError, match="--restart-from sft-0"):
        chain(run, seed=2)
    assert run.restart_from(["sft-0"]) == ["round-1/pairs", "score/sft-0", "sft-0"]
    assert (run.path / f"sft-0-before-{sft.fingerprint[:8]}" / "file.txt").exists()
    assert (run.path / "round-1" / f"pairs-before-{pairs.fingerprint[:8]}" / "file.txt").exists()
    chain(run, seed=2)
    assert [e["stage"] for e in events(run) if e["kind"] == "stage_skipped"][-1] == "data"
    assert run.restart_from(["data"])
    assert not list(stages_done(run.path))


def test_the_same_stage_may_be_put_aside_twice(run):
    for _ in range(3):
        chain(run)
        run.restart_from(["round-1/pairs"])
    assert len(list(run.path.glob("round-1/pairs-before-*"))) == 3


def test_several_stages_are_put_aside_at_once(run):
    chain(run)
    run.stage("export", Work(), settings={})
    assert run.restart_from(["export", "round-1/pairs"]) == ["export", "round-1/pairs"]
    assert [name for name, _ in stages_done(run.path)] == ["data", "score/sft-0", "sft-0"]


def test_with_one_unknown_stage_nothing_is_put_aside(run):
    names = sorted(artifact.name for artifact in chain(run))
    with pytest.raises(RunError, match="has no stage 'sft-1'"):
        run.restart_from(["data", "sft-1"])
    assert sorted(name for name, _ in stages_done(run.path)) == names
    assert not list(run.path.rglob("*-before-*"))


def test_an_unfinished_stage_can_be_put_aside(run):
    with pytest.raises(OSError, match="disk is full"):
        run.stage("samples", stopped, settings=SETTINGS, resumes=True)
    run.restart_from(["samples"])
    (aside,) = run.path.glob("samples-before-*")
    assert (aside / UNFINISHED / "shard").read_text() == "half"
    run.stage("samples", Work(), settings={**SETTINGS, "seed": 2}, resumes=True)


def test_a_stage_that_is_not_there_cannot_be_put_aside(run):
    chain(run)
    with pytest.raises(
        RunError, match=r"has no stage 'sft-1' \(did you mean 'sft-0'\?\); it holds data, round-1/pairs"
    ):
        run.restart_from(["sft-1"])


# What else may happen to a folder


@pytest.mark.parametrize("name", ["run.json", "data/done.json"])
def test_a_damaged_record_is_named(run, name):
    chain(run)
    (run.path / name).write_text('{"version": ')
    with pytest.raises(RunError, match=f"{name} is damaged"):
        chain(again(run)) if name != "run.json" else again(run).recipe


def test_a_clock_that_is_set_back_changes_nothing(run, monkeypatch):
    run.emit("notice", text="before")
    monkeypatch.setattr("dpost_lite.runs.folder.time.time", lambda: 0.0)
    made = run.stage("data", Work(), settings={})
    assert read_json(made.path / "done.json")["seconds"] < 60
    times = [event["time"] for event in events(run)]
    assert times == sorted(times)
    assert times[-1] - times[0] < 60


def test_the_time_before_a_stop_counts(run, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("dpost_lite.runs.folder.time.monotonic", lambda: now[0])

    def stopped(out: Path) -> dict:
        now[0] += 30
        if now[0] < 150:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run.stage("samples", stopped, settings=SETTINGS, resumes=True)
    now[0] = 500
    made = run.stage("samples", stopped, settings=SETTINGS, resumes=True)
    assert read_json(made.path / "done.json")["seconds"] == 60


def test_other_work_begins_anew(run):
    def stopped(out: Path) -> dict:
        (out / "half").write_text("")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        run.stage("sft", stopped, settings=SETTINGS)
    made = run.stage("sft", Work(), settings=SETTINGS)
    assert sorted(path.name for path in made.path.iterdir()) == ["done.json", "file.txt"]


# Stages


def test_a_stage_leaves_its_files_and_its_record(run):
    made = run.stage("round-1/sft", Work(), settings=SETTINGS)
    assert made.path == run.path / "round-1" / "sft"
    assert (made.path / "file.txt").read_text() == "made"
    done = read_json(made.path / "done.json")
    assert done["fingerprint"] == made.fingerprint
    assert done["settings"] == SETTINGS
    assert done["metrics"] == made.metrics == {"calls": 1}
    assert done["seconds"] >= 0
    assert not list(run.path.rglob("*.partial"))


def test_a_finished_stage_is_not_done_again(run):
    work = Work()
    first = run.stage("sft", work, settings=SETTINGS)
    assert run.stage("sft", work, settings=SETTINGS) == first
    assert again(run).stage("sft", work, settings=SETTINGS) == first
    assert work.num_calls == 1
    assert [e["kind"] for e in events(run)] == ["stage_started", "stage_finished", "stage_skipped", "stage_skipped"]


def test_the_order_of_settings_does_not_matter(run):
    work = Work()
    run.stage("sft", work, settings={"a": 1, "b": Path("x")})
    run.stage("sft", work, settings={"b": "x", "a": 1})
    assert work.num_calls == 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 2, "sft": SETTINGS["sft"]}, "seed: 1 -> 2"),
        ({"seed": 1, "sft": {"epochs": 3, "learning_rate": 1e-4}}, "sft.epochs: 2 -> 3"),
        ({"sft": SETTINGS["sft"]}, "seed: 1 -> None"),  # a key fewer must not shift the others
        ({**SETTINGS, "lora": {"rank": 8}}, "lora.rank: None -> 8"),
    ],
)
def test_other_settings_are_refused_and_named(run, changed, named):
    work = Work()
    run.stage("sft", work, settings=SETTINGS)
    with pytest.raises(RunError) as error:
        again(run).stage("sft", work, settings=changed)
    message = str(error.value)
    assert f"({named})" in message
    assert "'sft'" in message
    assert "--out" in message
    assert "\n" not in message
    assert work.num_calls == 1
    assert (run.path / "sft" / "file.txt").read_text() == "made"


def test_a_changed_input_is_refused_and_named(run):
    work = Work()
    old = run.stage("data", Work("old"), settings={"seed": 1})
    run.stage("sft", work, old, settings=SETTINGS)
    new = Artifact("data", old.path, "another fingerprint")
    with pytest.raises(RunError, match="input data changed"):
        run.stage("sft", work, new, settings=SETTINGS)
    with pytest.raises(RunError, match="input labels changed"):
        run.stage("sft", work, old, Artifact("labels", old.path, "one more"), settings=SETTINGS)
    with pytest.raises(RunError, match="input data changed"):
        run.stage("sft", work, settings=SETTINGS)
    assert work.num_calls == 1


def test_a_stage_to_renew_is_done_again_for_new_inputs_and_kept_aside(run):
    first = run.stage("export", Work("first"), Artifact("policy", run.path, "one"), settings=SETTINGS, renew=True)
    second = run.stage("export", Work("second"), Artifact("policy", run.path, "two"), settings=SETTINGS, renew=True)
    assert first.fingerprint != second.fingerprint
    kept = run.path / f"export-before-{first.fingerprint[:8]}"
    assert {path.read_text() for path in kept.glob("*.txt")} == {"first"}
    assert {path.read_text() for path in (run.path / "export").glob("*.txt")} == {"second"}
    with pytest.raises(RunError, match="other settings"):
        run.stage("export", Work("third"), Artifact("policy", run.path, "two"), settings={"seed": -1}, renew=True)


def test_a_change_is_seen_through_a_chain_of_stages(tmp_path):
    """Fingerprints cover the inputs' fingerprints: the third stage differs because the first one does."""
    prints = []
    for seed in (1, 2):
        run = Run.create(tmp_path / str(seed), Recipe())
        data = run.stage("data", Work(), settings={"seed": seed})
        sft = run.stage("sft", Work(), data, settings={"epochs": 2})
        prints.append(run.stage("dpo", Work(), sft, settings={"beta": 0.1}).fingerprint)
    assert prints[0] != prints[1]


def test_stages_of_the_same_settings_are_told_apart_by_name(run):
    assert run.stage("a", Work(), settings={}).fingerprint != run.stage("b", Work(), settings={}).fingerprint


@pytest.mark.parametrize("interruption", [ValueError("broke"), KeyboardInterrupt()])
def test_a_stage_that_broke_counts_for_nothing(run, interruption):
    def break_down(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise interruption

    with pytest.raises(type(interruption)):
        run.stage("sft", break_down, settings=SETTINGS)
    assert not (run.path / "sft").exists()
    assert not list(run.path.rglob("done.json"))
    assert [e["kind"] for e in events(run)] == ["stage_started", "stage_stopped"]

    work = Work()
    made = again(run).stage("sft", work, settings=SETTINGS)
    assert work.num_calls == 1
    assert sorted(p.name for p in made.path.iterdir()) == ["done.json", "file.txt"]  # half.txt is gone


def test_a_stage_without_metrics(run):
    assert run.stage("sft", lambda folder: None, settings={}).metrics == {}


# The folder


@pytest.mark.parametrize("content", ["a file", "a folder with something else"])
def test_what_is_no_run_folder_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "mine"
    if content == "a file":
        path.write_text("keep me")
    else:
        path.mkdir()
        (path / "thesis.txt").write_text("keep me")
    with pytest.raises(RunError, match=r"--out: .*mine exists and is not a run folder; name another"):
        Run.create(path, Recipe())
    assert (path if path.is_file() else path / "thesis.txt").read_text() == "keep me"
    assert path.is_file() or [p.name for p in path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "run").mkdir()
    assert Run.create(tmp_path / "run", Recipe()).recipe == Recipe()


def test_a_path_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--out: .* cannot be written"):
        Run.create(tmp_path / "file" / "run", Recipe())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(RunError, match=r"cannot be written \(Permission denied\)"):
        Run.create(tmp_path / "locked" / "run", Recipe())


def test_a_full_disk_is_a_run_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        Run.create(tmp_path / "run", Recipe())


def test_the_recipe_can_be_read_back(tmp_path):
    recipe = load_recipe("rehearsal", ["seed=7", "data.data_dir=some/where"])
    Run.create(tmp_path / "run", recipe)
    assert Run.open(tmp_path / "run").recipe == recipe


def test_a_refused_command_leaves_the_recipe_of_the_run(run):
    """`export` and `eval` read it: it must be the one that the folder's stages were made with."""
    work = Work()
    run.stage("sft", work, settings={"seed": run.recipe.seed})
    other = load_recipe(None, ["seed=7"])
    refused = Run.create(run.path, other)
    with pytest.raises(RunError, match="seed: 42 -> 7"):
        refused.stage("sft", work, settings={"seed": 7})
    assert Run.open(run.path).recipe == Recipe()


def test_a_command_that_does_something_new_leaves_its_recipe(run):
    run.stage("sft", Work(), settings={})
    other = load_recipe(None, ["rounds=5"])
    longer = Run.create(run.path, other)
    longer.stage("sft", Work(), settings={})
    longer.stage("round-4/sft", Work(), settings={})
    assert Run.open(run.path).recipe == other


def test_opening_what_is_no_run(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        Run.open(tmp_path)


# The journal


def test_journal_and_listeners(tmp_path):
    heard: list[dict] = []
    run = Run.create(tmp_path / "run", Recipe(), listeners=(heard.append,))
    run.emit("notice", text='naïve "quotes"\nand a line feed, 5 €')
    run.stage("sft", Work(), settings=SETTINGS)
    run.progress(1, 2, "steps", loss=0.5)
    assert [e["kind"] for e in heard] == ["notice", "stage_started", "stage_finished", "progress"]
    assert heard[3] == {**heard[3], "done": 1, "total": 2, "unit": "steps", "metrics": {"loss": 0.5}}
    assert heard[2]["stage"] == "sft"
    assert heard[2]["metrics"] == {"calls": 1}
    assert events(run) == heard  # a training's steps are kept
    run.progress(1, 2, "rationales")
    assert events(run) == heard[:-1]
    times = [e["time"] for e in heard]
    assert times == sorted(times)


def test_the_journal_grows_over_commands(run):
    run.emit("notice", text="first")
    again(run).emit("notice", text="second")
    assert [e["text"] for e in events(run)] == ["first", "second"]


# Helpers


def test_flatten():
    assert flatten({"b": {"y": 1, "x": [2]}, "a": None}) == [("a", None), ("b.x", [2]), ("b.y", 1)]


def test_write_json_never_leaves_half_a_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"number": 1})
    with pytest.raises(TypeError):
        write_json(path, {"number": 2, "object": object()})
    assert read_json(path) == {"number": 1}


# Disks


def test_a_full_disk_costs_nothing_that_was_made(small_disk):
    folder = small_disk(2**20)
    run = Run.create(folder / "run", Recipe())
    run.stage("data", Work(), settings={})
    ballast = folder / "ballast"

    def fills(out: Path) -> dict:
        shard = out / UNFINISHED / "shard"
        if shard.exists():
            return {"found": shard.read_text()}
        shard.write_text("drawn")
        ballast.write_bytes(bytes(2**21))
        return {}

    with pytest.raises(OSError, match="No space left") as full:
        run.stage("samples", fills, settings={}, resumes=True)
    assert str(of_disk(full.value)).startswith("the disk is full")
    ballast.unlink()
    resumed = again(run)
    resumed.stage("data", Work(), settings={})
    assert resumed.stage("samples", fills, settings={}, resumes=True).metrics == {"found": "drawn"}
    assert [e["stage"] for e in events(run) if e["kind"] == "stage_skipped"] == ["data"]


def test_a_read_only_disk_is_told_as_such(small_disk):
    folder = small_disk(2**21)
    run = Run.create(folder / "run", Recipe())
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    with pytest.raises(OSError, match="Read-only") as refused:
        run.stage("data", Work(), settings={})
    assert str(of_disk(refused.value)).endswith("cannot be written (Read-only file system); make its folder writable")
    with pytest.raises(RunError, match=r"--out: .* cannot be written \(Read-only file system\)"):
        Run.create(folder / "other", Recipe())
