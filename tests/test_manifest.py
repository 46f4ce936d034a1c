"""The manifest of a run: what it records, and that every change is found."""

import hashlib
import json

import pytest
from typer.testing import CliRunner

from dpost_lite.cli.app import app
from dpost_lite.errors import RunError
from dpost_lite.problems.corpus import digests
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.folder import Run, WorkResult, read_json
from dpost_lite.runs.manifest import verify, write_manifest


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "base"


@pytest.fixture
def run(tmp_path, base):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"question": "1+1?", "answer": "2"}\n')
    recipe = load_recipe(None, [f"data.train={data}", "seed=7"])
    run = Run.create(tmp_path / "run", recipe)
    run.stage("data", lambda out: {}, settings={"files": digests(recipe.data)})
    data.write_text("edited while the run was on")

    def work(out):
        (out / "adapter.safetensors").write_bytes(b"adapter")
        return WorkResult({"steps": 3}, ram_bytes=123)

    run.stage("round-1/sft", work, settings={})
    write_manifest(run, recipe, base, ["dpost-lite", "run", "--seed", "7"])
    return run


def test_it_holds_what_a_run_was_made_of(run, tmp_path):
    manifest = read_json(run.path / "manifest.json")
    assert manifest["command"] == ["dpost-lite", "run", "--seed", "7"]
    assert manifest["recipe"]["seed"] == 7
    assert manifest["machine"]["torch"]
    read = hashlib.sha256(b'{"question": "1+1?", "answer": "2"}\n').hexdigest()
    assert manifest["data"] == {str(tmp_path / "mine.jsonl"): read}
    assert manifest["base"] == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    stage = manifest["stages"]["round-1/sft"]
    assert stage["ram_bytes"] == 123
    assert stage["seconds"] >= 0
    assert set(manifest["files"]) == {
        "run.json", "data/done.json", "round-1/sft/adapter.safetensors", "round-1/sft/done.json"
    }  # fmt: skip


def test_an_untouched_run_is_verified_and_each_change_found(run):
    assert verify(run.path) == []
    run.emit("notice", text="the journal may grow")
    assert verify(run.path) == []
    (run.path / "round-1/sft/adapter.safetensors").write_bytes(b"adaptex")
    (run.path / "round-1/sft/new.txt").write_text("")
    (run.path / "round-1/sft/done.json").unlink()
    assert verify(run.path) == [
        "missing: round-1/sft/done.json",
        "changed: round-1/sft/adapter.safetensors",
    ]


def test_folders_put_aside_or_given_up_are_no_stages(run, tmp_path, base):
    for name in ("export-before-0123", "round-2/sft.partial"):
        (run.path / name).mkdir(parents=True)
        (run.path / name / "done.json").write_text("{}")
    write_manifest(run, run.recipe, base, [])
    manifest = read_json(run.path / "manifest.json")
    assert set(manifest["stages"]) == {"data", "round-1/sft"}
    assert not [name for name in manifest["files"] if "before" in name or "partial" in name]


def test_a_further_stage_removes_it(run):
    run.stage("round-2/sft", lambda out: {}, settings={})
    assert not (run.path / "manifest.json").exists()


def test_the_command_says_what_was_changed(run):
    def said(code: int) -> str:
        result = CliRunner().invoke(app, ["verify", str(run.path)])
        assert result.exit_code == code
        return result.stdout

    assert "all files match the manifest" in said(0)
    (run.path / "round-1/sft/adapter.safetensors").unlink()
    assert said(1) == "missing: round-1/sft/adapter.safetensors\n"


def test_without_a_manifest_the_way_out_is_named(run):
    (run.path / "manifest.json").write_text(json.dumps([]))
    with pytest.raises(RunError, match="cannot be read"):
        verify(run.path)
    (run.path / "manifest.json").unlink()
    with pytest.raises(RunError, match="not finished; run its command again"):
        verify(run.path)
