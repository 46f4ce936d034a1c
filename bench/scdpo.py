"""Does step-controlled DPO help? SCDPO, DPO on as many pairs, DPO, and the warm-up they start from, over several seeds.

    python bench/scdpo.py [--seeds 3] [--methods scdpo dpo-equal dpo] [--out DIR] [--save FILE.json] [key=value …]

Gives `dpost-lite run --method scdpo,dpo-equal,dpo` with the rehearsal's model on built-in problems of two steps, so
a benchmark that was stopped goes on. Prints the pairs and strict accuracy of each method by seed, and the differences
to SCDPO, problem by problem, with their 95 % interval. The last line is one JSON object.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean

from publish import mean_and_intervals, publish, result_of

from dpost_lite.methods import MethodName
from dpost_lite.problems.comparing import compare
from dpost_lite.report import health, results
from dpost_lite.report.summary import method_difference
from dpost_lite.runs.stage_names import WARM_UP

METHODS: tuple[MethodName, ...] = ("scdpo", "dpo-equal", "dpo")
SETTINGS = [
    "synthetic.min_steps=2", "synthetic.max_steps=2", "synthetic.num_train=160", "data.num_labelled=96", "sft.epochs=4",
    "sampling.samples_for_pairs=4", "sampling.max_new_tokens=96", "dpo.learning_rate=3e-5", "dpo.max_steps=1000",
]  # fmt: skip


def main() -> None:
    """Train, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="scdpo first")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-scdpo"))
    parser.add_argument("--save", type=Path, help="also write the JSON object to this file")
    parser.add_argument("overrides", nargs="*", help="recipe keys, key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.methods[0] != "scdpo":
        parser.error("--methods: scdpo, with which the others are compared, comes first")
    methods, seeds = arguments.methods, range(1, arguments.seeds + 1)
    command = [
        "run",
        "--recipe",
        "rehearsal",
        "--method",
        ",".join(methods),
        "--seed",
        "1",
        "--seeds",
        str(arguments.seeds),
    ]
    command += ["--out", str(arguments.out), *SETTINGS, *arguments.overrides]
    subprocess.run([sys.executable, "-m", "dpost_lite", *command], check=True, stdout=sys.stderr)
    runs = {(name, seed): arguments.out / f"seed-{seed}" / name for seed in seeds for name in methods}
    right = {key: results.right(run, "round-1") for key, run in runs.items()}
    right |= {("sft", seed): results.right(runs["scdpo", seed], WARM_UP) for seed in seeds}
    rows = []
    print(f"{'':<12}{'pairs':>16}   accuracy by seed, mean")
    for name in (*methods, "sft"):
        pairs = [health.rounds(runs[name, seed])[0].pairs.num_pairs for seed in seeds] if name != "sft" else []
        rates = [mean(right[name, seed].values()) for seed in seeds]
        rows.append({"method": name, "pairs": pairs, "accuracy": rates})
        print(
            f"{name:<12}{' '.join(map(str, pairs)):>16}   " + " ".join(f"{rate:.1%}" for rate in [*rates, mean(rates)])
        )
    differences = []
    for name in (*methods[1:], "sft"):
        compared = [compare(right[name, seed], right["scdpo", seed]) for seed in seeds]
        differences.append({"from": name, "to": "scdpo", **mean_and_intervals(compared)})
        print(method_difference(name, "scdpo", compared))
    publish(result_of("scdpo", rows=rows, differences=differences), arguments.save)


if __name__ == "__main__":
    main()
