"""What does each setting of DPO do to what is drawn? One warm-up, one set of samples, one DPO training for each lever.

    python bench/levers.py [--problems 320] [--samples 4] [--levers NAME …] [--save FILE.json] [key=value …]

A proxy for a whole run, in minutes instead of hours: self-training lives on distinct right rationales, so each policy
draws for all training problems with the same random numbers as the SFT policy. Prints for each lever the pairs, what
DPO did to them (nats against the reference), and what is drawn: right, problems with a right one, distinct right ones
with the paired difference to the SFT policy and its 95 % interval, steps and tokens of a rationale, unfinished ones.
The last line is one JSON object. What was measured is kept in --out; a benchmark that was stopped goes on.
"""

import argparse
import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from publish import publish, result_of

from dpost_lite.pipeline.preflight import preflight
from dpost_lite.pipeline.prepare import PrepareData
from dpost_lite.pipeline.tasks import SampleRationales, TrainDpo, TrainSft
from dpost_lite.pipeline.worker import Task, run_in_child
from dpost_lite.problems.comparing import bootstrap_mean
from dpost_lite.problems.pairs import distinct_right, make_pairs
from dpost_lite.problems.records import LabelledRationale, Problem, Rationale, read_jsonl, write_jsonl
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.report.health import sample_stats
from dpost_lite.runs.folder import UNFINISHED, read_json, write_json

BASE = ["data.num_labelled=48", "synthetic.num_test=1", "dpo.learning_rate=3e-5", "dpo.max_steps=1000"]
LEVERS: dict[str, list[str]] = {
    "paper's pairs, 3e-5": [],
    "1e-5": ["dpo.learning_rate=1e-5"],
    "6e-5": ["dpo.learning_rate=6e-5"],
    "beta 0.3": ["dpo.beta=0.3"],
    "nll_weight 1": ["dpo.nll_weight=1"],
    "sigmoid_norm, beta 2": ["dpo.loss=sigmoid_norm", "dpo.beta=2"],
    "calculator masked": ["dpo.calculated_in_loss=false"],
    "gold not first": ["pairs.gold_first=false"],
    "equal steps": ["pairs.equal_steps=true"],
    "8 pairs per problem": ["pairs.max_per_problem=8"],
    "3 passes": ["dpo.epochs=3"],
    "3e-4": ["dpo.learning_rate=3e-4"],
    "3e-4, max_logp_drop 3": ["dpo.learning_rate=3e-4", "dpo.max_logp_drop=3"],
}


