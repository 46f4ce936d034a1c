"""Where a rationale can be cut, and which pairs its rests give."""

import pytest

from dpost_lite.problems.records import PreferencePair, Rest
from dpost_lite.problems.steps import (
    as_many,
    as_rationale,
    choose_cuts,
    is_usable,
    least_certain,
    mixed,
    step_ends,
    stepwise_pairs,
)

KINDS = ["digits", "merged", "spm", "groups"]
TEXT = "She has 12*36=<<12*36=432>>432 apples.\nThen 432/2=<<432/2=216>>216.\nSo 216-3=<<216-3=213>>213.\n#### 213"


def cuts(pieces: list[str]) -> list[str]:
    """The kept texts of a rationale given as its tokens' texts."""
    ends = step_ends(range(len(pieces)), pieces.__getitem__)
    return ["".join(pieces[:end]) for end in ends]


def test_a_cut_lies_at_the_end_of_each_line_but_the_last():
    pieces = ["a", " is 1", ".\n", "b is", " 2", "\n", "c is 3", "\n", "####", " 3", ""]
    assert cuts(pieces) == ["a is 1.\n", "a is 1.\nb is 2\n"]


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        ["#### 3"],
        ["one step\n", "#### 3"],
        ["one step\n", "\n", "#### 3", "\n"],
        ["\n", "one step\n", "#### 3"],
        ["no answer"],
    ],
)
def test_a_rationale_of_one_step_has_no_cut(pieces):
    assert cuts(pieces) == []


def test_nothing_after_the_answer_is_cut():
    assert cuts(["A is 5\n", "so it is\n", "#### 5\n", "I hope ", "this helps"]) == ["A is 5\n"]


def test_nothing_after_a_box_is_cut():
    assert cuts(["A is 5\n", "so \\boxed{5}\n", "I hope ", "this helps"]) == ["A is 5\n"]
    assert cuts(["A is 5. ", "So \\boxed{5}. ", "I hope ", "this helps."]) == ["A is 5. "]


CODED = [
    "Half.\n",
    "```",
    "python",
    "\n",
    "x = 24\n",
    "print(x)\n",
    "```",
    "\n",
    "```",
    "output\n",
    "24\n",
    "```",
    "\n",
]


def test_solutions_with_code_are_cut_after_text_and_outputs_alone():
    """Not after code, and not in the last two blocks (SCDPO's code)."""
    once, twice = [*CODED, "#### 24"], [*CODED, "Twice.\n", *CODED[1:], "#### 48"]
    assert cuts(once) == ["Half.\n"]
    first = "".join(CODED)
    assert cuts(twice) == ["Half.\n", first, first + "Twice.\n"]


def test_a_block_that_ends_inside_a_token_is_no_place_to_cut():
    assert cuts(["Half.", "\n```", *CODED[2:], "Twice.\n", *CODED[1:], "#### 48"]) == [
        "Half.\n" + "".join(CODED[1:]),
        "Half.\n" + "".join(CODED[1:]) + "Twice.\n",
    ]


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("".join(CODED) + "#### 25", True),
        ("```output\n24\n```\n#### 25", False),
        ("```python\nx\n```\n#### 25", True),
    ],
)
def test_a_rest_whose_output_the_model_wrote_is_garbled(text, usable):
    rest = Rest("p", 0, 0, "Half.\n", "right", text, (1,), (2,), tuple(range(20)), "stop", "25", False)
    assert is_usable(rest) == usable


@pytest.mark.parametrize(
    "pieces", [["Mr", ".", " Smith has 2", ".", " #### 2"], ["1", ".", " Ann has 2", ".", "#### 2"]]
)
def test_a_sentence_has_two_words(pieces):
    assert cuts(pieces) == []


def test_a_token_that_merges_with_the_next_step_is_kept_whole():
    assert cuts(["a is 1", ".\nb", " is 2", "\n#", "### 2"]) == ["a is 1.\nb"]


def test_no_cut_lies_inside_an_annotation():
    assert cuts(["a <<1+", "\n1=2", ">>2\n", "b", "\n", "#### 2"]) == ["a <<1+\n1=2>>2\n"]


def test_without_lines_a_step_is_a_sentence():
    pieces = ["She has 3", ".", "5", ". ", "He", " has 4", ".", " Both", "?", " 7", ".", " #### 7"]
    assert cuts(pieces) == ["She has 3.5. ", "She has 3.5. He has 4."]


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_of_real_tokenizers_give_the_tokens_back(tokenizer_of, kind):
    from dpost_lite.problems.prompts import Prompter

    prompter = Prompter(tokenizer_of(kind))
    ids = prompter.answer_ids(TEXT)
    text_of = prompter.token_text()
    ends = step_ends(ids, text_of)
    assert len(ends) == 2
    for end, num_lines in zip(ends, (1, 2), strict=True):
        kept, rest = "".join(map(text_of, ids[:end])), "".join(map(text_of, ids[end:]))
        assert kept + rest == "".join(map(text_of, ids))
        assert kept.count("\n") == num_lines
        assert kept.count("<<") == kept.count(">>") == num_lines


