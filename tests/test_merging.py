"""Merging tensor by tensor: the same weights as peft's merge, in the memory of a few tensors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_gguf import llama_logits, relative_error, torch_logits
from tiny_training import model_recipe

from dpost_lite.errors import ExportError, ModelError
from dpost_lite.local import gguf
from dpost_lite.models import adapters
from dpost_lite.models.merging import TensorMerge, is_plain_lora
from dpost_lite.pipeline.export import export_gguf
from dpost_lite.recipe_files import load_recipe
from dpost_lite.report import proof


def merged_tensors(base_dir: Path, adapter_dir: Path | None, recipe) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    merge = TensorMerge(recipe, adapter_dir)
    merge.check(gguf.names_in_gguf(base_dir))
    return {name: merge(name, values) for name, values in load_file(base_dir / "model.safetensors").items()}


@pytest.mark.parametrize("has_adapter", [True, False])
@pytest.mark.parametrize("precision", ["4bit", "16bit"])
def test_the_merge_is_that_of_peft(base_dir, policy_dir, precision, has_adapter):
    recipe, adapter = model_recipe(precision, "float32"), policy_dir if has_adapter else None
    expected = adapters.load_merged(base_dir, adapter, recipe, on="cpu").state_dict()
    found = merged_tensors(base_dir, adapter, recipe)
    assert found.keys() == expected.keys()
    original = merged_tensors(base_dir, None, model_recipe("16bit", "float32"))
    changed = set()
    for name, values in found.items():
        assert torch.allclose(values.float(), expected[name], rtol=0, atol=1e-6), name
        if not torch.equal(values.float(), original[name].float()):
            changed.add(name)
    linears = {name for name in expected if name.endswith("_proj.weight")}
    assert changed == (linears if has_adapter or precision == "4bit" else set())


def test_in_bfloat16_the_sum_is_rounded_less_than_peft_s(base_dir, policy_dir):
    recipe = model_recipe("4bit", "bfloat16")
    base = adapters.load_merged(base_dir, None, recipe, on="cpu").state_dict()
    assert all(torch.equal(base[name], v) for name, v in merged_tensors(base_dir, None, recipe).items())
    rounded = adapters.load_merged(base_dir, policy_dir, recipe, on="cpu").state_dict()
    for name, values in merged_tensors(base_dir, policy_dir, recipe).items():
        assert torch.allclose(values.float(), rounded[name].float(), rtol=2**-7, atol=1e-4), name


def test_rank_stabilised_adapters_have_another_scale(base_dir, policy_dir, tmp_path):
    stabilised = Path(shutil.copytree(policy_dir, tmp_path / "stabilised"))
    config = json.loads((stabilised / "adapter_config.json").read_text())
    (stabilised / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    recipe = model_recipe("16bit", "float32")
    expected = adapters.load_merged(base_dir, stabilised, recipe, on="cpu").state_dict()
    for name, values in merged_tensors(base_dir, stabilised, recipe).items():
        assert torch.allclose(values, expected[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("setting", "is_plain"),
    [({}, True), ({"use_dora": True}, False), ({"modules_to_save": ["lm_head"]}, False), ({"bias": "all"}, False)],
)
def test_what_is_more_than_lora_is_left_to_peft(policy_dir, tmp_path, setting, is_plain):
    config = json.loads((policy_dir / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **setting}))
    assert is_plain_lora(tmp_path) == is_plain


def test_an_adapter_with_a_saved_head_is_exported_through_peft(base_dir, tmp_path):
    from gguf import GGUFReader
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.fill_(0.5)
    model.save_pretrained(tmp_path / "adapter")
    recipe = load_recipe(None, ["model.precision=16bit", "export.quant=f16"])
    file = export_gguf(recipe, base_dir, tmp_path / "adapter", tmp_path / "x.gguf").file
    head = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "output.weight")
    assert (head.data == 0.5).all()


def test_adapters_of_another_base_are_refused(base_dir, policy_dir, tmp_path, model_of):
    recipe = model_recipe("16bit", "float32")
    other, deeper = tmp_path / "other", tmp_path / "deeper"
    model_of("llama", vocab_size=352, hidden_size=128, intermediate_size=128).save_pretrained(other)
    with pytest.raises(ModelError, match=r"is of another base: its model.layers.0.\S+ is not of this size"):
        merged_tensors(other, policy_dir, recipe)
    model_of("llama", vocab_size=352, intermediate_size=128, num_hidden_layers=1).save_pretrained(deeper)
    with pytest.raises(ModelError, match=r"is of another base: this one has no model.layers.1"):
        merged_tensors(deeper, policy_dir, recipe)
    empty = Path(shutil.copytree(policy_dir, tmp_path / "empty"))
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"empty: adapter_config\.json has no usable r and lora_alpha"):
        TensorMerge(recipe, empty)
    damaged = Path(shutil.copytree(policy_dir, tmp_path / "damaged"))
    (damaged / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="damaged is damaged"):
        TensorMerge(recipe, damaged)
    (damaged / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        TensorMerge(recipe, damaged)


@pytest.fixture
def no_llama_cpp(tmp_path, monkeypatch) -> None:
    """New processes cannot import llama_cpp."""
    from dpost_lite.local import llama

    package = tmp_path / "site" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not built')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[1])]))
    monkeypatch.setattr(llama, "system_info", llama.system_info.__wrapped__)  # not the cached answer


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_without_llama_cpp_a_policy_is_streamed_and_said_to_be_unproved(
    base_dir, policy_dir, tmp_path, no_llama_cpp, quant
):
    recipe = load_recipe(None, ["model.precision=16bit", "model.compute_dtype=float32", f"export.quant={quant}"])
    made = export_gguf(recipe, base_dir, policy_dir, tmp_path / "out.gguf")
    (sentence,) = proof.sentences(made.metrics)
    assert sentence.startswith("not proved: llama-cpp-python could not be loaded")
    assert proof.for_page(made.metrics)["sizes"] == []
    merged = tmp_path / "merged"
    adapters.load_merged(base_dir, policy_dir, recipe.model, on="cpu").save_pretrained(merged)
    ids = list(range(5, 60))
    assert relative_error(llama_logits(made.file, ids), torch_logits(merged, ids)) < 0.2  # this process can import it


def test_without_llama_cpp_other_types_cannot_be_made(base_dir, policy_dir, tmp_path, no_llama_cpp):
    recipe = load_recipe(None, ["model.precision=16bit", "export.quant=q4_k_m"])
    with pytest.raises(ExportError, match=r"not built.*; or export f16 or q8_0, which need no llama\.cpp$"):
        export_gguf(recipe, base_dir, policy_dir, tmp_path / "out.gguf")
    assert list(tmp_path.glob("*.gguf*")) == []


PEAK = """
import sys
from pathlib import Path
import torch
from dpost_lite.local import gguf as writer
from dpost_lite.models.merging import TensorMerge
from dpost_lite.recipe import ModelRecipe
torch.set_num_threads(1)
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
def export(base, adapter):
    merge = TensorMerge(ModelRecipe(precision=precision, compute_dtype="float32"), Path(adapter))
    writer.write_gguf(Path(base), Path(out), dtype=quant, change=merge)
