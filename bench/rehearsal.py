"""Does a round of self-training gain on SFT in the rehearsal? Three seeds, same test problems.

    python bench/rehearsal.py [--seeds 1 2 3] [--out runs/bench-rehearsal] [--save FILE.json] [key=value …]

Each seed is one `dpost-lite run` in a process of its own (its peak memory is measured there), so an interrupted
benchmark goes on when it is started again. Prints one row per seed and the paired difference over all problems; the
last line is one JSON object, which `--save` also writes to a file.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from publish import publish, result_of

from dpost_lite.problems.comparing import mcnemar
from dpost_lite.rundir import read_json


def main() -> None:
    """Run the seeds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-rehearsal"))
    parser.add_argument("--save", type=Path, help="also write the JSON object to this file")
    parser.add_argument("overrides", nargs="*", help="recipe keys, key=value")
    arguments = parser.parse_intermixed_args()
    rows = [run_seed(seed, arguments.out / f"seed-{seed}", arguments.overrides) for seed in arguments.seeds]
    print("seed    base     sft  round-1    gain  minutes  peak GiB")
    for row in rows:
        print(
            f"{row['seed']:>4}  {row['base']:6.1%}  {row['sft']:6.1%}  {row['round']:7.1%}  {row['gain']:+6.1%}"
            f"  {row['minutes']:7.1f}  " + (f"{row['peak_gib']:8.2f}" if row["peak_gib"] else "       –")
        )
    gains = [row["gain"] for row in rows]
    mean = sum(gains) / len(gains)
    won, lost = sum(row["won"] for row in rows), sum(row["lost"] for row in rows)
    print(f"mean gain {mean:+.1%}; problems won {won}, lost {lost}, McNemar p = {mcnemar(won, lost):.2g}")
    figures = {"seeds": rows, "mean_gain": mean, "won": won, "lost": lost, "p": mcnemar(won, lost)}
    publish(result_of("rehearsal", **figures), arguments.save)


def run_seed(seed: int, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Run one seed to its end (or go on with it) and return its figures; peak memory only if it ran in one go."""
    command = [sys.executable, "-m", "dpost_lite", "run", "--seed", str(seed), "--out", str(out), *overrides]
    is_new = not out.exists()
    subprocess.run(command, check=True, stdout=sys.stderr)
    answers = {name: right_problems(out / "score" / name / "test.jsonl") for name in ("sft-0", "round-1")}
    num_problems = read_json(out / "score" / "base" / "done.json")["metrics"]["test"]["num_problems"]
    accuracy = {
        name: read_json(out / "score" / name / "done.json")["metrics"]["test"]["strict"]
        for name in ("base", "sft-0", "round-1")
    }
    return {
        "seed": seed,
        "num_problems": num_problems,
        "base": accuracy["base"],
        "sft": accuracy["sft-0"],
        "round": accuracy["round-1"],
        "gain": accuracy["round-1"] - accuracy["sft-0"],
        "won": len(answers["round-1"] - answers["sft-0"]),
        "lost": len(answers["sft-0"] - answers["round-1"]),
        "minutes": sum(read_json(done)["seconds"] for done in out.rglob("done.json")) / 60,
        "peak_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20 if is_new else None,
    }


def right_problems(file: Path) -> set[str]:
    """Return the ids of the problems that were solved."""
    with file.open(encoding="utf-8") as lines:
        return {answer["problem_id"] for answer in map(json.loads, lines) if answer["correct"]}


if __name__ == "__main__":
    main()
