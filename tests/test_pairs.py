"""Deduplication, preference pairs and pseudo-labels: each rule by hand, the invariants by hypothesis."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpost_lite.problems.pairs import deduplicate, equations, jaccard, make_labels, make_pairs, num_steps
from dpost_lite.problems.records import LabelledRationale, Problem, Rationale

P1, P2, P3 = (Problem(id=f"p{n}", question=f"Question {n}?", answer=str(n)) for n in (1, 2, 3))


def sampled(text, ids, correct=True, end="stop", problem="p1", predicted="1"):
    return Rationale(problem, 0, text, tuple(ids), (0,) * len(ids), -1.0, end, predicted, correct)


def gold(text, ids, problem="p1"):
    return LabelledRationale(problem, "Question 1?", text, tuple(ids), is_gold=True)


def pairs(rationales, gold_of=None, problems=(P1,), **settings):
    defaults = {"threshold": 0.7, "max_pairs": 3, "gold_first": True, "unfinished_rejected": False}
    return make_pairs(problems, rationales, gold_of or {}, **(defaults | settings))


def labels(rationales, gold_of=None, problems=(P1,), **settings):
    return make_labels(problems, rationales, gold_of or {}, **({"threshold": 0.7} | settings))


def texts(items):
    return [item.text for item in items]


# -- likeness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ((1, 2, 3), (2, 3, 4), 0.5),
        ((1, 1, 1, 2), (2, 1), 1.0),  # sets: neither order nor repeats count
        ((1, 2), (3, 4), 0.0),
        ((1,), (), 0.0),
        ((), (), 1.0),
        ([1, 2, 3, 4], {1, 2, 3}, 0.75),
    ],
)
def test_jaccard(a, b, value):
    assert jaccard(a, b) == value
    assert jaccard(b, a) == value


def test_steps_are_the_lines_before_the_answer():
    assert [num_steps(text) for text in ("", "#### 4", "a\n#### 4", "a\n\nb\n#### 4", "a\nb")] == [0, 0, 1, 2, 2]


def test_equations_are_the_annotations_in_order():
    assert equations("a 2 + 2 = <<2 + 2=4>>4\nb <<4*3=12>>12\n#### 12") == ("2+2=4", "4*3=12")
    assert equations("no calculation\n#### 4") == ("no calculation\n#### 4",)


# -- deduplication ----------------------------------------------------------------------------------------------------


def test_deduplicate_goes_by_text_and_keeps_the_first_of_what_is_alike():
    b, a, c = sampled("b", (1, 2, 3, 4)), sampled("a", (1, 2, 3)), sampled("c", (7, 8))
    assert deduplicate([b, c, a], threshold=0.7) == [a, c]  # b is 0.75 like a


def test_deduplicate_keeps_what_is_just_at_the_threshold():
    a, b = sampled("a", (1, 2, 3)), sampled("b", (1, 2, 3, 4))
    assert deduplicate([a, b], threshold=0.75) == [a, b]


def test_deduplicate_compares_with_kept_items_only():
    # b is dropped for a; c is like b but not like a, so it stays.
    a, b, c = sampled("a", (1, 2, 3)), sampled("b", (1, 2, 3, 4)), sampled("c", (2, 3, 4))
    assert jaccard(b.token_ids, c.token_ids) == 0.75
    assert jaccard(a.token_ids, c.token_ids) == 0.5
    assert deduplicate([c, b, a], threshold=0.7) == [a, c]


def test_one_text_is_kept_once_even_in_two_tokenisations():
    whole, pieces = sampled("12", (9,)), sampled("12", (1, 2))
    assert deduplicate([whole, pieces], threshold=1) == [pieces]
    assert deduplicate([pieces, whole], threshold=1) == [pieces]


def test_without_a_threshold_repeated_equations_are_removed():
    first, again, other = (
        sampled("A: <<2+2=4>>4", (1, 2)), sampled("B: <<2 + 2 = 4>>4", (7, 8)), sampled("C: <<2*2=4>>4", (1, 2, 3)),
    )  # fmt: skip
    assert deduplicate([other, again, first], threshold=None) == [first, other]
    kept = sampled("Z: <<2+2=4>>4", (9,))
    assert deduplicate([other, again, first], threshold=None, kept=[kept]) == [kept, other]


def test_what_is_kept_already_comes_first_whatever_its_text():
    z, a, b = sampled("z", (1, 2, 3)), sampled("a", (1, 2, 3, 4)), sampled("b", (7, 8))
    assert deduplicate([a, b], threshold=0.7, kept=[z]) == [z, b]


# -- preference pairs -------------------------------------------------------------------------------------------------


def test_a_pair_holds_both_sides_text_and_ids():
    (pair,) = pairs([sampled("good", (1, 2)), sampled("bad", (3, 4), correct=False)])
    assert (pair.problem_id, pair.question) == ("p1", "Question 1?")
    assert (pair.chosen, pair.chosen_ids) == ("good", (1, 2))
    assert (pair.rejected, pair.rejected_ids) == ("bad", (3, 4))


def test_unreadable_answers_are_rejected():
    (pair,) = pairs([sampled("good", (1, 2)), sampled("no number", (3, 4), correct=False, predicted=None)])
    assert pair.rejected == "no number"


def test_a_problem_without_negatives_or_without_positives_is_skipped():
    good, bad = sampled("good", (1, 2)), sampled("bad", (3, 4), correct=False)
    assert pairs([good]) == []
    assert pairs([good], {"p1": gold("gold", (5, 6))}) == []
    assert pairs([bad]) == []
    assert pairs([]) == []


def test_the_gold_rationale_leads_to_pairs_on_its_own():
    bad = sampled("bad", (3, 4), correct=False)
    (pair,) = pairs([bad], {"p1": gold("gold", (5, 6))})
    assert (pair.chosen, pair.chosen_ids) == ("gold", (5, 6))
    assert pairs([bad], {"p1": gold("gold", (5, 6))}, gold_first=False) == []
    assert pairs([bad], {"p2": gold("gold", (5, 6), "p2")}) == []


def test_the_gold_rationale_survives_deduplication_though_its_text_comes_later():
    good, bad = sampled("a", (1, 2, 3, 4)), sampled("bad", (8, 9), correct=False)
    made = pairs([good, bad], {"p1": gold("z", (1, 2, 3))})
    assert [pair.chosen for pair in made] == ["z"]


def test_both_sides_are_deduplicated_on_their_own():
    rationales = [
        sampled("good a", (1, 2, 3)),
        sampled("good b", (1, 2, 3, 4)),  # like good a
        sampled("bad a", (1, 2, 3, 5), correct=False),  # as like good a, but on the other side
        sampled("bad b", (1, 2, 3, 5), correct=False),  # like bad a
    ]
    assert [(p.chosen, p.rejected) for p in pairs(rationales)] == [("good a", "bad a")]


def test_the_least_alike_pairs_are_kept_least_alike_first():
    rationales = [
        sampled("good", (1, 2, 3, 4)),
        sampled("bad a", (1, 2, 5, 6), correct=False),  # 2/6
        sampled("bad b", (7, 8), correct=False),  # 0
        sampled("bad c", (1, 9), correct=False),  # 1/5
    ]
    assert [pair.rejected for pair in pairs(rationales)] == ["bad b", "bad c", "bad a"]
    assert [pair.rejected for pair in pairs(rationales, max_pairs=2)] == ["bad b", "bad c"]


def test_pairs_of_equally_many_steps_can_go_first():
    rationales = [
        sampled("2+2=4 apples.\n4+1=5 in all.\n#### 5", (1, 2, 3, 4)),
        sampled("one step.\n#### 3", (7, 8), correct=False),  # the least alike
        sampled("two steps.\nof them.\n#### 3", (1, 2, 9), correct=False),
        sampled("and three.\nof\nthem.\n#### 3", (1, 8), correct=False),
    ]
    order = [num_steps(pair.rejected) for pair in pairs(rationales, equal_steps=True)]
    assert order == [2, 1, 3]
    assert [num_steps(pair.rejected) for pair in pairs(rationales)] == [1, 3, 2]


def test_ties_go_by_gold_then_the_text_of_the_chosen_then_of_the_rejected():
    rationales = [
        sampled("bad b", (30,), correct=False),
        sampled("good b", (10,)),
        sampled("bad a", (40,), correct=False),
        sampled("good a", (20,)),
    ]
    expected = [
        ("the gold", "bad a"),
        ("the gold", "bad b"),
        ("good a", "bad a"),
        ("good a", "bad b"),
        ("good b", "bad a"),
        ("good b", "bad b"),
    ]
    for shuffled in itertools.permutations(rationales):
        made = pairs(shuffled, {"p1": gold("the gold", (50,))}, max_pairs=9)
        assert [(pair.chosen, pair.rejected) for pair in made] == expected


def test_unfinished_rationales_are_left_out_unless_asked_for():
    good = sampled("good", (1, 2))
    cut_wrong = sampled("cut", (3, 4), correct=False, end="limit", predicted=None)
    assert pairs([good, cut_wrong]) == []
    assert [pair.rejected for pair in pairs([good, cut_wrong], unfinished_rejected=True)] == ["cut"]


@pytest.mark.parametrize("unfinished_rejected", [False, True])
def test_a_right_but_unfinished_rationale_is_on_neither_side(unfinished_rejected):
    cut_right = sampled("cut", (3, 4), correct=True, end="limit")
    good, bad = sampled("good", (1, 2)), sampled("bad", (5, 6), correct=False)
    assert pairs([cut_right, bad], unfinished_rejected=unfinished_rejected) == []
    assert pairs([good, cut_right], unfinished_rejected=unfinished_rejected) == []


def test_pairs_follow_the_order_of_the_problems_and_ignore_other_problems():
    rationales = [
        rationale
        for name in ("p1", "p2", "p9")
        for rationale in (sampled("good", (1,), problem=name), sampled("bad", (2,), correct=False, problem=name))
    ]
    assert [pair.problem_id for pair in pairs(rationales, problems=(P2, P3, P1))] == ["p2", "p1"]


# -- pseudo-labels ----------------------------------------------------------------------------------------------------


def test_labels_are_the_gold_rationale_then_right_finished_ones():
    rationales = [
        sampled("b", (1,)),
        sampled("a", (2,)),
        sampled("wrong", (3,), correct=False),
        sampled("cut", (4,), end="limit"),
    ]
    made = labels(rationales, {"p1": gold("z", (5,))})
    assert made == [
        gold("z", (5,)),
        LabelledRationale("p1", "Question 1?", "a", (2,), is_gold=False),
        LabelledRationale("p1", "Question 1?", "b", (1,), is_gold=False),
    ]


def test_labels_are_deduplicated_against_gold_and_each_other():
    rationales = [sampled("a", (1, 2, 3, 4)), sampled("b", (7, 8, 9)), sampled("c", (7, 8, 9, 10))]
    assert texts(labels(rationales, {"p1": gold("z", (1, 2, 3))})) == ["z", "b"]


def test_without_gold_the_labels_are_the_samples():
    assert texts(labels([sampled("a", (1,)), sampled("b", (2,))])) == ["a", "b"]
    assert labels([]) == []
    assert labels([sampled("wrong", (1,), correct=False)]) == []


def numbered(problem, num):
    """`num` right rationales of a problem, none like another."""
    return [sampled(f"{n:03}", (n,), problem=problem) for n in range(num)]


@pytest.mark.parametrize(
    ("counts", "percentile", "kept"),
    [
        ((1, 2, 10), 90, [1, 2, 8]),  # numpy.percentile([1, 2, 10], 90) = 8.4
        ((1, 2, 10), 50, [1, 2, 2]),
        ((1, 2, 10), 0, [1, 1, 1]),
        ((1, 2, 10), 100, [1, 2, 10]),
        ((4, 4, 4), 90, [4, 4, 4]),
        ((0, 0, 6), 90, [0, 0, 6]),  # problems without a label have no say
        ((0, 1, 6), 90, [0, 1, 5]),  # numpy.percentile([1, 6], 90) = 5.5
        ((0, 0, 0), 90, [0, 0, 0]),
    ],
)
def test_the_cap_is_a_percentile_over_the_problems(counts, percentile, kept):
    problems = (P1, P2, P3)
    rationales = [r for problem, num in zip(problems, counts, strict=True) for r in numbered(problem.id, num)]
    made = labels(rationales, problems=problems, cap_percentile=percentile)
    assert [sum(label.problem_id == problem.id for label in made) for problem in problems] == kept


def test_the_cap_counts_gold_and_cuts_from_the_end():
    golds = {problem.id: gold("z", (999,), problem.id) for problem in (P1, P2, P3)}
    made = labels(numbered("p2", 9), golds, problems=(P1, P2, P3))  # counts 1, 10, 1: the percentile is 8.2
    assert texts(made) == ["z", "z", *(f"{n:03}" for n in range(7)), "z"]


def test_the_hard_limit_holds_and_is_100_by_default():
    assert len(labels(numbered("p1", 120))) == 100
    assert len(labels(numbered("p1", 120), max_per_problem=7)) == 7


def test_labels_follow_the_order_of_the_problems():
    rationales = [sampled("a", (1,), problem=name) for name in ("p1", "p2", "p9")]
    assert [label.problem_id for label in labels(rationales, problems=(P2, P3, P1))] == ["p2", "p1"]


# -- invariants -------------------------------------------------------------------------------------------------------

ids = st.lists(st.integers(0, 6), max_size=6).map(tuple)
rationale_lists = st.lists(
    st.builds(
        sampled,
        text=st.text("ab", max_size=3),
        ids=ids,
        correct=st.booleans(),
        end=st.sampled_from(["stop", "stop", "limit"]),
        problem=st.sampled_from(["p1", "p2", "p9"]),
    ),
    max_size=16,
)
golds = st.dictionaries(st.just("p1"), st.builds(gold, text=st.just("gold"), ids=ids))
thresholds = st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0])


@given(rationale_lists, thresholds)
def test_deduplication_keeps_no_two_alike_and_drops_only_what_is_alike(items, threshold):
    kept = deduplicate(items, threshold=threshold)
    assert texts(kept) == sorted(set(texts(kept)))
    for a, b in itertools.combinations(kept, 2):
        assert jaccard(a.token_ids, b.token_ids) <= threshold
    for item in items:
        assert any(item.text == k.text or jaccard(item.token_ids, k.token_ids) > threshold for k in kept)
    assert deduplicate(kept, threshold=threshold) == kept


@given(rationale_lists, golds, thresholds, st.integers(0, 4), st.booleans(), st.booleans(), st.randoms())
def test_pairs_are_right_over_wrong_bounded_and_independent_of_order(
    rationales, gold_of, threshold, max_pairs, gold_first, unfinished_rejected, random
):
    settings = {
        "threshold": threshold,
        "max_pairs": max_pairs,
        "gold_first": gold_first,
        "unfinished_rejected": unfinished_rejected,
    }
    made = pairs(rationales, gold_of, problems=(P1, P2), **settings)
    right = {(r.problem_id, r.text, r.token_ids) for r in rationales if r.correct and r.end == "stop"}
    right |= {(g.problem_id, g.text, g.token_ids) for g in gold_of.values() if gold_first}
    ends = ("stop", "limit") if unfinished_rejected else ("stop",)
    wrong = {(r.problem_id, r.text, r.token_ids) for r in rationales if not r.correct and r.end in ends}
    for pair in made:
        assert (pair.problem_id, pair.chosen, pair.chosen_ids) in right
        assert (pair.problem_id, pair.rejected, pair.rejected_ids) in wrong
    for problem in (P1, P2):
        likeness = [jaccard(p.chosen_ids, p.rejected_ids) for p in made if p.problem_id == problem.id]
        assert likeness == sorted(likeness)
        assert len(likeness) <= max_pairs
        has_both = all(any(item[0] == problem.id for item in side) for side in (right, wrong))
        assert bool(likeness) == (has_both and max_pairs > 0)
    shuffled = list(rationales)
    random.shuffle(shuffled)
    assert pairs(shuffled, gold_of, problems=(P1, P2), **settings) == made


@given(rationale_lists, golds, thresholds, st.integers(0, 100), st.integers(1, 4))
def test_labels_are_right_distinct_and_capped(rationales, gold_of, threshold, percentile, max_per_problem):
    made = labels(
        rationales,
        gold_of,
        problems=(P1, P2),
        threshold=threshold,
        cap_percentile=percentile,
        max_per_problem=max_per_problem,
    )
    right = {(r.problem_id, r.text, r.token_ids) for r in rationales if r.correct and r.end == "stop"}
    for problem in (P1, P2):
        group = [label for label in made if label.problem_id == problem.id]
        assert len(group) <= max_per_problem
        assert bool(group) == (problem.id in gold_of or any(item[0] == problem.id for item in right))
        assert [label.is_gold for label in group[:1]] == ([problem.id in gold_of] if group else [])
        assert all((label.problem_id, label.text, label.token_ids) in right for label in group if not label.is_gold)
        for a, b in itertools.combinations(group, 2):
            assert jaccard(a.token_ids, b.token_ids) <= threshold
