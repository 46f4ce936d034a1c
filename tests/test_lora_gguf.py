"""An adapter as a GGUF file: llama.cpp adds to the base what peft adds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import dpost_lite
from test_gguf import GEMMA, llama_logits, load, relative_error, save_model, torch_logits

from dpost_lite.errors import ExportError
from dpost_lite.local import gguf
from dpost_lite.pipeline.streaming import adapter_alone, export_lora

IDS = list(range(5, 60))


def save_adapter(model_dir: Path, out: Path, **settings) -> Path:
    """Save an adapter that does something, on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **settings})
    model = get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.1)
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize(
    ("family", "kind", "settings"),
    [
        ("llama", "smollm", {"tie_word_embeddings": True}),
        ("qwen3", "qwen2", {"head_dim": 32}),
        ("gemma3_text", "spm gemma", GEMMA),
    ],
)
def test_llama_cpp_adds_what_peft_merges(tmp_path, family, kind, settings, rank_stabilised):
    from peft import AutoPeftModelForCausalLM

    folder = save_model(tmp_path / "model", family, kind, **settings)
    adapter = save_adapter(folder, tmp_path / "adapter", use_rslora=rank_stabilised)
    base = gguf.write_gguf(folder, tmp_path / "base.gguf", dtype="f32")
    lora = export_lora(folder, adapter, tmp_path / "adapter.gguf")
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    llm = load(base, logits_all=True, lora_path=str(lora))
    llm.eval(IDS)
    assert relative_error(np.array(llm.scores[: len(IDS)]), expected) < (5e-3 if family == "gemma3_text" else 1e-4)
    assert relative_error(llama_logits(base, IDS), expected) > 0.1  # without the adapter
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter.gguf", "base.gguf", "model"]


def test_what_is_no_adapter_is_refused(tmp_path):
    folder = save_model(tmp_path / "model", "llama", "smollm")
    with pytest.raises(ExportError, match="--lora: the base is not a LoRA adapter"):
        adapter_alone(folder, None)
    adapter = save_adapter(folder, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ExportError, match=r"--lora: \S+ is more than LoRA"):
        adapter_alone(folder, adapter)
    other = save_model(tmp_path / "other", "llama", "smollm", num_hidden_layers=1)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"other has no model.layers.1\S+, which the adapter changes"):
        export_lora(other, adapter, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_the_command_exports_any_adapter_merged_and_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_model(tmp_path / "model", "qwen2", "qwen2")
    save_adapter(folder, tmp_path / "mine")
    result = dpost_lite("export", "mine", "--quant", "q8_0", "--lora")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("beside it: README.md, Modelfile, model-q8_0-adapter.gguf\n")
    exported = tmp_path / "exports" / "mine"
    adapter = exported / "model-q8_0-adapter.gguf"
    assert {path.name for path in exported.iterdir()} == {"model-q8_0.gguf", "README.md", "Modelfile", adapter.name}
    base = torch_logits(folder, IDS)
    merged = llama_logits(exported / "model-q8_0.gguf", IDS)
    assert relative_error(merged, base) > 0.1
    llm = load(gguf.write_gguf(folder, tmp_path / "base.gguf"), logits_all=True, lora_path=str(adapter))
    llm.eval(IDS)
    assert relative_error(merged, np.array(llm.scores[: len(IDS)])) < 0.1
    other = dpost_lite("export", "mine", "--quant", "f16", "--model", "model", "--out", "other/x.gguf")
    assert other.exit_code == 0, other.output
    assert relative_error(llama_logits(tmp_path / "other" / "x.gguf", IDS), base) > 0.1