def main() -> None:
    """Measure, print one line a lever."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=320)
    parser.add_argument("--samples", type=int, default=4, help="per problem, for pairs and to compare")
    parser.add_argument("--levers", nargs="+", default=list(LEVERS), help=f"of: {', '.join(LEVERS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-levers"))
    parser.add_argument("--save", type=Path, help="also write the JSON object to this file")
    parser.add_argument("overrides", nargs="*", help="recipe keys for all levers, key=value")
    arguments = parser.parse_intermixed_args()
    if unknown := [name for name in arguments.levers if name not in LEVERS]:
        parser.error(f"--levers: there is no {unknown[0]}; known: {', '.join(LEVERS)}")
    own = [f"synthetic.num_train={arguments.problems}", f"sampling.samples_for_pairs={arguments.samples}"]
    shared = [*BASE, *own, *arguments.overrides]
    bench = Bench(load_recipe("rehearsal", shared), arguments.out, arguments.samples)
    print(HEADER)
    rows = {"SFT": bench.drawn(bench.out / "sft-draws", bench.sft)}
    print(line("SFT", rows["SFT"]), flush=True)
    for lever in arguments.levers:
        rows[lever] = bench.measured(lever, load_recipe("rehearsal", [*shared, *LEVERS[lever]]))
        print(line(lever, rows[lever]), flush=True)
    publish(result_of("levers", base=shared, levers=LEVERS, rows=rows), arguments.save)


class Bench:
    """A warm-up and its samples, in a folder."""

    def __init__(self, recipe: Recipe, out: Path, num_samples: int) -> None:
        self.recipe, self.out, self.num_samples = recipe, out, num_samples
        out.mkdir(parents=True, exist_ok=True)
        settings = {"recipe": recipe.model_dump(mode="json"), "samples": num_samples}
        if (out / "settings.json").exists() and read_json(out / "settings.json") != settings:
            raise SystemExit(f"--out: {out} was measured with other settings; give another folder")
        write_json(out / "settings.json", settings)
        self.model_dir = preflight(recipe, out)
        self.data = self.work("data", PrepareData(recipe, self.model_dir))
        micro = recipe.sft.micro_batch_size
        self.sft = self.work("sft", TrainSft(recipe, self.model_dir, self.data, micro, "plain"))
        self.samples = self.draw(out / "samples-pairs", self.sft, "pairs")
        self.problems = list(read_jsonl(self.data / "train.jsonl", Problem))
        self.gold = {label.problem_id: label for label in read_jsonl(self.data / "labels.jsonl", LabelledRationale)}

    def work(self, name: str | Path, task: Task) -> Path:
        """Return the folder of a task's work, done now or before; its metrics are in metrics.json."""
        out = self.out / name
        if not (out / "metrics.json").exists():
            (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
            done = run_in_child(task, out, log=out / "log.txt", progress=ignore)
            write_json(out / "metrics.json", done.metrics)
        return out

    def draw(self, out: Path, policy: Path, purpose: str) -> Path:
        task = SampleRationales(
            self.recipe, self.model_dir, self.data, policy, None, purpose=purpose, num_samples=self.num_samples
        )
        return self.work(out.relative_to(self.out), task)

    def measured(self, lever: str, recipe: Recipe) -> dict[str, Any]:
        """Train DPO under a lever's recipe and draw."""
        folder = self.out / "".join(c if c.isalnum() else "-" for c in lever)
        folder.mkdir(exist_ok=True)
        pairs = make_pairs(
            self.problems,
            read_jsonl(self.samples / "rationales.jsonl", Rationale),
            self.gold,
            threshold=recipe.pairs.jaccard_threshold,
            max_pairs=recipe.pairs.max_per_problem,
            gold_first=recipe.pairs.gold_first,
            unfinished_rejected=recipe.pairs.unfinished_rejected,
            equal_steps=recipe.pairs.equal_steps,
        )
        write_jsonl(folder / "pairs.jsonl", pairs)
        micro = recipe.dpo.micro_batch_size
        steps: list[dict[str, float]] = []
        task = TrainDpo(recipe, self.model_dir, folder, self.sft, micro, "plain")
        out = folder / "dpo"
        if not (out / "metrics.json").exists():
            (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
            keep = functools.partial(keep_step, steps)
            done = run_in_child(task, out, log=out / "log.txt", progress=keep)
            write_json(out / "metrics.json", {**done.metrics, **changes(steps)})
        return {**read_json(out / "metrics.json"), **self.drawn(folder / "draws", out)}

    def drawn(self, out: Path, policy: Path) -> dict[str, Any]:
        """Draw, and compare with what the SFT policy draws."""
        counts = [
            self.distinct(self.draw(where, who, "levers"))
            for where, who in ((self.out / "sft-draws", self.sft), (out, policy))
        ]
        differences = [after - before for before, after in zip(*counts, strict=True)]
        low, high = (len(differences) * bound for bound in bootstrap_mean(differences))
        return {
            **asdict(sample_stats(out)),
            "distinct_right": sum(counts[1]),
            "difference": sum(differences),
            "low": low,
            "high": high,
        }

    def distinct(self, draws: Path) -> list[int]:
        rationales = list(read_jsonl(draws / "rationales.jsonl", Rationale))
        found = distinct_right(self.problems, rationales, self.gold, threshold=self.recipe.labels.threshold)
        return [found[problem.id] for problem in self.problems]


def ignore(*_: Any, **__: Any) -> None:
    """Progress that nobody reads."""


def keep_step(steps: list[dict[str, float]], *_: Any, **figures: float) -> None:
    """Keep a training step's figures."""
    steps.append(figures)


def changes(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean change of chosen and rejected rationales over the last fifth of the steps, in nats."""
    last = steps[-max(1, len(steps) // 5) :]
    return {name: sum(step[name] for step in last) / len(last) for name in ("chosen_change", "rejected_change")}


HEADER = (
    f"{'':<22}{'pairs':>6}{'steps':>6}{'chosen':>8}{'rejected':>9}{'right':>8}{'solved':>8}{'distinct':>9}"
    f"{'difference (95 %)':>24}{'steps/r':>8}{'tokens':>7}{'cut off':>8}"
)


def line(name: str, row: dict[str, Any]) -> str:
    """Return a lever's line of the table."""
    trained = (
        f"{row['num_pairs']:>6}{row['steps']:>6}{row['chosen_change']:>+8.2f}{row['rejected_change']:>+9.2f}"
        if "num_pairs" in row
        else " " * 29
    )
    difference = f"{row['difference']:+d} ({row['low']:+.0f} to {row['high']:+.0f})"
    return (
        f"{name:<22}{trained}{row['right']:>8.1%}{1 - row['all_wrong']:>8.1%}{row['distinct_right']:>9}{difference:>24}"
        f"{row['steps_per_rationale']:>7.2f}{row['tokens']:>7.1f}{row['unfinished']:>8.1%}"
    )


if __name__ == "__main__":
    main()
