"""The built-in word problems: seeded, distinct, correct in every annotation, and decent English."""

import re
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise

import pytest

from dpost_lite.errors import DataError
from dpost_lite.problems import synthetic
from dpost_lite.problems.records import Problem
from dpost_lite.problems.synthetic import generate, split
from dpost_lite.problems.synthetic_stories import LIMITS, MOVES, PASSED_ON, QUESTIONS
from dpost_lite.problems.synthetic_words import BOYS, END, GIRLS, START

ANNOTATION = re.compile(r"([0-9.+\-*/()]+)=<<([^<>=]+)=([^<>=]+)>>([0-9.]+)")


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return generate(3000, seed=7)


def _value(expression: str) -> Fraction:
    """Evaluate by recursive descent, apart from the calculator that wrote the annotation."""
    tokens = re.findall(r"\d+(?:\.\d+)?|[-+*/()]", expression)
    assert "".join(tokens) == expression

    def factor() -> Fraction:
        token = tokens.pop(0)
        if token != "(":
            return Fraction(token)
        inside = total()
        assert tokens.pop(0) == ")"
        return inside

    def product() -> Fraction:
        value = factor()
        while tokens and tokens[0] in "*/":
            value = value * factor() if tokens.pop(0) == "*" else value / factor()
        return value

    def total() -> Fraction:
        value = product()
        while tokens and tokens[0] in "+-":
            value = value + product() if tokens.pop(0) == "+" else value - product()
        return value

    result = total()
    assert not tokens
    return result


def test_one_problem_stays_as_it_is() -> None:
    assert generate(19, seed=0)[18] == Problem(
        id="synthetic-00019",
        question="David plans to stamp 20 letters a day for 7 days. "
        "In the afternoon he stamps 25% of the letters that are left. "
        "How many letters are left for David to stamp?",
        answer="105",
        rationale="In all that is 7*20=<<7*20=140>>140 letters.\n"
        "After that 25%, 140-140*25/100=<<140-140*25/100=105>>105 letters are left.\n"
        "#### 105",
    )


def test_same_seed_same_problems_and_longer_lists_start_with_shorter_ones() -> None:
    assert generate(60, seed=3) == generate(100, seed=3)[:60]
    assert not {p.question for p in generate(100, seed=3)} & {p.question for p in generate(100, seed=4)}


def test_problems_do_not_depend_on_the_hash_seed() -> None:
    code = "from dpost_lite.problems.synthetic import generate; print(generate(40, seed=1))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert outputs == {f"{generate(40, seed=1)}\n"}


def test_problems_are_distinct(problems: list[Problem]) -> None:
    assert len({p.question for p in problems}) == len({p.id for p in problems}) == len(problems)


def test_every_annotation_is_exact_and_the_last_is_the_answer(problems: list[Problem]) -> None:
    for problem in problems:
        *lines, last = (problem.rationale or "").split("\n")
        results = []
        for line in lines:
            annotations = ANNOTATION.findall(line)
            assert len(annotations) == line.count("<<") == 1, problem
            before, expression, result, after = annotations[0]
            assert before == expression, problem
            assert result == after.rstrip("."), problem
            assert _value(expression) == Fraction(result), problem
            results.append(result)
        assert last == f"#### {problem.answer}"
        assert results[-1] == problem.answer
        assert re.fullmatch("[1-9][0-9]*", problem.answer)


