"""What the calculator forces, token by token, against a reference that decodes and re-encodes the whole text.

The "model" is a script: at every step it writes some token of what it wants to say next, wrong results included. Which
token that is (the tokenizer's own, the longest that fits, single characters, any) is up to the pen, so no test
depends on one way to cut a text into tokens. It goes on from whatever the calculator made of its words.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpost_lite.problems.answer_tokens import written
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.forcing import MAX_ANNOTATION_CHARS, Forcer
from dpost_lite.problems.prompts import Prompter

KINDS = ["digits", "groups", "merged", "spm"]
PENS = ["own", "longest", "shortest", "any"]
PROMPT = "How many?\n"
CALCULATE = Calculator()


@dataclass
class Vocabulary:
    """A tokenizer with what the test asks of it."""

    tokenizer: Any
    forcer: Forcer
    by_text: dict[str, int]
    prompt_ids: list[int]
    prompt: str = PROMPT

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, ids: list[int]) -> str:
        """The text of an answer, decoded behind the prompt as a user would."""
        whole = self.tokenizer.decode(self.prompt_ids + ids, clean_up_tokenization_spaces=False)
        assert whole.startswith(self.prompt)
        return whole[len(self.prompt) :]

    def ids(self, text: str) -> list[int]:
        """The tokenizer's own encoding of an answer behind the prompt."""
        ids = self.encode(self.prompt + text)
        assert ids[: len(self.prompt_ids)] == self.prompt_ids
        return ids[len(self.prompt_ids) :]


_VOCABULARIES: dict[str, Vocabulary] = {}


@pytest.fixture(params=KINDS)
def vocabulary(request, tokenizer_of) -> Vocabulary:
    return vocabulary_of(request.param, tokenizer_of)


def vocabulary_of(kind: str, tokenizer_of: Callable[[str], Any]) -> Vocabulary:
    if kind not in _VOCABULARIES:
        tokenizer = tokenizer_of(kind)
        prompter = Prompter(tokenizer)
        text_of = prompter.token_text()
        texts = {text_of(i): i for i in reversed(range(len(tokenizer)))}
        by_text = {text: i for text, i in texts.items() if text and text.isascii()}
        forcer = Forcer(text_of, prompter.encode, CALCULATE)
        _VOCABULARIES[kind] = Vocabulary(tokenizer, forcer, by_text, prompter.encode(PROMPT))
    return _VOCABULARIES[kind]


Piece = str | tuple[str, str]  # plain text, or (what the model wants to write, what the calculator writes instead)


def continuation(script: list[Piece], text: str) -> str:
    """What the model wants to write behind `text`."""
    for i, piece in enumerate(script):
        wanted, forced = piece if isinstance(piece, tuple) else (piece, piece)
        if text.startswith(forced):
            text = text[len(forced) :]
        else:
            assert wanted.startswith(text), f"{text!r} stands where the model wanted {wanted!r}"
            return wanted[len(text) :] + wishes(script[i + 1 :])
    assert not text
    return ""


def wishes(script: list[Piece]) -> str:
    """The text of a script before any correction."""
    return "".join(piece if isinstance(piece, str) else piece[0] for piece in script)


def corrected(script: list[Piece]) -> str:
    return "".join(piece if isinstance(piece, str) else piece[1] for piece in script)


def next_token(vocabulary: Vocabulary, ids: list[int], rest: str, pen: str, dice: random.Random) -> int:
    """One token that `rest` begins with; pen "own" writes on as the tokenizer would, where `ids` are its own so far."""
    own = vocabulary.ids(vocabulary.text(ids) + rest) if pen == "own" else []
    if own[: len(ids)] == ids and own:
        return own[len(ids)]
    fitting = [vocabulary.by_text[rest[:n]] for n in range(1, 30) if rest[:n] in vocabulary.by_text]
    if pen == "any":
        return dice.choice(fitting)
    return fitting[0] if pen == "shortest" else fitting[-1]


