"""How long does a round take, against the papers' design on the same machine?

    python bench/loop.py [--sampler bench/results/sampler.json] [--training bench/results/training-cpu.json]
                         [--samples 10] [--save bench/results/loop.json]

Joins what bench/sampler.py and bench/training.py measured for one model: rationales per second of our sampler and of
the papers' procedure, tokens per second of QLoRA and of full fine-tuning. A round on GSM8K draws 5 + K rationales for
each of 6,705 questions, trains DPO on 12,800 pairs and SFT on two epochs of gold and kept rationales; lengths and kept
shares are the planner's. The reference's pass over the pairs, which full fine-tuning makes beforehand, is left out of
the papers' time. The papers used more GPUs than one: this compares designs, not machines. The last line is one JSON
object.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from publish import publish, result_of

from dpost_lite.planner.workload import GSM8K, KEPT_SHARE, RIGHT_SHARE
from dpost_lite.recipe import Recipe

DESIGNS = {"dpost-lite": ("ours", "qlora"), "papers'": ("papers", "full")}  # sampler, training
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Join, print the table."""
    arguments = parse()
    sampler, training = (json.loads(file.read_text("utf-8")) for file in (arguments.sampler, arguments.training))
    if any(sampler["machine"][part] != training["machine"][part] for part in ("cpu", "gpu")):
        raise SystemExit("the two files were measured on different machines")
    rows = [hours(name, *parts, sampler, training, arguments.samples) for name, parts in DESIGNS.items()]
    print(f"{'design':<12}{'sample':>9}{'DPO':>9}{'SFT':>9}{'a round':>9}   hours")
    for row in rows:
        print(f"{row['design']:<12}{row['sample']:9.1f}{row['dpo']:9.1f}{row['sft']:9.1f}{row['round']:9.1f}")
    print(f"a round takes {rows[1]['round'] / rows[0]['round']:.1f} times as long with the papers' design")
    publish(result_of("loop", measured_on=training["machine"], samples=arguments.samples, rows=rows), arguments.save)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", type=Path, default=RESULTS / "sampler.json")
    parser.add_argument("--training", type=Path, default=RESULTS / "training-cpu.json")
    parser.add_argument("--samples", type=int, default=10, help="K, for pseudo-labels")
    parser.add_argument("--save", type=Path)
    return parser.parse_args()


def hours(
    name: str,
    sampler_name: str,
    training_name: str,
    sampler: dict[str, Any],
    training: dict[str, Any],
    num_samples: int,
) -> dict[str, Any]:
    """Return hours of one round of a design, by part."""
    recipe = Recipe()
    rate = {row["kind"]: row["tokens_per_s"] for row in training["rows"] if row["entrant"] == training_name}
    rationales = GSM8K.num_train * (recipe.sampling.samples_for_pairs + num_samples)
    labels = GSM8K.num_train * (1 + num_samples * RIGHT_SHARE * KEPT_SHARE)
    pairs = recipe.dpo.max_steps * recipe.dpo.batch_size
    seconds = {
        "sample": rationales / sampler["entrants"][sampler_name]["rationales_per_s"],
        "dpo": 2 * pairs * GSM8K.mean_length / rate["dpo"],
        "sft": labels * recipe.sft.epochs * GSM8K.mean_length / rate["sft"],
    }
    return {"design": name, **{part: s / 3600 for part, s in seconds.items()}, "round": sum(seconds.values()) / 3600}


if __name__ == "__main__":
    main()
