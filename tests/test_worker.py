"""Work in child processes: what comes back, what is printed where, and how each way to die is told."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from dpost_lite.errors import DataError, OutOfMemory, RunError, is_out_of_memory
from dpost_lite.pipeline import worker
from dpost_lite.pipeline.worker import run_in_child
from dpost_lite.system.interrupt import graceful


def double(number: int, progress) -> dict:
    for done in (1, 2):
        progress(done, 2, "halves", right=0.5)
    return {"doubled": 2 * number, "pid": os.getpid()}


def chatter(progress) -> dict:
    print("said by the child")
    os.system("echo said by a grandchild >&2")
    return {}


def own_error(progress) -> dict:
    raise DataError("sft.max_length=3 leaves none")


def bug(progress) -> dict:
    print("before the bug")
    raise KeyError("nothing of that name")


def no_memory(progress) -> dict:
    import torch

    return {"size": torch.empty(2**60, dtype=torch.uint8).numel()}


def killed(progress) -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def leaves(progress) -> dict:
    print("\x1b[31mlast words\n\n", flush=True)
    os._exit(7)


def takes(num_bytes: int, progress) -> dict:
    return {"sum": sum(bytearray(b"\x01" * num_bytes)[:: 2**20])}


def looks_around(name: str, progress) -> dict:
    module = sys.modules.get(name)
    return {"before": module and module.before}


def reports_and_waits(file: Path, progress) -> dict:
    file.write_text(str(os.getpid()))
    progress(1, 2, "halves")
    time.sleep(600)
    return {}


def temporary(progress) -> dict:
    import tempfile

    Path(tempfile.mkstemp()[1]).write_text("left behind")
    return {"folder": tempfile.gettempdir()}


def steps(num: int, progress) -> dict:
    for done in range(num):
        try:
            progress(done, num, "steps")
        except KeyboardInterrupt:
            print("saved")
            raise
        time.sleep(0.02)
    return {"steps": num}


def writes(folder: Path, how: str, progress) -> dict:
    """More than `small_disk` holds, as Python, safetensors (in Rust) and numpy (in C) write."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    if how == "python":
        (folder / "file").write_bytes(bytes(2**22))
    elif how == "safetensors":
        save_file({"a": torch.ones(2**20)}, folder / "file")
    else:
        np.ones(2**19).tofile(folder / "file")
    return {}


def waits(file: Path, progress) -> dict:
    file.write_text(str(os.getpid()))
    time.sleep(600)
    return {}


@dataclass(frozen=True)
class Call:
    """A task that calls one of the functions above."""

    function: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]

    def run(self, out: Path, progress: Callable[..., None]) -> dict[str, Any]:
        return self.function(progress=progress, **self.arguments)


@pytest.fixture
def run(tmp_path):
    """A function: work and its arguments -> what comes back; `run.progress` holds what was reported."""

    def call(work, *, first_import=None, **arguments):
        call.result = run_in_child(
            Call(work, arguments),
            tmp_path,
            log=tmp_path / "logs" / "stage.log",
            progress=lambda *a, **k: call.progress.append((a, k)),
            first_import=first_import,
        )
        return call.result.metrics

    call.progress = []
    return call


def test_work_is_done_elsewhere_and_reports(run, tmp_path):
    value = run(double, number=21)
    assert value["doubled"] == 42
    assert value["pid"] != os.getpid()
    assert run.progress == [((1, 2, "halves"), {"right": 0.5}), ((2, 2, "halves"), {"right": 0.5})]
    assert list((tmp_path / "logs").iterdir()) == []  # nothing was printed


def test_what_is_printed_goes_to_the_log(run, tmp_path, capfd):
    run(chatter)
    said = (tmp_path / "logs" / "stage.log").read_text().splitlines()
    assert sorted(said) == ["said by a grandchild", "said by the child"]
    assert capfd.readouterr() == ("", "")


def test_an_error_that_the_user_can_mend_comes_as_it_is(run):
    with pytest.raises(DataError, match=r"^sft\.max_length=3 leaves none$"):
        run(own_error)


def test_any_other_error_names_the_log_and_its_end(run, tmp_path):
    with pytest.raises(
        RunError,
        match=r"^the work failed, .* report it .*stage\.log ends: KeyError: 'nothing of that name'$",
    ):
        run(bug)
    text = (tmp_path / "logs" / "stage.log").read_text()
    assert "before the bug" in text
    assert "Traceback" in text


def test_a_failed_allocation_is_told_as_such(run):
    with pytest.raises(OutOfMemory, match="can't allocate memory"):
        run(no_memory)


@pytest.mark.parametrize("source", ["CUDA error", "CUDA driver error", "Triton Error [CUDA]"])
def test_an_allocation_outside_pytorchs_allocator_is_recognised(source):
    assert is_out_of_memory(RuntimeError(f"{source}: out of memory"))
    assert not is_out_of_memory(RuntimeError(f"{source}: an illegal memory access was encountered"))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_a_child_killed_by_the_system_is_taken_for_want_of_memory(run):
    with pytest.raises(OutOfMemory, match="when memory runs out"):
        run(killed)