@dataclass
class Written:
    """An answer: its ids and text, the counters, and per forced place (ids before the newest token, it, ids behind)."""

    ids: list[int]
    text: str
    num_calculated: int
    num_refused: int
    places: list[tuple[int, int, int]] = field(default_factory=list)


def write(vocabulary: Vocabulary, script: list[Piece], pen: str, seed: int = 0) -> Written:
    """Let the script's model write with the row state machine at its hand."""
    row, ids, places, dice = vocabulary.forcer.row(), [], [], random.Random(seed)
    while rest := continuation(script, vocabulary.text(ids)):
        token = next_token(vocabulary, ids, rest, pen, dice)
        replaced = row.push(token)
        if replaced is not None:
            places.append((len(ids), token, len(ids) + len(replaced)))
        ids += [token] if replaced is None else replaced
    return Written(ids, vocabulary.text(ids), row.num_calculated, row.num_refused, places)


OPEN = re.compile(r"<<(?!<)((?:(?!<<)[^>=\n])*)=")


def write_by_text(vocabulary: Vocabulary, script: list[Piece], pen: str, seed: int = 0) -> Written:
    """The reference: decode everything after each token, put the result behind every new `<<expr=`, encode again."""
    ids: list[int] = []
    done = num_calculated = num_refused = 0
    dice = random.Random(seed)
    while rest := continuation(script, vocabulary.text(ids)):
        text = vocabulary.text([*ids, next_token(vocabulary, ids, rest, pen, dice)])
        while match := OPEN.search(text, done):
            done = match.end()
            result = CALCULATE(match[1])
            if result is None or len(match[1]) > MAX_ANNOTATION_CHARS:
                num_refused += 1
                continue
            num_calculated += 1
            forced = f"{result}>>{result}"
            if not text.startswith(forced, done):
                text = text[:done] + forced
            done += len(forced)
        ids = vocabulary.ids(text)
        assert vocabulary.text(ids) == text
    return Written(ids, vocabulary.text(ids), num_calculated, num_refused)


def sum_of(expression: str, wrong: str = "99", head: str | None = None) -> list[Piece]:
    """An annotation that the model gets wrong and the calculator puts right."""
    result = CALCULATE(expression)
    assert result is not None
    return [f"{head if head is not None else '<<'}{expression}=", (f"{wrong}>>{wrong}", f"{result}>>{result}")]


