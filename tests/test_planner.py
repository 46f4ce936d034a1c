"""The planner: what it chooses, what it counts, and what it says when nothing fits."""

import re

import pytest
import yaml

from dpost_lite.errors import ModelError, RecipeError
from dpost_lite.models.shapes import BASES
from dpost_lite.planner import (
    GIB,
    MIN_ROWS,
    find_shape,
    fit_to_gpu,
    make_plan,
    parse_memory,
    pick_base,
    plan_for,
    weight_bytes,
)  # fmt: skip
from dpost_lite.recipe import Recipe, load_recipe, recipes_dir

SIZES = ("6GB", "8GB", "12GB", "16GB", "24GB", "32GB", "48GB", "80GB")
GPU_RECIPES = sorted(path.stem for path in recipes_dir().glob("*gb.yaml"))


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
    budget, recipe = parse_memory(size), Recipe()
    plan = pick_base(recipe, budget)
    assert all(stage.peak_bytes <= budget for stage in plan.stages)
    assert plan == make_plan(recipe, plan.shape, budget)
    assert plan.samples_merged
    assert not BASES[plan.shape.name].is_gated
    smaller = [pick_base(recipe, parse_memory(other)) for other in SIZES[: SIZES.index(size)]]
    assert all(other.shape.num_parameters <= plan.shape.num_parameters for other in smaller)


def test_the_effective_batch_never_changes():
    for size in SIZES:
        for name in ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-0.6B-Base"):
            plan = make_plan(Recipe(), find_shape(name), parse_memory(size))
            for stage in plan.stages:
                if "micro-batch" in stage.choices:
                    assert stage.choices["micro-batch"] * stage.choices["accumulation"] == 128


def test_parts_add_up_and_are_what_they_are_called():
    recipe, shape = Recipe(), find_shape("meta-llama/Llama-3.1-8B")
    plan = make_plan(recipe, shape, parse_memory("24GB"))
    sft, sampling, dpo, _ = plan.stages
    assert sft.peak_bytes == sum(sft.parts.values())
    assert sft.parts["weights"] / 1e9 == pytest.approx(0.5 * 6.98 + 0.016 * 6.98 + 2 * 1.05, rel=0.01)
    assert sampling.parts["weights"] / 1e9 == pytest.approx(16.06, rel=0.01)
    assert dpo.parts["adapters"] == 2 * sft.parts["adapters"] == 8 * shape.num_lora(16)
    micro = dpo.choices["micro-batch"]
    one_copy = 2 * micro * 640 * 128_256 * 4  # papers.md: 657 MB of float32 logits for a pair of Llama-3's
    assert one_copy / micro == pytest.approx(657e6, rel=0.01)
    assert dpo.parts["logits"] > 2 * one_copy  # with their gradient
    # 0.125 MiB of cache a position, the shape's known figure
    positions = sampling.parts["cache"] / (shape.cache_position_values * 2)
    assert shape.cache_position_values * 2 == 2**17
    rows = sampling.choices["rows"]
    assert rows * 300 < positions < rows * 556


def test_cache_bytes_are_the_engines(model_of):
    torch = pytest.importorskip("torch")
    from dpost_lite.models.shapes import shape_of
    from dpost_lite.sampling.kvcache import position_bytes

    for family in ("llama", "qwen3", "gemma2"):
        config = model_of(family).config
        assert shape_of(config.to_dict(), family).cache_position_values * 2 == position_bytes(config, torch.bfloat16)


def test_less_memory_means_smaller_micro_batches_then_fewer_rows_then_four_bits():
    recipe, shape = Recipe(), find_shape("Qwen/Qwen3-8B-Base")
    plans = [make_plan(recipe, shape, parse_memory(size)) for size in ("80GB", "48GB", "24GB", "16GB")]
    for stage in (0, 2):
        micro = [plan.stages[stage].choices["micro-batch"] for plan in plans]
        assert micro == sorted(micro, reverse=True)
        assert micro[0] > micro[-1]
    assert [plan.stages[1].choices["weights"] for plan in plans] == ["merged"] * 3 + ["quantized"]
    assert plans[-1].stages[3].choices["device"] == "CPU"
    assert all(plan.stages[1].choices["rows"] >= MIN_ROWS for plan in plans)


