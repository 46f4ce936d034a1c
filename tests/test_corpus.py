"""The problems of one run: where train, dev and test come from, what limits do to them, and what is refused."""

import json
from pathlib import Path

import pytest

from dpost_lite.errors import DataError
from dpost_lite.problems.corpus import Corpus, also_digests, also_names, digests, load_also, load_corpus
from dpost_lite.problems.records import Problem
from dpost_lite.recipe import DataRecipe, SyntheticRecipe

SMALL = SyntheticRecipe(num_train=30, num_dev=6, num_test=10, max_steps=2)


def synthetic(*, seed: int = 1, **data) -> Corpus:
    return load_corpus(DataRecipe(train="synthetic", **data), SMALL, seed=seed)


def write(path: Path, num: int, *, first: int = 0, labelled: bool = True) -> str:
    """Write `num` problems, every one with its rationale if `labelled`, and return the path as the recipe has it."""
    rows = []
    for i in range(first, first + num):
        answer = f"He has {i}+1=<<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}" if labelled else str(i + 1)
        rows.append({"question": f"Bob has {i} coins and finds one. How many coins?", "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def from_file(source: str, **data) -> Corpus:
    return load_corpus(DataRecipe(train=source, **data), SMALL, seed=1)


def questions(problems: list[Problem]) -> list[str]:
    return [problem.question for problem in problems]


def num_labelled(problems: list[Problem]) -> int:
    return sum(problem.rationale is not None for problem in problems)


# Built-in problems


def test_synthetic_sizes_and_labels():
    corpus = synthetic()
    assert [len(part) for part in (corpus.train, corpus.dev, corpus.test)] == [30, 6, 10]
    assert num_labelled(corpus.train) == 30
    assert corpus.num_refused == 0
    assert len({*questions(corpus.train), *questions(corpus.dev), *questions(corpus.test)}) == 46


def test_the_seed_changes_what_is_trained_on_and_not_the_test():
    one, other = synthetic(seed=1), synthetic(seed=2)
    assert synthetic(seed=1) == one
    assert questions(one.train) != questions(other.train)
    assert one.test == other.test


def test_the_first_ones_are_labelled():
    corpus = synthetic(num_labelled=5)
    assert [problem.rationale is not None for problem in corpus.train] == [True] * 5 + [False] * 25
    assert questions(corpus.train) == questions(synthetic().train)
    assert num_labelled(corpus.test) == 10  # only training problems hide theirs
    assert num_labelled(synthetic(num_labelled=99).train) == 30


def test_a_limited_run_sees_a_part_of_the_full_one():
    full, limited = synthetic(), synthetic(limit=4)
    assert limited.train == full.train[:4]
    assert limited.dev == full.dev[:4]
    assert limited.test == full.test[:4]
    assert synthetic(test_limit=3).test == full.test[:3]
    assert len(synthetic(test_limit=3).train) == 30
    assert len(synthetic(limit=4, test_limit=3).test) == len(synthetic(limit=3, test_limit=4).test) == 3


def test_labels_are_counted_after_the_limit():
    assert num_labelled(synthetic(limit=4, num_labelled=20).train) == 4
    assert num_labelled(synthetic(limit=4, num_labelled=2).train) == 2


# A user's file


def test_a_tenth_of_a_file_is_dev_and_another_test(tmp_path):
    source = write(tmp_path / "mine.jsonl", 40)
    corpus = from_file(source)
    parts = [set(questions(part)) for part in (corpus.train, corpus.dev, corpus.test)]
    assert [len(part) for part in parts] == [32, 4, 4]
    assert len(set.union(*parts)) == 40  # the best round is not chosen on what it is reported on
    assert num_labelled(corpus.train) == 32


def test_dev_size_is_what_was_asked_for(tmp_path):
    source = write(tmp_path / "mine.jsonl", 40)
    assert len(from_file(source, dev_size=2).dev) == 2
    assert len(from_file(source, dev_size=20).dev) == 20
    with pytest.raises(DataError, match=r"data\.dev_size=36 leaves none of 36"):
        from_file(source, dev_size=36)


def test_an_edited_file_has_another_digest(tmp_path):
    source = write(tmp_path / "mine.jsonl", 4)
    before = digests(DataRecipe(train=str(source)))
    assert before == digests(DataRecipe(train=str(source)))
    write(tmp_path / "mine.jsonl", 5)
    assert digests(DataRecipe(train=str(source))).keys() == before.keys()
    assert digests(DataRecipe(train=str(source))) != before
    assert digests(DataRecipe(train="gsm8k")) == {}


def test_the_split_does_not_depend_on_the_limit(tmp_path):
    source = write(tmp_path / "mine.jsonl", 40)
    full, limited = from_file(source), from_file(source, limit=3)
    assert limited.train == full.train[:3]
    assert limited.dev == full.dev[:3]


def test_a_split_file_decides(tmp_path):
    source = write(tmp_path / "mine.jsonl", 6)
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": [0, 2, 4, 5], "dev": [1, 3]}))
    corpus = from_file(source, split_file=split)
    assert [problem.answer for problem in corpus.train] == ["1", "3", "5", "6"]
    assert [problem.answer for problem in corpus.dev] == ["2", "4"]


def test_labelled_are_the_first_that_carry_a_rationale(tmp_path):
    path = tmp_path / "mine.jsonl"
    plain, worked = write(path, 10, labelled=False), tmp_path / "worked.jsonl"
    write(worked, 10, first=10)
    path.write_text(Path(plain).read_text() + worked.read_text())
    corpus = from_file(str(path), dev_size=1, num_labelled=3)
    shown = [problem for problem in corpus.train if problem.rationale]
    carrying = [problem for problem in from_file(str(path), dev_size=1).train if problem.rationale]
    assert len(carrying) > 3
    assert shown == carrying[:3]


def test_refused_rows_are_counted(tmp_path):
    path = tmp_path / "mine.jsonl"
    write(path, 20)
    path.write_text(path.read_text() + '{"question": "How many?", "answer": "plenty"}\nnot JSON\n')
    assert from_file(str(path)).num_refused == 2


def test_a_test_set_of_its_own(tmp_path):
    source = write(tmp_path / "mine.jsonl", 20)
    other = write(tmp_path / "other.jsonl", 5, first=100)
    corpus = from_file(source, test=other, dev_size=0)
    assert [problem.answer for problem in corpus.test] == ["101", "102", "103", "104", "105"]
    assert corpus.dev == []
    assert from_file(source, test="synthetic").test == synthetic().test
    assert len(from_file(source, test=other, test_limit=2).test) == 2


def test_synthetic_problems_can_be_tested_on_a_file(tmp_path):
    other = write(tmp_path / "other.jsonl", 5)
    corpus = synthetic(test=other)
    assert len(corpus.test) == 5
    assert corpus.train == synthetic().train


# Named sets


def test_a_named_set_has_its_own_test_part(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    write(tmp_path / "gsm8k" / "train.jsonl", 30)
    write(tmp_path / "gsm8k" / "test.jsonl", 5, first=50)
    corpus = from_file("gsm8k", data_dir=tmp_path, dev_size=8)
    assert [len(part) for part in (corpus.train, corpus.dev, corpus.test)] == [22, 8, 5]
    with pytest.raises(DataError, match=r"dev_size=30 leaves none of 30"):
        from_file("gsm8k", data_dir=tmp_path, dev_size=30)  # not made smaller in silence, as for a file


# Further test sets


def also(problems: list[Problem], *sources: str, **data) -> dict[str, list[Problem]]:
    return load_also(DataRecipe(also_test=sources, **data), SMALL, problems, seed=1)


def test_further_test_sets_are_limited_as_the_test_set(tmp_path):
    source = write(tmp_path / "hard.jsonl", 8)
    write(tmp_path / "svamp.jsonl", 5)
    sets = also([], "svamp", source, "synthetic", data_dir=tmp_path)
    assert {name: len(problems) for name, problems in sets.items()} == {"svamp": 5, "hard": 8, "synthetic": 10}
    assert sets["synthetic"] == synthetic().test
    assert also([], source, test_limit=3)["hard"] == also([], source, limit=3)["hard"] == sets["hard"][:3]
    assert also([]) == {}


def test_files_with_the_same_stem_have_different_names(tmp_path):
    sources = ("a/hard.jsonl", "b/Hard.csv", "c/svamp.jsonl", "svamp", "../odd name!.jsonl", "hard-2.jsonl", "~/hard")
    names = also_names(DataRecipe(also_test=sources))
    assert dict(zip(names.values(), names, strict=True)) == {
        "a/hard.jsonl": "hard",
        "b/Hard.csv": "Hard-2",
        "c/svamp.jsonl": "svamp-2",
        "svamp": "svamp",
        "../odd name!.jsonl": "odd-name",
        "hard-2.jsonl": "hard-2-2",
        "~/hard": "hard-3",
    }
    assert list(names.values()) == list(sources)


def test_a_training_question_in_a_further_test_set_is_refused(tmp_path):
    train = from_file(write(tmp_path / "mine.jsonl", 20), dev_size=0, test="synthetic").train
    other = write(tmp_path / "other.jsonl", 5, first=18)
    with pytest.raises(
        DataError, match=r"2 of 5 test questions of data\.also_test=.*other\.jsonl are also in the train"
    ):
        also(train, other, train="mine.jsonl")


def test_a_further_test_set_that_cannot_be_read_is_named_with_its_key(tmp_path):
    with pytest.raises(
        DataError, match=r"^data\.also_test: there is no file or set 'svam' \(did you mean 'svamp'\?\): give "
    ):
        also([], "svam")
    with pytest.raises(DataError, match=r"^data\.also_test: --data-dir .* has no file asdiv\.jsonl: add it"):
        also([], "asdiv", data_dir=tmp_path)


def test_an_edited_further_test_set_has_another_digest(tmp_path):
    source = write(tmp_path / "hard.jsonl", 4)
    recipe = DataRecipe(also_test=(source, "svamp"))
    before = also_digests(recipe)
    assert list(before) == [source]
    write(tmp_path / "hard.jsonl", 5)
    assert also_digests(recipe) != before
    assert digests(recipe) == {}  # those of the other problems stay


# What is refused


def test_nothing_to_test_on(tmp_path):
    source = write(tmp_path / "mine.jsonl", 9)
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": list(range(9)), "dev": []}))
    with pytest.raises(DataError, match=r"no test problems; set data\.test"):
        from_file(source, split_file=split)
    assert len(from_file(source).test) == 1
    assert len(from_file(source, dev_size=0, test=write(tmp_path / "other.jsonl", 2, first=50)).train) == 9


def test_overlap_of_train_and_test_is_refused(tmp_path):
    source = write(tmp_path / "mine.jsonl", 20)
    other = write(tmp_path / "other.jsonl", 5, first=18)  # two of them are trained on, unless they are dev problems
    with pytest.raises(DataError, match=r"2 of 5 test questions of .*other\.jsonl are also in the training data"):
        from_file(source, test=other, dev_size=0)


def test_overlap_is_seen_through_case_and_punctuation(tmp_path):
    source = write(tmp_path / "mine.jsonl", 20)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"question": "bob has 3 coins, and finds one: HOW MANY coins", "answer": "4"}))
    with pytest.raises(DataError, match=r"1 of 1 test questions"):
        from_file(source, test=str(other), dev_size=0)


def test_a_file_tested_on_itself_is_refused(tmp_path):
    source = write(tmp_path / "mine.jsonl", 20)
    with pytest.raises(DataError, match=r"18 of 20 test questions of .*mine\.jsonl"):
        from_file(source, test=source)


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        from_file(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="did you mean 'gsm8k'"):
        from_file("gsm8")
    with pytest.raises(DataError, match="svamp is for evaluation only"):
        from_file("svamp")
