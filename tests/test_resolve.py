"""The same words mean the same to `plan` and to `run`, and several methods and seeds are planned together."""

import contextlib
import importlib
import shlex
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from dpost_lite.cli.app import app
from dpost_lite.cli.resolve import RunRequest
from dpost_lite.errors import ModelError
from dpost_lite.planner.device import HERE, Device
from dpost_lite.planner.plan import Plan, plan_for
from dpost_lite.planner.recorder import planned_stages
from dpost_lite.problems.records import Score
from dpost_lite.recipe import ModelRecipe, Recipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.folder import Run
from dpost_lite.runs.stage_names import StageName

PAPER = None  # the defaults
TABLE = [
    ("--gpu-mem 24GB", PAPER),
    ("--gpu-mem auto", PAPER),
    ("--gpu-mem cpu", "rehearsal"),
    ("--gpu-mem 24GB --data synthetic", "rehearsal"),
    ("--gpu-mem 24GB data.train=synthetic", "rehearsal"),
    ('--gpu-mem 24GB data.train="synthetic"', "rehearsal"),
    ("--gpu-mem cpu --data synthetic", "rehearsal"),
    ("--gpu-mem cpu data.train=my.csv", PAPER),
    ("--gpu-mem cpu --data my.csv", PAPER),
    ("--gpu-mem cpu --data my.csv --data-dir .", PAPER),
    ("--gpu-mem cpu --data gsm8k", PAPER),
    ("--gpu-mem cpu --data my.csv data.train=synthetic", "rehearsal"),
    ("--gpu-mem 24GB --data synthetic data.train=my.csv", PAPER),
    ("--gpu-mem 24GB data.train=my.csv data.train=synthetic", "rehearsal"),
    ("--gpu-mem cpu data.test=my.csv", "rehearsal"),
    ("--gpu-mem 8GB --recipe rehearsal --data my.csv", "rehearsal"),
    ("--gpu-mem cpu --recipe full-precision --limit 64", "full-precision"),
    ("--gpu-mem 24GB --model Qwen/Qwen3-1.7B-Base --precision 16bit sft.max_length=512", PAPER),
    ("--gpu-mem 12GB method=st model.name=Qwen/Qwen2.5-0.5B", PAPER),
]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 48 GB and a CPU that are only said to be there, in a folder with a file of problems."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    rows = [f"How many are {i} and {i}?,{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i} #### {2 * i}\n" for i in range(20)]
    Path("my.csv").write_text("question,answer\n" + "".join(rows))
    monkeypatch.setattr("dpost_lite.models.hardware.device", lambda: "cuda")
    monkeypatch.setattr("dpost_lite.planner.device.this_gpu", lambda: (40e9, 48e9, 1e14, 1e12, 2e13))
    monkeypatch.setattr("dpost_lite.planner.device.this_cpu", lambda: Device("cpu", 16e9, 4, 1e11, 1e10, HERE))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, Plan]]:
    """Collect what `run` begins; nothing is trained."""
    runs: list[tuple[Recipe, Plan]] = []

    def execute(recipe: Recipe, _: Run, plan: Plan) -> Any:
        runs.append((recipe, plan))
        return SimpleNamespace(best="sft-0", failure=None, scores=[Score("sft-0", 1, 1, 1, 0, 1, 0, 0, 0)])

    monkeypatch.setattr("dpost_lite.pipeline.run.execute", execute)
    monkeypatch.setattr("dpost_lite.pipeline.preflight.preflight", lambda *_: None)
    monkeypatch.setattr("dpost_lite.runs.manifest.write_manifest", lambda *_: None)
    monkeypatch.setattr("dpost_lite.evaluation.publish.describe_run", lambda *_, **__: [])
    monkeypatch.setattr("dpost_lite.cli.run._print_outcome", lambda *_: None)
    monkeypatch.setattr("dpost_lite.evaluation.baselines.differences", lambda *_: [])
    return runs


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[RunRequest]:
    """Collect what `plan` shows."""
    asked: list[RunRequest] = []
    module = importlib.import_module("dpost_lite.cli.plan")  # hidden by its function of the same name
    real = module.resolve

    def resolve(*arguments: Any, **options: Any) -> tuple[Path, list[RunRequest]]:
        folder, runs = real(*arguments, **options)
        asked.extend(runs)
        return folder, runs

    monkeypatch.setattr(module, "resolve", resolve)
    return asked


