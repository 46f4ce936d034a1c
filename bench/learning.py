"""Does it learn, and is it DPO that helps? SFT, plain self-training and DPO-ST from the same warm-up, several seeds.

    python bench/learning.py [--seeds 3] [--tests 1000] [--equal-steps] [--out DIR] [--save FILE.json] [key=value …]
    python bench/learning.py --real --data-dir DIR                  # warm-up on built-in problems, then real ones
    python bench/learning.py --data gsm8k --data-dir DIR --also multiarith asdiv svamp  # where there is a GPU

Gives `dpost-lite run` for each seed and entrant, so a benchmark that was stopped goes on. Without --data it is the
rehearsal (SmolLM2-135M-Instruct, built-in problems). There are two budgets. At equal K, every entrant draws K samples a
problem for labels, and DPO-ST those for pairs on top, as in the paper. At equal draws, plain self-training draws all of
them for labels, and DPO-ST uses the right ones drawn for pairs as labels too; draws for the gate are not counted.

More labels also make the final fine-tuning longer. With --equal-steps the final fine-tuning of every run is repeated,
from the base on its own labels, for as many steps as the shortest one of self-training had; that of `sft` gets longer.
What is then left of the gain comes from more data.

Prints accuracy by entrant and seed; differences at either budget, problem by problem; and the health of each round,
which says why. The last line is one JSON object.
"""

import argparse
import json
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from publish import mean_and_intervals, publish, result_of
from rich.console import Console

from dpost_lite.evaluation.baselines import adopt
from dpost_lite.evaluation.evaluate import saved_answers
from dpost_lite.methods import MethodName
from dpost_lite.pipeline.stages import RunStages
from dpost_lite.problems.comparing import compare
from dpost_lite.problems.datasets import load, normal_question
from dpost_lite.problems.records import file_name
from dpost_lite.problems.synthetic import generate
from dpost_lite.recipe_files import load_recipe
from dpost_lite.report import health, results
from dpost_lite.report.summary import method_difference
from dpost_lite.report.terminal import TerminalView
from dpost_lite.runs.folder import Artifact, Run, read_json
from dpost_lite.runs.stage_names import StageName, policy_name

Right = dict[str, bool]


@dataclass(frozen=True, slots=True)
class Entrant:
    """A method with its own settings. `draws_for_pairs`: it spends on labels what DPO-ST draws for pairs."""

    name: str
    method: MethodName
    settings: tuple[str, ...] = ()
    draws_for_pairs: bool = False


GATE, NO_GATE = "dpo.gate=on", "dpo.gate=off"
ENTRANTS = (
    Entrant("sft", "sft"),
    Entrant("st", "st"),
    Entrant("st-all-draws", "st", draws_for_pairs=True),
    Entrant("dpo-st-paper", "dpo-st", (NO_GATE, "labels.from_pairs=false")),
    Entrant("dpo-st-gate", "dpo-st", (GATE, "labels.from_pairs=false")),
    Entrant("dpo-st-gate-all-draws", "dpo-st", (GATE, "labels.from_pairs=true")),
)
COMPARED = (
    ("equal K", "st", "dpo-st-paper"),
    ("equal K", "st", "dpo-st-gate"),
    ("equal draws", "st-all-draws", "dpo-st-gate-all-draws"),
    ("gain over the warm-up", "sft", "st"),
    ("gain over the warm-up", "sft", "st-all-draws"),
    ("gain over the warm-up", "sft", "dpo-st-gate-all-draws"),
)
SVAMP_TRAIN = 700  # of SVAMP's problems, the first; the others are for the test of --real
NUM_BUILT_IN = 64  # problems with rationales, for the warm-up of --real
SHARED = ("data", "score/base", "sft-0", "score/sft-0")
SHARED_BY_DPO = ("round-1/samples-pairs", "round-1/pairs", "round-1/dpo", "round-1/gate")


