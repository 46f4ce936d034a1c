"""What the package does to its own process on a machine: how threads wait, and what libraries print."""

import os
import subprocess
import sys

import pytest
import torch

from dpost_lite.models import hardware, loading
from dpost_lite.sampling.sampler import share_gib
from dpost_lite.system import machine

# Threads that wait


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    """The environment as it is where the user has set nothing."""
    for name in machine.WAITING:
        monkeypatch.delenv(name, raising=False)
    variables = dict(os.environ)
    monkeypatch.setattr(machine.os, "environ", variables)
    return variables


def test_threads_sleep_soon_unless_the_user_says_otherwise(environment):
    machine.let_threads_sleep()
    assert int(environment["GOMP_SPINCOUNT"]) < 300_000  # libgomp's own choice
    assert environment["KMP_BLOCKTIME"] == "1"


@pytest.mark.parametrize("name", machine.WAITING)
def test_a_users_setting_wins(environment, name):
    environment[name] = "x"
    before = dict(environment)
    machine.let_threads_sleep()
    assert environment == before


def test_the_command_line_sets_it_before_torch(environment):
    """Seen where it counts: libgomp's own report of what it was started with."""
    code = (
        "import sys; from dpost_lite.cli.app import main\n"
        "assert 'torch' not in sys.modules\n"
        "sys.argv = ['dpost-lite', '--version']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "import torch; torch.ones(2)"
    )
    variables = {**environment, "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this PyTorch has another OpenMP")
    assert "GOMP_SPINCOUNT = '20000'" in done.stderr


# What libraries print


PRINTS = """
import os, subprocess, sys
from dpost_lite.system.quiet import stderr_to
with stderr_to(sys.argv[1]):
    print("from Python", file=sys.stderr)
    os.write(2, b"from below\\n")
    subprocess.run([sys.executable, "-c", "import sys; print('from a child', file=sys.stderr)"], check=True)
    print("on stdout")
print("after", file=sys.stderr)
try:
    with stderr_to(sys.argv[1]):
        1 / 0
except ZeroDivisionError:
    print("the error came out", file=sys.stderr)
"""


def test_stderr_goes_to_the_file_from_python_from_below_it_and_from_children(tmp_path):
    log = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", PRINTS, str(log)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("on stdout\n", "after\nthe error came out\n")
    assert sorted(log.read_text().splitlines()) == ["from Python", "from a child", "from below"]


@pytest.mark.skipif(os.name == "nt", reason="a shell that closes stderr")
def test_a_process_without_stderr_goes_on(tmp_path):
    code = "from dpost_lite.system.quiet import stderr_to\nwith stderr_to('log'): print('done')"
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "done\n"


def test_loading_prints_nothing(base_dir):
    code = (
        "import sys; from pathlib import Path; from dpost_lite.models import loading\n"
        "for precision in ('4bit', '16bit'): loading.load(Path(sys.argv[1]), precision)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(base_dir)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What follows from the machine and not from what is free on it


def test_memory_for_sampling_does_not_follow_what_is_free(monkeypatch):
    import psutil

    real = psutil.virtual_memory()
    before = share_gib(torch.device("cpu"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=2**20, free=2**20))
    assert share_gib(torch.device("cpu")) == before == real.total / 3 / 2**30


@pytest.mark.parametrize("choice", ["float32", "bfloat16"])
def test_the_compute_type_is_what_was_asked_for(base_dir, choice):
    dtype = getattr(torch, choice)
    assert hardware.compute_dtype(choice) is dtype
    for precision in ("4bit", "16bit"):
        model = loading.load(base_dir, precision, compute=choice)
        assert model.get_input_embeddings().weight.dtype is dtype
        logits = model(torch.tensor([[1, 2, 3]])).logits
        assert logits.dtype is dtype
        assert bool(logits.isfinite().all())
    assert loading.load(base_dir, "full", compute=choice).dtype is torch.float32


@pytest.mark.parametrize(("is_multiplied", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_follows_the_processor(monkeypatch, is_multiplied, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_multiplied)
    assert hardware.compute_dtype(on="cpu") is dtype