def test_a_child_that_ends_by_itself_is_told_with_its_last_words(run):
    with pytest.raises(RunError, match=r"exit code 7; the same command tries again: .*stage\.log ends: .*last words$"):
        run(leaves)


def test_peak_memory_is_measured_and_returns(run):
    def peak(num_bytes: int) -> int:
        run(takes, num_bytes=num_bytes)
        return run.result.ram_bytes

    small, large = peak(1), peak(300 * 2**20)
    assert large - small > 300 * 2**20  # bytes and their bytearray
    assert peak(1) == pytest.approx(small, rel=0.1)


def test_a_module_can_come_before_the_libraries(run, tmp_path, monkeypatch):
    """As on a GPU, where children start from nothing."""
    monkeypatch.setattr("dpost_lite.pipeline.worker._context", lambda: multiprocessing.get_context("spawn"))
    names = ("transformers", "peft", "trl")
    (tmp_path / "comes_first.py").write_text(f"import sys\nbefore = [n for n in {names} if n in sys.modules]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(looks_around, name="comes_first", first_import="comes_first")["before"] == []
    assert run(looks_around, name="comes_first")["before"] is None


@pytest.mark.parametrize(("given", "seen"), [(None, "0"), ("1,0", "1"), ("GPU-5a", "GPU-5a")])
def test_children_see_one_gpu(monkeypatch, given, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is restored
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr("dpost_lite.models.hardware.device", lambda: "cuda")
    assert worker._context().get_start_method() == "spawn"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_what_a_child_leaves_in_its_temporary_folder_goes_with_it(run):
    assert not Path(run(temporary)["folder"]).exists()


def test_progress_that_fails_ends_the_child(tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        run_in_child(
            Call(reports_and_waits, {"file": tmp_path / "pid"}), tmp_path, log=tmp_path / "a.log", progress=full
        )
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.fixture
def listens():
    """Ctrl-C as a command in the foreground has it, even where these tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_asked_to_stop_the_child_ends_after_its_step(tmp_path, listens):
    """What the command line does at the first Ctrl-C; the child takes no notice of the signal itself."""
    told = []

    def interrupt(*args, **_):
        if args[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), graceful(lambda: told.append(1)):
        run_in_child(Call(steps, {"num": 1000}), tmp_path, log=tmp_path / "a.log", progress=interrupt)
    assert told == [1]
    assert (tmp_path / "a.log").read_text() == "saved\n"


def test_the_second_time_it_stops_at_once(tmp_path, listens):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    started = time.monotonic()
    task = Call(reports_and_waits, {"file": tmp_path / "pid"})
    with pytest.raises(KeyboardInterrupt), graceful(interrupt):
        run_in_child(task, tmp_path, log=tmp_path / "a.log", progress=interrupt)
    assert time.monotonic() - started < 60
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def asked_to_stop(run, work) -> None:
    """Do `work` in a child, with Ctrl-C before it begins; what it returned is not reached."""
    used = {}
    with graceful(lambda: None):
        os.kill(os.getpid(), signal.SIGINT)
        run(work)
        used.update(run.result.used)
    raise AssertionError(used)


def test_work_that_says_nothing_more_is_finished(run, tmp_path, listens):
    """Export, for one: it is kept, and nothing begins after it (see also Run.stage)."""
    with pytest.raises(KeyboardInterrupt):
        asked_to_stop(run, chatter)
    assert "said by the child" in (tmp_path / "logs" / "stage.log").read_text()


def test_a_child_that_dies_when_asked_to_stop_was_stopped(run, listens):
    """As one that Ctrl-C reached before it could turn a deaf ear."""
    with pytest.raises(KeyboardInterrupt):
        asked_to_stop(run, leaves)


def test_in_the_background_the_signal_stays_ignored(run, listens):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with graceful(lambda: pytest.fail("was told")):
        os.kill(os.getpid(), signal.SIGINT)
        assert run(double, number=1)["doubled"] == 2
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("how", ["python", "safetensors", "numpy"])
def test_a_full_disk_is_told_as_such(run, small_disk, how):
    with pytest.raises(RunError, match=r"^the disk is full .*; free some space, then run the same command to resume$"):
        run(writes, folder=small_disk(2**20), how=how)


PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_worker import Call, waits
from dpost_lite.pipeline.worker import run_in_child
if __name__ == "__main__":
    folder = Path({folder!r})
    run_in_child(Call(waits, dict(file=folder / "pid")), folder, log=folder / "a.log", progress=print)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_a_child_does_not_outlive_its_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    parent = subprocess.Popen([sys.executable, str(script)])
    pid = _when(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    child = psutil.Process(int(pid))
    parent.kill()
    parent.wait()
    _when(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def _when(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def test_tasks_are_read_without_the_libraries_that_unsloth_must_precede():
    code = (
        "import sys; import dpost_lite.pipeline.tasks; "
        "print({'transformers', 'peft', 'trl', 'unsloth'} & {name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