precision, quant, out, small, small_adapter, *large = sys.argv[1:]
export(small, small_adapter)  # loads the libraries
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
before = status("VmRSS")
export(*large)
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory, tokenizer_of) -> tuple[Path, Path, int]:
    """A base of 240 MB in float32, an adapter on it, and the size of its largest tensor: 8 MB."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8, "head_dim": 128}
    model = tiny_model("llama", vocab_size=352, num_key_value_heads=4, **sizes)
    model.save_pretrained(folder / "base")
    tokenizer_of("digits").save_pretrained(folder / "base")
    largest = max(4 * p.numel() for p in model.parameters())
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(folder / "adapter")
    assert (folder / "base" / "model.safetensors").stat().st_size > 25 * largest
    return folder / "base", folder / "adapter", largest


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
@pytest.mark.parametrize(
    ("precision", "quant", "limit"), [("16bit", "q8_0", 3), ("16bit", "f16", 3), ("4bit", "q8_0", 5)]
)
def test_the_export_takes_the_memory_of_a_few_tensors(
    large, base_dir, policy_dir, tmp_path, precision, quant, limit
):  # fmt: skip
    """As local/gguf.py says."""
    base, adapter, largest = large
    out = tmp_path / "out.gguf"
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[1]),
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0",  # what is freed does not count
    }  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-c", PEAK, precision, quant, out, base_dir, policy_dir, base, adapter],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    peak = int(child.stdout) / largest
    print(f"{precision} {quant}: {peak:.1f} times the largest tensor")
    assert 0.5 < peak < limit
