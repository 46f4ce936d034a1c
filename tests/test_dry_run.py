"""The planner's bytes beside the real steps on fake tensors (bench/dry_run.py)."""

import gc
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpost_lite.models import adapters, loading
from dpost_lite.models.shapes import BASES
from dpost_lite.planner.device import Device, card, parse_memory
from dpost_lite.planner.footprint import merge_parts
from dpost_lite.planner.workload import workload_of
from dpost_lite.recipe import ModelRecipe
from dpost_lite.recipe_files import load_recipe, recipes_dir
from dpost_lite.sampling.choosing import choose
from dpost_lite.sampling.request import logit_copies

sys.path.append(str(Path(__file__).parents[1] / "bench"))  # last: it has a code.py, as Python has

import dry_run
from dry_run import Dry, Live, compare, smallest_card

TOLERANCE = 0.05
MOVED = 1.5  # times weights and cache, of a decode step with merged weights; Qwen2.5-0.5B, not tested here, has 1.67
GPU_RECIPES = sorted(path.stem for path in recipes_dir().glob("*gb.yaml"))
OTHER_BASES = ["HuggingFaceTB/SmolLM2-360M", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-14B-Base"]  # than those below


def check(recipe, name: str, device: Device) -> None:
    rows = compare(recipe, name, device)
    stages = ["sft", "dpo"] if device.is_cpu else ["sft", "sampling", "dpo"]
    assert [row["stage"] for row in rows] == [*stages, "merge, export"]
    for row in rows:
        off = row["planned"] / row["found"] - 1
        assert abs(off) < TOLERANCE, (
            f"{name} {row['device']} {row['stage']} {row['choices']}: {off:+.1%}, {row['parts']}"
        )
        if row["choices"].get("weights") == "merged":
            assert row["moved"] < MOVED * row["bound"], f"{name} {row['device']}: {row['moved'] / row['bound']:.2f}"


@pytest.mark.parametrize("name", OTHER_BASES)
def test_bases(name):
    """Three, for time; the benchmark takes all."""
    recipe = load_recipe(None)
    check(recipe, name, smallest_card(recipe, name))


@pytest.mark.parametrize("preset", GPU_RECIPES)
def test_every_preset(preset):
    recipe = load_recipe(preset)
    check(recipe, recipe.model.name, card(parse_memory(preset.rpartition("-")[2])))


def test_16_bit_weights():
    recipe = load_recipe(None, ["model.precision=16bit"])
    check(recipe, "Qwen/Qwen2.5-7B", smallest_card(recipe, "Qwen/Qwen2.5-7B"))


@pytest.mark.parametrize(("preset", "size"), [("flan-t5-base", "24GB"), ("flan-t5-base-qlora", "8GB")])
def test_t5(preset, size):
    """Two, for time; the benchmark takes all."""
    recipe = load_recipe(preset)
    check(recipe, recipe.model.name, card(parse_memory(size)))


@pytest.mark.parametrize("device", [card(24e9), replace(dry_run.CPUS[1], memory_bytes=24e9)], ids=dry_run.name_of)
def test_full_precision(device):
    """Of a base whose embedding is its head, so that their gradients are one."""
    check(load_recipe(None, ["model.precision=full"]), "Qwen/Qwen3-0.6B-Base", device)


@pytest.mark.parametrize("device", dry_run.CPUS, ids=dry_run.name_of)
def test_the_rehearsal_on_cpus(device):
    check(load_recipe("rehearsal"), "HuggingFaceTB/SmolLM2-135M", device)


def test_the_compute_type_is_the_recipes(monkeypatch):
    monkeypatch.setattr(dry_run, "dry_training", lambda *_: Dry(1))
    recipe, name = load_recipe(None, ["model.compute_dtype=float32"]), "HuggingFaceTB/SmolLM2-135M"
    _, sampling, *_ = compare(recipe, name, smallest_card(recipe, name))
    assert sampling["planned"] == pytest.approx(sampling["found"], rel=TOLERANCE)


def test_memory_is_counted_from_its_allocation_to_its_end():
    with FakeTensorMode(), (live := Live()):
        first = torch.empty(1000)  # 4000 bytes: 8 blocks of 512
        view = first[10:]
        assert live.now == 4096
        second = first + 1
        del first
        assert live.now == 2 * 4096  # the view holds it
        del view
        assert (live.now, live.peak) == (4096, 2 * 4096)
        assert (live.moved, live.num_operations) == (2 * 4000, 1)
        second[torch.empty(1000, dtype=torch.bool)].sum().item()
        table = torch.empty(100, 8)
        live.moved = 0
        torch.nn.functional.embedding(torch.empty(3, dtype=torch.int64), table)
        assert live.moved == 2 * 3 * 8 * 4  # and not the whole table
        live.moved = 0
        torch.empty(3, 1).expand(3, 100).clone()
        assert live.moved == (3 + 300) * 4  # what is expanded is read once


def test_layers_are_extrapolated():
    few, many = Dry(10.0, 4.0, 7), Dry(13.0, 5.0, 9)
    assert few.with_layers(many, (2, 3), 3) == many
    assert few.with_layers(many, (2, 3), 36) == Dry(10 + 3 * 34, 4 + 34, 7 + 2 * 34)


@pytest.mark.parametrize("vocabulary", [1024, 49_152])
@pytest.mark.parametrize("rank", [8, 256])
@pytest.mark.parametrize("device", [card(24e9), *dry_run.CPUS], ids=dry_run.name_of)
def test_merging_saving_or_proving_takes_most(device, rank, vocabulary):
    """Of a small model, whose adapter or vocabulary may be large."""
    shape = replace(BASES["HuggingFaceTB/SmolLM2-135M"].shape, num_layers=4, vocabulary=vocabulary)
    recipe = load_recipe(None, [f"lora.rank={rank}", "sampling.max_new_tokens=16"])
    work = replace(workload_of(recipe), longest_prompt=16)
    found = dry_run._dry_merging(recipe, shape, work, device).peak
    assert sum(merge_parts(recipe, shape, device).values()) == pytest.approx(found, rel=TOLERANCE)


def test_a_merge_of_four_bits_takes_no_more_than_one_of_sixteen(base_dir, policy_dir, monkeypatch):
    """With real weights, once the base is loaded: what is dequantised is freed at once."""

    def load(*given, **options):
        model = loading.load(*given, **options)
        for tensor in [*model.parameters(), *model.buffers()]:
            live.hold(tensor.data)
        live.peak = live.now
        return model

    monkeypatch.setattr(adapters, "load", load)
    peaks = {}
    gc.disable()
    try:
        for precision in ("4bit", "16bit"):
            with Live() as live:
                adapters.load_merged(base_dir, policy_dir, ModelRecipe(precision=precision))
            peaks[precision] = live.peak
    finally:
        gc.enable()
    assert peaks["4bit"] == pytest.approx(peaks["16bit"], rel=0.01)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("vocabulary", [49_152, 151_936])  # with and without whole blocks
def test_tokens_are_chosen_with_as_many_copies_of_the_logits_as_are_counted(vocabulary, top_p, temperature):
    num_rows = 64
    settings = {"temperature": temperature, "top_k": None, "top_p": top_p, "seed": 0, "step": 0}
    with dry_run.stand_ins(), FakeTensorMode():
        logits = torch.empty(num_rows, vocabulary, dtype=torch.bfloat16)
        with Live() as live:
            live.hold(logits)
            before = live.now
            choose(logits, **{name: [value] * num_rows for name, value in settings.items()})
    copies = (live.peak - before) / (logits.numel() * 4)
    assert 1 < copies < logit_copies(top_p) + 0.1
