"""How much work there is: numbers of problems and their lengths in tokens, estimated without a tokenizer.

Local problems are read. For published sets, which might have to be downloaded, the sizes are known.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from dpost_lite.problems.code_format import CODE_START
from dpost_lite.problems.corpus import SYNTHETIC, load_also, load_corpus
from dpost_lite.problems.records import Problem
from dpost_lite.recipe import Recipe

TEMPLATE_TOKENS = {"plain": 7, "auto": 7, "chat": 40}  # base models have no chat template
PIECES = re.compile(r"[^\W\d_]+|\d|[^\w\s]|\n")  # about one token each: words, single digits, signs
RIGHT_SHARE = 0.35  # of sampled rationales after the warm-up; an assumption
KEPT_SHARE = 0.5  # of right rationales, after those that resemble another are dropped
PAIRS_PER_PROBLEM = 1.2  # of the at most three
CUT_SHARE = 0.6  # of the problems have a right rationale that can be cut
WRONG_SHARE = 0.75  # of the cuts get a wrong rest within the attempts; an assumption
CODE_FACTOR = 1.55  # a solution with code has so many times the tokens of the rationale: 1.48 of GSM8K's, 1.57 built-in
CUTS_PER_RATIONALE = 2  # GSM8K's rationales have 3.6 lines


@dataclass(frozen=True, slots=True)
class Workload:
    """Numbers of problems, and lengths in tokens: means, and the longest prompt and prompt with gold rationale.

    `num_also` counts the problems of all further test sets.
    """

    num_train: int
    num_labelled: int
    num_dev: int
    num_test: int
    prompt: float
    rationale: float
    longest_prompt: int
    longest: int
    num_also: int = 0

    @property
    def mean_length(self) -> float:
        """Prompt and rationale together."""
        return self.prompt + self.rationale


GSM8K = Workload(
    num_train=6705, num_labelled=6705, num_dev=768, num_test=1319,
    prompt=62, rationale=126, longest_prompt=213, longest=550,
)  # fmt: skip
# Without repeated questions.
TEST_SIZES = {"gsm8k": 1319, "multiarith": 580, "asdiv": 2095, "svamp": 1000, "math500": 500}


def workload_of(recipe: Recipe) -> Workload:
    """Count a recipe's problems. Raises DataError if they cannot be read."""
    data = recipe.data
    if data.train == SYNTHETIC or data.data_dir is not None or Path(data.train).is_file():
        return _counted(recipe)
    factor = CODE_FACTOR if recipe.solutions == "code" else 1
    limit = data.limit or GSM8K.num_train
    num_train, num_dev = min(GSM8K.num_train, limit), min(GSM8K.num_dev, limit)
    return Workload(
        num_train=num_train,
        num_labelled=min(num_train, data.num_labelled or num_train),
        num_dev=num_dev if data.dev_size is None else min(num_dev, data.dev_size),
        num_test=min(GSM8K.num_test, limit, data.test_limit or limit),
        prompt=GSM8K.prompt,
        rationale=GSM8K.rationale * factor,
        longest_prompt=GSM8K.longest_prompt,
        longest=GSM8K.longest_prompt + math.ceil((GSM8K.longest - GSM8K.longest_prompt) * factor),
        num_also=_num_also(recipe, []),
    )


def _counted(recipe: Recipe) -> Workload:
    corpus = load_corpus(recipe.data, recipe.synthetic, seed=recipe.seed)
    template = TEMPLATE_TOKENS[recipe.model.prompt]
    prompts = [template + num_tokens(problem.question) for problem in corpus.train]
    labelled = [
        (prompt, _solution_tokens(problem.rationale, recipe))
        for prompt, problem in zip(prompts, corpus.train, strict=True)
        if problem.rationale
    ]
    return Workload(
        num_train=len(corpus.train),
        num_labelled=len(labelled),
        num_dev=len(corpus.dev),
        num_test=len(corpus.test),
        prompt=mean(prompts),
        rationale=mean(rationale for _, rationale in labelled) if labelled else GSM8K.rationale,
        longest_prompt=max(prompts),
        longest=max(map(sum, labelled)) if labelled else GSM8K.longest,
        num_also=_num_also(recipe, corpus.train),
    )


def _solution_tokens(rationale: str, recipe: Recipe) -> int:
    """Return the tokens of a training solution; in a run with code, of the program that a rationale becomes."""
    becomes_code = recipe.solutions == "code" and CODE_START not in rationale
    return math.ceil(num_tokens(rationale) * (CODE_FACTOR if becomes_code else 1)) + 1


def _num_also(recipe: Recipe, train: list[Problem]) -> int:
    """Count the problems of the further test sets; those that are read here must not share a question with `train`."""
    data = recipe.data
    known = [source for source in data.also_test if source in TEST_SIZES and data.data_dir is None]
    read = data.model_copy(update={"also_test": tuple(source for source in data.also_test if source not in known)})
    limit = min(filter(None, (data.limit, data.test_limit)), default=max(TEST_SIZES.values()))
    sets = load_also(read, recipe.synthetic, train, seed=recipe.seed)
    return sum(min(TEST_SIZES[source], limit) for source in known) + sum(map(len, sets.values()))


def num_tokens(text: str) -> int:
    """Return roughly how many tokens a text has."""
    return len(PIECES.findall(text))
