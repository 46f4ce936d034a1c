"""The planner: what it chooses, what it counts, and what it says when nothing fits."""

import os
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import yaml

from dpost_lite.errors import ModelError, OutOfMemory, RecipeError
from dpost_lite.models.shapes import BASES
from dpost_lite.pipeline.worker import run_in_child
from dpost_lite.planner import device as device_module
from dpost_lite.planner import footprint
from dpost_lite.planner.device import GIB, Device, card, find_device, parse_memory
from dpost_lite.planner.footprint import longest_row, weight_bytes
from dpost_lite.planner.pace import Pace
from dpost_lite.planner.plan import MIN_ROWS, find_shape, make_plans, pick_base, plan_for, settings_of
from dpost_lite.planner.workload import GSM8K, workload_of
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe, recipes_dir
from dpost_lite.runs.stage_names import StageName
from dpost_lite.sampling.request import max_prompts

SIZES = ("6GB", "8GB", "12GB", "16GB", "24GB", "32GB", "48GB", "80GB")
GPU_RECIPES = sorted(path.stem for path in recipes_dir().glob("*gb.yaml"))


def stage(name: str) -> StageName:
    found = StageName.parse(name)
    assert found is not None
    return found


def planned(recipe, name, size):
    (plan,) = make_plans([(recipe, workload_of(recipe))], find_shape(name), card(parse_memory(size)))
    return plan


def picked(recipe, size):
    device = card(parse_memory(size) if isinstance(size, str) else size)
    (plan,) = pick_base([(recipe, workload_of(recipe))], device)
    return plan


def planned_for(recipe, size, **options):
    (plan,) = plan_for([recipe], size, **options)
    return plan


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def whole_logits(monkeypatch):
    """An older trl, which holds all logits at once."""
    monkeypatch.setattr(footprint, "version", lambda _: "1.14.2")


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("24GiB", 24 * GIB), ("7.5 gib", 7.5 * GIB), ("800MB", 8e8), ("24G", 24e9)]
)
def test_sizes_are_read(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "-3GB", "24GBs", "much", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError, match="--gpu-mem"):
        parse_memory(text)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_picked_fits_and_a_larger_card_takes_no_smaller_model(size):
    recipe = Recipe()
    plan = picked(recipe, size)
    assert all(stage.peak_bytes <= parse_memory(size) for stage in plan.stages)
    assert plan == planned(recipe, plan.shape.name, size)
    assert plan.samples_merged
    assert not BASES[plan.shape.name].is_gated
    smaller = [picked(recipe, other) for other in SIZES[: SIZES.index(size)]]
    assert all(other.shape.num_parameters <= plan.shape.num_parameters for other in smaller)


def test_the_effective_batch_never_changes():
    for size in SIZES:
        for name in ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-0.6B-Base"):
            plan = planned(Recipe(), name, size)
            for stage in plan.stages:
                if "micro-batch" in stage.choices:
                    assert stage.choices["micro-batch"] * stage.choices["accumulation"] == 128


def test_parts_add_up_and_are_what_they_are_called(whole_logits):
    recipe, shape = Recipe(), find_shape("meta-llama/Llama-3.1-8B")
    plan = planned(recipe, shape.name, "24GB")
    sft, sampling, dpo, _ = plan.stages
    assert sft.peak_bytes == sum(sft.parts.values())
    assert sft.parts["weights"] / 1e9 == pytest.approx(0.5 * 6.98 + 0.016 * 6.98 + 2 * 1.05, rel=0.01)
    assert sampling.parts["weights"] / 1e9 == pytest.approx(16.06, rel=0.01)
    assert dpo.parts["adapters"] == 2 * sft.parts["adapters"] == 8 * shape.num_lora(16)
    micro = dpo.choices["micro-batch"]
    assert dpo.choices["longest"] == 605  # 10 % over GSM8K's longest, counted without the tokenizer
    one_copy = 2 * micro * 605 * 128_256 * 4  # float32
    assert dpo.parts["logits"] > 2 * one_copy  # with their gradient
    # 0.125 MiB of cache a position, the shape's known figure
    positions = sampling.parts["cache"] / (shape.cache_position_values * 2)
    assert shape.cache_position_values * 2 == 2**17
    rows = sampling.choices["rows"]
    assert rows * 300 < positions < rows * (300 + 240)


