"""How the checks of a GPU are run, recorded and obeyed, with stand-ins for the GPU and for what the checks find."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import dpost_lite

from dpost_lite.errors import ModelError, OutOfMemory, RunError
from dpost_lite.models import hardware
from dpost_lite.models.backend import choose_backend
from dpost_lite.pipeline import gpu_check
from dpost_lite.pipeline.gpu_check import CHECKS, CheckTask, check_once, line, run_checks
from dpost_lite.pipeline.gpu_checks import Outcome
from dpost_lite.recipe import ModelRecipe, Recipe
from dpost_lite.sampling.model_runner import ModelRunner
from dpost_lite.sampling.statistics import Statistics
from dpost_lite.system import gpu_record
from dpost_lite.system.gpu_record import Result, switched_off

BY_NAME = {check.name: check for check in CHECKS}


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path) -> Path:
    """A machine with a GPU by name, and an empty cache; returns the record's file."""
    monkeypatch.setenv("DPOST_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_record, "device_name", lambda: "Test GPU")
    return tmp_path / "cache" / "gpu.json"


def good(device: str, folder: Path) -> Outcome:
    return Outcome("ok", f"equal on {device}")


def bad(device: str, folder: Path) -> Outcome:
    return Outcome("failed", "it differs by 3 nats here")


def missing(device: str, folder: Path) -> Outcome:
    return Outcome("not applicable", "not installed")


def note(device: str, folder: Path) -> Outcome:
    return Outcome("note", "SFT takes 20 % more")


def dies(device: str, folder: Path) -> Outcome:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def hangs(device: str, folder: Path) -> Outcome:
    time.sleep(600)
    raise AssertionError


def breaks(device: str, folder: Path) -> Outcome:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def computes_nan(device: str, folder: Path) -> Outcome:
    raise ModelError("the model computes NaN: its training diverged (lower sft.learning_rate)")


def finds_no_space(device: str, folder: Path) -> Outcome:
    raise OSError(errno.ENOSPC, "No space left on device", str(folder / "model.safetensors"))


def starves(device: str, folder: Path) -> Outcome:
    raise OutOfMemory("CUDA out of memory")


def writes(device: str, folder: Path) -> None:
    (folder / "left").write_text(str(os.getpid()))


def reads(device: str, folder: Path) -> Outcome:
    return Outcome("ok", f"another process: {(folder / 'left').read_text() != str(os.getpid())}")


@pytest.fixture
def in_process(monkeypatch) -> None:
    """Run the parts in this process, for speed."""

    def run(task, out, **_):
        return SimpleNamespace(metrics=task.run(out, print))

    monkeypatch.setattr(gpu_check, "run_in_child", run)


def stand_in(name: str, *parts) -> gpu_check.Check:
    """One of the real checks, which finds what the test says."""
    return replace(BY_NAME[name], parts=tuple((part, None) for part in parts))


def all_with(monkeypatch, **other) -> None:
    """Replace the checks; those that are not given find that all is well."""
    checks = tuple(stand_in(name, other.get(name.replace(" ", "_").replace("-", "_"), good)) for name in BY_NAME)
    monkeypatch.setattr(gpu_check, "CHECKS", checks)


def off(name: str) -> None:
    """Record that a check failed."""
    gpu_record.remember(Result(name, "failed", "it differs", BY_NAME[name].switches_off))


# What is found is said and recorded


@pytest.mark.parametrize(
    ("name", "feature", "cost"),
    [
        ("attention", "attention", "switched off, matrix products compute it, sampling may be slower"),
        ("CUDA graphs", "graphs", "switched off, sampling of small models is slower"),
        ("sampler", "engine", "`run` refuses this GPU; use --gpu-mem cpu, and please report it"),
        ("4-bit layers", "4bit", "`run` refuses 4-bit weights; use --precision 16bit, which needs more memory"),
        ("unsloth", "unsloth", "switched off, the plain backend trains, which is slower"),
    ],
)
def test_a_failed_check_is_one_line_with_its_cost_and_switches_a_feature_off(name, feature, cost, in_process):
    (result,) = run_checks([stand_in(name, bad)])
    assert line(result) == f"✗ {name:<18} failed: it differs by 3 nats here: {cost}"
    assert switched_off() == {feature}
    (result,) = run_checks([stand_in(name, good)])
    assert line(result) == f"✓ {name:<18} equal on cuda"
    assert switched_off() == set()


def test_a_check_that_does_not_apply_switches_nothing_off(in_process):
    (result,) = run_checks([stand_in("unsloth", missing)])
    assert line(result) == f"- {'unsloth':<18} not applicable: not installed"
    assert switched_off() == set()


@pytest.mark.parametrize("name", ["memory cap", "memory"])
@pytest.mark.parametrize("how", [note, dies])
def test_what_only_warns_is_a_note(name, how):
    (result,) = run_checks([stand_in(name, how)])
    assert result.state == "note"
    assert line(result).startswith("! ")
    assert line(result).endswith(f": {BY_NAME[name].remedy}")
    assert switched_off() == set()


@pytest.mark.parametrize(
    ("how", "words"),
    [(dies, "exit code -11"), (breaks, "an illegal memory access was encountered"), (hangs, "stopped after 2 s")],
)
def test_a_check_that_crashes_has_failed_and_the_others_are_made(how, words, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMIT_S", 2.0)
    checks = [stand_in("sampler", good), stand_in("CUDA graphs", how), stand_in("4-bit layers", good)]
    states = {result.name: result for result in run_checks(checks)}
    assert {name: one.state for name, one in states.items()} == {
        "sampler": "ok", "CUDA graphs": "failed", "4-bit layers": "ok",
    }  # fmt: skip
    assert states["CUDA graphs"].text.startswith("the check crashed twice (")
    assert words in states["CUDA graphs"].text
    assert "same command" not in line(states["CUDA graphs"])
    assert "\n" not in line(states["CUDA graphs"])
    assert gpu_record.results() == states
    assert switched_off() == {"graphs"}


def test_a_check_that_crashes_once_is_repeated_and_counts(monkeypatch):
    real, logs = gpu_check._outcome, []

    def dies_at_first(check, device, log):
        logs.append(log)
        return real(stand_in("sampler", dies), device, log) if len(logs) == 1 else real(check, device, log)

    monkeypatch.setattr(gpu_check, "_outcome", dies_at_first)
    (result,) = run_checks([stand_in("sampler", good)])
    assert len(logs) == 2
    assert (result.state, result.text) == ("ok", "equal on cuda")
    assert gpu_record.results() == {"sampler": result}


def test_a_check_without_memory_is_not_recorded_and_made_again(monkeypatch):
    (result,) = run_checks([stand_in("sampler", starves)])
    assert result.state == "note"
    assert "not checked, for want of memory" in line(result)
    assert gpu_record.results() == {}


def test_a_model_that_computes_nan_has_failed():
    (result,) = run_checks([stand_in("sampler", computes_nan)])
    assert line(result) == f"✗ {'sampler':<18} failed: the model computes NaN: {BY_NAME['sampler'].remedy}"


def test_a_full_disk_says_nothing_about_the_gpu():
    with pytest.raises(RunError, match="the disk is full"):
        list(run_checks([stand_in("sampler", finds_no_space)]))
    assert gpu_record.results() == {}


def test_what_was_found_before_the_user_stopped_is_kept_and_the_rest_is_made_next_time(monkeypatch, in_process):
    all_with(monkeypatch, sampler=bad)
    checks = run_checks(gpu_check.CHECKS)
    assert [next(checks).name for _ in range(3)] == ["attention", "CUDA graphs", "sampler"]
    checks.close()
    assert switched_off() == {"engine"}
    said: list[str] = []
    check_once(said.append)
    assert [text.split()[1] for text in said[1:-1]] == ["4-bit", "unsloth", "memory", "memory"]
    assert switched_off() == {"engine"}


def test_parts_of_a_check_share_a_folder_but_no_process():
    (result,) = run_checks([stand_in("unsloth", writes, reads)])
    assert result.text == "another process: True"


def test_only_unsloths_own_step_runs_in_a_process_that_imports_unsloth_first():
    assert [first for _, first in BY_NAME["unsloth"].parts] == [None, "dpost_lite.models.unsloth_backend"]
    others = [first for check in CHECKS if check.name != "unsloth" for _, first in check.parts]
    assert set(others) == {None}
    code = (
        "import sys, pickle; pickle.loads(bytes.fromhex(sys.argv[1]));"
        "print({'transformers', 'peft', 'trl', 'unsloth'} & {name.partition('.')[0] for name in sys.modules})"
    )
    import pickle

    task = pickle.dumps(CheckTask(BY_NAME["unsloth"].parts[1][0], "cuda")).hex()
    found = subprocess.run([sys.executable, "-c", code, task], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# Once per device and versions


def checked() -> bool:
    said: list[str] = []
    check_once(said.append)
    return bool(said)


def test_checks_are_made_once_per_device_and_versions(monkeypatch, in_process):
    all_with(monkeypatch)
    assert checked()
    assert not checked()
    for package in gpu_record.PACKAGES:
        with monkeypatch.context() as patch:
            patch.setattr(gpu_record, "version", lambda name, p=package: "99" if name == p else "1")
            assert checked()
            assert not checked()
    monkeypatch.setattr(gpu_record, "device_name", lambda: "Other GPU")
    assert checked()
    monkeypatch.setattr(gpu_record, "device_name", lambda: "Test GPU")
    assert not checked()  # nothing of it was lost


def test_a_failure_is_of_one_device_and_its_versions(monkeypatch):
    off("CUDA graphs")
    assert switched_off() == {"graphs"}
    with monkeypatch.context() as patch:
        patch.setattr(gpu_record, "version", lambda name: "99")
        assert switched_off() == set()
    monkeypatch.setattr(gpu_record, "device_name", lambda: "Other GPU")
    assert switched_off() == set()


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"KEY": 5}', '{"KEY": [5, {"name": "sampler"}, {"name": 1, "state": "x", "text": 2}]}']
)
def test_a_damaged_record_is_made_anew(monkeypatch, gpu, in_process, text):
    all_with(monkeypatch, CUDA_graphs=bad)
    gpu.parent.mkdir()
    gpu.write_text(text.replace("KEY", gpu_record._key("Test GPU")))
    assert switched_off() == set()
    assert checked()
    assert switched_off() == {"graphs"}
    assert not checked()
    (found,) = json.loads(gpu.read_text()).values()
    assert [one["name"] for one in found] == list(BY_NAME)


def test_a_damaged_line_loses_no_other(gpu):
    off("CUDA graphs")
    written = json.loads(gpu.read_text())
    next(iter(written.values())).append({"name": "sampler", "state": "no such state", "text": ""})
    gpu.write_text(json.dumps(written))
    assert switched_off() == {"graphs"}


# What is switched off


def test_a_fused_kernel_is_used_where_there_is_one_and_it_passed(monkeypatch):
    import torch

    from dpost_lite.sampling.attention import flash_for_cpu, kernel_for, memory_efficient, products_if_many

    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: True)
    assert kernel_for(cuda, bfloat16, 64) is kernel_for(cuda, float16, 64) is memory_efficient
    assert kernel_for(cuda, float32, 64) is kernel_for(cuda, bfloat16, 20) is None
    assert kernel_for(cuda, bfloat16, 64, is_padded=False) is None
    assert kernel_for(torch.device("mps"), bfloat16, 64) is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: including_emulation)
    assert kernel_for(cuda, bfloat16, 64) is None
    assert kernel_for(cuda, float16, 64) is memory_efficient
    off("attention")
    assert kernel_for(cuda, float16, 64) is None
    assert kernel_for(cuda, float16, 64, is_checked=False) is memory_efficient
    for has_amx, of_bfloat16 in ((False, products_if_many), (True, flash_for_cpu)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        assert kernel_for(cpu, bfloat16, 64) is kernel_for(cpu, bfloat16, 20, is_padded=False) is of_bfloat16
        assert kernel_for(cpu, float32, 64) is kernel_for(cpu, float32, 20, is_padded=False) is flash_for_cpu


def test_graphs_that_failed_are_not_used_and_others_are():
    import torch

    config = SimpleNamespace(
        model_type="llama", layer_types=None, is_encoder_decoder=False, head_dim=64, num_key_value_heads=2
    )
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, config=config)

    def has_graphs() -> bool:
        runner = ModelRunner(model, Statistics(), static=None)
        assert runner.static  # steps stay padded
        return runner._has_graphs

    assert has_graphs()
    off("CUDA graphs")
    assert not has_graphs()
    assert ModelRunner(model, Statistics(), static=True, graphs=True)._has_graphs  # the check itself