LONG = "1+" * 20 + "1"  # 41 characters
HUGE = "1+" * 120 + "1"  # more than an annotation may have
CASES: dict[str, tuple[list[Piece], int, int]] = {  # script, annotations calculated, annotations refused
    "in a sentence": (["She has 48/2=", *sum_of("48/2"), " apples.\n#### 24"], 1, 0),
    "at the first token": ([*sum_of("48/2"), " apples"], 1, 0),
    "alone": (sum_of("2"), 1, 0),
    "at the very end": (["so ", *sum_of("12*36")], 1, 0),
    "right already": (["is <<48/2=24>>24 apples"], 1, 0),
    "right partial result": (["is <<48/2=", ("24", "24>>24"), " apples"], 1, 0),
    "right, then another number": (["is <<48/2=", ("24>>48", "24>>24"), " apples"], 1, 0),
    "wrong first digit": (["is ", *sum_of("8/2", "24"), " apples"], 1, 0),
    "first digit right": (["is ", *sum_of("48/2", "29"), " apples"], 1, 0),
    "result is a prefix": (["is ", *sum_of("48/2", "240"), " apples"], 1, 0),
    "wanted is a prefix": (["is ", *sum_of("480/2", "24"), " apples"], 1, 0),
    "more digits behind": (["is ", *sum_of("48/2", "24"), "00 apples"], 1, 0),
    "one digit, then brackets": (["is ", *sum_of("4/2", "2>>2"), " apples"], 1, 0),
    "wrong sign": (["is ", *sum_of("3-5", "2"), " apples"], 1, 0),
    "negative": (["is ", *sum_of("3-5", "-9"), " apples"], 1, 0),
    "decimal": (["is ", *sum_of("1/4", "0.9"), " apples"], 1, 0),
    "point without zero": (["is ", *sum_of(".5*3", "2"), " apples"], 1, 0),
    "rounded": (["is ", *sum_of("2/3", "0.6"), " apples"], 1, 0),
    "blanks inside": (["is ", *sum_of(" 48 / 2 "), " apples"], 1, 0),
    "blank behind the equals sign": (["is <<48/2=", (" 24>>24", "24>>24"), " apples"], 1, 0),
    "long expression": (["is ", *sum_of(LONG, "7"), " apples"], 1, 0),
    "chain": ([*sum_of("48/2"), *sum_of("24*2"), *sum_of("1-2"), *sum_of("4/2", "2"), "."], 4, 0),
    "two in a line": (["48/2=", *sum_of("48/2"), ", 24*10=", *sum_of("24*10", "24"), "\n#### 240"], 2, 0),
    "nested": (["is <<48/", *sum_of("4/2"), "=24>>24 apples"], 1, 0),
    "nested behind the equals sign": (["is ", "<<5/0=", *sum_of("4/2"), " apples"], 1, 1),
    "nested in a right one": (["is ", *sum_of("5+1", "<<4/2"), " apples"], 1, 0),
    "three brackets": (["is ", *sum_of("48/2", head="<<<"), " apples"], 1, 0),
    "five brackets": (["is ", *sum_of("48/2", head="<<<<<"), " apples"], 1, 0),
    "three brackets behind a word": (["a<b <", *sum_of("48/2", head="<<"), " apples"], 1, 0),
    "two equals signs": (["is ", *sum_of("48/2", "24=24"), " apples"], 1, 0),
    "two equals signs, refused": (["is <<x=48/2=24>>24 apples"], 0, 1),
    "unclosed": (["is <<48/2 apples and more"], 0, 0),
    "unclosed, then another": (["is <<48/2 apples, ", *sum_of("24*2"), "."], 1, 0),
    "closed before the equals sign": (["is <<48/2>>24=24 apples = 3"], 0, 0),
    "one bracket closes too": (["is <<48/2> 24=24 apples"], 0, 0),
    "newline inside": (["is <<48/\n2=24>>24 apples"], 0, 0),
    "brackets apart": (["is < <48/2=24>>24 apples < 3 = 3"], 0, 0),
    "one bracket": (["if 3<4 then 4=4 and <4/2=2>"], 0, 0),
    "huge expression": ([f"is <<{HUGE}=121>>121 apples"], 0, 1),
    "huge junk without an equals sign": (["is <<" + "a lot of " * 30 + "apples"], 0, 1),
    "huge, then another": ([f"is <<{HUGE}=121>>121 apples, ", *sum_of("24*2"), "."], 1, 1),
    "huge number": ([f"is <<{'9' * 15}*{'9' * 15}=3>>3 apples"], 0, 1),
    "division by zero": (["is <<5/0=0>>0 apples"], 0, 1),
    "junk": (["is <<five+2=7>>7 apples"], 0, 1),
    "percent": (["is <<20%*5=1>>1 apples"], 0, 1),
    "empty expression": (["is <<=2>>2 apples"], 0, 1),
    "refused, then right": (["is <<5/0=0>>0 or ", *sum_of("24*2"), "."], 1, 1),
    "refused, then back to back": (["is <<5/0=", *sum_of("24*2"), "."], 1, 1),
    "refused, three brackets": (["is <<5/0=<", *sum_of("24*2"), "."], 1, 1),
    "closed and opened": (["is <<5>", *sum_of("24*2"), "."], 1, 0),
    "closed and opened thrice": (["is <<5><", *sum_of("24*2"), "."], 1, 0),
    "comparison before": (["3 > 2 <", *sum_of("24*2"), "."], 1, 0),
}