@pytest.mark.parametrize("in_chunks", [True, False])
@pytest.mark.parametrize("recomputes", [True, False])
def test_logits_and_a_recomputed_layer_are_never_there_at_once(recomputes, in_chunks):
    """With checkpointing the larger of the two is counted, without it both."""
    recipe, shape, device = Recipe(), find_shape("meta-llama/Llama-3.1-8B"), card(24e9)
    technique = footprint.own_technique(recipe, shape, device)
    assert technique.recomputes
    technique = replace(technique, recomputes=recomputes, in_chunks=in_chunks)
    parts = footprint.training_parts("sft", recipe, shape, GSM8K, device, 8, technique)
    tokens, values = 8 * 605, 4 * (4096 + 4096 + 14_336)
    logits = 4096 * 32_768 * 2 + tokens * 4096 * (4 + 2) if in_chunks else tokens * 128_256 * 12
    layer = tokens * values * 2
    norms = tokens * 12 * 4096  # in float32
    kept = tokens * 32 * 4096 * 2 + max(logits, 2 * layer) if recomputes else 32 * (layer + norms) + logits
    dequantised = 2 * 2 * 4096 * 14_336
    assert parts["activations"] + parts["logits"] == pytest.approx(kept + dequantised)
    assert parts["logits"] == logits


@pytest.mark.parametrize("micro", [1, 16])
def test_the_gradient_of_an_embedding_that_is_the_head_is_held_in_full_precision(micro):
    """From the head's to the embedding's part of the backward pass; both are there at its end."""
    recipe, shape = load_recipe(None, ["model.precision=full"]), find_shape("Qwen/Qwen3-0.6B-Base")
    parts = footprint.training_parts("sft", recipe, shape, GSM8K, card(24e9), micro)
    tokens, gradient = micro * 605, 4 * 151_936 * 1024
    layer = 4 * (2 * (1024 + 2048) + 4 * 3072)
    recomputing = tokens * 28 * 4 * 1024 + tokens * 2 * layer + gradient
    expected = 2 * gradient if micro == 1 else recomputing
    assert parts["activations"] + parts["logits"] == pytest.approx(expected)


def test_a_gpu_that_trains_adapters_keeps_more_in_reserve():
    sft, sampling, dpo, merge = planned(Recipe(), "Qwen/Qwen3-8B-Base", "24GB").stages
    full, *_ = planned(load_recipe(None, ["model.precision=full"]), "HuggingFaceTB/SmolLM2-360M", "24GB").stages
    for stage, share in ((sft, 0.12), (dpo, 0.12), (sampling, 0.06), (merge, 0.06), (full, 0.06)):
        counted = stage.peak_bytes - stage.parts["reserve"]
        assert stage.parts["reserve"] == pytest.approx(device_module.CONTEXT_BYTES + share * counted)


def test_cache_bytes_are_the_engines(model_of):
    torch = pytest.importorskip("torch")
    from dpost_lite.models.shapes import shape_of
    from dpost_lite.sampling.cache import position_bytes

    for family in ("llama", "qwen3", "gemma2"):
        config = model_of(family).config
        assert shape_of(config.to_dict(), family).cache_position_values * 2 == position_bytes(config, torch.bfloat16)


def test_less_memory_means_smaller_micro_batches_then_fewer_rows_then_four_bits():
    recipe, shape = Recipe(), find_shape("Qwen/Qwen3-8B-Base")
    plans = [planned(recipe, shape.name, size) for size in ("80GB", "24GB", "16GB", "12GB")]
    for stage in (0, 2):
        micro = [plan.stages[stage].choices["micro-batch"] for plan in plans]
        assert micro == sorted(micro, reverse=True)
        assert micro[0] > micro[-1]
    assert [plan.stages[1].choices["weights"] for plan in plans] == ["merged"] * 2 + ["quantized"] * 2
    assert plans[-1].stages[3].choices["device"] == "CPU"
    assert all(plan.stages[1].choices["rows"] >= MIN_ROWS for plan in plans)


def test_merged_weights_are_sampled_from_only_where_they_can_be_exported_too():
    """An export takes more than sampling a few rows, if the vocabulary is large and the cache small."""
    recipe, shape = load_recipe(None, ["sampling.max_rows=32"]), find_shape("Qwen/Qwen2.5-7B")
    roomy = planned(recipe, shape.name, "80GB")
    sampling, merge = (roomy.stages[i].peak_bytes for i in (1, 3))
    assert sampling < merge
    for size, weights, on in ((merge, "merged", "CUDA"), (merge - 1, "quantized", "CPU")):
        (plan,) = make_plans([(recipe, workload_of(recipe))], shape, card(size))
        assert (plan.stages[1].choices["weights"], plan.stages[3].choices["device"]) == (weights, on)


