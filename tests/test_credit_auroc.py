"""Where a wrong number is put, which tokens its step has, and what the AUROC says of a score."""

import random
import re

import pytest

from dpost_lite.errors import DataError
from dpost_lite.evaluation.credit import (
    ErrorPlace,
    auroc,
    corrupt,
    corrupted,
    error_place,
    mean_auroc,
    mean_difference,
    solution_auroc,
    step_spans,
    wrong_number,
)
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import Problem
from dpost_lite.problems.synthetic import generate

KINDS = ["digits", "merged", "spm", "groups"]
TEXT = "She has 12*36=<<12*36=432>>432 apples.\nThen 432/2=<<432/2=216>>216.\nSo 216-3=<<216-3=213>>213.\n#### 213"


def problem(rationale: str, name: str = "1") -> Problem:
    return Problem(name, "How many?", "213", rationale)


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        ([1, 2], [3, 4, 5], 1),
        ([6], [3, 4], 0),
        ([1, 4], [2, 3], 0.5),
        ([2], [2, 2], 0.5),  # ties count half
        ([2], [1, 2, 3, 4], 2.5 / 4),
        ([-0.5], [0.5], 1),
    ],
)
def test_auroc_by_hand(positives, negatives, expected):
    assert auroc(positives, negatives) == pytest.approx(expected)


def test_a_score_is_compared_within_its_solution():
    spans, scores = [(0, 2), (2, 4), (4, 5)], [5.0, 5.0, 1.0, 7.0, 4.0, -99.0]  # the last token is the answer's
    place = ErrorPlace(spans, 1, [2])
    assert solution_auroc(scores, place, "tokens") == pytest.approx((1 + 0) / 2)
    assert solution_auroc(scores, place, "steps") == pytest.approx(3 / 4)  # 4 against 5 and 4
    assert solution_auroc(scores, place, "result") == 1  # 1 against 5, 5 and 4
    place = ErrorPlace(spans, 2, [4])
    assert solution_auroc(scores, place, "tokens") == pytest.approx(3 / 4)
    assert solution_auroc(scores, place, "steps") == pytest.approx(3 / 4)  # 4 against 5 and 4


def test_means_come_with_their_interval():
    found = mean_auroc([0, 1] * 50)
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.4, abs=0.02)
    assert found.high == pytest.approx(0.6, abs=0.02)
    paired = mean_difference([0.2, 0.9], [0.1, 0.8])
    assert (paired.mean, paired.low, paired.high) == pytest.approx((0.1, 0.1, 0.1))


def test_exactly_one_step_is_corrupted():
    steps = set()
    for i in range(40):
        found = corrupt(problem(TEXT, str(i)), 1)
        before, after = TEXT.split("\n"), found.text.split("\n")
        changed = [k for k in range(4) if before[k] != after[k]]
        assert changed == [found.step]
        steps.add(found.step)
        right = re.search(r"=(\d+)>>(\d+)", before[found.step])
        wrong = re.search(r"=(\d+)>>(\d+)", after[found.step])
        assert found.wrong == wrong[1] == wrong[2] != right[1]
        assert len(wrong[1]) == len(right[1])
        assert after[found.step].replace(f"={wrong[1]}>>{wrong[1]}", f"={right[1]}>>{right[1]}") == before[found.step]
    assert steps == {0, 1, 2}
    assert corrupt(problem(TEXT), 1) == corrupt(problem(TEXT), 1)


@pytest.mark.parametrize("number", ["0", "7", "10", "432", "-3", "0.5", "2.50", "10.25", "1000"])
def test_a_wrong_number_has_the_same_digits(number):
    for seed in range(50):
        wrong = wrong_number(number, random.Random(seed))
        assert re.sub(r"\d", "d", wrong) == re.sub(r"\d", "d", number)
        assert float(wrong) != float(number)
        assert not re.match(r"-?0\d", wrong)


@pytest.mark.parametrize(
    "rationale",
    [
        None,
        "",
        "1+1=<<1+1=2>>2\n#### 2",  # one step
        "It is 2.\nThen 3.\n#### 3",  # no calculation
        "It is 2.\n1+1=<<1+1=2>>$2\n#### 2",  # its result does not follow at once
        "It is 2.\n500*2=<<500*2=1000>>1000,5\n#### 2",
        "It is 2.\n1/4=<<1/4=.25>>.25\n#### 2",
    ],
)
def test_what_cannot_be_corrupted_is_left_out(rationale):
    assert corrupt(problem(rationale), 1) is None


def test_too_few_solutions_are_an_error():
    problems = generate(20, seed=1, min_steps=2)
    assert [one.problem_id for one in corrupted(problems, 20, seed=1)] == [p.id for p in problems]
    assert len(corrupted(problems, 3, seed=1)) == 3
    with pytest.raises(DataError, match="only 20 solutions have 2 steps and a calculation"):
        corrupted(problems, 21, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_spans_are_the_tokens_of_the_steps(tokenizer_of, kind):
    prompter = Prompter(tokenizer_of(kind))
    text_of = prompter.token_text()
    texts = [TEXT, *(one.text for one in corrupted(generate(20, seed=2, min_steps=2), 20, seed=1))]
    for text in texts:
        ids = prompter.answer_ids(text)
        spans = step_spans(ids, text_of)
        lines = text.split("\n")[:-1]
        assert len(spans) == len(lines)
        assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
        for (start, end), line in zip(spans, lines, strict=True):
            assert "".join(map(text_of, ids[start:end])).strip("\n ") == line
        assert "".join(map(text_of, ids[spans[-1][1] :])).strip("\n ").startswith("####")


@pytest.mark.parametrize("kind", KINDS)
def test_the_wrong_result_is_found_among_the_tokens(tokenizer_of, kind):
    prompter = Prompter(tokenizer_of(kind))
    text_of = prompter.token_text()
    for one in corrupted(generate(20, seed=2, min_steps=2), 20, seed=1):
        ids = prompter.answer_ids(one.text)
        place = error_place(one, ids, text_of)
        assert place.spans == step_spans(ids, text_of)
        start, end = place.spans[one.step]
        assert all(start <= i < end for i in place.result)
        result = "".join(text_of(ids[i]) for i in place.result)
        assert one.wrong in result
        if kind == "digits":  # where no token holds more than a part of the number
            assert result == one.wrong
            assert "".join(map(text_of, ids[start : place.result[0]])).endswith("=")


def test_a_token_that_begins_the_answer_s_line_is_left_out():
    pieces = ["a", " is 1", ".\n", "b is", " 2", "\n##", "## 2", ""]
    assert step_spans(range(8), pieces.__getitem__) == [(0, 3), (3, 5)]
    pieces = ["a", " is 1", ".\n", "b is", " 2", "\n", "", ""]  # without an answer
    assert step_spans(range(8), pieces.__getitem__) == [(0, 3), (3, 6)]


def test_the_control_has_the_same_place_and_no_error():
    for seed in range(9):
        wrong, intact = corrupt(problem(TEXT), seed), corrupt(problem(TEXT), seed, intact=True)
        assert wrong
        assert intact
        assert intact.step == wrong.step
        assert intact.text == TEXT != wrong.text
