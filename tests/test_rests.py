"""Hot rests on tiny models: behind which tokens, at which temperature, and until when they are drawn."""

import pytest

torch = pytest.importorskip("torch")

from dpost_lite.models import loading  # noqa: E402
from dpost_lite.models.credit import token_logprobs  # noqa: E402
from dpost_lite.pipeline.rests import SampleRests  # noqa: E402
from dpost_lite.problems.records import Problem, Rationale, write_jsonl  # noqa: E402
from dpost_lite.problems.steps import step_ends  # noqa: E402
from dpost_lite.problems.tools import Tools  # noqa: E402
from dpost_lite.recipe_files import load_recipe  # noqa: E402
from dpost_lite.sampling import rests  # noqa: E402
from dpost_lite.sampling.rests import Cut, sample_rests, schedule  # noqa: E402
from dpost_lite.sampling.sampler import sample  # noqa: E402


@pytest.fixture(scope="module")
def model(base_dir):
    return loading.load(base_dir, "full")


PROBLEMS = [Problem(f"p{i}", f"Ann has {i} boxes of 2. How many?", str(2 * i)) for i in range(6)]


def right(prompter, problem: Problem) -> Rationale:
    text = f"She has {problem.answer}.\nThat is all.\n#### {problem.answer}"
    ids = prompter.answer_ids(text)
    return Rationale(problem.id, 0, text, ids, (0,) * len(ids), 0.0, "stop", problem.answer, True)


def cut(prompter, problem: Problem) -> Cut:
    rationale, text_of = right(prompter, problem), prompter.token_text()
    num_kept = 1 + next(i for i, token in enumerate(rationale.token_ids) if "\n" in text_of(token))
    return Cut(problem, rationale, num_kept)


def recipe(*overrides: str):
    return load_recipe(None, ["sampling.max_new_tokens=12", "sampling.max_rows=4", *overrides])


def draw(model, prompter, *overrides: str, done=()):
    cuts = [cut(prompter, problem) for problem in PROBLEMS]
    return list(sample_rests(model, prompter, cuts, recipe(*overrides), purpose="test", done=done))


def by_attempt(found):
    return {(one.problem_id, one.attempt): one.token_ids for one in found}


@pytest.mark.parametrize(
    ("settings", "temperatures"),
    [
        ((1.1, 0.05, 1.4), (1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4)),
        ((1.0, 0.25, 1.4), (1.0, 1.25, 1.4)),
        ((1.1, 0.0, 1.4), (1.1,)),
        ((1.4, 0.1, 1.4), (1.4,)),
    ],
)
def test_the_schedule_rises_by_step_up_to_the_highest(settings, temperatures):
    assert schedule(*settings) == pytest.approx(temperatures)


def test_a_greedy_rest_is_the_rest_of_the_unbroken_rationale(model, prompter):
    """The kept steps stand in the cache as if the model had written them."""
    whole = list(sample(model, prompter, PROBLEMS, tools=Tools(), purpose="x", temperature=0.0, max_new_tokens=12))
    for rationale, problem in zip(sorted(whole, key=lambda r: r.problem_id), PROBLEMS, strict=True):
        for kept in (1, 4):
            (found,) = sample_rests(
                model, prompter, [Cut(problem, rationale, kept)],
                recipe("rests.temperature=1e-6", "rests.temperature_increase=0", "rests.max_tries=1",
                       "calculator.enabled=false"),
                purpose="test",
            )  # fmt: skip
            assert found.kept_ids + found.token_ids == rationale.token_ids
            assert found.right_ids == found.token_ids


def test_rests_are_drawn_in_waves_until_one_is_usable(model, prompter, monkeypatch):
    usable_from = {"p0": 0, "p1": 1, "p2": 2, "p3": 99}
    monkeypatch.setattr(rests, "is_usable", lambda one: one.attempt >= usable_from.get(one.problem_id, 0))
    found = draw(model, prompter, "rests.max_tries=5")
    attempts = {p.id: sorted(one.attempt for one in found if one.problem_id == p.id) for p in PROBLEMS[:4]}
    assert attempts == {"p0": [0, 1], "p1": [0, 1], "p2": [0, 1, 2, 3], "p3": [0, 1, 2, 3, 4]}
    assert all(one.kept.startswith("She has") and one.kept.endswith(".\n") for one in found)
    assert all(
        one.kept_ids + one.right_ids == right(prompter, PROBLEMS[0]).token_ids
        for one in found
        if one.problem_id == "p0"
    )


def test_what_was_drawn_before_a_stop_is_not_drawn_again_and_the_result_stays(model, prompter, monkeypatch):
    """Also where the attempt that ended the search was there before its neighbour of the same wave."""
    monkeypatch.setattr(rests, "is_usable", lambda one: one.attempt == 1)
    whole = draw(model, prompter)
    assert {one.attempt for one in whole} == {0, 1}
    for done in (whole[:1], whole[:5], whole[:-1], [one for one in whole if one.attempt == 1]):
        more = draw(model, prompter, done=done)
        assert by_attempt([*done, *more]) == by_attempt(whole)
        assert len(more) == len(whole) - len(done)


def test_rests_do_not_depend_on_their_neighbours(model, prompter):
    whole = by_attempt(draw(model, prompter, "rests.max_tries=2"))
    (one,) = [cut(prompter, PROBLEMS[3])]
    alone = by_attempt(sample_rests(model, prompter, [one], recipe("rests.max_tries=2"), purpose="test"))
    assert alone == {key: ids for key, ids in whole.items() if key[0] == "p3"}


def test_nothing_to_cut_needs_no_model(prompter):
    assert list(sample_rests(None, prompter, [], recipe(), purpose="test")) == []


def test_a_rationale_is_cut_before_the_step_that_the_policy_finds_least_likely(model, prompter, base_dir, tmp_path):
    """By hand: the mean log-probability of each step's tokens, without those that the calculator wrote."""
    problem = PROBLEMS[1]
    text = "She has 2.\nThat is all.\nTwo is two.\n#### 2"
    ids = prompter.answer_ids(text)
    text_of = prompter.token_text()
    ends = step_ends(ids, text_of)
    assert len(ends) == 2
    (logprobs,) = token_logprobs(model, [(prompter.prompt_ids(problem.question), ids)])
    means = [sum(logprobs[a:b]) / (b - a) for a, b in ((ends[0], ends[1]), (ends[1], len(ids)))]
    least = means.index(min(means))
    write_jsonl(tmp_path / "train.jsonl", [problem])
    for skipped in (False, True):  # with that step written by the calculator, the other one
        forced = [0] * len(ids)
        if skipped:
            start, end = (ends[0], ends[1]) if least == 0 else (ends[1], len(ids))
            forced[start:end] = [1] * (end - start)
        drawn = Rationale(problem.id, 0, text, ids, tuple(forced), 0.0, "stop", problem.answer, True)
        write_jsonl(tmp_path / "rationales.jsonl", [drawn])
        task = SampleRests(
            recipe("rests.cut=least-certain"), base_dir, tmp_path, None, None, samples_dir=tmp_path, purpose="test"
        )
        kept = tmp_path / f"cuts-{skipped}.json"
        read: list[tuple[int, int]] = []
        (found,) = task._least_certain_cuts(prompter, model, kept, lambda *done, read=read: read.append(done))
        assert found.num_kept == ends[least if not skipped else 1 - least]
        assert read == [(1, 1, "rationales read")]
        kept.write_text(f"[{ends[0]}]")  # as a stopped stage left it
        (found,) = task._least_certain_cuts(prompter, None, kept, lambda *_: None)
        assert found.num_kept == ends[0]
