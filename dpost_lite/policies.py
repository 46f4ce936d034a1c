"""What a policy, an adapter on its base or weights of its own, is for: to answer problems, and to go home as a file."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpost_lite.local import gguf
from dpost_lite.models import adapters, backends
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import Problem, Rationale
from dpost_lite.recipe import Recipe


def calculator_of(recipe: Recipe) -> Calculator | None:
    """The calculator that a recipe asks for, or None."""
    settings = recipe.calculator
    if not settings.enabled:
        return None
    return Calculator(max_decimals=settings.max_decimals, rounded_decimals=settings.rounded_decimals)


def prompter_of(recipe: Recipe, model_dir: Path) -> Prompter:
    """The prompt template that a recipe asks for, with the model's tokenizer."""
    return Prompter(backends.load_tokenizer(model_dir), recipe.model.prompt)


def answers(
    model: Any,
    prompter: Prompter,
    problems: Sequence[Problem],
    recipe: Recipe,
    *,
    purpose: str,
    num_samples: int = 1,
    temperature: float = 0.0,
    done: Iterable[Rationale] = (),
) -> Iterator[Rationale]:
    """Yield graded rationales of a loaded policy as they end, sampled as the recipe says; greedy unless told.

    Those in `done` are not drawn again.
    """
    from dpost_lite.sampling.sampler import sample

    sampling = recipe.sampling
    return sample(
        model,
        prompter,
        problems,
        calculator=calculator_of(recipe),
        purpose=purpose,
        num_samples=num_samples,
        temperature=temperature,
        top_p=sampling.top_p if temperature else 1.0,
        max_new_tokens=sampling.max_new_tokens,
        max_rows=sampling.max_rows,
        memory_gib=sampling.memory_gib,
        seed=recipe.seed,
        done=done,
    )


def export_gguf(recipe: Recipe, model_dir: Path, policy_dir: Path | None, out: Path) -> Path:
    """Merge a policy in 16 bit and write `out` as GGUF, quantised as `recipe.export.quant` says."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="merged-") as folder:
        where = None if recipe.sampling.weights == "merged" else "cpu"  # what did not fit to sample does not to merge
        model = adapters.load_merged(model_dir, policy_dir, recipe.model, on=where)
        adapters.save_merged(model, prompter_of(recipe, model_dir).tokenizer, Path(folder))
        del model
        return gguf.export(Path(folder), out, quant=recipe.export.quant)