def test_a_model_that_does_not_fit_says_which_does():
    with pytest.raises(
        ModelError, match=r"Qwen3-14B-Base needs at least \d+\.\d GiB for \w+.*; Qwen/Qwen3-4B-Base fits"
    ):
        planned(Recipe(), "Qwen/Qwen3-14B-Base", "8GB")


def test_a_size_that_fits_nothing_says_what_the_smallest_plan_would_be():
    with pytest.raises(ModelError, match="SmolLM2-135M needs at least") as caught:
        picked(Recipe(), "1GB")
    named = float(re.search(r"at least (\d+\.\d) GiB", str(caught.value))[1])
    smallest = picked(Recipe(), (named + 0.1) * GIB)  # what is named is enough, and not much less would be
    assert smallest.shape.name.endswith("SmolLM2-135M")
    with pytest.raises(ModelError):
        picked(Recipe(), (named - 0.1) * GIB)


def test_unquantised_weights_are_counted_in_16_bit():
    shape = find_shape("Qwen/Qwen3-4B-Base")
    recipe, gpu = load_recipe(None, ["model.precision=16bit"]), card(24e9)
    assert weight_bytes(recipe, shape, gpu) == 2 * shape.num_parameters
    assert weight_bytes(Recipe(), shape, gpu) < 0.4 * weight_bytes(recipe, shape, gpu)
    plan = planned(recipe, shape.name, "24GB")
    assert plan.stages[1].choices["weights"] == "merged"


def test_the_peak_of_each_stage_is_that_of_its_kind():
    plan = planned(Recipe(), "Qwen/Qwen3-1.7B-Base", "8GB")
    sft, sampling, dpo, merge = (stage.peak_bytes for stage in plan.stages)
    peaks = plan.peaks
    assert peaks["sft-0"] == peaks["round-1/sft"] == sft
    assert peaks["score/base"] == peaks["round-1/samples-pairs"] == peaks["round-3/samples-labels"] == sampling
    assert (peaks["round-2/dpo"], peaks["export"]) == (dpo, merge)
    assert not peaks.keys() & {"data", "round-1/pairs", "round-1/labels"}  # these need no model


@pytest.mark.parametrize(("num_samples", "expected"), [(1, 64), (1.05, 64), (3, 41), (4, 35), (10, 20)])
def test_prompts_are_held_for_all_rows_and_for_those_whose_last_sample_lasts(num_samples, expected):
    """With 10 samples, 1 + 1/2 + … + 1/10 = 2.93 times the 6.4 prompts that fill 64 rows."""
    assert max_prompts(64, num_samples) == expected


def test_top_p_takes_memory_for_sorting():
    """Planner and engine count the same, so that the planned rows are those that run."""
    for top_p, numbers in ((1, 3), (0.9, 10)):
        plan = planned(load_recipe(None, [f"sampling.top_p={top_p}"]), "Qwen/Qwen3-8B-Base", "24GB")
        logits = plan.stages[1].choices["rows"] * plan.shape.vocabulary
        assert plan.stages[1].parts["logits"] == (4 * numbers + 2) * logits  # 2 bytes each where graphs put them


def test_overrides_are_keys_of_the_recipe_and_say_what_was_planned():
    plan = planned(Recipe(), "Qwen/Qwen3-1.7B-Base", "8GB")
    recipe = load_recipe(None, settings_of([plan]))
    assert recipe.sft.micro_batch_size == plan.stages[0].choices["micro-batch"]
    assert recipe.dpo.micro_batch_size == plan.stages[2].choices["micro-batch"]
    assert recipe.sampling.max_rows == plan.stages[1].choices["rows"]
    assert recipe.sampling.memory_gib == pytest.approx(
        sum(plan.stages[1].parts[part] for part in ("cache", "logits")) / GIB, abs=0.01
    )


