"""Train a small T5: an encoder–decoder to try the whole loop on where Flan-T5 cannot be had.

    python bench/small_t5.py runs/small-t5 [--problems 1200] [--epochs 20]
    dpost-lite run --recipe rehearsal-t5 --model runs/small-t5

A million weights, trained from scratch on built-in problems of one step with their rationales (of another seed than a
run's: of 1,000 test problems one is among them), with a vocabulary of their words. It knows nothing else. What a run
makes of it shows that the loop works on encoder–decoders, not how good Flan-T5 is.
"""

import argparse
import logging
import math
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dpost_lite.models import loading, sft
from dpost_lite.models.shapes import EncoderDecoderShape
from dpost_lite.problems.notation import BRACKETS
from dpost_lite.problems.records import LabelledRationale
from dpost_lite.problems.synthetic import generate
from dpost_lite.recipe import ModelRecipe, SftRecipe
from dpost_lite.report.terminal import TerminalView
from dpost_lite.system import quiet

SEED = 1000
LEAST_COUNT = 5  # of a word that gets a piece of its own
SPECIAL = ("<pad>", "</s>", "<unk>")


def main() -> None:
    """Make the tokenizer and a random model, train it, and save both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", type=int, default=1200)
    parser.add_argument("--epochs", type=float, default=20)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names of its own
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # about a kernel that is not needed
    problems = generate(arguments.problems, seed=SEED, max_steps=1)
    tokenizer = tokenizer_of([BRACKETS.to_model(f"{p.question} {p.rationale}") for p in problems])
    recipe = SftRecipe(learning_rate=2e-3, epochs=arguments.epochs, batch_size=64, micro_batch_size=64)
    with tempfile.TemporaryDirectory() as scratch, TerminalView(Console()) as view:
        start = save_random(tokenizer, Path(scratch) / "start")
        prompter = loading.load_prompter(start, ModelRecipe())
        view({"kind": "stage_started", "stage": "small T5"})

        def progress(done: int, total: int, unit: str, **metrics: Any) -> None:
            view({"kind": "progress", "done": done, "total": total, "unit": unit, "metrics": metrics})

        labelled = [
            LabelledRationale(p.id, p.question, p.rationale or "", prompter.answer_ids(p.rationale or ""), is_gold=True)
            for p in problems
        ]
        sft.train_sft(
            loading.load(start, "full"),
            prompter,
            labelled,
            arguments.folder,
            recipe=recipe,
            seed=0,
            progress=progress,
            checkpoint_s=60,
        )
    print(f"saved in {arguments.folder}")


def tokenizer_of(texts: Sequence[str]) -> Any:
    """Return a tokenizer built as T5's is: the words of the texts, single digits, and characters for all else."""
    from transformers import T5Tokenizer

    words = Counter(word for text in texts for word in re.findall(r"[^\W\d_]+|[^\w\s]+", text))
    pieces = dict.fromkeys(sorted({character for text in texts for character in text} - {" "}), -12.0)
    pieces |= {start + digit: -6.0 for start in ("", "▁") for digit in "0123456789"}
    pieces["▁"] = -6.0
    for word, count in sorted(words.items()):
        if count >= LEAST_COUNT:
            pieces |= dict.fromkeys(("▁" + word, *(() if word.isalpha() else (word,))), math.log(count / words.total()))
    return T5Tokenizer(vocab=[*dict.fromkeys(SPECIAL, 0.0).items(), *pieces.items()], extra_ids=0)


def save_random(tokenizer: Any, folder: Path) -> Path:
    """Save a small T5 with random weights."""
    import torch
    import transformers

    shape = EncoderDecoderShape(
        name="small-t5", num_layers=2, num_encoder_layers=2, hidden=128, intermediate=256, num_heads=4, num_kv_heads=4,
        head_dim=32, vocabulary=-(-len(tokenizer) // 64) * 64, is_tied=False,
    )  # fmt: skip
    torch.manual_seed(0)
    config = shape.config()
    config.dropout_rate = 0.0  # it is far too small to learn too much by heart
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)  # which shares the embedding with the head
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach() * shape.hidden**-0.5)
    model.config.tie_word_embeddings = False
    with quiet.quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
