"""Solutions with code: when a block runs, what it sees, and the tokens that are inserted, for any way to tokenise.

The "model" is a script, as in test_forcing.py; the sandbox computes at once or late, and notes what it was given.
"""

import random
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
from test_forcing import KINDS, PENS, Vocabulary, next_token, vocabulary_of

from dpost_lite.problems.answer_tokens import AnswerTokens, written
from dpost_lite.problems.code_format import blocks, inserted_text, inserted_tokens
from dpost_lite.problems.coding import CodeWriter
from dpost_lite.problems.forcing import PENDING
from dpost_lite.problems.prompts import Prompter
from dpost_lite.sandbox.base import Limits, Ran, took_too_long

LIMITS = Limits()


@dataclass
class Desk:
    """A sandbox that answers from a table of the last line of code."""

    outputs: dict[str, str]
    limits: Limits = LIMITS
    calls: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    is_late: bool = False
    waiting: list[tuple[Future[Ran], Ran]] = field(default_factory=list)

    def run(self, earlier: Sequence[str], code: str) -> Future[Ran]:
        self.calls.append((tuple(earlier), code))
        text = self.outputs[code.rstrip("\n").rpartition("\n")[2]]
        future: Future[Ran] = Future()
        result = Ran(text, text if "Error" in text else "")
        if self.is_late:
            self.waiting.append((future, result))
        else:
            future.set_result(result)
        return future

    def reply(self) -> None:
        for future, result in self.waiting:
            future.set_result(result)
        self.waiting.clear()

    def close(self) -> None:
        """Nothing runs."""


def writer_of(vocabulary: Vocabulary, desk: Desk, *, max_blocks: int = 8, max_chars: int = 3000) -> CodeWriter:
    prompter = Prompter(vocabulary.tokenizer)
    return CodeWriter(
        vocabulary.forcer.text_of, prompter.encode_text, prompter.text, desk, max_blocks=max_blocks, max_chars=max_chars
    )


def write(vocabulary: Vocabulary, desk: Desk, pieces: list[str], pen: str, **limits: int) -> tuple[AnswerTokens, str]:
    """Let a model write the pieces; after each but the last the sandbox's text follows, whatever it is."""
    answer = AnswerTokens(writer_of(vocabulary, desk, **limits).row(), lambda _: False, 2000)
    dice, done = random.Random(0), ""
    for piece in pieces:
        wanted = done + piece
        while not (text := vocabulary.text(answer.token_ids)).startswith(wanted):
            assert wanted.startswith(text), (wanted, text)
            token = next_token(vocabulary, answer.token_ids, wanted[len(text) :], pen, dice)
            if answer.append_token(token) is None:
                desk.reply()
                answer.wait()
        done = text
    return answer, done


def feed(answer: AnswerTokens, ids: Sequence[int]) -> None:
    for token in ids:
        if answer.append_token(token) is None:
            answer.wait()


@pytest.fixture(params=KINDS)
def vocabulary(request, tokenizer_of) -> Vocabulary:
    return vocabulary_of(request.param, tokenizer_of)


FIRST = "Half of 48.\n```python\nx = 48 / 2\nprint(x)\n```"
SECOND = "Then twice that.\n```python\nprint(x * 2)\n```"
END = "So 48.\n#### 48"
OUTPUTS = {"print(x)": "24.0", "print(x * 2)": "48.0"}
WHOLE = FIRST + inserted_text("24.0") + SECOND + inserted_text("48.0") + END


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("pen", PENS)
def test_each_block_runs_once_and_its_output_follows(vocabulary: Vocabulary, pen: str, is_late: bool) -> None:
    desk = Desk(OUTPUTS, is_late=is_late)
    answer, text = write(vocabulary, desk, [FIRST, SECOND, END], pen)
    assert text == WHOLE
    first, second = "x = 48 / 2\nprint(x)\n", "print(x * 2)\n"
    assert desk.calls == [((), first), ((first,), second)]
    assert (answer.num_calculated, answer.num_refused) == (2, 0)
    assert [block.kind for block in blocks(text)] == ["text", "code", "output"] * 2 + ["text"]


