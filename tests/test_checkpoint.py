"""A training that was stopped resumes at its step and ends like an unbroken one; checkpoints are whole or not there."""

import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_training import run_dpo, run_sft

from dpost_lite.errors import DpostError, ModelError
from dpost_lite.models import checkpoint as checkpoint_module
from dpost_lite.models.checkpoint import Checkpoints, _unshared, random_state, set_random_state
from dpost_lite.models.training import check_loss_of_step
from dpost_lite.runs.folder import UNFINISHED

SFT = {"epochs": 4, "batch_size": 4, "micro_batch_size": 1, "num": 11, "learning_rate": 1e-2}  # 3 steps to an epoch
DPO = {"epochs": 2, "batch_size": 4, "micro_batch_size": 2, "num": 11, "learning_rate": 1e-3}  # the same


@pytest.fixture
def train(base_dir, prompter, policy_dir, full_dir):
    """A function: (kind, precision, folder, **options) -> the figures of a small training."""

    def run(kind, precision, out, **options):
        if kind == "sft":
            return run_sft(base_dir, prompter, out, precision=precision, **{**SFT, **options})
        policy = full_dir if precision == "full" else policy_dir
        return run_dpo(base_dir, prompter, policy, out, precision=precision, **{**DPO, **options})

    return run


def stop_at(step):
    """A progress function that is interrupted after a step, as by Ctrl-C; `steps` are those it heard of."""

    def progress(done, total, unit, **_):
        progress.steps.append(done)
        if done == step:
            raise KeyboardInterrupt

    progress.steps = []
    return progress


def weights(folder):
    (path,) = folder.glob("*model.safetensors")
    return path.read_bytes()


