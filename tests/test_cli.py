"""The command line: help, mistakes (one line, exit code 2, no traceback), and what `run` passes on and prints."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import a_run, dpost_lite

from dpost_lite import __version__
from dpost_lite.cli.app import app
from dpost_lite.errors import ExportError, RecipeError
from dpost_lite.pipeline import preflight
from dpost_lite.pipeline import run as pipeline_run
from dpost_lite.pipeline.run import Outcome
from dpost_lite.planner.plan import Plan, settings_of
from dpost_lite.problems.records import GradedAnswer, Score, write_jsonl
from dpost_lite.recipe import DataRecipe, Recipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.folder import Artifact, Run, write_json

COMMANDS = ("run", "plan", "eval", "report", "runs", "solve", "serve", "export", "data", "verify", "doctor")
TYPER = {  # with what it stands on
    "typer", "click", "shellingham", "colorama", "typing_extensions", "annotated_doc", "annotated_types", "pydantic",
    "pydantic_core", "typing_inspection",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("cwd")


def in_a_new_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    source = Path(__file__).parents[1]  # also found where the package is not installed
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)


# Help


def test_every_command_is_known_here_and_in_the_readme() -> None:
    registered = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert registered == set(COMMANDS)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if not re.search(rf"(dpost-lite |`){name}[ `\n]", readme)] == []


def test_help_imports_nothing_heavy_and_answers_at_once() -> None:
    """What would take time is to import others' packages: help needs typer alone."""
    code = (
        "import sys; before = {*sys.modules}; from dpost_lite.cli.app import app\n"
        f"for command in {('', *COMMANDS)}:\n"
        "    try: app([*filter(None, [command]), '--help'])\n"
        "    except SystemExit as end: assert not end.code, end\n"
        "packages = {name.partition('.')[0] for name in {*sys.modules} - before} - sys.stdlib_module_names\n"
        "print(*(name for name in packages if not name.startswith('_')))"
    )
    done = in_a_new_process(code)
    assert done.returncode == 0, done.stderr
    *usages, packages = done.stdout.splitlines()
    assert sum(line.startswith("Usage: ") for line in usages) == 1 + len(COMMANDS)
    assert {*packages.split()} <= {"dpost_lite", *TYPER}