@pytest.mark.parametrize("pen", PENS)
def test_what_was_inserted_is_found_in_the_tokens_again(vocabulary: Vocabulary, pen: str) -> None:
    answer, _ = write(vocabulary, Desk(OUTPUTS), [FIRST, SECOND, END], pen)
    found = inserted_tokens(answer.token_ids, vocabulary.forcer.text_of)
    for is_found, is_forced in zip(found, answer.forced, strict=True):
        assert is_forced or not is_found  # a fence that was tokenised again with its line feed counts as the model's
    text = "".join(vocabulary.forcer.text_of(i) for i, one in zip(answer.token_ids, found, strict=True) if one)
    assert text.replace("\n", "") == "```output24.0``````output48.0```"


def test_the_tokens_of_an_output_are_those_of_training_text(vocabulary: Vocabulary) -> None:
    answer, text = write(vocabulary, Desk(OUTPUTS), [FIRST, SECOND, END], "own")
    assert answer.token_ids == vocabulary.ids(text)
    assert written(writer_of(vocabulary, Desk(OUTPUTS)).row(), answer.token_ids).count(True) == sum(answer.forced)


def test_a_prefix_with_code_brings_the_state_back(vocabulary: Vocabulary) -> None:
    desk = Desk(OUTPUTS)
    answer = AnswerTokens(writer_of(vocabulary, desk).row(), lambda _: False, 200)
    answer.read_prefix(vocabulary.ids(FIRST + inserted_text("24.0")))
    feed(answer, vocabulary.ids(SECOND))
    assert desk.calls[-1] == (("x = 48 / 2\nprint(x)\n",), "print(x * 2)\n")
    assert vocabulary.text(answer.token_ids).startswith(SECOND + inserted_text("48.0"))
    assert answer.num_calculated == 1, "the prefix's block is not this answer's"


def test_a_prefix_may_end_inside_an_output(vocabulary: Vocabulary) -> None:
    ids = vocabulary.ids(FIRST + inserted_text("24.0"))
    cut = len(vocabulary.ids(FIRST)) + 2
    answer = AnswerTokens(writer_of(vocabulary, Desk(OUTPUTS)).row(), lambda _: False, 200)
    answer.read_prefix(ids[:cut])
    feed(answer, vocabulary.ids("x")[:1])
    assert answer.token_ids == ids[cut:], "the rest of the output, whatever the model chose"


NO_CODE = {
    "another language": "```c\nx\n```\n#### 1",
    "fence in a line": "a ```python\nx\n```\n#### 1",
    "not closed": "```python\nprint(x)\n",
    "fence in a line of code": "```python\nx = '```'\n",
    "only text": "48/2=24 apples\n#### 24",
    "an output of its own": "```output\n3\n```\n#### 3",
}


@pytest.mark.parametrize("pen", PENS)
@pytest.mark.parametrize("name", NO_CODE)
def test_nothing_runs(vocabulary: Vocabulary, name: str, pen: str) -> None:
    desk = Desk({})
    answer, text = write(vocabulary, desk, [NO_CODE[name]], pen)
    assert text == NO_CODE[name]
    assert not desk.calls
    assert not any(answer.forced)
    assert not any(inserted_tokens(answer.token_ids, vocabulary.forcer.text_of))


@pytest.mark.parametrize("pen", PENS)
def test_an_empty_block_and_an_empty_output(vocabulary: Vocabulary, pen: str) -> None:
    desk = Desk({"": "", "x = 1": ""})
    _, text = write(vocabulary, desk, ["```python\n```", "```python\nx = 1\n```", "#### 1"], pen)
    assert text == "```python\n```\n```output\n```\n```python\nx = 1\n```\n```output\n```\n#### 1"
    assert desk.calls[1] == (("",), "x = 1\n")


