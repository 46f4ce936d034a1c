"""The stages of a run: their order, learned from Algorithm 2 itself, and their names."""

import pytest

from dpost_lite.planner.recorder import planned_stages
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.stage_names import StageName, is_round, policy_name, policy_of, rounds_in

WARM_UP = ["data", "score/base", "sft-0", "score/sft-0"]
LABELS = ["samples-labels", "labels", "sft"]
ROUND = {"sft": [], "st": LABELS, "dpo-st": ["samples-pairs", "pairs", "dpo", "gate", *LABELS]}


@pytest.mark.parametrize("method", ["dpo-st", "st", "sft"])
def test_the_stages_are_those_of_the_algorithm_in_its_order(method):
    expected = list(WARM_UP)
    for i in (1, 2) if ROUND[method] else ():
        expected += [f"round-{i}/{kind}" for kind in ROUND[method]] + [f"score/round-{i}"]
    names = planned_stages(Recipe(method=method, rounds=2))
    assert [str(name) for name in names] == [*expected, "export", "solved"]
    assert [StageName.parse(str(name)) for name in names] == names


def test_further_test_sets_are_scored_after_test():
    names = planned_stages(load_recipe(None, ["method=st", "rounds=1", "data.also_test=svamp"]))
    assert [StageName.parse(str(name)) for name in names] == names
    assert [str(name) for name in names if not name.round] == [
        "data", "data-also", "score/base", "score-also/base", "sft-0", "score/sft-0", "score-also/sft-0", "export",
        "solved",
    ]  # fmt: skip
    assert [str(name) for name in names if name.policy == "round-1"] == ["score/round-1", "score-also/round-1"]


def test_the_papers_algorithm_has_no_gate():
    names = [name.kind for name in planned_stages(load_recipe(None, ["dpo.gate=off"]))]
    assert "dpo" in names
    assert "gate" not in names


@pytest.mark.parametrize(
    "name", ["", "sft", "sft-1", "round-1", "round-1/score", "round-x/sft", "score/else", "score-also", "logs"]
)
def test_other_folders_are_no_stages(name):
    assert StageName.parse(name) is None


def test_policies_have_the_name_of_their_round(tmp_path):
    for name in ("round-2", "round-10", "round-x", "sft-0"):
        (tmp_path / name).mkdir()
    assert [policy_name(number) for number in (0, *rounds_in(tmp_path))] == ["sft-0", "round-2", "round-10"]
    assert [policy_of(stage) for stage in ("sft-0", "round-2/sft")] == ["sft-0", "round-2"]
    assert [is_round(name) for name in ("base", "sft-0", "round-2")] == [False, False, True]
