"""How fast does a training step go, and in how much memory: QLoRA, LoRA on 16 bit, and the papers' full fine-tuning?

    python bench/training.py [--model NAME | --shape llama-3.1-8b] [--gpu-mem 24GB] [--length 256] [--micro-batch 4]
                             [--steps 4] [--entrants qlora unsloth 16bit full] [--save bench/results/training.json]

Each entrant trains SFT and DPO on the same random token ids, in a process of its own; --gpu-mem caps that process, so
that a larger card can stand for a smaller one. The first step is left out of the time, and is in the peak. Tokens are
those of the policy's rows. Of LoRA's DPO the pass through the reference is in the time; where all weights are trained
it came before the first step. Utilisation counts the products that the method needs (4 FLOP a weight and token, 6 if
all weights are trained, 2 for the reference), against the rate of products measured on this machine: of float32 ones
where all weights are trained. The last line is one JSON object.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from publish import publish, result_of
from random_model import add_model_options, model_folder

from dpost_lite.errors import DpostError
from dpost_lite.models import adapters, hardware, loading
from dpost_lite.models.backend import FIRST_IMPORTS, choose_backend
from dpost_lite.models.dpo import train_dpo
from dpost_lite.models.sft import train_sft
from dpost_lite.pipeline.worker import run_in_child
from dpost_lite.planner.device import GIB, Device, find_device
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import LabelledRationale, PreferencePair
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe

ENTRANTS = {
    "qlora": ["model.precision=4bit", "model.backend=plain"],
    "unsloth": ["model.precision=4bit", "model.backend=unsloth"],
    "16bit": ["model.precision=16bit", "model.backend=plain"],
    "full": ["model.precision=full"],
}
IDS = range(1000, 20_000)  # words of the tokenizer that all models here have, no special ones


def main() -> None:
    """Run the entrants, print the table."""
    arguments = parse()
    device = find_device(arguments.gpu_mem)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, shape = model_folder(arguments, Path(scratch))
        for name in arguments.entrants:
            for kind in ("sft", "dpo"):
                row = {"entrant": name, "kind": kind, **measured(name, kind, folder, device, arguments, Path(scratch))}
                if "seconds" in row:
                    per_weight = (6 if name == "full" else 4) + (2 if kind == "dpo" and name != "full" else 0)
                    flops = per_weight * shape.num_parameters * row["tokens_per_s"]
                    row["utilisation"] = flops / (device.float32_flops if name == "full" else device.flops)
                rows.append(row)
                print(as_line(row), flush=True)
    publish(result_of("training", model=shape.name, flops=device.flops, rows=rows), arguments.save)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--gpu-mem", default="auto" if hardware.device() == "cuda" else "cpu")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row, a quarter of them the prompt")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows of SFT, pairs of DPO")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--entrants", nargs="+", choices=list(ENTRANTS), default=["qlora", "16bit", "full"])
    parser.add_argument("--save", type=Path)
    return parser.parse_args()


def measured(
    name: str, kind: str, folder: Path, device: Device, arguments: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Train in a child; return seconds a step, tokens a second, and its peak, or the error that ended it."""
    micro = arguments.micro_batch
    recipe = training_recipe(name, kind, micro, micro, arguments.length)
    try:
        value = run_in_child(
            Training(kind, recipe, folder, arguments.length, arguments.steps),
            scratch / f"{name}-{kind}",
            log=scratch / f"{name}-{kind}.log",
            progress=lambda *_, **__: None,
            memory_share=device.memory_share,
            first_import=FIRST_IMPORTS[choose_backend(recipe.model)],
        )
    except DpostError as error:
        return {"error": str(error)}
    return {**value.metrics, "peak_gib": (value.gpu_bytes or value.ram_bytes) / GIB}


def training_recipe(name: str, kind: str, micro: int, batch: int, length: int, settings: Sequence[str] = ()) -> Recipe:
    """Return the recipe of an entrant with these micro-batches, and a limit that keeps rows of `length` tokens."""
    sizes = [f"{kind}.batch_size={batch}", f"{kind}.micro_batch_size={micro}", f"{kind}.max_length={length}"]
    return load_recipe(None, [*settings, *ENTRANTS[name], *sizes, "sft.epochs=1", "dpo.max_steps=100000"])


@dataclass(frozen=True)
class Training:
    """The task for the child: train `steps` timed steps on random ids of one length, after one that is not timed.

    With `longest`, it first takes a step on rows of that length: what a stage's memory is planned for.
    DPO starts from a fresh adapter, which costs as much as a trained one.
    """

    kind: str
    recipe: Recipe
    folder: Path
    length: int
    steps: int
    longest: int = 0

    def run(self, out: Path, progress: Callable[..., None]) -> dict[str, Any]:
        """Return the seconds and the policy's tokens of a step, their rate, and the first loss."""
        policy = adapters.load_for_sft(self.folder, self.recipe, choose_backend(self.recipe.model))
        if self.longest:
            self._train(policy, out / "longest", progress, self.longest, 1)
            if "ref" in getattr(policy, "peft_config", {}):
                policy.delete_adapter("ref")  # DPO makes it anew
        times: list[float] = []

        def timed(*args: Any, **figures: Any) -> None:
            times.append(time.perf_counter())
            progress(*args, **figures)

        found = self._train(policy, out / "timed", timed, self.length, self.steps + 1)
        rows = self._batch_size * (2 if self.kind == "dpo" else 1)
        seconds, tokens = (times[-1] - times[0]) / (len(times) - 1), rows * self.length
        return {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds, "loss": found["first_loss"]}

    @property
    def _batch_size(self) -> int:
        return (self.recipe.sft if self.kind == "sft" else self.recipe.dpo).batch_size

    def _train(self, policy: Any, out: Path, progress: Callable[..., None], length: int, steps: int) -> dict[str, Any]:
        prompter: Any = FixedPrompt(Prompter(loading.load_tokenizer(self.folder), "plain"), length // 4)
        dice, num_rows = random.Random(0), steps * self._batch_size
        options: dict[str, Any] = {"seed": 0, "progress": progress, "checkpoint_s": inf}
        out.mkdir(parents=True)

        def answer() -> tuple[int, ...]:
            return tuple(dice.choice(IDS) for _ in range(length - length // 4))

        if self.kind == "sft":
            labels = [LabelledRationale(str(i), "", "", answer(), is_gold=True) for i in range(num_rows)]
            return train_sft(policy, prompter, labels, out, recipe=self.recipe.sft, **options)
        pairs = [PreferencePair(str(i), "", "", "", answer(), answer()) for i in range(num_rows)]
        return train_dpo(policy, prompter, pairs, out, recipe=self.recipe.dpo, **options)


class FixedPrompt:
    """A prompter whose every prompt is of one length."""

    def __init__(self, prompter: Prompter, length: int) -> None:
        self.tokenizer = prompter.tokenizer
        self._ids = tuple(IDS[:length])

    def prompt_ids(self, question: str) -> tuple[int, ...]:
        return self._ids


def as_line(row: dict[str, Any]) -> str:
    name = f"{row['entrant']:<8} {row['kind']:<4}"
    if "error" in row:
        return f"{name} {row['error'][:100]}"
    return (
        f"{name} {row['seconds']:8.3f} s a step  {row['tokens_per_s']:9.1f} tok/s  {row['peak_gib']:6.2f} GiB peak  "
        f"{row['utilisation']:6.1%} of the measured rate"
    )


if __name__ == "__main__":
    main()
