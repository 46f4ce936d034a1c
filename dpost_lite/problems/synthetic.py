"""Built-in maths word problems: one to four steps, with rationales in GSM8K's format.

The default run must work without a download, and a 135M model must be able to learn from these problems without
memorising them. So a problem is not a template but a random walk: an opening introduces a quantity, each move
transforms it (gives away a third, sells the rest at $2.50 each …), and the story ends with a question. Every move has
several wordings for question and rationale; see `synthetic_stories`. Each step is one line of the rationale with one
annotation, `EXPR=<<EXPR=RESULT>>RESULT`, as the calculator would write it.

The papers use GSM8K and similar sets only. Accuracies on these problems are not comparable with theirs.
"""

import random
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from dpost_lite.errors import DataError
from dpost_lite.problems.calculator import decimal_text, evaluate
from dpost_lite.problems.records import Problem
from dpost_lite.problems.synthetic_stories import LIMITS, MOVES, PASSED_ON, QUESTIONS
from dpost_lite.problems.synthetic_words import BOYS, END, GIRLS, KIN, START, Move

# Test problems do not depend on the run's seed, so that seeds can be compared.
TEST_SEED = "test problems of dpost-lite"

_MAX_DRAWS = 20  # attempts to draw numbers that a move divides evenly
_MAX_GROUPS = 12  # a remainder's quotient has to be found without an annotation
_MAX_FAILURES = 2000  # consecutive stories that hit a dead end or repeat an earlier one

_FEMALE = {"she": "she", "her": "her", "him": "her"}
_MALE = {"she": "he", "her": "his", "him": "him"}
_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_PERSON = re.compile(r"\{(name|she|She|her|Her|him)\}")
_SHARES = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}


def generate(num_problems: int, *, seed: int, min_steps: int = 1, max_steps: int = 4) -> list[Problem]:
    """Return distinct problems with rationales; equal arguments give equal problems on any machine.

    The number of steps, which sets the difficulty, is uniform from `min_steps` to `max_steps`. The first n problems of
    a longer list equal the list of n. Raises DataError if there are not enough distinct problems, or for impossible
    arguments.
    """
    return _generate(num_problems, f"problems {seed}", "synthetic", (min_steps, max_steps), taken=set())


