"""What comes from strangers: no pickle is read, nothing damaged is used, and offline nobody is asked."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from tiny_training import run_sft

from dpost_lite.errors import ModelError
from dpost_lite.models import adapters, hub, loading
from dpost_lite.runs.folder import UNFINISHED


class Malicious:
    """What a pickle may do to whoever reads it."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def test_pickles_are_never_read(base_dir, policy_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, adapter = Path(shutil.copytree(base_dir, "base")), Path(shutil.copytree(policy_dir, "adapter"))
    for folder, name in ((base, "pytorch_model"), (adapter, "adapter_model")):
        for file in folder.glob("*.safetensors"):
            file.unlink()
        (folder / f"{name}.bin").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ModelError, match=r"base cannot be loaded .*safetensors"):
        loading.load(base)
    with pytest.raises(ModelError, match=r"adapter has no adapter_model\.safetensors; pickles are never read"):
        adapters.attach(loading.load(base_dir), adapter, trainable=False)
    assert not Path("unpickled").exists()


def test_pickles_in_a_checkpoint_are_not_read(base_dir, prompter, tmp_path, monkeypatch):
    """transformers would look for these names in a folder that somebody sent."""
    monkeypatch.chdir(tmp_path)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sft(base_dir, prompter, tmp_path, num=8, batch_size=4, progress=stop)
    (checkpoint,) = (tmp_path / UNFINISHED).glob("checkpoint-*")
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "pytorch_model.bin"):
        (checkpoint / name).write_bytes(pickle.dumps(Malicious()))
    assert run_sft(base_dir, prompter, tmp_path, num=8, batch_size=4)["steps"] == 2
    assert not Path("unpickled").exists()


def test_code_that_comes_with_a_model_is_neither_run_nor_offered(base_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = Path(shutil.copytree(base_dir, "base"))
    code = "from pathlib import Path\nPath('ran').touch()\nclass Own: pass\n"
    for file, key, value in (
        ("config.json", "AutoModelForCausalLM", "own.Own"),
        ("tokenizer_config.json", "AutoTokenizer", ["own.Own", None]),
    ):
        config = json.loads((base / file).read_text())
        config.update(model_type="own", auto_map={"AutoConfig": "own.Own", key: value}, tokenizer_class="Own")
        (base / file).write_text(json.dumps(config))
    (base / "own.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (loading.load, loading.load_tokenizer):
        with pytest.raises(ModelError):
            load(base)
    assert not Path("ran").exists()


def test_a_truncated_base_is_named(base_dir, tmp_path):
    base = Path(shutil.copytree(base_dir, tmp_path / "base"))
    (weights,) = base.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ModelError, match="base cannot be loaded"):
        loading.load(base)


def test_a_fingerprint_changes_with_any_part_of_a_model(base_dir, tmp_path):
    base = Path(shutil.copytree(base_dir, tmp_path / "base"))
    prints = {hub.fingerprint(base_dir)}
    assert {hub.fingerprint(base)} == prints
    for name, at in (("model.safetensors", 3000), ("model.safetensors", -1), ("tokenizer.json", 50)):
        content = bytearray((base / name).read_bytes())
        content[at] ^= 1
        (base / name).write_bytes(content)
        prints.add(hub.fingerprint(base))
    assert len(prints) == 4


def test_offline_the_hub_is_not_asked(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"owner/name is not in the local cache and --offline forbids asking the hub"):
        hub.find("owner/name")
