"""Runs that several modules look at."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from easy import SETTINGS, write_problems
from typer.testing import CliRunner


@dataclass(frozen=True)
class TwoMethods:
    """DPO-ST and plain self-training from one warm-up, by the command line; `output` is what it printed."""

    command: list[str]
    output: str
    folders: dict[str, Path]


@pytest.fixture(scope="session")
def two_methods(base_dir, tmp_path_factory) -> TwoMethods:
    from dpost_lite.cli import app

    folder = tmp_path_factory.mktemp("methods")
    data = write_problems(folder / "mine.jsonl")
    command = [
        "run", "--method", "dpo-st,st", "--out", str(folder / "run"), "--data", str(data), "--model", str(base_dir),
        *SETTINGS, "rounds=1", "seed=1", "sft.epochs=5", "report_to=tensorboard",
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    folders = {method: folder / "run" / "seed-1" / method for method in ("dpo-st", "st")}
    return TwoMethods(command, result.stdout, folders)
