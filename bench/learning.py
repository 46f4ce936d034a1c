"""Does it learn, and is it DPO that helps? SFT, plain self-training and DPO-ST from the same warm-up, several seeds.

    python bench/learning.py [--seeds 3] [--out runs/bench-learning] [--save FILE.json] [key=value …]
    python bench/learning.py --data gsm8k --data-dir DIR --also multiarith asdiv svamp  # where there is a GPU

Gives `dpost-lite run --method dpo-st,st,sft` for each seed, so a benchmark that was stopped goes on. Without --data
it is the rehearsal (SmolLM2-135M-Instruct, built-in problems). `st` draws for its labels as many rationales as DPO-ST
draws for pairs and labels together; what DPO-ST draws for the gate is not counted. Prints accuracy by method and seed;
the differences of DPO-ST from the others, problem by problem; and the health of each round, which says why. The last
line is one JSON object.
"""

import argparse
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from publish import publish, result_of

from dpost_lite.evaluation.evaluate import file_name, saved_answers
from dpost_lite.problems.comparing import compare, mean_difference
from dpost_lite.report import health, results
from dpost_lite.report.summary import method_difference

METHODS = ("dpo-st", "st", "sft")
Right = dict[str, bool]


def main() -> None:
    """Train, score, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-learning"))
    parser.add_argument("--data", help="as --data of run; unset, the rehearsal")
    parser.add_argument("--data-dir", type=Path, help="as --data-dir of run")
    parser.add_argument("--also", nargs="*", default=[], help="other sets to test the best policies on")
    parser.add_argument("--save", type=Path, help="also write the JSON object to this file")
    parser.add_argument("overrides", nargs="*", help="recipe keys, key=value")
    arguments = parser.parse_intermixed_args()
    train(arguments)
    seeds = range(1, arguments.seeds + 1)
    runs = {(method, seed): arguments.out / f"seed-{seed}" / method for seed in seeds for method in METHODS}
    answers = {"test": {key: results.right(run, results.exported(run)) for key, run in runs.items()}}
    answers |= {data: {key: on_other(run, data, arguments) for key, run in runs.items()} for data in arguments.also}
    tables = {data: tabled(data, by_run) for data, by_run in answers.items()}
    rounds = [
        {"method": method, "seed": seed, **asdict(one)}
        for (method, seed), run in runs.items()
        for one in health.rounds(run)
    ]
    print_health(rounds)
    publish(result_of("learning", tables=tables, health=rounds), arguments.save)


def train(arguments: argparse.Namespace) -> None:
    """Run all methods and seeds, or go on with them."""
    for seed in range(1, arguments.seeds + 1):
        options = ["--method", ",".join(METHODS), "--seed", str(seed), "--out", str(arguments.out)]
        options += ["--data", arguments.data] if arguments.data else []
        dpost_lite("run", *options, *data_dir(arguments), *arguments.overrides)


def dpost_lite(*arguments: str) -> None:
    """Give a command; what it prints goes to stderr."""
    subprocess.run([sys.executable, "-m", "dpost_lite", *arguments], check=True, stdout=sys.stderr)


def data_dir(arguments: argparse.Namespace) -> list[str]:
    return ["--data-dir", str(arguments.data_dir)] if arguments.data_dir else []


def on_other(run: Path, data: str, arguments: argparse.Namespace) -> Right:
    """Return which problems of another set a run's best policy solves."""
    best = results.exported(run)
    out = run.with_name(f"{run.name}-{best}-on-{file_name(data)}")
    if not out.is_dir():
        options = ["--policy", best, "--data", data, "--calculator", "on", "--out", str(out), *data_dir(arguments)]
        dpost_lite("eval", str(run), *options)
    (answers,) = out.iterdir()
    return {answer.problem_id: answer.correct for answer in saved_answers(answers)}


def tabled(data: str, answers: dict[tuple[str, int], Right]) -> dict[str, Any]:
    """Print accuracy by method and seed, and how DPO-ST differs from the others; return the same."""
    seeds = sorted({seed for _, seed in answers})
    first, *others = METHODS
    rates = {method: [mean(answers[method, seed].values()) for seed in seeds] for method in METHODS}
    num_problems = len(answers[first, seeds[0]])
    print(f"\n{data}, {num_problems} problems")
    print(" " * 10 + "".join(f"{f'seed {seed}':>9}" for seed in seeds) + "     mean       sd")
    for method, values in rates.items():
        spread = [stdev(values)] if len(values) > 1 else []
        print(f"{method:<10}" + "".join(f"{value:9.1%}" for value in [*values, mean(values), *spread]))
    differences = {}
    for other in others:
        compared = [compare(answers[other, seed], answers[first, seed]) for seed in seeds]
        differences[other] = mean_difference(compared)
        print(method_difference(other, first, compared))
    return {"num_problems": num_problems, "seeds": seeds, "accuracy": rates, "differences": differences}


def print_health(rounds: list[dict[str, Any]]) -> None:
    """Print what each round drew and what DPO did to the policy."""
    print("\nmethod    seed round    drawn   right  mixed  pairs  chosen rejected  margin  labels  of them gold")
    for one in rounds:
        drawn, pairs, dpo, labels = one["for_labels"], one["pairs"], one["dpo"], one["labels"]
        did = f"{dpo['chosen_change']:+8.2f} {dpo['rejected_change']:+8.2f} {dpo['margin']:7.3f}" if dpo else " " * 25
        print(
            f"{one['method']:<10}{one['seed']:>4}{one['number']:>6}{drawn['num_rationales']:>9}{drawn['right']:>8.1%}"
            f"{drawn['mixed']:>7.1%}{pairs['num_pairs'] if pairs else '':>7}{did}{labels['num_labels']:>8}"
            f"{labels['num_gold']:>14}"
        )


if __name__ == "__main__":
    main()
