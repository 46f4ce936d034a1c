"""How much of DPO is padding, and what does it cost? Rows as they are drawn, and by length within each step.

    python bench/padding.py PAIRS.jsonl POLICY [--batch 32] [--micro-batch 8] [--steps 4] [--repeats 3]
                            [--save FILE.json]

PAIRS.jsonl is that of a run (RUN/round-1/pairs/pairs.jsonl), POLICY the adapter of its SFT policy, on the demo model.
Trains the same steps both ways, in turn, and prints the share of tokens that are padding, the seconds of a step, and
the losses, which are those of the same rows. The last line is one JSON object.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from publish import publish, result_of

from dpost_lite.models import adapters, dpo, hub
from dpost_lite.models.loading import load_prompter
from dpost_lite.models.order import ByLength
from dpost_lite.problems.records import PreferencePair, read_jsonl
from dpost_lite.recipe_files import load_recipe

by_length = ByLength.__iter__


def as_drawn(sampler: ByLength) -> Iterator[int]:
    """The order without the sorting: of rows of equal length."""
    equal = ByLength([1] * len(sampler), sampler._rows_per_step, sampler._micro_batch_size, seed=sampler._seed)
    return by_length(equal)


ORDERS = {"as drawn": as_drawn, "by length": by_length}


def main() -> None:
    """Count and measure, print one line an order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("policy", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    pairs = list(read_jsonl(arguments.pairs, PreferencePair))
    rows: dict[str, dict[str, Any]] = {name: {"seconds_per_step": []} for name in ORDERS}
    for _ in range(arguments.repeats):
        for name, order in ORDERS.items():
            with patch.object(ByLength, "__iter__", order):
                found = train(pairs, arguments)
            rows[name]["seconds_per_step"].append(found.pop("seconds_per_step"))
            rows[name].update(found)
    for name, row in rows.items():
        seconds = median(row["seconds_per_step"])
        losses = ", ".join(f"{loss:.5f}" for loss in row["losses"])
        print(
            f"{name:<10} padding {row['padding']:6.1%} of all pairs' tokens; {seconds:6.2f} s a step; losses {losses}"
        )
    publish(result_of("padding", num_pairs=len(pairs), rows=rows), arguments.save)


def train(pairs: list[PreferencePair], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train some steps in the order that `ByLength` has now; return their losses and time, and the share of padding."""
    overrides = [
        f"dpo.batch_size={arguments.batch}", f"dpo.micro_batch_size={arguments.micro_batch}",
        f"dpo.max_steps={arguments.steps}",
    ]  # fmt: skip
    recipe = load_recipe("rehearsal", overrides)
    model_dir = hub.find(recipe.model.name)
    prompter = load_prompter(model_dir, recipe.model)
    ends, losses = [], []

    def progress(*_: Any, loss: float, **__: Any) -> None:
        ends.append(time.perf_counter())
        losses.append(loss)

    with tempfile.TemporaryDirectory() as folder:
        policy = adapters.load_for_dpo(model_dir, arguments.policy, recipe, "plain")
        dpo.train_dpo(
            policy, prompter, pairs, Path(folder), recipe=recipe.dpo, seed=recipe.seed, progress=progress,
            checkpoint_s=1e9,
        )  # fmt: skip
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {
        "seconds_per_step": seconds, "losses": losses, "padding": padding(pairs, prompter, recipe.seed, arguments)
    }  # fmt: skip


def padding(pairs: list[PreferencePair], prompter: Any, seed: int, arguments: argparse.Namespace) -> float:
    """Return the share of padding in one pass over all pairs."""
    prompts = [len(prompter.prompt_ids(pair.question)) + len(pair.prefix_ids) for pair in pairs]
    sides = [
        (prompt + len(pair.chosen_ids), prompt + len(pair.rejected_ids))
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    order = list(ByLength([max(both) for both in sides], arguments.batch, arguments.micro_batch, seed=seed))
    padded = 0
    for start in range(0, len(order), arguments.micro_batch):
        batch = [sides[i] for i in order[start : start + arguments.micro_batch]]
        padded += 2 * len(batch) * max(map(max, batch))
    return 1 - sum(map(sum, sides)) / padded


if __name__ == "__main__":
    main()