@pytest.mark.parametrize("name", GPU_RECIPES)
def test_recipes_for_gpus_are_what_the_planner_makes(name):
    """Each fits the size in its name, and holds the planner's own choices."""
    size = re.search(r"(\d+gb)$", name)
    assert size
    recipe = load_recipe(name)
    own = [f"sampling.samples_for_labels={recipe.sampling.samples_for_labels}", f"dpo.gate={recipe.dpo.gate}"]
    own.append(f"sampling.top_k={recipe.sampling.top_k or 'null'}")
    free = load_recipe(None, own)
    plan = planned(free, recipe.model.name, size[1])
    expected = load_recipe(None, [*own, *settings_of([plan])])
    assert recipe == expected
    table = (recipes_dir() / "README.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if f"`{name}`" in line)
    for stage in plan.stages:
        assert f"{stage.peak_bytes / GIB:.1f} GiB" in row
    assert f"{plan.seconds / 3600:.0f} h" in row
    if name.startswith("gsm8k"):
        assert picked(free, size[1]).shape.name == recipe.model.name
    given = yaml.safe_load((recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8"))
    lines = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    keys = sum(len(section) for section in given.values())
    assert sum("  #" in line for line in lines) == keys  # one comment a key


@pytest.mark.parametrize("name", ["flan-t5-base", "flan-t5-base-qlora", "flan-t5-large", "flan-t5-large-qlora"])
def test_the_table_of_flan_t5_is_what_the_planner_counts(name, no_gpu):
    recipe = load_recipe(name)
    lines = (recipes_dir() / "README.md").read_text(encoding="utf-8").splitlines()
    cells = next(line for line in lines if line.startswith(f"| `{name}` |")).split(" | ")[1:]
    for size, cell in zip(("8GB", "12GB", "16GB", "24GB"), cells, strict=True):
        try:
            plan = planned_for(recipe, size)
        except ModelError:
            assert "does not fit" in cell
        else:
            assert f"{plan.largest.peak_bytes / GIB:.1f} GiB, {plan.seconds / 3600:.1f} h" in cell


def test_the_model_is_the_recipes_then_the_begun_runs_then_the_largest(no_gpu):
    """With "auto" a resumed run meets other free memory: it keeps its base."""
    named = load_recipe(None, ["model.name=Qwen/Qwen2.5-0.5B"])
    assert planned_for(Recipe(), "24GB").shape.name == "Qwen/Qwen3-8B-Base"
    assert planned_for(Recipe(), "24GB", base="Qwen/Qwen3-4B-Base").shape.name == "Qwen/Qwen3-4B-Base"
    assert planned_for(named, "24GB", base="Qwen/Qwen3-4B-Base").shape.name == "Qwen/Qwen2.5-0.5B"


@dataclass(frozen=True)
class Take7GiB:
    def run(self, out: Any, progress: Any) -> dict[str, Any]:
        return _take_7_gib(progress)


def _take_7_gib(progress):
    import torch

    return {"bytes": torch.empty(7 * GIB, dtype=torch.uint8, device="cuda").nbytes}


@pytest.mark.gpu
def test_a_gpu_is_held_to_the_size(tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    share = planned_for(Recipe(), "6GB", to_run=True).device.memory_share
    with pytest.raises(OutOfMemory):
        run_in_child(Take7GiB(), tmp_path, log=tmp_path / "log", progress=print, memory_share=share)


def test_a_local_folder_is_planned_from_its_config(model_of, tmp_path):
    model_of("llama").config.save_pretrained(tmp_path)
    assert find_shape(str(tmp_path)).num_layers == 2
    with pytest.raises(ModelError, match=r"model\.name"):
        find_shape(str(tmp_path / "none"))


# --- precision, chunks, CPU ------------------------------------------------------------------------------------------


def test_full_fine_tuning_holds_four_numbers_a_weight_and_no_adapter():
    shape = find_shape("Qwen/Qwen2.5-0.5B")
    recipe = load_recipe(None, ["model.precision=full"])
    plan = planned(recipe, shape.name, "24GB")
    sft, sampling, dpo, _ = plan.stages
    for stage in (sft, dpo):  # float32 weights, gradients and two moments
        assert stage.parts["weights"] + stage.parts["optimiser"] == 16 * shape.num_parameters
        assert stage.parts["adapters"] == 0
    assert dpo.choices["reference"] == "computed beforehand"
    assert sampling.parts["weights"] == 2 * shape.num_parameters
    assert sft.disk_bytes == 4 * 4 * shape.num_parameters  # sft-0 and three rounds


@pytest.mark.parametrize(("size", "base"), [("24GB", "Qwen3-0.6B-Base"), ("80GB", "Qwen3-4B-Base")])
def test_the_papers_design_is_planned_as_its_row_says(size, base):
    plan = picked(load_recipe("full-precision"), size)
    assert plan.shape.name.endswith(base)
    table = (recipes_dir() / "README.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in table if f"`full-precision`, {size[:-2]} GB" in line)
    for stage in plan.stages:
        assert f"{stage.peak_bytes / GIB:.1f} GiB" in row
    assert f"{sum(stage.disk_bytes for stage in plan.stages) / GIB:.0f} GiB | {plan.seconds / 3600:.0f} h" in row


def test_four_bits_take_a_third_of_full_fine_tuning():
    shape = find_shape("meta-llama/Llama-3.1-8B")
    peaks = {}
    for precision in ("4bit", "16bit", "full"):
        recipe = load_recipe(None, [f"model.precision={precision}", "sft.batch_size=1", "dpo.batch_size=1"])
        plan = planned(recipe, shape.name, "500GB")
        peaks[precision] = plan.stages[0].peak_bytes
    assert peaks["4bit"] < peaks["full"] / 3
    assert peaks["4bit"] < 0.6 * peaks["16bit"]


def test_whole_logits_take_more_and_leave_smaller_micro_batches(whole_logits, monkeypatch):
    name = "Qwen/Qwen3-8B-Base"
    whole = planned(Recipe(), name, "24GB")
    monkeypatch.setattr(footprint, "version", lambda _: "1.16.0")
    chunked = planned(Recipe(), name, "24GB")
    for stage in (0, 2):
        assert whole.stages[stage].choices["logits"] == "whole"
        assert chunked.stages[stage].choices["logits"] == "in chunks"
        assert whole.stages[stage].choices["micro-batch"] < chunked.stages[stage].choices["micro-batch"]


def test_lengths_are_those_of_the_data():
    rehearsal, gsm8k = load_recipe("rehearsal"), Recipe()
    short, long = workload_of(rehearsal), workload_of(gsm8k)
    assert (short.num_train, short.num_labelled, short.num_test) == (128, 32, 400)
    assert long == GSM8K
    shape, t5 = find_shape("Qwen/Qwen3-8B-Base"), find_shape("google/flan-t5-base")
    assert longest_row("sft", rehearsal, short, shape) < 200 < longest_row("sft", gsm8k, long, shape) < 640
    limited = load_recipe(None, ["dpo.max_length=100"])
    assert longest_row("dpo", limited, long, shape) == 100
    assert longest_row("dpo", limited, long, t5) == 200  # for each side
    limited = workload_of(load_recipe(None, ["data.limit=64"]))
    assert (limited.num_train, limited.num_dev, limited.num_test) == (64, 64, 64)


@pytest.mark.skipif(not os.environ.get("DPOST_DATA_DIR"), reason="DPOST_DATA_DIR is not set")
def test_known_lengths_of_gsm8k_are_those_of_its_files():
    counted = workload_of(load_recipe(None, [f"data.data_dir={os.environ['DPOST_DATA_DIR']}"]))
    assert (counted.num_train, counted.num_dev, counted.num_test) == (6705, 768, 1319)
    for name in ("prompt", "rationale", "longest_prompt", "longest"):
        assert getattr(GSM8K, name) == pytest.approx(getattr(counted, name), rel=0.01)


def test_a_cpu_is_planned_for_its_own_memory_and_rates(no_gpu):
    plan = planned_for(load_recipe("rehearsal"), "cpu")
    device = plan.device
    assert device.is_cpu
    assert device.memory_share is None
    assert device.flops > 1e9
    assert device.bandwidth > 1e8
    assert plan.shape.num_parameters / 1e6 == pytest.approx(134.5, rel=0.01)
    assert all(stage.ram_bytes == stage.peak_bytes for stage in plan.stages)
    assert plan.stages[0].choices["micro-batch"] == 4  # the recipe's own: a CPU gains nothing from more


def test_training_on_a_cpu_takes_as_long_in_bfloat16_as_in_float32():
    """Only sampling gains from fast products, and emulated ones slow both down."""
    recipe, shape = load_recipe("rehearsal"), find_shape("smollm2-135m-instruct")
    cpu = Device("cpu", 20e9, 2, 1.1e12, 2e10, "", measured_float32_flops=3e11)

    def seconds(device: Device, stage: StageName) -> float:
        (plan,) = make_plans([(recipe, workload_of(recipe))], shape, device)
        return plan.estimates[stage].seconds

    sft, sampling = StageName("sft", 1), StageName("samples-labels", 1)
    assert seconds(cpu, sft) == seconds(cpu.computing("float32"), sft)
    assert seconds(cpu, sampling) < seconds(cpu.computing("float32"), sampling)
    without = Device("cpu", 20e9, 4, 3e11, 2e10, "", measured_float32_flops=3e11)
    for stage in (sft, sampling):
        assert seconds(without.computing("bfloat16"), stage) > seconds(without, stage)


def test_float32_is_no_faster_than_cards_are_sold_with():
    sold = [15.1e12, 29.15e12, 22.06e12, 82.6e12, 104.8e12, 38.7e12, 19.5e12]
    for gb, most in zip(device_module.CARDS, sold, strict=True):
        assert 0.6 * most < card(gb * 1e9).float32_flops <= most


def test_sizes_without_a_gpu_are_those_of_a_card(no_gpu):
    assert find_device("24GB").rates_of == "RTX 4090, not measured here"
    assert find_device("6GB").rates_of == "RTX 4060, not measured here"
    assert find_device("8GiB").memory_bytes == 8 * GIB
    assert find_device("300GB").rates_of == "A100, not measured here"
    with pytest.raises(RecipeError, match="auto: this machine has no CUDA GPU"):
        find_device("auto")


def test_with_a_gpu_auto_is_what_is_free_and_a_size_is_a_share(monkeypatch):
    monkeypatch.setattr(device_module, "this_gpu", lambda: (20e9, 48e9, 1e14, 1e12, 2e13))
    assert find_device("auto").memory_bytes == 20e9
    assert find_device("auto").memory_share is None
    assert find_device("12GB").memory_share == (12e9 - device_module.CONTEXT_BYTES) / 48e9
    assert find_device("24GB").memory_bytes == 20e9  # the rest is taken
    assert find_device("24GB").rates_of == "measured here"
    assert {find_device(size).float32_flops for size in ("auto", "24GB")} == {2e13}
    assert find_device("80GB").rates_of == "A100, not measured here"


def test_a_run_is_not_fitted_to_more_than_the_gpu_has(monkeypatch):
    monkeypatch.setattr("dpost_lite.models.hardware.device", lambda: "cuda")
    monkeypatch.setattr(device_module, "this_gpu", lambda: (7e9, 8e9, 1e14, 1e12, 2e13))
    with pytest.raises(RecipeError, match="this machine's GPU has less; give auto, or a smaller size"):
        planned_for(Recipe(), "24GB", to_run=True)
    assert planned_for(Recipe(), "8GB", to_run=True).device.memory_bytes == 7e9


# --- hours -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pace():
    recipe = Recipe()
    return Pace(recipe, find_shape("Qwen/Qwen3-8B-Base"), GSM8K, card(24e9), num_rows=64, is_merged=True)


def test_every_stage_is_estimated_and_the_stages_add_up():
    plan = planned(Recipe(), "Qwen/Qwen3-8B-Base", "24GB")
    assert sum(stage.total.seconds for stage in plan.stages) == pytest.approx(plan.seconds)
    assert sum(stage.total.tokens for stage in plan.stages) == pytest.approx(
        sum(estimate.tokens for estimate in plan.estimates.values())
    )
    assert {str(name) for name, e in plan.estimates.items() if not e.seconds} == {
        "data", "solved", *(f"round-{i}/{name}" for i in (1, 2, 3) for name in ("pairs", "labels"))
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({}, 1.2),
        ({"pairs.stepwise": 0.5}, 2 * 0.45),  # six problems in ten are cut once, three cuts in four get a wrong rest
        ({"pairs.stepwise": 0.25}, 0.45 + 1.2),  # three times as many ordinary ones are more than there are
        ({"pairs.stepwise": 1}, 0.45),
        ({"method": "scdpo"}, 1.2 + 0.45),
        ({"method": "scdpo", "rests.cut": "every"}, 1.2 + 0.9),
        ({"method": "scdpo", "pairs.stepwise": 0.5}, 1.2 + 0.45),  # without effect
        ({"method": "dpo-equal"}, 1.2 + 0.45),
        ({"method": "dpo", "pairs.stepwise": 0.5}, 1.2),
    ],
)
def test_pairs_are_counted_by_kind(pace, changes, pairs):
    recipe = load_recipe(None, ["dpo.max_steps=1000", *(f"{key}={value}" for key, value in changes.items())])
    assert replace(pace, recipe=recipe).of(stage("round-1/dpo")).tokens == pytest.approx(2 * 6705 * pairs * 188)


def test_work_grows_with_what_there_is_to_do(pace):
    pairs, labels = pace.of(stage("round-1/samples-pairs")), pace.of(stage("round-1/samples-labels"))
    assert pairs.tokens - labels.tokens == pytest.approx(2 * 6705 * 126)  # five samples and three
    assert pace.of(stage("round-2/sft")).tokens > pace.of(stage("round-1/sft")).tokens > pace.of(stage("sft-0")).tokens
    assert pace.of(stage("sft-0")).tokens == 6705 * 2 * (62 + 126)
    assert pace.of(stage("round-1/dpo")).tokens == 2 * 6705 * 1.2 * 188  # fewer pairs than 100 steps of 128 take
    assert pace.of(stage("round-2/dpo")).tokens == 2 * 12_800 * 188
    gate = pace.of(stage("round-1/gate"))
    drawn = 2 * 447 * (3 * 126 + 62)  # two policies, a twentieth of the round's draws
    greedy = 768 * (126 + 62)
    assert gate.tokens == pytest.approx(2 * drawn + greedy)  # for as many dev problems too, and greedy answers to all
    assert gate.seconds < 0.15 * (pairs.seconds + labels.seconds)
    few, none = (replace(pace, work=replace(pace.work, num_dev=n)).of(stage("round-1/gate")).tokens for n in (40, 0))
    assert (few, none) == pytest.approx((drawn + 40 * (2 * (3 * 126 + 62) + 126 + 62), drawn))


def test_labels_from_pairs_make_the_next_sft_longer(pace):
    more = replace(pace, recipe=load_recipe(None, ["labels.from_pairs=true"]))
    first, second = (each.of(stage("round-1/sft")).tokens - each.of(stage("sft-0")).tokens for each in (pace, more))
    assert second == pytest.approx(first * (3 + 5) / 3)


def test_further_test_sets_are_counted_and_scored_for_every_policy(pace, tmp_path):
    """Published sets by their known sizes, files by reading them; other stages take as long as before."""
    file = tmp_path / "hard.jsonl"
    file.write_text("".join(f'{{"question": "How many are {i} and 1?", "answer": "{i + 1}"}}\n' for i in range(30)))
    for given, number in (("svamp,multiarith", 1580), (f"asdiv,{file}", 2125), ("[]", 0)):
        assert workload_of(load_recipe(None, [f"data.also_test={given}"])).num_also == number
    recipe = load_recipe(None, [f"data.also_test=svamp,{file}", "data.test_limit=20"])
    assert workload_of(recipe).num_also == 40
    rehearsal = workload_of(load_recipe("rehearsal", [f"data.also_test={file}"]))
    assert (rehearsal.num_test, rehearsal.num_also) == (400, 30)
    more = replace(pace, work=replace(pace.work, num_also=pace.work.num_test + pace.work.num_dev))
    for policy in ("base", "round-1"):
        assert (
            more.of(stage(f"score-also/{policy}"))
            == pace.of(stage(f"score/{policy}"))
            == more.of(stage(f"score/{policy}"))
        )
    plan = planned(recipe, "Qwen/Qwen3-8B-Base", "24GB")
    names = [str(name) for name in plan.estimates]
    assert names.count("score-also/round-1") == names.count("score-also/base") == 1
    assert plan.estimates[stage("score-also/sft-0")].seconds > 0


def test_a_decode_step_is_bound_by_reading_or_by_arithmetic(pace):
    """Reading the 16.4 GB of weights takes 16 ms at 1008 GB/s, whatever the rows; arithmetic grows with them."""
    from dataclasses import replace

    few, many = (replace(pace, num_rows=n).of(stage("round-1/samples-pairs")).seconds for n in (8, 64))
    assert many < few / 4
    slow = replace(pace, device=replace(pace.device, flops=1e12))
    few, many = (replace(slow, num_rows=n).of(stage("round-1/samples-pairs")).seconds for n in (32, 64))
    assert many > 0.9 * few