@pytest.mark.parametrize(
    ("kind", "precision", "step"),
    [
        ("sft", "4bit", 1),
        ("sft", "4bit", 3),  # an epoch's end
        ("sft", "4bit", 5),
        ("sft", "4bit", 9),
        ("sft", "full", 2),
        ("dpo", "4bit", 4),
        ("dpo", "full", 3),
    ],
)
def test_a_stopped_training_ends_like_an_unbroken_one(train, tmp_path, kind, precision, step):
    expected = train(kind, precision, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        train(kind, precision, tmp_path / "stopped", progress=stop_at(step))
    assert [path.name for path in (tmp_path / "stopped" / UNFINISHED).iterdir()] == [f"checkpoint-{step}"]
    random.seed(0)  # as in another process
    np.random.seed(0)
    torch.manual_seed(0)
    resumed = stop_at(None)
    assert train(kind, precision, tmp_path / "stopped", progress=resumed) == expected
    assert resumed.steps == list(range(step + 1, expected["steps"] + 1))
    assert weights(tmp_path / "stopped") == weights(tmp_path / "unbroken")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_training_goes_on_in_smaller_micro_batches(train, tmp_path, kind):
    """As it does when memory ran out: the steps that are left see the same rows."""

    def watch(stops_at=None):
        def progress(done, total, unit, *, loss, **_):
            losses[done] = loss
            if done == stops_at:
                raise KeyboardInterrupt

        losses = {}
        return losses, progress

    unbroken, progress = watch()
    train(kind, "4bit", tmp_path / "unbroken", micro_batch_size=4, progress=progress)
    _, progress = watch(stops_at=2)
    with pytest.raises(KeyboardInterrupt):
        train(kind, "4bit", tmp_path / "stopped", micro_batch_size=4, progress=progress)
    resumed, progress = watch()
    train(kind, "4bit", tmp_path / "stopped", micro_batch_size=1, progress=progress)
    assert resumed == pytest.approx({step: loss for step, loss in unbroken.items() if step > 2}, rel=1e-2)


def test_stopped_after_the_last_step_there_is_nothing_to_go_on_with(train, tmp_path):
    figures = train("sft", "4bit", tmp_path, progress=stop_at(12))
    assert figures["steps"] == 12
    assert not (tmp_path / UNFINISHED).exists()


def test_checkpoints_come_by_time_and_only_the_newest_is_kept(train, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "LARGEST_SHARE", 1e9)  # however long writing takes
    left = []

    def progress(done, total, unit, **_):
        left.append(sorted(path.name for path in (tmp_path / UNFINISHED).iterdir()))

    train("sft", "4bit", tmp_path, progress=progress, checkpoint_s=0)
    assert left == [[f"checkpoint-{step}"] for step in range(1, 13)]


def test_writing_takes_a_hundredth_of_the_time_at_most(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now[0])
    model = torch.nn.Linear(500, 500_000, bias=False, device="meta")  # 1e9 bytes of weights, 3e9 in all
    checkpoints = Checkpoints(SimpleNamespace(model=model), Path(), interval_s=60)  # 6 s at the assumed rate
    due = [seconds for seconds in range(0, 1000, 10) if now.__setitem__(0, seconds) or checkpoints.is_due()]
    assert due[0] == 600


def test_a_checkpoint_that_was_being_written_is_passed_over(train, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train("sft", "4bit", tmp_path, progress=stop_at(2))
    half = tmp_path / UNFINISHED / "checkpoint-3.partial"
    shutil.copytree(tmp_path / UNFINISHED / "checkpoint-2", half)
    (half / "state.json").unlink()
    resumed = stop_at(None)
    train("sft", "4bit", tmp_path, progress=resumed)
    assert resumed.steps[0] == 3


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(train, tmp_path, name):
    with pytest.raises(KeyboardInterrupt):
        train("sft", "4bit", tmp_path, progress=stop_at(2))
    path = tmp_path / UNFINISHED / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DpostError, match=r"checkpoint-2.* is damaged .* remove it"):
        train("sft", "4bit", tmp_path)


def test_a_loss_that_jumps_after_a_checkpoint_stops_the_training(train, tmp_path):
    """The weights of a model that learned nothing, under the log of one that did."""
    from safetensors.torch import load_file, save_file

    long = {"epochs": 12}
    with pytest.raises(KeyboardInterrupt):
        train("sft", "4bit", tmp_path, progress=stop_at(30), **long)
    path = tmp_path / UNFINISHED / "checkpoint-30" / "state.safetensors"
    save_file({k: v * 0 if k.startswith("weight.") else v for k, v in load_file(path).items()}, path)
    log = path.with_name("trainer_state.json")
    state = json.loads(log.read_text())
    for entry in state["log_history"]:
        entry["loss"] = 0.1
    log.write_text(json.dumps(state))
    with pytest.raises(
        ModelError, match=r"at step 31 of 36, the first after checkpoint-30, the loss is .* at most 0\.1"
    ):
        train("sft", "4bit", tmp_path, **long)


@pytest.mark.parametrize(("loss", "stops"), [(0.3, False), (1.2, False), (2.1, True), (math.nan, True)])
def test_what_counts_as_a_jump(tmp_path, loss, stops):
    history = [{"loss": 0.4}, {"loss": 0.3}, {"other": 1}, {"loss": loss}]
    state = SimpleNamespace(global_step=3, max_steps=9, log_history=history)
    if stops:
        with pytest.raises(ModelError):
            check_loss_of_step(state, tmp_path / "checkpoint-2")
    else:
        check_loss_of_step(state, tmp_path / "checkpoint-2")
    if math.isfinite(loss):
        check_loss_of_step(state, tmp_path / "checkpoint-1")  # not the first step after it
        check_loss_of_step(state, None)


def test_a_diverged_training_leaves_its_last_good_checkpoint(train, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "LARGEST_SHARE", 1e9)
    broken = []

    def progress(done, total, unit, **_):
        if done == 3:
            for parameter in broken[0]._trained.values():
                parameter.data.fill_(math.nan)

    real = Checkpoints.__init__

    def remember(self, *args, **kwargs):
        broken.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "__init__", remember)
    with pytest.raises(ModelError, match="the loss is nan at step 4"):
        train("sft", "4bit", tmp_path, progress=progress, checkpoint_s=0)
    assert [path.name for path in (tmp_path / UNFINISHED).iterdir()] == ["checkpoint-3"]
    broken[0].save()  # weights that are no numbers are not kept
    assert [path.name for path in (tmp_path / UNFINISHED).iterdir()] == ["checkpoint-3"]


def test_random_states_come_back_through_json():
    state = json.loads(json.dumps(random_state()))
    drawn = random.random(), np.random.random(), torch.rand(1).item()
    set_random_state(state)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == drawn


def test_tensors_that_share_memory_are_parted():
    """As the 8-bit optimiser's quantiles do, which a CPU cannot show."""
    shared = torch.arange(4)
    parted = _unshared({"a": shared, "b": shared})
    assert parted["a"].data_ptr() != parted["b"].data_ptr()
    assert parted["a"].tolist() == parted["b"].tolist() == [0, 1, 2, 3]