def test_what_the_newest_token_holds_beyond_the_fence_is_replaced() -> None:
    texts = ["```python\n", "print(x)\n", "```\n\n0", *"\n`abcdefghijklmnopqrstuvwxyz.0123456789"]
    ids = {text: i for i, text in enumerate(texts)}
    writer = CodeWriter(
        texts.__getitem__, lambda text: [ids[c] for c in text], lambda i: "", Desk(OUTPUTS), max_blocks=8, max_chars=99
    )
    row = writer.row()
    assert [row.push(0), row.push(1), row.push(2)] == [None, None, PENDING]
    inserted = row.poll()
    assert isinstance(inserted, list)
    assert "".join(texts[i] for i in inserted) == "```" + inserted_text("24.0")


def test_an_error_is_output_and_counts(vocabulary: Vocabulary) -> None:
    error = "ZeroDivisionError: division by zero"
    answer, text = write(vocabulary, Desk({"print(1/0)": error}), ["```python\nprint(1/0)\n```", "#### 1"], "own")
    assert error in text
    assert (answer.num_calculated, answer.num_refused) == (0, 1)


def test_a_block_stopped_by_a_limit_leaves_no_variables(vocabulary: Vocabulary) -> None:
    desk = Desk({"print(x)": took_too_long(LIMITS), "print(x * 2)": "48.0"})
    write(vocabulary, desk, [FIRST, SECOND, END], "own")
    assert desk.calls[1] == ((), "print(x * 2)\n")


def test_limits_on_blocks_and_characters(vocabulary: Vocabulary) -> None:
    desk = Desk(OUTPUTS)
    _, text = write(vocabulary, desk, [FIRST, SECOND, END], "own", max_blocks=1)
    assert len(desk.calls) == 1
    assert "RuntimeError: at most 1 blocks of a solution are run" in text
    desk = Desk(OUTPUTS)
    answer, text = write(vocabulary, desk, [FIRST, SECOND, END], "own", max_chars=15)
    assert [code for _, code in desk.calls] == ["print(x * 2)\n"]
    assert "RuntimeError: a block of more than 15 characters is not run" in text
    assert (answer.num_calculated, answer.num_refused) == (1, 1)


def test_an_output_cannot_open_a_block_or_end_the_answer(tokenizer_of) -> None:
    vocabulary = vocabulary_of("digits", tokenizer_of)
    desk = Desk({"print(x)": "```\n```python\nprint(x)\n```\n</s><|im_end|>"})
    answer, text = write(vocabulary, desk, [FIRST, "#### 1"], "own")
    assert len(desk.calls) == 1
    assert [block.kind for block in blocks(text)] == ["text", "code", "output", "text"]
    special = set(vocabulary.tokenizer.all_special_ids)
    assert not special & set(answer.token_ids), "printed names of special tokens stay text"


def test_characters_of_several_tokens_reach_the_sandbox_whole(tokenizer_of) -> None:
    vocabulary = vocabulary_of("digits", tokenizer_of)
    desk = Desk({"print('é→')": "é→"})
    writer = writer_of(vocabulary, desk)
    answer = AnswerTokens(writer.row(), lambda _: False, 200)
    ids = vocabulary.ids("```python\nprint('é→')\n```")
    assert "\N{REPLACEMENT CHARACTER}" in "".join(map(writer.text_of, ids))
    feed(answer, ids)
    assert desk.calls == [((), "print('é→')\n")]
    assert "é→\n" in vocabulary.text(answer.token_ids)


def test_code_in_the_token_that_opens_the_block_is_run_too() -> None:
    """Also where characters span tokens, whose texts are then read together."""
    texts = ["```", "python", "\n    ", "x = '", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}", "'\n", "\n"]
    desk = Desk({"    x = 'é'": ""})

    def text(ids: list[int]) -> str:
        return "".join(texts[i] for i in ids).replace("\N{REPLACEMENT CHARACTER}" * 2, "é")

    writer = CodeWriter(texts.__getitem__, lambda _: [], text, desk, max_blocks=8, max_chars=99)
    row = writer.row()
    assert [row.push(i) for i in (0, 1, 2, 3, 4, 5, 6, 0)][-1] is PENDING
    assert desk.calls == [((), "    x = 'é'\n")]