def test_every_number_of_a_line_is_known_from_the_question_or_an_earlier_line(problems: list[Problem]) -> None:
    """Nothing that a rationale calculates with may come from nowhere."""
    spelled = {word: Fraction(number) for number, word in enumerate(synthetic._WORDS, start=2)}
    spelled |= {
        word: Fraction(n) for word, n in (("twice", 2), ("half", 2), ("third", 3), ("quarter", 4), ("fifth", 5))
    }
    for problem in problems:
        words = re.findall(r"[a-z]+|\d+(?:\.\d+)?", problem.question.lower())
        known = {Fraction(word) if word[0].isdigit() else spelled.get(word) for word in words}
        known |= {Fraction(n) for n in (2, 60, 100)}  # there and back, minutes in an hour, per cent
        for expression, result in re.findall(r"<<(.*?)=(.*?)>>", problem.rationale or ""):
            numbers = [Fraction(number) for number in re.findall(r"\d+(?:\.\d+)?", expression)]
            if re.fullmatch(r"\d+-\d+\*\d+", expression) and 0 < Fraction(result) < numbers[2]:
                known.add(numbers[0] // numbers[2])  # a remainder's quotient is found in the head
            assert set(numbers) <= known, problem
            known.add(Fraction(result))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_steps_are_annotations_and_questions_stay_short(num_steps: int) -> None:
    for problem in generate(200, seed=5, min_steps=num_steps, max_steps=num_steps):
        assert (problem.rationale or "").count("<<") == num_steps
        assert len(problem.question.split()) <= 25 + 12 * num_steps


def test_steps_are_drawn_uniformly(problems: list[Problem]) -> None:
    counts = [sum((p.rationale or "").count("<<") == steps for p in problems) for steps in range(1, 5)]
    assert sum(counts) == len(problems)
    assert min(counts) > 0.22 * len(problems)


def test_there_are_hundreds_of_templates_and_many_names(problems: list[Problem]) -> None:
    sentences = [sentence for move in MOVES for sentence in move.sentences]
    questions = [question for state in QUESTIONS.values() for question in state]
    assert len(set(sentences)) >= 200
    assert len(set(sentences) | set(questions)) >= 250
    assert len({*GIRLS, *BOYS}) == len(GIRLS) + len(BOYS) >= 80
    text = " ".join(p.question for p in problems)
    assert all(name in text for name in (*GIRLS, *BOYS))


def test_every_move_turns_up() -> None:
    """A move whose numbers never work out would be dead text."""
    tellable = set()
    for seed in range(3):
        for problem in generate(1000, seed=seed):
            tellable |= {move for move in MOVES if any(_is_told(s, problem.question) for s in move.sentences)}
    assert [move.sentences[0] for move in MOVES if move not in tellable] == []


def _is_told(sentence: str, question: str) -> bool:
    """Whether the question holds the sentence's fixed words, in order."""
    position = 0
    for part in re.split(r"\{.*?\}", sentence):
        position = question.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True


def test_the_stories_fit_together() -> None:
    states = {move.end for move in MOVES}
    assert states == set(LIMITS) == {*QUESTIONS, END}
    assert {move.start for move in MOVES} <= {*states, START}
    assert set(PASSED_ON) <= states
    for move in MOVES:
        assert bool(move.rationales) == (move.formula != "a"), move
        assert all(line.count("{expr}") == 1 for line in move.rationales), move


def test_the_english_is_clean(problems: list[Problem]) -> None:
    slips = (
        r"[{}]|  |\bNone\b| [.,?]|\.\.",
        r"\b1 [a-z]+s\b|\bone [a-z]+s\b",
        r"\b[Aa] [aeiou][a-z]|\b[Aa]n (?!hour)[^aeiou]",
        r"(?:^|[.?] )[a-z]|\bI\b",
        r"\$\d+\.\d\b|\d\.\d{3}|\d/\d",
        r"\b(\w+) \1\b",
    )
    for problem in problems:
        for slip in slips:
            found = re.search(slip, problem.question)
            assert not found, (found, problem.question)
        for line in (problem.rationale or "").split("\n"):
            assert not re.search(r"[{}]|  |^[a-z]|\b1 [a-z]+s\b", line), line
        assert problem.question.endswith("?")
        assert problem.question.count("?") == 1


def test_a_pronoun_never_follows_another_persons_name() -> None:
    """After "Leo adds 23 pears." a bare "he" could be Leo."""
    others = {*GIRLS, *BOYS}
    for problem in generate(1000, seed=9):
        sentences = re.split(r"(?<=[.?]) ", problem.question)
        storyteller = next((word for word in re.findall(r"[A-Z][a-z]+", problem.question) if word in others), None)
        for first, second in pairwise(sentences):
            if any(name in others - {storyteller} for name in re.findall(r"[A-Z][a-z]+", first)):
                assert not re.match(r"(She|He|Her|His)\b", second), problem.question


def test_splits_never_share_a_question() -> None:
    train, dev, test = split(
        num_train=600, num_dev=200, num_test=300, num_labelled=50, seed=1, min_steps=1, max_steps=2
    )
    assert (len(train), len(dev), len(test)) == (600, 200, 300)
    assert len({p.question for p in (*train, *dev, *test)}) == len({p.id for p in (*train, *dev, *test)}) == 1100


def test_only_the_labelled_train_problems_keep_their_rationale() -> None:
    train, dev, test = split(num_train=30, num_dev=5, num_test=5, num_labelled=10, seed=1, min_steps=1, max_steps=4)
    assert [p.rationale is not None for p in train] == [True] * 10 + [False] * 20
    assert all(p.rationale for p in (*dev, *test))
    assert all(p.answer for p in train)


def test_the_test_split_is_the_same_for_every_seed() -> None:
    sizes = {"num_train": 80, "num_dev": 20, "num_test": 50, "num_labelled": 10, "min_steps": 1, "max_steps": 4}
    first, second = split(seed=1, **sizes), split(seed=2, **sizes)
    assert first[2] == second[2]
    assert not {p.question for p in first[0]} & {p.question for p in second[0]}
    assert first == split(seed=1, **sizes)


def test_train_skips_what_the_test_split_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the test split's own seed, train would repeat the test questions, were they not excluded."""
    sizes = {"num_train": 40, "num_dev": 0, "num_test": 40, "num_labelled": 0, "min_steps": 1, "max_steps": 1}
    monkeypatch.setattr(synthetic, "TEST_SEED", "train 3")
    train, _, test = split(seed=3, **sizes)
    assert not {p.question for p in train} & {p.question for p in test}


def test_too_many_problems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(move for move in MOVES if move.end == "age" and move.start == START)
    monkeypatch.setattr(synthetic, "MOVES", (*few, *(m for m in MOVES if m.formula == "x/a" and m.start == "age")))
    monkeypatch.setattr(synthetic, "GIRLS", GIRLS[:2])
    monkeypatch.setattr(synthetic, "BOYS", BOYS[:1])
    with pytest.raises(DataError, match=r"found only .* ask for fewer problems"):
        generate(100_000, seed=1, min_steps=1, max_steps=1)


@pytest.mark.parametrize(
    ("num_problems", "min_steps", "max_steps", "message"),
    [(5, 0, 2, "min_steps=0"), (5, 3, 2, "max_steps=2"), (-1, 1, 2, "num_problems=-1"), (1, 40, 40, "40 to 40 steps")],
)
def test_impossible_wishes_are_refused(num_problems: int, min_steps: int, max_steps: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        generate(num_problems, seed=1, min_steps=min_steps, max_steps=max_steps)


def test_more_labelled_than_train_problems_are_refused() -> None:
    with pytest.raises(DataError, match="num_labelled=6"):
        split(num_train=5, num_dev=1, num_test=1, num_labelled=6, seed=1, min_steps=1, max_steps=2)
