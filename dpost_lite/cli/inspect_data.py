"""Show how a source of problems is read, and what the model will see (`dpost-lite data`)."""

from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from dpost_lite.models import hub, loading
from dpost_lite.problems import datasets
from dpost_lite.problems.corpus import SYNTHETIC, load_corpus
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import Problem
from dpost_lite.recipe import Recipe
from dpost_lite.report.terminal import plain

NUM_SAMPLES_SHOWN = 3
NUM_REFUSED_SHOWN = 10


def preview(source: str, recipe: Recipe, *, split: str | None = None) -> Iterator[Text]:
    """Yield lines on the problems of `source`: counts, refused rows, and samples as `recipe`'s model sees them.

    `split` is "train" or "test"; unset, train if the source has one. Raises DataError if the source cannot be read,
    ModelError if the model's tokenizer cannot be loaded.
    """
    loaded = load(source, recipe, split or ("train" if source in ("gsm8k", SYNTHETIC) else "test"))
    problems, refused = loaded.problems, loaded.refused
    num_labelled = sum(problem.rationale is not None for problem in problems)
    yield plain(f"{source}: read as {loaded.format}", "bold")
    yield plain(f"  {len(problems):,} problems, {num_labelled:,} of them labelled (with a worked solution)")
    yield plain(f"  {len(refused):,} rows refused")
    for row in refused[:NUM_REFUSED_SHOWN]:
        yield plain(f"    {row.where}: {row.reason}")
    if len(refused) > NUM_REFUSED_SHOWN:
        yield plain(f"    and {len(refused) - NUM_REFUSED_SHOWN:,} more")
    name = recipe.model.name
    prompter = loading.load_prompter(hub.find(name), recipe.model)
    yield plain(f"\nas {name} sees it, the prompt in colour:", "bold")
    for problem in problems[:NUM_SAMPLES_SHOWN]:
        yield _sample(problem, prompter)


def load(source: str, recipe: Recipe, split: str) -> datasets.Loaded:
    """Load one part of a source without limits."""
    if source == SYNTHETIC:
        corpus = load_corpus(recipe.data, recipe.synthetic, seed=recipe.seed)
        return datasets.Loaded(corpus.train if split == "train" else corpus.test, [], "built-in problems")
    data_dir: Path | None = recipe.data.data_dir
    return datasets.load(source, split="train" if split == "train" else "test", data_dir=data_dir)


def _sample(problem: Problem, prompter: Prompter) -> Text:
    """Return the exact text of a problem's tokens, including special tokens."""
    prompt_ids = prompter.prompt_ids(problem.question)
    answer_ids = prompter.answer_ids(problem.rationale) if problem.rationale else ()
    decode = prompter.tokenizer.decode
    answer = f"{len(answer_ids)} answer tokens" if answer_ids else f"no worked solution, answer {problem.answer}"
    return Text.assemble(
        plain(f"\n{problem.id}: {len(prompt_ids)} prompt tokens, {answer}\n", "bold"),
        plain(decode(list(prompt_ids), clean_up_tokenization_spaces=False), "cyan"),
        plain(decode(list(answer_ids), clean_up_tokenization_spaces=False)),
    )
