"""The checks of a GPU's memory, made on the CPU as far as it has what they check."""

import itertools
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from dpost_lite.pipeline import gpu_memory  # noqa: E402
from dpost_lite.pipeline.gpu_checks import SHAPE, save_base  # noqa: E402
from dpost_lite.planner.device import card  # noqa: E402

NOWHERE = Path("/nowhere")  # of checks that write no files


@pytest.mark.parametrize(("holds", "state"), [(True, "ok"), (False, "note")])
def test_a_cap_is_tried_with_an_allocation_above_it(monkeypatch, holds, state):
    shares, asked = [], []

    def allocate(num_bytes):
        asked.append(num_bytes)
        if holds and sum(asked) > gpu_memory.CAP_BYTES:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**33, 2**34))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(gpu_memory, "_allocate", allocate)
    assert gpu_memory.memory_cap("cuda", NOWHERE).state == state
    assert shares == [gpu_memory.CAP_BYTES / 2**34]


def test_an_allocation_below_the_cap_that_fails_says_nothing_about_the_cap(monkeypatch):
    def allocate(num_bytes):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 2**34))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: None)
    monkeypatch.setattr(gpu_memory, "_allocate", allocate)
    with pytest.raises(torch.OutOfMemoryError):
        gpu_memory.memory_cap("cuda", NOWHERE)


@pytest.mark.parametrize(("measured", "state"), [(1.1, "ok"), (0.9, "ok"), (1.2, "note"), (0.8, "note")])
def test_a_peak_more_than_15_percent_off_the_plan_is_a_note_with_both_figures(measured, state):
    found = gpu_memory.compare_peaks({"SFT": 100 * 2**20, "DPO": 2**30}, {"SFT": measured * 100 * 2**20, "DPO": 2**30})
    assert found.state == state
    assert f"SFT {measured * 100:.0f} MiB (planned 100 MiB, {measured - 1:+.0%})" in found.text
    assert "DPO 1024 MiB (planned 1024 MiB, +0%)" in found.text


def test_the_steps_whose_memory_is_measured_run(tmp_path, monkeypatch):
    """On a few tokens: a CPU has no peak to read, but what is measured on a GPU is this code."""
    for name, value in {"LENGTH": 80, "NEW_TOKENS": 8, "ROWS": 8}.items():
        monkeypatch.setattr(gpu_memory, name, value)
    peaks = itertools.count(1)
    done = []
    monkeypatch.setattr(gpu_memory, "_peak", lambda step, folder: done.append(step(folder)) or next(peaks))
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, ones=torch.ones, **given: ones(*size, **given))
    save_base(tmp_path / "base", SHAPE)
    assert gpu_memory.measured_peaks(tmp_path) == {"SFT": 1, "DPO": 2, "sampling": 3}
    assert done == [None] * 3


def test_the_planned_peaks_are_those_of_the_real_steps(monkeypatch):
    """As counted on fake tensors, so that a note says something about the GPU and not about this small shape."""
    sys.path.append(str(Path(__file__).parents[1] / "bench"))
    from dry_run import _dry_sampling, _dry_training

    recipe, shape, work, device = gpu_memory.RECIPE, gpu_memory.LARGE_SHAPE, gpu_memory.WORK, card(8e9)
    found = {
        "SFT": _dry_training("sft", recipe, shape, device, recipe.sft.micro_batch_size, work.longest),
        "DPO": _dry_training("dpo", recipe, shape, device, recipe.dpo.micro_batch_size, work.longest),
        "sampling": _dry_sampling(recipe, shape, work, device, gpu_memory.ROWS, is_merged=True),
    }
    for name, planned in gpu_memory.planned_peaks(2).items():
        assert planned == pytest.approx(found[name].peak, rel=0.1), name
