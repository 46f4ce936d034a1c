"""Calculations in GSM8K's notation and in brackets: converted and back, and completed with any cut into tokens."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from test_forcing import CALCULATE, PENS, Piece, Vocabulary, corrected, write
from tiny_t5 import t5_tokenizer, trained_t5_tokenizer

from dpost_lite.problems.answers import predicted_answer
from dpost_lite.problems.forcing import MAX_ANNOTATION_CHARS, Forcer
from dpost_lite.problems.notation import BRACKETS, GSM8K
from dpost_lite.problems.prompts import EncoderDecoderPrompter, Prompter
from dpost_lite.problems.synthetic import generate
from dpost_lite.problems.tools import Tools

PAIRS = {  # GSM8K's notation and the model's
    "a sentence": ("48/2 = <<48/2=24>>24 clips", "48/2 = [ 48 / 2 = 24] 24 clips"),
    "three operands": ("<<1+2+3=6>>6", "[ 1 + 2 + 3 = 6] 6"),
    "negative": ("<<3-5=-2>>-2", "[ 3 - 5 = -2] -2"),
    "signs": ("<<71+-3-+2=66>>66", "[ 71 + -3 - +2 = 66] 66"),
    "a sign first": ("<<-3*-(2+1)=9>>9", "[ -3 * -(2 + 1) = 9] 9"),
    "floor": ("<<7//2*2=6>>6", "[ 7 // 2 * 2 = 6] 6"),
    "decimals": ("$<<.5*3=1.5>>1.5.", "$[ .5 * 3 = 1.5] 1.5."),
    "a point": ("<<.5*.5=.25>>.25", "[ .5 * .5 = .25] .25"),
    "not for the calculator": ("<<20%*1,000=200>>200", "[ 20% * 1,000 = 200] 200"),
    "words": ("<<number of cats=2>>2", "[ number of cats = 2] 2"),
    "two results": ("<<1+1=2=2>>2", "[ 1 + 1 = 2 = 2] 2"),
    "side by side": ("<<1+1=2>>2<<2+1=3>>3", "[ 1 + 1 = 2] 2[ 2 + 1 = 3] 3"),
    "at the end": ("<<1+1=2>>", "[ 1 + 1 = 2]"),
    "the answer": ("It is 2.\n#### 2", "It is 2. #### 2"),
}


def test_no_space_is_put_before_a_full_stop():
    """A result that no number follows."""
    text = "It is <<1+1=2>>. Or (<<1+1=2>>), <<1+1=2>> or <<.5+1=1.5>>-1.5."
    in_model = BRACKETS.to_model(text)
    assert in_model == "It is [ 1 + 1 = 2]. Or ([ 1 + 1 = 2]), [ 1 + 1 = 2] or [ .5 + 1 = 1.5] -1.5."
    assert BRACKETS.from_model(in_model).replace(">>or", ">> or") == text


def test_an_expression_with_brackets_is_left_as_it_is():
    assert BRACKETS.to_model("<<[1+2]*3=9>>9") == "<<[1+2]*3=9>>9"


PLAIN = ["see [5] and [note], [5 = five] or [x", "[ 5 ] = 3", "[ 48 / 2 apples", "[ a [ b ] = 5", "a < b >> c << d = 5"]


@pytest.mark.parametrize("name", PAIRS)
def test_a_text_is_converted_and_back(name):
    text, in_model = PAIRS[name]
    assert BRACKETS.to_model(text) == in_model
    assert BRACKETS.from_model(in_model) == text
    assert GSM8K.to_model(text) == GSM8K.from_model(text) == text


@pytest.mark.parametrize("text", PLAIN)
def test_other_brackets_are_text(text):
    assert BRACKETS.from_model(text) == BRACKETS.to_model(text) == text


def test_line_feeds_become_spaces_and_the_one_before_the_answer_comes_back():
    assert BRACKETS.to_model("One  is 1.\n\nTwo is 2.\n#### 3\n") == "One is 1. Two is 2. #### 3"
    assert BRACKETS.from_model("One is 1. Two is 2.  #### 3") == "One is 1. Two is 2.\n#### 3"


def test_spaces_that_a_model_leaves_out_or_adds_do_not_matter():
    for spelling in ("[ 48/2=24]24", "[ 48 / 2 = 24 ] 24", "[  48 /2= 24] 24"):
        assert BRACKETS.from_model(spelling) == "<<48/2=24>>24"


def random_calculation(dice: random.Random) -> tuple[str, str]:
    """An expression such as the calculator takes, and its result."""
    while True:
        numbers = [dice.choice(["0.5", ".25", "2.50", "1.05", *map(str, range(200))]) for _ in range(6)]
        operands = dice.choices(
            [numbers[0], numbers[1], f"-{numbers[2]}", f"({numbers[3]}-{numbers[4]})", f"-(2*{numbers[5]})"],
            k=dice.randint(1, 5),
        )
        expression = operands[0] + "".join(dice.choice(["+", "-", "*", "/", "//"]) + one for one in operands[1:])
        if result := CALCULATE(expression):
            return expression, result


def test_random_annotations_come_back():
    dice = random.Random(1)
    for _ in range(5000):
        found = [random_calculation(dice) for _ in range(dice.randint(1, 3))]
        before = dice.choice(["", "$", "so 2*3 = ", "see [5] "])
        text = " and".join(f"{before}<<{expression}={result}>>{result}" for expression, result in found)
        in_model = BRACKETS.to_model(text)
        assert BRACKETS.from_model(in_model) == text
        shown = re.findall(r"\[ (.*?) = -?[0-9.]+\] ", in_model)
        assert list(map(CALCULATE, shown)) == [result for _, result in found]
        assert not re.search(r"[0-9)][-+*/]", "\n".join(shown)), "an operator without spaces"


@pytest.mark.parametrize("split", ["train", "test"])
def test_all_of_gsm8k_comes_back(data_dir: Path, split):
    for line in (data_dir / "gsm8k" / f"{split}.jsonl").read_text().splitlines():
        text = json.loads(line)["answer"]
        in_model = BRACKETS.to_model(text)
        assert "<<" not in in_model
        assert BRACKETS.from_model(in_model).split() == text.split()


# The calculator.


def vocabulary_of(kind: str, tokenizer_of: Any) -> Vocabulary:
    tokenizer = t5_tokenizer() if kind == "t5" else tokenizer_of(kind)
    prompter = (EncoderDecoderPrompter if kind == "t5" else Prompter)(tokenizer)
    text_of = prompter.token_text()
    by_text = {text_of(i): i for i in reversed(range(len(tokenizer))) if text_of(i).isascii() and text_of(i)}
    forcer = Forcer(text_of, prompter.encode_text, CALCULATE, BRACKETS)
    prompt = "How many?" if kind == "t5" else "How many?\n"
    return Vocabulary(tokenizer, forcer, by_text, prompter.encode(prompt), prompt)


@pytest.fixture(scope="module", params=["t5", "brackets", "merged", "spm", "digits"])
def vocabulary(request, tokenizer_of) -> Vocabulary:
    return vocabulary_of(request.param, tokenizer_of)


def calculation(expression: str, wrong: str = "99") -> list[Piece]:
    """An annotation that the model gets wrong and the calculator puts right."""
    result = CALCULATE(expression)
    assert result is not None
    return [f"[ {expression} =", (f" {wrong}] {wrong}", f" {result}] {result}")]


LONG = "1 + " * 20 + "1"
HUGE = "1 + " * 60 + "1"
CASES: dict[str, tuple[list[Piece], int, int]] = {  # script, annotations calculated, annotations refused
    "in a sentence": ([" She has 48 / 2 = ", *calculation("48 / 2"), " apples. #### 24"], 1, 0),
    "at the first token": ([" ", *calculation("48 / 2"), " apples"], 1, 0),
    "alone": ([" ", *calculation("2")], 1, 0),
    "right already": ([" is [ 48 / 2 = 24] 24 apples"], 1, 0),
    "right, then another number": ([" is [ 48 / 2 =", (" 24] 48", " 24] 24"), " apples"], 1, 0),
    "wrong first digit": ([" is ", *calculation("8 / 2", "24"), " apples"], 1, 0),
    "first digit right": ([" is ", *calculation("48 / 2", "29"), " apples"], 1, 0),
    "result is a prefix": ([" is ", *calculation("48 / 2", "240"), " apples"], 1, 0),
    "wanted is a prefix": ([" is ", *calculation("480 / 2", "24"), " apples"], 1, 0),
    "negative": ([" is ", *calculation("3 - 5", "2"), " apples"], 1, 0),
    "decimal": ([" is ", *calculation("1 / 4", "0.9"), " apples"], 1, 0),
    "point without zero": ([" is ", *calculation(".5 * 3", "2"), " apples"], 1, 0),
    "parentheses": ([" is ", *calculation("(1 + 2) * 3"), " or ", *calculation("( 1 + 2 ) * 3"), "."], 2, 0),
    "floor": ([" is ", *calculation("7 // 2"), "."], 1, 0),
    "behind a sign": ([" is $", *calculation("48 / 2"), "."], 1, 0),
    "no spaces inside": ([" is [ 48/2=", ("24]24", " 24] 24"), " apples"], 1, 0),
    "long expression": ([" is ", *calculation(LONG, "7"), " apples"], 1, 0),
    "chain": ([" ", *calculation("48 / 2"), *calculation("24 * 2"), *calculation("4 / 2", "2"), "."], 3, 0),
    "nested": ([" is [ 48 / ", *calculation("4 / 2"), " = 24] 24 apples"], 1, 0),
    "behind other brackets": ([" see [5] and [", *calculation("48 / 2"), "]."], 1, 0),
    "other brackets": ([" see [5] and [note], [5 = five] apples [x"], 0, 0),
    "closed before the equals sign": ([" is [ 48 / 2 ] 24 = 24 apples"], 0, 0),
    "unclosed": ([" is [ 48 / 2 apples and more"], 0, 0),
    "unclosed, then another": ([" is [ 48 / 2 apples, ", *calculation("24 * 2"), "."], 1, 0),
    "huge expression": ([f" is [ {HUGE} = 61] 61 apples"], 0, 1),
    "huge, then another": ([f" is [ {HUGE} = 61] 61 apples, ", *calculation("24 * 2"), "."], 1, 1),
    "division by zero": ([" is [ 5 / 0 = 0] 0 apples"], 0, 1),
    "junk, then another": ([" is [ five + 2 = 7] 7 or ", *calculation("24 * 2"), "."], 1, 1),
    "empty expression": ([" is [ = 2] 2 apples"], 0, 1),
}


def test_the_vocabularies_have_the_merges_that_make_it_hard(tokenizer_of):
    assert {" 24]", " =", " [", " [5", "2]", " 48", " ", "4"} <= vocabulary_of("t5", tokenizer_of).by_text.keys()
    merged = vocabulary_of("brackets", tokenizer_of).by_text
    assert {" = 2", "= 2] 2", "/ 2 =", "24] ", "] [ ", "[ 4"} <= merged.keys()
    assert len(HUGE) > MAX_ANNOTATION_CHARS > len(LONG)


@pytest.mark.parametrize("pen", PENS)
@pytest.mark.parametrize("case", CASES)
def test_every_case_is_completed(vocabulary, case, pen):
    script, num_calculated, num_refused = CASES[case]
    ours = write(vocabulary, script, pen)
    assert ours.text == corrected(script)
    assert (ours.num_calculated, ours.num_refused) == (num_calculated, num_refused)


def cuts(text: str, by_text: dict[str, int]) -> list[list[int]]:
    """All the ways to write a text in tokens."""
    if not text:
        return [[]]
    starts = [text[:n] for n in range(1, len(text) + 1) if text[:n] in by_text]
    return [[by_text[start], *rest] for start in starts for rest in cuts(text[len(start) :], by_text)]


@pytest.mark.parametrize("kind", ["t5", "brackets"])
@pytest.mark.parametrize("expression", ["48 / 2", "12 + -3", ".5 * 4", "(1 + 2)"])
def test_an_annotation_is_completed_however_it_is_cut_into_tokens(tokenizer_of, kind, expression):
    vocabulary = vocabulary_of(kind, tokenizer_of)
    opened, result = f" [ {expression} =", CALCULATE(expression)
    found = cuts(f"{opened} {result}", vocabulary.by_text)
    assert len(found) > 10
    for ids in found:
        row = vocabulary.forcer.row()
        place, reply = next((i, reply) for i, token in enumerate(ids) if (reply := row.push(token)))
        assert vocabulary.text(ids[:place] + reply) == f"{opened} {result}] {result}"


@pytest.mark.parametrize("pen", PENS)
def test_random_annotations_are_completed(vocabulary, pen):
    dice = random.Random(2)
    for seed in range(20):
        script: list[Piece] = [" so"]
        for _ in range(dice.randint(1, 4)):
            expression, result = random_calculation(dice)
            wrong = dice.choice(["24", "-2", "0.5", "7"])
            opened = BRACKETS.to_model(f"<<{expression}={result}>>").removesuffix(f" {result}]")
            script += [f" {opened}", (f" {wrong}] {wrong}", f" {result}] {result}"), " are"]
        ours = write(vocabulary, script, pen, seed)
        assert ours.text == corrected(script)
        assert (ours.num_calculated, ours.num_refused) == (len(script) // 3, 0)


def test_training_text_is_written_back_token_by_token(vocabulary):
    for line in (" She has 48/2 = [ 48 / 2 = 24] 24", " It is [ 3 - 5 = -2] -2", " a 1/4 = [ 1 / 4 = 0.25] 0.25"):
        canonical = vocabulary.ids(line)
        row, ids = vocabulary.forcer.row(), []
        while len(ids) < len(canonical):
            token = canonical[len(ids)]
            ids += row.push(token) or [token]
        assert ids == canonical
        assert (row.num_calculated, row.num_refused) == (1, 0)


def test_a_trained_vocabulary_too():
    """With pieces of its own at every training: built-in rationales are completed as they were tokenised."""
    problems = [BRACKETS.to_model(f"{p.question} {p.rationale}") for p in generate(300, seed=1)]
    prompter = EncoderDecoderPrompter(trained_t5_tokenizer(problems))
    forcer = Forcer(prompter.token_text(), prompter.encode_text, CALCULATE, BRACKETS)
    num_calculated = 0
    for problem in generate(100, seed=2):
        ids, row, made = prompter.answer_ids(problem.rationale or ""), forcer.row(), list[int]()
        while len(made) < len(ids):
            token = ids[len(made)]
            made += row.push(token) or [token]
        assert prompter.text(made) == prompter.text(ids)
        assert made == list(ids)
        num_calculated += row.num_calculated
    assert num_calculated > 100


@pytest.mark.parametrize(
    ("text", "inserted"),
    [
        (" 48/2 = [ 48 / 2 = 24] 24 of them", " 24] 24"),
        (" [ 3 - 5 = -2] -2 so $[ 1 + 1 = 2] 2 are", " -2] -2 2] 2"),
        (" no [ 4 / 2 = 3] 3 apples [5]", ""),
    ],
)
def test_what_was_inserted_is_found_again_in_a_finished_answer(text, inserted):
    prompter = EncoderDecoderPrompter(t5_tokenizer())
    text_of, ids = prompter.token_text(), prompter.encode_text(text)
    find = Tools(CALCULATE).inserted(text_of, prompter.encode_text, prompter.notation, calculated_in_loss=False)
    assert find is not None
    assert "".join(text_of(i) for i, mark in zip(ids, find(ids), strict=True) if mark) == inserted


def test_an_answer_is_completed_and_graded_as_any_other():
    """From the decoder's tokens to the answer. Token ids beyond the vocabulary, which T5's models have, are no text."""
    prompter = EncoderDecoderPrompter(t5_tokenizer())
    chosen = [*prompter.encode_text("She has 2 * 12 = $[ 2 * 12 ="), len(prompter.tokenizer) + 5]
    with Tools(CALCULATE).writer(
        prompter.token_text(), prompter.encode_text, prompter.text, prompter.notation
    ) as writer:
        assert writer is not None
        row = writer.row()
        ids = [token for chosen_id in chosen for token in row.push(chosen_id) or [chosen_id]]
    text = prompter.text([*ids, *prompter.answer_ids("in all. #### 24")])
    assert text == "She has 2 * 12 = $<<2*12=24>>24 in all.\n#### 24"
    assert predicted_answer(text, "24") == "24"
