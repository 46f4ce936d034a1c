"""How much of DPO is padding, and what does it cost? Rows as they are drawn, and by length within one step and several.

    python bench/padding.py PAIRS.jsonl [POLICY] [--first N] [--batch 32] [--micro-batch 8] [--steps 4] [--repeats 3]
                            [--data-dir DIR] [--save FILE.json] [key=value …]

PAIRS.jsonl is that of a run (RUN/round-1/pairs/pairs.jsonl). Counts the share of tokens that is padding in each order,
what is left within the pairs, which no order can avoid, and how far steps' mean lengths spread (standard deviation by
mean). With GSM8K in DIR it also counts pairs of GSM8K's length: the chosen one is a gold rationale, and the rejected
one is as many times longer as that of a pair of PAIRS.jsonl at random.

With POLICY, the adapter of the run's SFT policy on the demo model, it trains some steps in each order, in turn, on all
pairs or the first N, and prints their seconds and losses. Sorting several steps at once makes steps of other rows; in a
whole pass, the mean loss is of the same rows. The last line is one JSON object.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any
from unittest.mock import patch

from publish import publish, result_of

from dpost_lite.models import adapters, dpo, hub, order
from dpost_lite.models.loading import load_prompter
from dpost_lite.models.order import ByLength
from dpost_lite.problems.datasets import load
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import PreferencePair, read_jsonl
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe

Lengths = Sequence[tuple[int, int, int]]
"""Tokens of prompt, chosen and rejected rationale of each pair."""

Counted = dict[str, dict[str, dict[str, float]]]

by_length = ByLength.__iter__


def as_drawn(sampler: ByLength) -> Iterator[int]:
    """The order without the sorting: of rows of equal length."""
    equal = ByLength([1] * len(sampler), sampler._rows_per_step, sampler._micro_batch_size, seed=sampler._seed)
    return by_length(equal)


ORDERS: dict[str, AbstractContextManager[Any]] = {
    "as drawn": patch.object(ByLength, "__iter__", as_drawn),
    "within a step": patch.object(order, "STEPS_SORTED", 1),
    f"within {order.STEPS_SORTED} steps": nullcontext(),
}


def main() -> None:
    """Count and measure, print one line an order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("policy", type=Path, nargs="?")
    parser.add_argument("--first", type=int, help="pairs to train on")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("overrides", nargs="*", help="recipe keys, key=value")
    arguments = parser.parse_intermixed_args()
    overrides = [
        f"dpo.batch_size={arguments.batch}", f"dpo.micro_batch_size={arguments.micro_batch}",
        f"dpo.max_steps={arguments.steps}", *arguments.overrides,
    ]  # fmt: skip
    recipe = load_recipe("rehearsal", overrides)
    pairs = list(read_jsonl(arguments.pairs, PreferencePair))
    shares = count(pairs, recipe, arguments.data_dir)
    for name, row in shares.items():
        words = (f"{of} {one['padding']:6.1%}, spread {one['spread']:5.1%}" for of, one in row.items())
        print(f"{name:<17}padding " + "; ".join(words))
    trained: dict[str, dict[str, Any]] = {}
    if arguments.policy:
        trained = measure(pairs[: arguments.first], arguments.policy, recipe, arguments.repeats)
    for name, row in trained.items():
        seconds, losses = median(row["seconds_per_step"]), row["losses"]
        words = ", ".join(f"{loss:.5f}" for loss in losses)
        print(f"{name:<17}{seconds:6.2f} s a step; mean loss {mean(losses):.5f} of {words}")
    publish(result_of("padding", num_pairs=len(pairs), padding=shares, trained=trained), arguments.save)


def count(pairs: Sequence[PreferencePair], recipe: Recipe, data_dir: Path | None) -> Counted:
    """Return the share of padding and the spread of steps, by order and kind of pairs."""
    prompter = load_prompter(hub.find(recipe.model.name), recipe.model)
    lengths: dict[str, Lengths] = {
        "these pairs": [
            (len(prompter.prompt_ids(p.question)) + len(p.prefix_ids), len(p.chosen_ids), len(p.rejected_ids))
            for p in pairs
        ]
    }
    if data_dir:
        lengths["GSM8K's length"] = like_gsm8k(lengths["these pairs"], prompter, data_dir)
    shares: Counted = {}
    for name, patched in ORDERS.items():
        with patched:
            shares[name] = {of: shares_of(one, recipe, recipe.dpo.micro_batch_size) for of, one in lengths.items()}
    shares["within the pairs"] = {of: shares_of(one, recipe, 1) for of, one in lengths.items()}
    return shares


def like_gsm8k(pairs: Lengths, prompter: Prompter, data_dir: Path) -> Lengths:
    """Return the lengths of GSM8K's gold rationales, paired with others that differ from them as those of `pairs`."""
    draw = random.Random(0)
    found = []
    for problem in draw.sample(load("gsm8k", split="train", data_dir=data_dir).problems, 3200):
        chosen = len(prompter.answer_ids(problem.rationale or ""))
        _, one, other = draw.choice(pairs)
        found.append((len(prompter.prompt_ids(problem.question)), chosen, max(1, round(chosen * other / one))))
    return found


def shares_of(pairs: Lengths, recipe: Recipe, micro_batch_size: int) -> dict[str, float]:
    """Return the share of padding and the spread of whole steps in one pass, in the order that `ByLength` has now."""
    longest = [prompt + max(chosen, rejected) for prompt, chosen, rejected in pairs]
    rows = list(ByLength(longest, recipe.dpo.batch_size, micro_batch_size, seed=recipe.seed))
    *steps, _ = batched(rows, recipe.dpo.batch_size)
    num_padded = sum(2 * len(batch) * max(longest[i] for i in batch) for batch in batched(rows, micro_batch_size))
    num_tokens = [2 * prompt + chosen + rejected for prompt, chosen, rejected in pairs]
    means = [mean(num_tokens[i] for i in step) for step in steps]
    return {"padding": 1 - sum(num_tokens) / num_padded, "spread": stdev(means) / mean(means)}


def batched(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut rows into batches; the last may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def measure(pairs: list[PreferencePair], policy_dir: Path, recipe: Recipe, repeats: int) -> dict[str, dict[str, Any]]:
    """Train in each order, in turn; return the losses and the seconds of a step of each repeat."""
    rows: dict[str, dict[str, Any]] = {name: {"seconds_per_step": []} for name in ORDERS}
    for _ in range(repeats):
        for name, patched in ORDERS.items():
            with patched:
                seconds, rows[name]["losses"] = train(pairs, policy_dir, recipe)
            rows[name]["seconds_per_step"].append(seconds)
    return rows


def train(pairs: list[PreferencePair], policy_dir: Path, recipe: Recipe) -> tuple[float, list[float]]:
    """Train some steps in the order that `ByLength` has now; return the seconds of a step, and the losses."""
    model_dir = hub.find(recipe.model.name)
    ends, losses = [], []

    def progress(*_: Any, loss: float, **__: Any) -> None:
        ends.append(time.perf_counter())
        losses.append(loss)

    with tempfile.TemporaryDirectory() as folder:
        policy = adapters.load_for_dpo(model_dir, policy_dir, recipe, "plain")
        dpo.train_dpo(
            policy, load_prompter(model_dir, recipe.model), pairs, Path(folder), recipe=recipe.dpo, seed=recipe.seed,
            progress=progress, checkpoint_s=1e9,
        )  # fmt: skip
    return (ends[-1] - ends[0]) / (len(ends) - 1), losses


if __name__ == "__main__":
    main()