def test_unsloth_that_failed_is_not_taken_and_asked_for_is_an_error(monkeypatch):
    monkeypatch.setattr(hardware, "device", lambda: "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert choose_backend(ModelRecipe()) == "unsloth"
    off("unsloth")
    assert choose_backend(ModelRecipe()) == "plain"
    assert choose_backend(ModelRecipe(backend="plain")) == "plain"
    with pytest.raises(ModelError, match=r"^model\.backend=unsloth: .* use auto or plain .*`dpost-lite doctor --gpu`$"):
        choose_backend(ModelRecipe(backend="unsloth"))


def test_wrong_four_bit_layers_are_refused_where_they_would_be_used():
    gpu_check.refuse(Recipe(model=ModelRecipe(precision="4bit")))
    off("4-bit layers")
    with pytest.raises(ModelError, match=r"^model\.precision=4bit: .* use --precision 16bit, or test again"):
        gpu_check.refuse(Recipe(model=ModelRecipe(precision="4bit")))
    for precision in ("16bit", "full"):
        gpu_check.refuse(Recipe(model=ModelRecipe(precision=precision)))


# The commands


def a_run(model: Path, *options: str):
    return dpost_lite("run", "--recipe", "rehearsal", "--model", model, *options)


@pytest.mark.parametrize(
    ("check", "options", "words"),
    [("sampler", (), "--gpu-mem cpu"), ("4_bit_layers", ("--precision", "4bit"), "--precision 16bit")],
)
def test_run_checks_first_and_refuses_with_a_way_out(bare_model, monkeypatch, in_process, check, options, words):
    all_with(monkeypatch, **{check: bad})
    result = a_run(bare_model, *options)
    assert result.exit_code == 2, result.output
    assert "Checking Test GPU, which is done once" in result.stdout
    assert result.stdout.count("\n✓ ") == len(CHECKS) - 1
    assert result.stdout.count("\n✗ ") == 1
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr
    assert not Path("runs").exists()
    again = a_run(bare_model, *options)
    assert again.exit_code == 2
    assert "Checking" not in again.stdout


def test_a_run_on_a_cpu_checks_nothing(bare_model, monkeypatch, gpu):
    monkeypatch.undo()
    monkeypatch.setenv("DPOST_LITE_CACHE", str(gpu.parent))
    monkeypatch.setattr(gpu_check, "run_checks", lambda *_: pytest.fail("a check was made"))
    result = a_run(bare_model, "dpo.loss=none_such")  # which the preflight refuses
    assert result.exit_code == 2
    assert "dpo.loss" in result.stderr
    assert "Checking" not in result.stdout
    assert not gpu.exists()


def test_doctor_tests_again_whatever_is_recorded(monkeypatch, in_process):
    all_with(monkeypatch, memory=note)
    off("CUDA graphs")
    result = dpost_lite("doctor", "--gpu")
    assert result.exit_code == 0, result.output
    first, *lines = result.stdout.splitlines()
    assert first == "Checking Test GPU, a minute or two:"
    assert [text[0] for text in lines] == ["✓"] * 6 + ["!"]
    assert switched_off() == set()
    all_with(monkeypatch, CUDA_graphs=bad)
    result = dpost_lite("doctor", "--gpu")
    assert result.exit_code == 1
    assert switched_off() == {"graphs"}


def test_doctor_without_a_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(gpu_record, "device_name", lambda: None)
    result = dpost_lite("doctor", "--gpu")
    assert result.exit_code == 2
    (only,) = result.stderr.splitlines()
    assert only.startswith("dpost-lite: --gpu: PyTorch ")
    assert "finds no CUDA GPU here; install the card's driver" in only


def test_doctor_lists_what_is_recorded_and_how_to_test_again(monkeypatch, in_process):
    from dpost_lite.cli.diagnosis import Finding, _gpu_checks

    (none_yet,) = _gpu_checks()
    assert none_yet.state == "note"
    assert "`dpost-lite doctor --gpu`" in none_yet.value
    list(run_checks([stand_in("sampler", good), stand_in("CUDA graphs", bad), stand_in("unsloth", missing)]))
    first, *others = _gpu_checks()
    assert "`dpost-lite doctor --gpu` tests again" in first.value
    assert others[0] == Finding("  sampler", "equal on cuda", "ok")
    assert (others[1].state, others[1].value.startswith("failed: it differs")) == ("note", True)
    assert others[2] == Finding("  unsloth", "not applicable: not installed", "ok")
    monkeypatch.setattr(gpu_record, "device_name", lambda: None)
    assert list(_gpu_checks()) == []


def test_the_name_of_the_gpu_is_asked_without_taking_its_memory(monkeypatch):
    """In a child process, which on this machine has no GPU to name."""
    import torch

    monkeypatch.undo()
    assert gpu_record.device_name() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu_record._name_in_child.cache_clear()
    assert gpu_record.device_name() is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "of this process")
    assert gpu_record.device_name() == "of this process"