def main() -> None:
    """Train, score, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    names = [entrant.name for entrant in ENTRANTS]
    parser.add_argument("--entrants", nargs="+", default=names, choices=names)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-learning"))
    parser.add_argument("--data", help="as --data of run; unset, the rehearsal")
    parser.add_argument("--real", action="store_true", help="train on ASDiv and SVAMP, test on MultiArith and SVAMP")
    parser.add_argument("--data-dir", type=Path, help="as --data-dir of run")
    parser.add_argument("--tests", type=int, help="built-in problems to test on (the rehearsal: 400)")
    parser.add_argument("--equal-steps", action="store_true", help="also test after final SFTs of equally many steps")
    parser.add_argument("--also", nargs="*", default=[], help="other sets to test the best policies on")
    parser.add_argument("--save", type=Path, help="also write the JSON object to this file")
    parser.add_argument("overrides", nargs="*", help="recipe keys, key=value")
    arguments = parser.parse_intermixed_args()
    arguments.recipe = None if arguments.data else "rehearsal"
    arguments.options = ["--data", arguments.data] if arguments.data else ["--recipe", "rehearsal"]
    if arguments.tests is not None and (arguments.data or arguments.real):
        raise SystemExit("--tests counts built-in problems; leave it out with --data or --real")
    if arguments.tests is not None:
        arguments.overrides = [f"synthetic.num_test={arguments.tests}", *arguments.overrides]
    if arguments.real:
        use_real_text(arguments)
    entrants = [entrant for entrant in ENTRANTS if entrant.name in arguments.entrants]
    seeds = range(1, arguments.seeds + 1)
    runs = {(one.name, seed): train(one, seed, arguments) for seed in seeds for one in entrants}
    answers = {"test": {key: results.right(run, results.exported(run)) for key, run in runs.items()}}
    if arguments.real:  # SVAMP's come first
        num_svamp = len(load("svamp", data_dir=arguments.data_dir).problems) - SVAMP_TRAIN
        by_set = {"svamp": slice(num_svamp), "multiarith": slice(num_svamp, None)}
        answers |= {
            name: {key: dict(list(right.items())[part]) for key, right in answers["test"].items()}
            for name, part in by_set.items()
        }
    answers |= {data: {key: on_other(run, data, arguments) for key, run in runs.items()} for data in arguments.also}
    if arguments.equal_steps:
        num_steps = steps_of_shortest(runs)
        name = f"test, final fine-tunings of {num_steps} steps"
        answers[name] = {key: with_steps(run, num_steps) for key, run in runs.items()}
    tables = {data: tabled(data, by_run) for data, by_run in answers.items()}
    rounds = [
        {"entrant": name, "seed": seed, **asdict(one)}
        for (name, seed), run in runs.items()
        for one in health.rounds(run)
    ]
    print_health(rounds)
    publish(result_of("learning", tables=tables, health=rounds), arguments.save)


def train(entrant: Entrant, seed: int, arguments: argparse.Namespace) -> Path:
    """Run one entrant with one seed, or go on with it; return its folder."""
    folder = arguments.out / f"seed-{seed}"
    run = folder / entrant.name
    for other in ENTRANTS:  # what another one has made already
        source = folder / other.name
        if other is not entrant and (source / "run.json").exists():
            adopt(source, run, SHARED)
            if {entrant.method, other.method} == {"dpo-st"}:
                adopt(source, run, SHARED_BY_DPO if GATE in entrant.settings else SHARED_BY_DPO[:-1])
    options = ["--method", entrant.method, "--seed", str(seed), "--out", str(run)]
    options += arguments.options
    settings = [*arguments.overrides, *entrant.settings]
    if entrant.draws_for_pairs:
        sampling = load_recipe(arguments.recipe, settings).sampling
        settings.append(f"sampling.samples_for_labels={sampling.samples_for_labels + sampling.samples_for_pairs}")
    dpost_lite("run", *options, *data_dir(arguments), *settings)
    return run


def use_real_text(arguments: argparse.Namespace) -> None:
    """Write the files of --real, and give them to the runs.

    Training: built-in problems of one step with rationales, then 400 of ASDiv and of SVAMP's first 700 with their
    answers only. Test: SVAMP's last 300, and MultiArith. Questions of the test are left out of training.
    """
    if arguments.data_dir is None or arguments.data:
        raise SystemExit(
            "--real needs --data-dir DIR with asdiv.jsonl, svamp.jsonl and multiarith.jsonl, and no --data"
        )
    asdiv, svamp, multiarith = (
        load(name, data_dir=arguments.data_dir).problems for name in ("asdiv", "svamp", "multiarith")
    )
    test = [*svamp[SVAMP_TRAIN:], *multiarith]
    tested = {normal_question(problem.question) for problem in test}
    real = [problem for problem in (*asdiv, *svamp[:SVAMP_TRAIN]) if normal_question(problem.question) not in tested]
    chosen = random.Random(0).sample(real, 400)
    built_in = generate(NUM_BUILT_IN, seed=0, max_steps=1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [{"question": problem.question, "answer": problem.rationale} for problem in built_in]
    rows += [{"question": problem.question, "answer": problem.answer} for problem in chosen]
    train, tests = arguments.out / "real-train.jsonl", arguments.out / "real-test.jsonl"
    write_rows(train, rows)
    write_rows(tests, [{"question": problem.question, "answer": problem.answer} for problem in test])
    settings = [f"data.train={train}", f"data.test={tests}", "data.dev_size=0", "data.num_labelled=null"]
    arguments.overrides = [*settings, *arguments.overrides]


def write_rows(path: Path, rows: list[dict[str, str | None]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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


def steps_of_shortest(runs: dict[tuple[str, int], Path]) -> int:
    """Print the steps of the final fine-tunings; return the fewest of a round's (of all, without rounds)."""
    last = {key: last_of(run) for key, run in runs.items()}
    steps = {key: read_json(runs[key] / str(sft) / "done.json")["metrics"]["steps"] for key, sft in last.items()}
    print("\nsteps of the final fine-tunings")
    for name in dict.fromkeys(name for name, _ in steps):
        print(f"{name}: {', '.join(str(number) for (other, _), number in steps.items() if other == name)}")
    return min([steps[key] for key, sft in last.items() if sft.round] or steps.values())