def test_a_model_that_does_not_fit_says_which_does():
    with pytest.raises(
        ModelError, match=r"Qwen3-14B-Base needs at least \d+\.\d GiB for \w+.*; Qwen/Qwen3-1.7B-Base fits"
    ):
        make_plan(Recipe(), find_shape("Qwen/Qwen3-14B-Base"), parse_memory("8GB"))


def test_a_size_that_fits_nothing_says_what_the_smallest_plan_would_be():
    with pytest.raises(ModelError, match="SmolLM2-135M needs at least") as caught:
        pick_base(Recipe(), parse_memory("1GB"))
    named = float(re.search(r"at least (\d+\.\d) GiB", str(caught.value))[1])
    smallest = pick_base(Recipe(), (named + 0.1) * GIB)  # what is named is enough, and not much less would be
    assert smallest.shape.name.endswith("SmolLM2-135M")
    with pytest.raises(ModelError):
        pick_base(Recipe(), (named - 0.1) * GIB)


def test_unquantised_weights_are_counted_in_16_bit():
    shape = find_shape("Qwen/Qwen3-4B-Base")
    recipe = load_recipe(None, ["model.quantization=none"])
    assert weight_bytes(recipe, shape) == 2 * shape.num_parameters
    assert weight_bytes(Recipe(), shape) < 0.4 * weight_bytes(recipe, shape)
    plan = make_plan(recipe, shape, parse_memory("24GB"))
    assert plan.stages[1].choices["weights"] == "merged"


def test_overrides_are_keys_of_the_recipe_and_say_what_was_planned():
    plan = make_plan(Recipe(), find_shape("Qwen/Qwen3-1.7B-Base"), parse_memory("8GB"))
    recipe = load_recipe(None, plan.settings)
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
    free = load_recipe(None, [f"sampling.samples_for_labels={recipe.sampling.samples_for_labels}"])
    plan = make_plan(free, find_shape(recipe.model.name), parse_memory(size[1]))
    expected = load_recipe(
        None,
        [f"sampling.samples_for_labels={recipe.sampling.samples_for_labels}", *plan.settings],
    )  # fmt: skip
    assert recipe == expected
    table = (recipes_dir() / "README.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if f"`{name}`" in line)
    for stage in plan.stages:
        assert f"{stage.peak_bytes / GIB:.1f} GiB" in row
    if name.startswith("gsm8k"):
        assert pick_base(free, parse_memory(size[1])).shape.name == recipe.model.name
    given = yaml.safe_load((recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8"))
    lines = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    keys = sum(len(section) for section in given.values())
    assert sum("  #" in line for line in lines) == keys  # one comment a key


def test_the_model_is_the_recipes_then_the_begun_runs_then_the_largest():
    """With "auto" a resumed run meets other free memory: it keeps its base."""
    named = load_recipe(None, ["model.name=Qwen/Qwen2.5-0.5B"])
    assert plan_for(Recipe(), "24GB").shape.name == "Qwen/Qwen3-8B-Base"
    assert plan_for(Recipe(), "24GB", base="Qwen/Qwen3-4B-Base").shape.name == "Qwen/Qwen3-4B-Base"
    assert plan_for(named, "24GB", base="Qwen/Qwen3-4B-Base").shape.name == "Qwen/Qwen2.5-0.5B"


@pytest.mark.gpu
def test_a_gpu_is_held_to_the_size():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    fit_to_gpu(Recipe(), "6GB")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(7 * GIB, dtype=torch.uint8, device="cuda")
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_local_folder_is_planned_from_its_config(model_of, tmp_path):
    model_of("llama").config.save_pretrained(tmp_path)
    assert find_shape(str(tmp_path)).num_layers == 2
    with pytest.raises(ModelError, match=r"model\.name"):
        find_shape(str(tmp_path / "none"))