def test_the_vocabularies_have_the_merges_that_make_it_hard(tokenizer_of):
    for kind in ("merged", "spm"):
        texts = vocabulary_of(kind, tokenizer_of).by_text
        assert {"=2", ">>2", "24>>", "/2=", "=<<", ">><", "48"} <= texts.keys(), kind
    assert {"48", "24", "=<<", ">>"} <= vocabulary_of("groups", tokenizer_of).by_text.keys()
    digits = vocabulary_of("digits", tokenizer_of).by_text
    assert {"=<<", ">>", " <<"} <= digits.keys()
    assert not [text for text in digits if len(text) > 1 and any(c.isdigit() for c in text)]
    assert "\n" in tokenizer_of("spm").decode(tokenizer_of("spm").convert_tokens_to_ids(["<0x0A>"]))


@pytest.mark.parametrize("pen", PENS)
@pytest.mark.parametrize("case", CASES)
def test_every_case_equals_the_text_reference(vocabulary, case, pen):
    script, num_calculated, num_refused = CASES[case]
    ours, reference = write(vocabulary, script, pen), write_by_text(vocabulary, script, pen)
    assert ours.text == reference.text == corrected(script)
    assert (ours.num_calculated, ours.num_refused) == (num_calculated, num_refused)
    assert (reference.num_calculated, reference.num_refused) == (num_calculated, num_refused) or "huge" in case


def test_the_tokenizers_own_encoding_is_written_where_it_can_be(vocabulary):
    """What stands before the newest token cannot change; where the own encoding begins with it, that is written."""
    num_reachable = 0
    for case, (script, *_), pen in ((case, CASES[case], pen) for case in CASES for pen in PENS):
        written = write(vocabulary, script, pen)
        for before, _, behind in written.places:
            canonical = vocabulary.ids(vocabulary.text(written.ids[:behind]))
            if canonical[:before] == written.ids[:before]:
                num_reachable += 1
                assert written.ids[:behind] == canonical, (case, pen)
    assert num_reachable >= 5


def test_the_newest_token_is_kept_unless_it_is_wrong_or_not_the_tokenizers_own(vocabulary):
    """What the model chose is its own to learn from; only what the calculator wrote is marked as forced."""
    num_odd = 0
    for case, (script, *_), pen in ((case, CASES[case], pen) for case in CASES for pen in PENS):
        written = write(vocabulary, script, pen)
        for before, newest, behind in written.places:
            outcome = vocabulary.text(written.ids[:behind])
            is_right = outcome.startswith(vocabulary.text([*written.ids[:before], newest]))
            tails = [written.ids[start:behind] for start in range(before + 1)]
            is_own = any(vocabulary.ids(vocabulary.text(ids)) == ids for ids in tails if "<<" in vocabulary.text(ids))
            assert written.ids[before] == newest or not is_right or is_own, (case, pen)
            num_odd += is_right and not is_own
    assert num_odd >= 5


def test_a_written_annotation_in_training_text_is_written_back_token_by_token(vocabulary):
    """A model that writes the training text's own tokens gets the training text's own tokens."""
    for line in ("She has 48/2=<<48/2=24>>24", "It is <<3-5=-2>>-2", "<<12*36=432>>432", "a 1/4=<<1/4=0.25>>0.25"):
        canonical = vocabulary.ids(line)
        row, ids = vocabulary.forcer.row(), []
        while len(ids) < len(canonical):
            token = canonical[len(ids)]
            ids += row.push(token) or [token]
        assert ids == canonical
        assert (row.num_calculated, row.num_refused) == (1, 0)


def test_what_was_inserted_is_found_again_in_a_finished_answer(vocabulary):
    for line, inserted in (
        ("48/2=<<48/2=24>>24 of them", "24>>24"),
        ("<<3-5=-2>>-2 so <<1+1=2>>2", "-2>>-22>>2"),
        ("no <<4/2=3>>3 apples", ""),
    ):
        ids = vocabulary.ids(line)
        marks = written(vocabulary.forcer.row(), ids)
        found = "".join(vocabulary.forcer.text_of(i) for i, mark in zip(ids, marks, strict=True) if mark)
        pieces = [vocabulary.forcer.text_of(i) for i, mark in zip(ids, marks, strict=True) if not mark]
        if any("=" in piece and not piece.endswith("=") for piece in pieces):  # a merge across the `=`
            assert set(found) <= set(inserted)
        else:
            assert found == inserted