def given(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(("words", "source"), TABLE)
def test_plan_run_and_the_command_that_plan_names_agree(started, shown, words: str, source: str | None) -> None:
    told = given("plan", *words.split())
    given("run", *words.split())
    program, *following = shlex.split(told.splitlines()[-1].removeprefix("next: "))
    assert (program, following[0]) == ("dpost-lite", "run")
    given(*following, "--out", "next")
    ((recipe, plan),) = ((asked.recipe, asked.plan) for asked in shown)
    assert started == [(recipe, plan)] * 2
    assert told.startswith(f"{recipe.model.name}: ")
    expected = load_recipe(source)
    assert (recipe.sft.learning_rate, recipe.dpo.max_steps) == (expected.sft.learning_rate, expected.dpo.max_steps)


def test_a_run_keeps_the_base_that_it_began_with(started) -> None:
    for folder in ("one", "several/seed-42/st"):
        Run.create(Path(folder), Recipe(model=ModelRecipe(name="Qwen/Qwen3-1.7B-Base")))
    given("run", "--gpu-mem", "24GB", "--out", "one")
    given("run", "--gpu-mem", "24GB", "--out", "several", "--method", "st,sft")
    given("run", "--gpu-mem", "24GB", "--out", "new")
    kept, picked = "Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-8B-Base"
    assert [recipe.model.name for recipe, _ in started] == [kept, kept, kept, picked]


def test_a_run_keeps_how_it_was_cut_whatever_is_free_later(started, monkeypatch) -> None:
    def free(gb: float) -> None:
        device = Device("cpu", gb * 1e9, 4, 1e11, 1e10, HERE)
        monkeypatch.setattr("dpost_lite.planner.device.this_cpu", lambda: device)

    words = ("run", "--gpu-mem", "cpu", "sampling.max_rows=512", "synthetic.num_train=400")
    free(16)
    first = given(*words, "--out", "one")
    free(3)
    again = given(*words, "--out", "one")
    given("run", "--gpu-mem", "cpu", "--out", "new", *words[3:])
    before, kept, new = (recipe for recipe, _ in started)
    assert kept.sampling == before.sampling
    assert kept.sft == before.sft
    assert new.sampling.memory_gib < before.sampling.memory_gib
    assert "kept from the run's first start" not in first
    (line,) = (line for line in again.splitlines() if line.startswith("kept from the run's first start: "))
    assert f"sampling.memory_gib={before.sampling.memory_gib}" in line
    assert "sampling.max_rows" not in line  # the command says it
    given(*words, "--out", "one", "sft.batch_size=7")  # which the kept micro-batch need not divide
    assert started[-1][0].sft.batch_size == 7


# Several methods and seeds


def test_each_method_and_seed_has_its_own_estimates_and_the_same_settings(started) -> None:
    told = given(
        "run", "--gpu-mem", "24GB", "--method", "sft,st,dpo-st", "--seeds", "2", "sampling.samples_for_labels=4"
    )
    assert [(recipe.seed, recipe.method) for recipe, _ in started] == [
        (seed, method) for seed in (42, 43) for method in ("sft", "st", "dpo-st")
    ]
    for recipe, plan in started:
        assert list(plan.estimates) == planned_stages(recipe)
        assert [stage.name for stage in plan.stages] == [
            "sft", "sampling", *(["dpo"] if recipe.method == "dpo-st" else []), "merge, export",
        ]  # fmt: skip
        assert plan.fits
        assert str(plan) in told
    _, st, dpo_st = (plan.estimates for _, plan in started[:3])
    drawn = [estimates[StageName("samples-labels", 1)].tokens for estimates in (st, dpo_st)]
    assert drawn[0] - drawn[1] == pytest.approx(5 * 6705 * 126)  # st draws the five for pairs too

    def but_method(recipe: Recipe) -> Recipe:
        sampling = recipe.sampling.model_copy(update={"samples_for_labels": 0})
        return recipe.model_copy(update={"method": "", "seed": 0, "sampling": sampling})

    assert len({but_method(recipe) for recipe, _ in started}) == 1
    recipe, plan = started[-1]
    assert recipe.dpo.micro_batch_size == plan.stages[2].choices["micro-batch"]
    assert recipe.sampling.max_rows == plan.stages[1].choices["rows"]


def alone(size: str, source: str | None, *changes: str) -> Plan:
    (plan,) = plan_for([load_recipe(source, list(changes))], size)
    return plan


SHAPE, IN_16_BIT = attrgetter("shape"), "model.precision=16bit"


@cache
def a_size_on_which_they_differ(source: str | None, trait: Callable[[Plan], Any], *changes: str) -> str:
    """A size for which st, drawing as beside dpo-st, and dpo-st would be planned differently if each were alone."""
    for tenths in sorted(range(100, 400), key=lambda number: abs(number - 355)):  # mostly, the first few tell
        size = f"{tenths / 10}GB"
        with contextlib.suppress(ModelError):
            st = alone(size, source, "method=st", "sampling.samples_for_labels=8", *changes)
            if trait(st) != trait(alone(size, source, *changes)):
                return size
    raise AssertionError("no such size")


@pytest.mark.parametrize("methods", ["st,dpo-st", "dpo-st,st"])
def test_what_is_picked_fits_every_method(started, methods: str) -> None:
    """With 16-bit weights DPO takes more than SFT, and so a smaller base."""
    size = a_size_on_which_they_differ(PAPER, SHAPE, IN_16_BIT)
    given("run", "--gpu-mem", size, "--precision", "16bit", "--method", methods)
    assert [plan.shape for _, plan in started] == [alone(size, PAPER, IN_16_BIT).shape] * 2


def test_what_does_not_fit_every_method_is_refused_with_what_does() -> None:
    size = a_size_on_which_they_differ(PAPER, SHAPE, IN_16_BIT)
    fitting = alone(size, PAPER, IN_16_BIT).shape.name
    too_large = alone(size, PAPER, IN_16_BIT, "method=st").shape.name
    words = ["run", "--gpu-mem", size, "--precision", "16bit", "--model", too_large, "--method", "st,dpo-st"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert f"{too_large} needs at least" in result.stderr
    assert "GiB for dpo" in result.stderr
    assert f"{fitting} fits" in result.stderr
    assert not Path("runs").exists()


def rows_of(plan: Plan) -> int | str:
    return plan.stages[1].choices["rows"]


def test_methods_that_are_compared_are_cut_alike(started) -> None:
    """Else one would be sampled with more rows than the other."""
    model = "Qwen/Qwen3-8B-Base"
    size = a_size_on_which_they_differ(None, rows_of, f"model.name={model}")
    given("run", "--gpu-mem", size, "--model", model, "--method", "st,dpo-st")
    assert len({(recipe.sampling.weights, recipe.sampling.max_rows) for recipe, _ in started}) == 1
    assert {rows_of(plan) for _, plan in started} == {started[0][0].sampling.max_rows}
    apart = [
        alone(size, None, f"model.name={model}", *own) for own in ([], ["method=st", "sampling.samples_for_labels=8"])
    ]
    assert started[0][0].sampling.max_rows == min(map(rows_of, apart))