def test_one_cut_at_random_or_all():
    assert choose_cuts([3, 5, 9], "every", 1) == [3, 5, 9]
    assert {choose_cuts([3, 5, 9], "random", seed)[0] for seed in range(50)} == {3, 5, 9}
    assert choose_cuts([3, 5, 9], "random", 7) == choose_cuts([3, 5, 9], "random", 7)
    assert choose_cuts([], "random", 1) == choose_cuts([], "every", 1) == []


# -- pairs ------------------------------------------------------------------------------------------------------------


def rest(
    text: str, attempt: int = 0, *, correct: bool = False, end: str = "stop", ids=(7, 8), kept=(1, 2), problem="p"
):
    return Rest(problem, 0, attempt, "kept", "right", text, tuple(kept), (3, 4), tuple(ids), end, "1", correct)


@pytest.mark.parametrize(
    ("logprobs", "cut"),
    [
        ([-9, -9, -1, -1, -2, -2, -1], 4),  # the first step is always kept
        ([0, 0, -2, -1, -1, -1, -9], 6),
        ([0, 0, None, -2, -1, -1, 0], 2),  # what the calculator wrote does not count
        ([0, 0, None, None, None, None, -1], 6),
        ([0, 0, -1, -1, -1, -1, -1], 2),  # the earliest of equals
    ],
)
def test_the_cut_before_the_least_certain_step(logprobs, cut):
    assert least_certain([2, 4, 6], logprobs) == cut


def test_a_pair_is_the_own_rest_over_the_first_wrong_one_behind_the_kept_steps():
    drawn = [
        rest("right after all", 0, correct=True),
        rest("cut off", 1, end="limit"),
        rest("loops", 2, ids=(5,) * 30),
        rest("wrong too", 4),
        rest("wrong", 3, ids=(6, 7)),
    ]
    assert [is_usable(one) for one in drawn] == [False, False, False, True, True]
    assert stepwise_pairs({"p": "Q?"}, drawn, max_pairs=3) == [
        PreferencePair("p", "Q?", "right", "wrong", (3, 4), (6, 7), prefix="kept", prefix_ids=(1, 2))
    ]
    assert stepwise_pairs({"p": "Q?"}, drawn[:3], max_pairs=3) == []


def test_each_cut_gives_a_pair_of_its_own_up_to_a_limit():
    drawn = [rest("a"), rest("b", kept=(1,)), rest("c", problem="q"), rest("d", kept=(5, 6))]
    for max_pairs, expected in (
        (9, [("p", (1,), "b"), ("p", (1, 2), "a"), ("p", (5, 6), "d"), ("q", (1, 2), "c")]),
        (1, [("p", (1,), "b"), ("q", (1, 2), "c")]),
    ):
        found = stepwise_pairs({"p": "Q?", "q": "R?"}, drawn, max_pairs=max_pairs)
        assert [(pair.problem_id, pair.prefix_ids, pair.rejected) for pair in found] == expected


def test_rationales_of_two_rounds_are_two_even_if_cut_at_one_offset():
    drawn = [rest("a", kept=(1, 2)), rest("b", kept=(5, 6))]  # both are sample 0 of their rounds
    assert len(stepwise_pairs({"p": "Q?"}, drawn, max_pairs=3)) == 2


@pytest.mark.parametrize(("share", "num_ordinary"), [(1.0, 0), (0.5, 4), (0.4, 6), (0.25, 12), (0.1, 20)])
def test_the_share_of_stepwise_pairs(share, num_ordinary):
    ordinary = [PreferencePair(str(i), "?", "", "", (1,), (2,)) for i in range(20)]
    stepwise = [PreferencePair("s", "?", "", "", (1,), (2,), (9,))] * 4
    found = mixed(ordinary, stepwise, share, seed=1)
    assert len(found) == num_ordinary + 4
    assert found[num_ordinary:] == stepwise
    assert found[:num_ordinary] == sorted(found[:num_ordinary], key=lambda pair: int(pair.problem_id))
    assert found == mixed(ordinary, stepwise, share, seed=1)
    assert mixed(ordinary, [], share, seed=1) == (ordinary if share < 1 else [])
    assert mixed(ordinary, stepwise, 0.0, seed=1) == [*ordinary, *stepwise]  # SCDPO: all of both


@pytest.mark.parametrize(("number", "limits", "num_found"), [(3, [2], 3), (7, [2, 4], 7), (9, [2, 4, 8], 8)])
def test_as_many_ordinary_pairs_as_there_are_or_fewer(number, limits, num_found):
    """Two problems with four possible pairs each."""
    asked = []

    def pairs_of(limit: int) -> list[PreferencePair]:
        asked.append(limit)
        return [PreferencePair(problem, str(i), "", "", (1,), (2,)) for problem in "ab" for i in range(min(limit, 4))]

    found = as_many(pairs_of, number, 2, seed=1)
    assert asked == limits
    assert len(found) == len({(pair.problem_id, pair.question) for pair in found}) == num_found
    assert found == sorted(found, key=lambda pair: (pair.problem_id, pair.question))
    assert found == as_many(pairs_of, number, 2, seed=1)


def test_a_rest_that_is_right_after_all_is_a_whole_rationale():
    whole = as_rationale(rest(" done", correct=True))
    assert (whole.text, whole.token_ids, whole.correct, whole.end) == ("kept done", (1, 2, 7, 8), True, "stop")