def test_text_outside_of_annotations_is_never_touched(vocabulary):
    text = "Ann has 3 < 4 apples = 2 >> 1, naïve café — $4.50 é= 日本 <3 =>\n\n<a> =2 <\n< x=2"
    row = vocabulary.forcer.row()
    assert [row.push(token) for token in vocabulary.ids(text)] == [None] * len(vocabulary.ids(text))
    assert (row.num_calculated, row.num_refused) == (0, 0)


def test_special_tokens_have_no_text_and_end_nothing(vocabulary):
    row = vocabulary.forcer.row()
    special = vocabulary.tokenizer.eos_token_id
    ids: list[int] = []
    for token in (*map(vocabulary.by_text.get, "<<4"), special, *map(vocabulary.by_text.get, "/2"), special):
        assert row.push(token) is None
        ids.append(token)
    replaced = row.push(vocabulary.by_text["="])
    assert replaced is not None
    assert vocabulary.text(ids + replaced).replace("</s>", "") == "<<4/2=2>>2"


def test_rows_of_one_forcer_are_apart(vocabulary):
    first, second = vocabulary.forcer.row(), vocabulary.forcer.row()
    for token in vocabulary.encode("so <<48/2"):
        assert first.push(token) is None
        second.push(vocabulary.by_text["a"])
    equals = vocabulary.by_text["="]
    assert second.push(equals) is None
    assert first.push(equals) is not None


@st.composite
def scripts(draw) -> list[Piece]:
    """Sentences with annotations right, wrong and broken, one behind the other."""
    number = st.integers(0, 300).map(str) | st.sampled_from(["0.5", ".25", "2.50", "-3"])
    expression = st.lists(number, min_size=1, max_size=4).flatmap(
        lambda parts: st.lists(st.sampled_from("+-*/"), min_size=len(parts) - 1, max_size=len(parts) - 1).map(
            lambda signs: "".join(a + b for a, b in zip(parts, [*signs, ""], strict=True))
        )
    )
    plain = st.sampled_from([" apples.\n", " so 48/2=", "", " ", "24", ". Then = 2 > 1 ", "2>>2", " <", "< "])
    broken = st.sampled_from(["<<48/2 ", "<<48>", "<<a=", "<<1/0=", "<<5\n=2", "<<", "<<<", "<<1,0=2>>2", "=<<", ">><"])
    script: list[Piece] = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["plain", "sum", "sum", "broken"]))
        if kind == "plain":
            script.append(draw(plain))
        elif kind == "broken":
            script.append(draw(broken))
        else:
            script.append(f"<<{draw(expression)}=")
            wrong = draw(number)
            script.append((f"{wrong}>>{wrong}", ""))
    return settled(script)


def settled(script: list[Piece]) -> list[Piece]:
    """Work out what the calculator writes, by the text alone: it also comes in where broken pieces meet."""
    whole, done, pieces = wishes(script), 0, []
    while match := OPEN.search(whole, done):
        result = CALCULATE(match[1])
        pieces.append(whole[done : match.end()])
        done = match.end()
        if result is None:
            continue
        forced = f"{result}>>{result}"
        wrong = re.compile(r"-?[0-9.]+>>-?[0-9.]+").match(whole, done)
        end = wrong.end() if wrong else done
        if whole.startswith(forced, done):
            end = done + len(forced)
        pieces.append((whole[done:end], forced))
        done = end
    return [*pieces, whole[done:]]


@settings(max_examples=150, deadline=None)
@given(script=scripts(), pen=st.sampled_from(PENS), seed=st.integers(0, 99), kind=st.sampled_from(KINDS))
def test_random_scripts_equal_the_text_reference(tokenizer_of, script, pen, seed, kind):
    vocabulary = vocabulary_of(kind, tokenizer_of)
    ours, reference = write(vocabulary, script, pen, seed), write_by_text(vocabulary, script, pen, seed)
    assert ours.text == reference.text
    assert (ours.num_calculated, ours.num_refused) == (reference.num_calculated, reference.num_refused)