def test_version_and_a_bare_call() -> None:
    assert dpost_lite("--version").stdout.strip() == f"dpost-lite {__version__}"
    assert all(f"\n  {command} " in dpost_lite().output for command in COMMANDS)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run sft.epoch=3", "unknown key 'sft.epoch' (did you mean 'epochs'?)"),
        ("run sft.epochs=many", "sft.epochs: "),
        ("run sft", "'sft' is not of the form key=value"),
        ("run --method dop", "method: "),
        ("run --recipe rehersal", "--recipe: there is no recipe rehersal (did you mean 'rehearsal'?)"),
        ("run --recipe no.yaml", "--recipe: there is no file no.yaml"),
        ("run --model ./nowhere", "model.name: there is no folder ./nowhere"),
        ("run --model empty", "model.name: the folder empty has no config.json"),
        ("run --model model --data no.jsonl --out new", "there is no file or set 'no.jsonl'"),
        ("run --model model --data words.jsonl --out new", "words.jsonl has no usable row"),
        ("run --model model --data notes.txt --out new", "unknown file type"),
        ("run --model odd --out new", "models of type 'odd' cannot be exported to GGUF"),
        ("run --model model --out full", "--out: full exists and is not a run folder; name another"),
        ("run --model model --out run", "--out: run holds stage 'data' made with other settings"),
        ("run --model model dpo.loss=sigmod", "dpo.loss"),
        ("data gsm9k", "there is no file or set 'gsm9k' (did you mean 'gsm8k'?)"),
        ("data svamp --split train", "svamp is for evaluation only"),
        ("data words.jsonl --split tset", "--split: tset (did you mean 'test'?); give train, test"),
        ("data gsm8k --data-dir empty", "--data-dir empty has no file gsm8k/train.jsonl"),
        ("solve no.gguf why", "no.gguf cannot be read"),
        ("solve empty why", "empty is not a run folder (no run.json)"),
        ("solve half why", "half has no exported model yet"),
        ("serve no.gguf", "no.gguf cannot be read"),
        ("serve half", "half has no exported model yet"),
        ("serve run --api-key=", "--api-key: the key is empty"),
        ("serve run --host 203.0.113.9", "--host, --port: cannot listen on 203.0.113.9:8000"),
        ("eval run --calculator of", "--calculator: of (did you mean 'off'?); give on, off, both"),
        ("eval model", "--data: a model has no test problems of its own"),
        ("eval nowhere/ --data synthetic", "model.name: nowhere/ is neither a folder nor a hub id"),
        ("eval model --policy sft-0 --data synthetic", "--policy: model is not a run folder"),
        ("eval run --policy round-3", "--policy: run has no policy round-3 (did you mean 'round-2'?)"),
        ("export empty --quant q8_0", "export: empty is not a run, an adapter or a model"),
        ("export run --quant q9", "--quant: export.quant: "),
        ("export run --quant q8_0 --merge both", "--merge: export.merge: "),
        ("export run --quant auto --max-loss -1", "--max-loss: export.max_loss: "),
        ("run --data synthetic --out new export.quant=auto", "needs dev problems; set synthetic.num_dev=100, or name"),
        ("export half --quant q8_0", "half has no exported model yet"),
        ("export run --quant q8_0 --out words.jsonl/model.gguf", "--out: words.jsonl cannot be created"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(cwd: Path, bare_model: Path, arguments: str, message: str) -> None:
    a_run(cwd)
    a_run(cwd / "other", finished=False).path.rename(cwd / "half")
    for name in ("empty", "full", "odd"):
        (cwd / name).mkdir()
    (cwd / "full" / "thesis.tex").touch()
    (cwd / "odd" / "config.json").write_text('{"model_type": "odd"}')
    (cwd / "words.jsonl").write_text('{"question": "Who?", "answer": "Ann"}\n')
    (cwd / "notes.txt").touch()
    result = dpost_lite(*arguments.split())
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("dpost-lite: ")
    assert message in line
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [["--debug", "run", "--recipe", "x"], ["run", "--recipe", "x", "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str]) -> None:
    assert isinstance(dpost_lite(*arguments).exception, RecipeError)
    done = in_a_new_process("from dpost_lite.cli.app import main; main()", *arguments)
    assert done.stderr.startswith("Traceback")
    assert "RecipeError: --recipe: there is no recipe x" in done.stderr
    assert done.returncode == 1


def test_a_bug_stays_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpost_lite.recipe_files.load_recipe", lambda *_, **__: 1 / 0)
    assert isinstance(dpost_lite("run").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("arguments", "message"), [("run", "interrupted; run the same command to resume"), ("data gsm8k", "interrupted")]
)
def test_ctrl_c_is_one_line_and_exit_code_130(monkeypatch: pytest.MonkeyPatch, arguments: str, message: str) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpost_lite.recipe_files.load_recipe", interrupt)
    result = dpost_lite(*arguments.split())
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [f"dpost-lite: {message}"]


def test_an_error_cannot_command_the_terminal() -> None:
    line = dpost_lite("data", "no\x1b[2J\r[bold]file").stderr
    assert "\x1b" not in line
    assert "\r" not in line
    assert "[bold]file" in line


# run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, Path]]:
    """Collect what `run` asks `execute` for; nothing is trained."""
    calls = []

    def execute(recipe: Recipe, run: Run, plan: Plan) -> Outcome:
        calls.append((recipe, run.path))
        scores = [Score("sft-0", 100, 0.2, 0.2, 0.1, 0.3, 0, 0, 0), Score("round-1", 100, 0.25, 0.3, 0.2, 0.4, 7, 0, 0)]
        solution = {"text": "[i]2[/i]\n#### 2", "strict": "2", "end": "stop"}
        (run.path / "export").mkdir()
        (run.path / "export" / "m.gguf").write_bytes(b"0" * 3 * 2**20)
        write_json(run.path / "export" / "done.json", {"metrics": {"policy": "round-1/sft"}})
        for name, right in (("sft-0", range(20)), ("round-1", range(15, 40))):
            (run.path / "score" / name).mkdir(parents=True)
            answers = [GradedAnswer(str(i), 0, "", "stop", None, i in right) for i in range(100)]
            write_jsonl(run.path / "score" / name / "test.jsonl", answers)
        write_json(run.path / "solved.json", [{"question": "1+1?", "answer": "2", "solution": solution}])
        exported = Artifact("export", run.path / "export", "", {"file": "m.gguf"})
        return Outcome(scores, [], "round-1/sft", exported, Artifact("solved", run.path, ""))

    monkeypatch.setattr(pipeline_run, "execute", execute)
    monkeypatch.setattr(preflight, "preflight", lambda recipe, folder: folder)
    monkeypatch.setattr("dpost_lite.planner.plan.estimate", lambda recipe: None)
    monkeypatch.setattr("dpost_lite.runs.manifest.write_manifest", lambda *_: None)
    monkeypatch.setattr("dpost_lite.evaluation.publish.describe_run", lambda *_, **__: [])
    return calls


@pytest.mark.parametrize(
    ("arguments", "recipe", "out"),
    [
        ("", "rehearsal", "runs/rehearsal"),
        ("--data synthetic", "rehearsal", "runs/rehearsal"),
        ("--data gsm8k", None, "runs/gsm8k"),
        ("data.train=my/own.csv", None, "runs/own"),
        ("--recipe rehearsal --data gsm8k --out here", "rehearsal", "here"),
    ],
)
def test_recipe_and_folder_without_options(trained, arguments: str, recipe: str | None, out: str) -> None:
    result = dpost_lite("run", *arguments.split())
    assert result.exit_code == 0, result.output
    ((given, folder),) = trained
    assert folder == Path(out)
    assert given.sft == load_recipe(recipe).sft


def test_options_are_recipe_keys_and_key_value_comes_last(trained, cwd: Path) -> None:
    arguments = "dpo.beta=0.3 rounds=2 --data gsm8k --data-dir d --model no --seed 7 --limit 9 --rounds 5 --method st"
    assert dpost_lite("run", *arguments.split()).exit_code == 0
    given = trained[0][0]
    assert given.data == DataRecipe(train="gsm8k", data_dir=Path("d"), limit=9)
    assert (given.model.name, given.seed, given.method, given.dpo.beta) == ("no", 7, "st", 0.3)  # and not false
    assert given.rounds == 2


def test_a_run_ends_with_scores_verdict_problems_files_and_next_commands(trained) -> None:
    out = " ".join(dpost_lite("run").stdout.split())
    assert "round-1 on 25.0% 20.0–40.0% 30.0% 7 100" in out
    assert "Self-training gained 5.0 points (round-1 is at 25.0%, sft-0 at 20.0%; 95 % interval " in out
    assert "may be chance" in out
    assert "1+1? [i]2[/i] #### 2 ✓ the answer is 2" in out
    assert "runs/rehearsal/export/m.gguf: the model (3 MiB), exported from round-1/sft" in out
    for command in (
        'solve runs/rehearsal "…"',
        "report runs/rehearsal",
        "eval runs/rehearsal",
        "export runs/rehearsal --quant q8_0",
    ):
        assert f"dpost-lite {command}" in out


def test_stages_are_archived_before_the_run_continues(trained, cwd: Path) -> None:
    a_run(cwd)
    options = ("--restart-from", "sft-0, export", "--restart-from", "round-1/sft")
    result = dpost_lite("run", "--out", "run", *options)
    assert result.exit_code == 0, result.output
    assert "archived: export, round-1/sft, sft-0\n" in result.stdout
    aside = [path.relative_to("run").as_posix() for path in Path("run").rglob("*-before-*")]
    assert sorted(name.partition("-before-")[0] for name in aside) == ["export", "round-1/sft", "sft-0"]
    assert len(trained) == 1


@pytest.mark.parametrize("stage", ["", "sft-0,", "sft-0,sft-9"])
def test_a_stage_to_restart_from_that_is_not_there_is_named(trained, cwd: Path, stage: str) -> None:
    a_run(cwd)
    result = dpost_lite("run", "--out", "run", "--restart-from", stage)
    assert result.exit_code == 2
    assert f"--restart-from: run has no stage '{stage.rpartition(',')[2]}'" in result.stderr
    assert not list(Path("run").rglob("*-before-*"))
    assert not trained


def test_a_disk_that_fills_at_the_very_end_hides_nothing(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "manifest.json")

    monkeypatch.setattr("dpost_lite.runs.manifest.write_manifest", full)
    result = dpost_lite("run")
    assert result.exit_code == 3
    assert "round-1 is at 25.0%" in result.stdout
    (line,) = result.stderr.splitlines()
    assert "the disk is full" in line


def test_a_card_that_cannot_be_written_hides_nothing_and_is_tried_again(trained, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ExportError("export cannot be written")

    monkeypatch.setattr("dpost_lite.runs.manifest.write_manifest", lambda run, *_: (run.path / "manifest.json").touch())
    monkeypatch.setattr("dpost_lite.evaluation.publish.describe_run", fail)
    result = dpost_lite("run")
    assert result.exit_code == 3
    assert "round-1 is at 25.0%" in result.stdout
    assert "export cannot be written; everything else is done; run the same command to retry it" in result.stderr
    assert not Path("runs/rehearsal/manifest.json").exists()


def test_run_on_the_cpu_takes_the_plans_settings_and_hides_the_gpu(
    trained: list[tuple[Recipe, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    result = dpost_lite("run", "--gpu-mem", "cpu", "--precision", "16bit")
    assert result.exit_code == 0, result.output
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    ((recipe, folder),) = trained
    assert folder == Path("runs/rehearsal")
    assert recipe.model.precision == "16bit"
    assert recipe.sampling.memory_gib is not None


def test_run_fits_itself_into_the_size_and_holds_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU that is only said to be there: the plan's settings reach the run, and what the user gave wins."""
    monkeypatch.setattr("dpost_lite.models.hardware.device", lambda: "cuda")
    monkeypatch.setattr("dpost_lite.planner.device.this_gpu", lambda: (40e9, 48e9, 1e14, 1e12, 2e13))
    monkeypatch.setattr("dpost_lite.pipeline.preflight.preflight", lambda *_: None)
    seen: list[tuple[Recipe, Plan]] = []

    def stop(recipe: Recipe, _: Run, plan: Plan) -> None:
        seen.append((recipe, plan))
        raise RecipeError("far enough")

    monkeypatch.setattr(pipeline_run, "execute", stop)
    result = dpost_lite("run", "--gpu-mem", "24GB", "sft.micro_batch_size=4")
    assert "far enough" in result.stderr, result.output
    assert "sampling: weights merged, rows" in result.stdout
    ((recipe, plan),) = seen
    assert plan.device.memory_share == pytest.approx((24e9 - 0.6 * 2**30) / 48e9)
    assert recipe.model.name == plan.shape.name == "Qwen/Qwen3-8B-Base"
    assert recipe.data.train == "gsm8k"
    assert recipe.sft.micro_batch_size == 4
    assert recipe.dpo.micro_batch_size == plan.stages[2].choices["micro-batch"] > 1
    assert f"sampling.max_rows={recipe.sampling.max_rows}" in settings_of([plan])
