"""The problems of one run: load, split and limit train, dev and test, and check them for overlap."""

import hashlib
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dpost_lite.errors import DataError
from dpost_lite.problems import datasets, synthetic
from dpost_lite.problems.records import Problem, file_name
from dpost_lite.recipe import DataRecipe, SyntheticRecipe

SYNTHETIC = "synthetic"
PAPERS_DEV_SIZE = 768  # of GSM8K's 7,473 training problems (DPO-ST, section 4.1)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The problems of a run. Train problems with a rationale are labelled; `num_refused` counts unusable rows."""

    train: list[Problem]
    dev: list[Problem]
    test: list[Problem]
    num_refused: int = 0


def load_corpus(recipe: DataRecipe, settings: SyntheticRecipe, *, seed: int) -> Corpus:
    """Load the recipe's problems. Limits apply after the split: a limited run uses a subset of the full one.

    A file without data.test gives a tenth of its problems to test and a tenth to dev. Raises DataError if something
    cannot be read, there are no test problems, or a training question is also a test question.
    """
    corpus = _synthetic(settings, seed) if recipe.train == SYNTHETIC else _loaded(recipe)
    if recipe.test is not None:
        corpus = replace(corpus, test=_test_set(recipe.test, recipe, settings, seed))
    corpus = Corpus(
        train=_only_labelled(corpus.train[: recipe.limit], recipe.num_labelled),
        dev=corpus.dev[: recipe.limit],
        test=_limited(corpus.test, recipe),
        num_refused=corpus.num_refused,
    )
    if not corpus.test:
        raise DataError(f"data.train={recipe.train}: there are no test problems; set data.test")
    test_name = recipe.test or ("dev part" if corpus.test == corpus.dev else f"{recipe.train} test")
    datasets.check_overlap(corpus.train, corpus.test, train_name=recipe.train, test_name=test_name)
    return corpus


def also_names(recipe: DataRecipe) -> dict[str, str]:
    """Return the sources of data.also_test by the name each has in files and tables.

    It is the set's, or the file's stem, with a number if another has it already.
    """
    names = {source: source for source in recipe.also_test if source in (*datasets.NAMED, SYNTHETIC)}
    taken = {*names}
    for source in recipe.also_test:
        if source not in names:
            stem = file_name(Path(source).stem)
            numbered = (f"{stem}-{number}" for number in itertools.count(2))
            name = next(name for name in itertools.chain([stem], numbered) if name.lower() not in taken)
            taken.add(name.lower())  # some file systems ignore case
            names[source] = name
    return {names[source]: source for source in recipe.also_test}


def load_also(
    recipe: DataRecipe, settings: SyntheticRecipe, train: list[Problem], *, seed: int
) -> dict[str, list[Problem]]:
    """Load the further test sets, by name. Raises DataError if one cannot be read, or has a question of `train`."""
    sets = {}
    for name, source in also_names(recipe).items():
        try:
            sets[name] = _limited(_test_set(source, recipe, settings, seed), recipe)
        except DataError as error:
            raise DataError(f"data.also_test: {error}") from error
        datasets.check_overlap(train, sets[name], train_name=recipe.train, test_name=f"data.also_test={source}")
    return sets


def _synthetic(settings: SyntheticRecipe, seed: int) -> Corpus:
    train, dev, test = synthetic.split(
        num_train=settings.num_train,
        num_dev=settings.num_dev,
        num_test=settings.num_test,
        num_labelled=settings.num_train,  # data.num_labelled is applied in load_corpus, for every source
        seed=seed,
        min_steps=settings.min_steps,
        max_steps=settings.max_steps,
    )
    return Corpus(train, dev, test)


def _loaded(recipe: DataRecipe) -> Corpus:
    loaded = datasets.load(recipe.train, split="train", data_dir=recipe.data_dir)
    problems, refused = loaded.problems, len(loaded.refused)
    if recipe.train in datasets.NAMED:
        test = datasets.load(recipe.train, split="test", data_dir=recipe.data_dir).problems
        train, dev = _without_dev(problems, recipe, PAPERS_DEV_SIZE)
    elif recipe.split_file is not None:
        train, dev = _without_dev(problems, recipe, 0)
        test = dev
    else:
        tenth = -(-len(problems) // 10)
        rest, test = (problems, []) if recipe.test else datasets.split_train_dev(problems, dev_size=tenth)
        train, dev = _without_dev(rest, recipe, tenth)
    return Corpus(train, dev, test, refused)


def _without_dev(problems: list[Problem], recipe: DataRecipe, dev_size: int) -> tuple[list[Problem], list[Problem]]:
    wanted = dev_size if recipe.dev_size is None else recipe.dev_size
    return datasets.split_train_dev(problems, dev_size=wanted, split_file=recipe.split_file)


def _test_set(source: str, recipe: DataRecipe, settings: SyntheticRecipe, seed: int) -> list[Problem]:
    if source == SYNTHETIC:
        return _synthetic(settings, seed).test
    return datasets.load(source, split="test", data_dir=recipe.data_dir).problems


def _limited(test: list[Problem], recipe: DataRecipe) -> list[Problem]:
    return test[: min(filter(None, (recipe.limit, recipe.test_limit)), default=None)]


def _only_labelled(problems: list[Problem], num_labelled: int | None) -> list[Problem]:
    """Remove all but the first `num_labelled` rationales."""
    if num_labelled is None:
        return problems
    labelled = [problem.id for problem in problems if problem.rationale][:num_labelled]
    return [problem if problem.id in labelled else replace(problem, rationale=None) for problem in problems]


def digests(recipe: DataRecipe) -> dict[str, str]:
    """Return the SHA-256 of each file that train, dev and test come from, by path, so that edits are detected."""
    files = [path for path in (recipe.split_file, recipe.train, recipe.test) if path and Path(path).is_file()]
    if recipe.data_dir:
        files += sorted(recipe.data_dir.glob("*.jsonl")) + sorted(recipe.data_dir.glob("gsm8k/*.jsonl"))
    return _sha256_of(files)


def also_digests(recipe: DataRecipe) -> dict[str, str]:
    """Return the same for the files of data.also_test; `digests` has those in data_dir."""
    return _sha256_of(path for path in map(os.path.expanduser, recipe.also_test) if os.path.isfile(path))


def _sha256_of(files: Iterable[str | Path]) -> dict[str, str]:
    return {str(path): hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files}
