"""For the tests of the command line: call it, and a run folder to call it on."""

from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from dpost_lite.cli.app import app
from dpost_lite.problems.records import Problem, write_jsonl
from dpost_lite.recipe import ModelRecipe, Recipe
from dpost_lite.runs.folder import Run


def dpost_lite(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


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
