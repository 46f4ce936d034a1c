"""Faults at random moments, and every run ends in the same result as one that met none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from easy import SETTINGS, write_problems

BENCH = Path(__file__).parents[2] / "bench" / "faults.py"
NUM_FAULTS = 2  # of random kinds; the published figures are of 50


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark forks")
def test_faults_of_every_kind_lose_nothing(base_dir, tmp_path):
    data = write_problems(tmp_path / "mine.jsonl")
    command = [
        sys.executable, str(BENCH), "--faults", str(NUM_FAULTS), "--model", str(base_dir), "--data", str(data),
        "--out", str(tmp_path / "runs"), *SETTINGS, "rounds=1", "sft.epochs=4", "sampling.max_rows=8",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    rows = result["faults"].values()
    assert sum(row["tried"] for row in rows) == sum(row["recovered"] for row in rows) == NUM_FAULTS
    assert sum(row["rationales_again"] for row in rows) == 0
