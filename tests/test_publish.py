"""What `export` takes, and the model card and Modelfile beside the file: only what the run's files say."""

import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import a_run, dpost_lite
from test_modelfile import CHATML, gguf_file

from dpost_lite.errors import RunError
from dpost_lite.evaluation import publish
from dpost_lite.evaluation.model_card import Release, _without_folder
from dpost_lite.evaluation.publish import find_release, write_beside
from dpost_lite.problems.records import GradedAnswer, Score, write_jsonl
from dpost_lite.runs.folder import Run, write_json

pytestmark = pytest.mark.usefixtures("cwd")


def scored_run(folder: Path) -> Run:
    """A run folder with scores of two policies on its five test problems."""
    run = a_run(folder)
    for name, strict in (("sft-0", 0.4), ("round-2", 0.6)):
        score = Score(name, 5, strict, 0.8, 0.1, 0.9, 1, 12, 0)
        answers = [GradedAnswer(f"t-{i}", 0, "", "stop", "", i < 5 * strict) for i in range(5)]

        def write(out: Path, score: Score = score, answers: list[GradedAnswer] = answers) -> dict[str, Any]:
            write_jsonl(out / "test.jsonl", answers)
            return {"test": asdict(score)}

        run.stage(f"score/{name}", write, settings={})
    return run


def written(run: Run, **options: Any) -> tuple[Release, str, str]:
    """Write card and Modelfile beside a GGUF file; return what was exported, and both texts."""
    exported = find_release(str(run.path.relative_to(Path.cwd())), {"quant": "q8_0"}, **options)
    exported.file.parent.mkdir(exist_ok=True, parents=True)
    gguf_file(exported.file, chat_template=CHATML, eos_token_id=3)
    card, modelfile = write_beside(exported)
    return exported, card.read_text(), modelfile.read_text()


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run_s_card_has_its_scores_data_method_and_manifest(cwd: Path, bare_model: Path) -> None:
    run = scored_run(cwd)
    write_json(run.path / "manifest.json", {"machine": {"torch": "9.9"}, "commit": "c0ffee"})
    exported, card, modelfile = written(run)
    assert exported.file == Path("run/export/model-q8_0.gguf")
    assert (exported.policy, exported.policy_dir) == ("round-2", Path("run/round-2/sft"))
    assert "| sft-0 | on | 40.0% | 10.0–90.0% | 80.0% | 1 | 5 |" in card
    assert "| **round-2** | on | 60.0% | 10.0–90.0% | 80.0% | 1 | 5 |" in card
    assert "Self-training gained 20.0 points" in card
    assert "arXiv:2407.18248" in card
    assert "SCDPO" not in card
    assert "`gsm8k`: 1 training problems, 5 test problems." in card
    assert "torch 9.9" in card
    assert "- commit: c0ffee" in card
    assert metadata(card) == {
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "math-word-problems", "dpost-lite", "dpo-st"],
        "datasets": ["openai/gsm8k"],
    }
    import hashlib

    assert hashlib.sha256(exported.file.read_bytes()).hexdigest() in card
    assert str(cwd) not in card  # the base is a folder with an absolute path
    assert "FROM ./model-q8_0.gguf" in modelfile
    assert "Ollama has no calculator" in modelfile
    assert "without" not in modelfile  # nobody has measured it


def test_the_score_without_the_calculator_is_in_the_card_once_eval_has_saved_it(cwd: Path, bare_model: Path) -> None:
    run = scored_run(cwd)
    answers = [GradedAnswer(f"t-{i}", 0, "", "stop", "", i == 0) for i in range(5)]
    folder = cwd / "evals" / "run" / "test" / "round-2-off"
    folder.mkdir(parents=True)
    write_jsonl(folder / "answers.jsonl", answers[:4])
    _, card, _ = written(run)
    assert "| off |" not in card  # answers to some of the problems only
    write_jsonl(folder / "answers.jsonl", answers)
    _, card, modelfile = written(run)
    assert "| **round-2** | off | 20.0% |" in card
    assert "On the run's 5 test problems: 60.0% right with the calculator, 20.0% without." in modelfile
    newer = cwd / "evals" / "run" / "test-2" / "round-2-off"
    newer.mkdir(parents=True)
    write_jsonl(newer / "answers.jsonl", [replace(answer, correct=True) for answer in answers])
    os.utime(folder / "answers.jsonl", (time.time() - 9,) * 2)
    assert "| **round-2** | off | 100.0% |" in written(run)[1]
    os.utime(run.path / "round-2" / "sft" / "done.json", (time.time() + 9,) * 2)  # trained again since
    assert "| off |" not in written(run)[1]