def split(
    *, num_train: int, num_dev: int, num_test: int, num_labelled: int, seed: int, min_steps: int, max_steps: int
) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Return (train, dev, test) problems with no question in common.

    Only the first `num_labelled` train problems keep their rationale; all of dev and test do. Train and dev depend on
    `seed`, test does not. Raises DataError as `generate` does, and if `num_labelled` exceeds `num_train`.
    """
    if not 0 <= num_labelled <= num_train:
        raise DataError(f"num_labelled={num_labelled} does not fit num_train={num_train}: give 0 to {num_train}")
    steps = (min_steps, max_steps)
    taken: set[str] = set()
    test = _generate(num_test, TEST_SEED, "synthetic-test", steps, taken)
    dev = _generate(num_dev, f"dev {seed}", "synthetic-dev", steps, taken)
    train = _generate(num_train, f"train {seed}", "synthetic-train", steps, taken)
    unlabelled = [replace(problem, rationale=None) for problem in train[num_labelled:]]
    return train[:num_labelled] + unlabelled, dev, test


def _generate(num_problems: int, seed: str, prefix: str, steps: tuple[int, int], taken: set[str]) -> list[Problem]:
    """Generate stories until enough are new; their questions are added to `taken`."""
    min_steps, max_steps = steps
    if not 1 <= min_steps <= max_steps:
        raise DataError(f"min_steps={min_steps}, max_steps={max_steps}: give 1 <= min_steps <= max_steps")
    if num_problems < 0:
        raise DataError(f"num_problems={num_problems}: give 0 or more")
    rng = random.Random(seed)  # strings are seeded by SHA-512, independent of PYTHONHASHSEED
    problems: list[Problem] = []
    while len(problems) < num_problems:
        story = _new_story(rng, rng.randint(min_steps, max_steps), taken)
        if story is None:
            raise DataError(
                f"found only {len(problems)} distinct synthetic problems of {min_steps} to {max_steps} steps, "
                f"not {num_problems}: ask for fewer problems or other numbers of steps"
            )
        taken.add(story.question)
        problems.append(
            Problem(f"{prefix}-{len(problems) + 1:05d}", story.question, str(story.number), story.rationale)
        )
    return problems


def _new_story(rng: random.Random, num_steps: int, taken: Collection[str]) -> "_Story | None":
    """Return a story whose question is not in `taken`, or None if too many attempts fail."""
    for _ in range(_MAX_FAILURES):
        story = _Story(rng)
        if story.build(num_steps) and story.question not in taken:
            return story
    return None


class _Story:
    """A problem under construction: its sentences and rationale so far, its state, and the running number."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.state = START
        self.number = Fraction(0)
        self.sentences: list[str] = []
        self.lines: list[str] = []
        self.is_pronoun_ambiguous = False
        self.unused_moves = list(MOVES)
        name = rng.choice((*GIRLS, *BOYS))
        self.named = {name}
        pronouns = _FEMALE if name in GIRLS else _MALE
        capitals = {key.capitalize(): word.capitalize() for key, word in pronouns.items()}
        self.words = {"name": name, "who": name, **pronouns, **capitals}

    @property
    def question(self) -> str:
        return " ".join(self.sentences)

    @property
    def rationale(self) -> str:
        return "\n".join((*self.lines, f"#### {_Number(self.number)}"))

    def build(self, num_steps: int) -> bool:
        """Build a whole story of `num_steps` calculations; return False at a dead end."""
        while self.state == START or len(self.lines) < num_steps:
            if not self._add_move(num_steps):
                return False
        if self.state != END:
            self._say(self.rng.choice(QUESTIONS[self.state]), self.words)
        return True

    def _add_move(self, num_steps: int) -> bool:
        """Add a move that fits the running number, a closing one only as the last step; return False if none fits."""
        is_last = len(self.lines) + 1 == num_steps
        moves = [move for move in self.unused_moves if move.start == self.state and (is_last or move.end != END)]
        for move in self.rng.sample(moves, len(moves)):
            numbers = self._draw(move)
            if numbers is not None:
                self.unused_moves.remove(move)
                self._write(move, numbers)
                return True
        return False

    def _draw(self, move: Move) -> "dict[str, _Number] | None":
        """Draw a and b until the result is a whole number within the state's limits; None if no attempt succeeds.

        Returns x, a, b, q and `result`.
        """
        low, high = LIMITS[move.end]
        for _ in range(_MAX_DRAWS):
            a, b = Fraction(self.rng.choice(move.a)), Fraction(self.rng.choice(move.b))
            values = {"x": self.number, "a": a, "b": b, "q": Fraction(self.number // b if b else 0)}
            result = evaluate(_fill_in(move.formula, values))
            if result is None or result.denominator != 1 or not low <= result <= high or result == self.number:
                continue
            if "q" not in move.formula or 2 <= values["q"] <= _MAX_GROUPS:
                return {key: _Number(value) for key, value in (*values.items(), ("result", result))}
        return None

    def _write(self, move: Move, numbers: "dict[str, _Number]") -> None:
        """Add the move's sentence and, if it calculates, a line of the rationale; update state and number."""
        self.words |= self.rng.choice(move.scenes)
        friend = self.rng.choice([name for name in (*GIRLS, *BOYS) if name not in self.named])
        self.named.add(friend)
        words: dict[str, object] = {**self.words, "friend": friend, "kin": self.rng.choice(KIN), **numbers}
        self._say(self.rng.choice(move.sentences), words)
        if move.rationales:
            expression = _fill_in(move.formula, {key: number.value for key, number in numbers.items()})
            words["expr"] = f"{expression}=<<{expression}={numbers['result']}>>{numbers['result']}"
            self.lines.append(self.rng.choice(move.rationales).format(**words))
        self.state = move.end
        self.number = numbers["result"].value
        if move.end in PASSED_ON and move.start != START:
            self.words["who"] = friend

    def _say(self, sentence: str, words: Mapping[str, object]) -> None:
        """Add a sentence. After another person was mentioned, the next pronoun is replaced by the name, to be clear."""
        if self.is_pronoun_ambiguous:
            sentence, num_names = _PERSON.subn(_name_instead, sentence, count=1)
            self.is_pronoun_ambiguous = num_names == 0
        self.is_pronoun_ambiguous |= "{friend}" in sentence or "{kin}" in sentence
        self.sentences.append(sentence.format(**words))


def _name_instead(pronoun: re.Match[str]) -> str:
    return "{name}'s" if pronoun[1] in ("her", "Her") else "{name}"


def _fill_in(formula: str, values: dict[str, Fraction]) -> str:
    """Replace the letters of a formula by numbers: "x+a*b" becomes "24+3*2.5"."""
    return re.sub("[xabq]", lambda letter: str(_Number(values[letter[0]])), formula)


@dataclass(frozen=True, slots=True)
class _Number:
    """A number with the format specs that sentences use; see `synthetic_stories`."""

    value: Fraction

    def __str__(self) -> str:
        if self.value.denominator == 1:
            return str(self.value.numerator)
        return decimal_text(self.value, max_decimals=2) or str(self.value)

    def __format__(self, style: str) -> str:
        if style == "money":
            return f"${self}" if self.value.denominator == 1 else f"${float(self.value):.2f}"
        if style == "share":
            return _SHARES[int(self.value)]
        if style == "times":
            return "twice" if self.value == 2 else f"{self:word} times"
        if style == "Times":
            return f"{self:times}".capitalize()
        if style == "word" and 2 <= self.value <= 12:
            return _WORDS[int(self.value) - 2]
        return str(self)