def last_of(run: Path) -> StageName:
    """Return a run's final fine-tuning."""
    return StageName("sft", StageName.score(results.scores(run)[-1].name).round)


def with_steps(run: Path, num_steps: int) -> Right:
    """Repeat a run's final fine-tuning, from the base on the same labels, for `num_steps`; return what it solves."""
    number, recipe = last_of(run).round, Run.open(run).recipe
    sft = {"max_steps": num_steps, "epochs": float(num_steps)}  # a pass over the labels takes at least one step
    recipe = recipe.model_copy(update={"sft": recipe.sft.model_copy(update=sft)})
    out = run.with_name(f"{run.name}-{num_steps}-steps")
    source = str(StageName("labels", number)) if number else "data"
    adopt(run, out, ("data", source))
    with TerminalView(Console(stderr=True)) as view:
        again = Run.create(out, recipe, (view,))
        with again.locked():
            stages = RunStages(recipe, again)
            stages.data()
            made = read_json(out / source / "done.json")
            stages.sft(number, Artifact(source, out / source, made["fingerprint"], made["metrics"]))
    return results.right(out, policy_name(number))


def tabled(data: str, answers: dict[tuple[str, int], Right]) -> dict[str, Any]:
    """Print accuracy by entrant and seed, and the differences at either budget; return the same."""
    names = list(dict.fromkeys(name for name, _ in answers))
    seeds = sorted({seed for _, seed in answers})
    rates = {name: [mean(answers[name, seed].values()) for seed in seeds] for name in names}
    num_problems = len(answers[names[0], seeds[0]])
    width = max(map(len, names)) + 2
    print(f"\n{data}, {num_problems} problems")
    print(" " * width + "".join(f"{f'seed {seed}':>9}" for seed in seeds) + "     mean       sd")
    for name, values in rates.items():
        spread = [stdev(values)] if len(values) > 1 else []
        print(f"{name:<{width}}" + "".join(f"{value:9.1%}" for value in [*values, mean(values), *spread]))
    differences = []
    for budget, a, b in COMPARED:
        if a in names and b in names:
            compared = [compare(answers[a, seed], answers[b, seed]) for seed in seeds]
            differences.append({"budget": budget, "from": a, "to": b, **mean_and_intervals(compared)})
            print(f"{budget}: {method_difference(a, b, compared)}")
    return {"num_problems": num_problems, "seeds": seeds, "accuracy": rates, "differences": differences}


def print_health(rounds: list[dict[str, Any]]) -> None:
    """Print what each round drew and what DPO did to the policy."""
    print(
        f"\n{'entrant':<22} seed round   drawn  right  mixed pairs  chosen rejected      distinct before, after DPO"
        "   labels  of them gold"
    )
    for one in rounds:
        drawn, pairs, dpo, gate, labels = (one[part] for part in ("for_labels", "pairs", "dpo", "gate", "labels"))
        did = f"{dpo['chosen_change']:+8.2f} {dpo['rejected_change']:+8.2f}" if dpo else " " * 17
        found = ""
        if gate:
            decision = "kept" if gate["low"] > 0 else "discarded"
            found = f"{gate['distinct_right_before']:,} → {gate['distinct_right_after']:,}, {decision}"
        print(
            f"{one['entrant']:<22}{one['seed']:>5}{one['number']:>6}{drawn['num_rationales']:>8}{drawn['right']:>7.1%}"
            f"{drawn['mixed']:>7.1%}{pairs['num_pairs'] if pairs else '':>6}{did}{found:>32}{labels['num_labels']:>9}"
            f"{labels['num_gold']:>14}"
        )


if __name__ == "__main__":
    main()