def test_the_licence_and_base_are_those_that_are_known(cwd: Path, bare_model: Path) -> None:
    run = scored_run(cwd)
    (bare_model / "README.md").write_text("---\nlicense: mit\n---\nA model.")
    assert metadata(written(run)[1])["license"] == "mit"
    (bare_model / "README.md").write_text("No metadata.")
    assert "license" not in metadata(written(run)[1])


def test_a_policy_without_a_score_is_not_given_the_others(cwd: Path, bare_model: Path) -> None:
    run = scored_run(cwd)
    release = find_release(str(run.path), {"quant": "q8_0"}, policy="round-2/dpo", out=cwd / "m.gguf")
    gguf_file(release.file, eos_token_id=2)
    card, _ = write_beside(release)
    assert "The exported policy, round-2/dpo, was not scored; these are others of its run." in card.read_text()
    assert "was not scored" not in written(run)[1]


def test_folders_of_problems_are_not_published(cwd: Path, bare_model: Path) -> None:
    assert _without_folder("clients/acme/p.jsonl") == "p.jsonl"  # also from another folder, where it is not
    assert _without_folder("openai/gsm8k") == "openai/gsm8k"


def test_files_of_somebody_else_stay(cwd: Path, bare_model: Path) -> None:
    run = scored_run(cwd)
    (cwd / "README.md").write_text("mine")
    exported, _, _ = written(run, out=Path("m.gguf"))
    assert (cwd / "README.md").read_text() == "mine"
    assert [path.name for path in write_beside(exported)] == ["m.README.md", "Modelfile"]
    (cwd / "Modelfile").write_text("FROM mine")
    card, modelfile = write_beside(exported)
    assert modelfile.name == "m.Modelfile"
    assert "-f m.Modelfile" in card.read_text()


def test_an_adapter_is_exported_on_its_base_or_another(cwd: Path, bare_model: Path) -> None:
    write_json(cwd / "adapter_config.json", {})
    (cwd / "mine").mkdir()
    write_json(cwd / "mine" / "adapter_config.json", {"base_model_name_or_path": "model"})
    exported = find_release("mine", {"quant": "f16"})
    assert (exported.file, exported.model_dir) == (Path("exports/mine/model-f16.gguf"), Path("model"))
    assert (exported.policy_dir, exported.recipe.model.precision) == (Path("mine"), "16bit")
    bare_model.rename(cwd / "other")
    assert find_release("mine", {"quant": "f16"}, base="other").model_dir == Path("other")
    model = find_release("other", {"quant": "f16"}, out=Path("x.gguf"))
    assert (model.policy_dir, model.model_dir, model.file) == (None, Path("other"), Path("x.gguf"))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("empty", {}, r"empty is not a run, an adapter or a model \(no run.json, adapter_config.json, config.json\)"),
        ("m.gguf", {}, "m.gguf is a GGUF file already"),
        ("model", {"policy": "base"}, "--policy: model is not a run folder"),
        ("model", {"base": "model"}, "--model: model is not an adapter"),
        ("run", {"policy": "round-7"}, "--policy: run has no policy round-7"),
    ],
)
def test_what_cannot_be_exported(cwd: Path, bare_model: Path, source: str, options: Any, message: str) -> None:
    (cwd / "empty").mkdir()
    (cwd / "m.gguf").write_bytes(b"GGUF")
    a_run(cwd)
    with pytest.raises(RunError, match=message):
        find_release(source, {"quant": "q8_0"}, **options)


def test_the_command_writes_both_for_a_file_that_exists_already(
    cwd: Path, bare_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpost_lite.pipeline.export.holds", lambda *_: True)
    run = scored_run(cwd)
    file, _, _ = written(run)
    (run.path / "export" / "README.md").unlink()
    result = dpost_lite("export", "run", "--quant", "q8_0")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("beside it: README.md, Modelfile\n")
    assert publish.CARD in {path.name for path in file.file.parent.iterdir()}
