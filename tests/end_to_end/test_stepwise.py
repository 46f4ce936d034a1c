"""A run with step-controlled pairs (SCDPO), on a tiny model that learns two-step rationales by heart."""

import json
from pathlib import Path

import pytest
from easy import NAMES, SETTINGS

pytest.importorskip("torch")

from dpost_lite.models.loading import load_prompter
from dpost_lite.pipeline.run import execute
from dpost_lite.planner.recorder import planned_stages
from dpost_lite.problems.records import PreferencePair, Rest, read_jsonl
from dpost_lite.problems.steps import is_usable
from dpost_lite.recipe import ModelRecipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.report import health
from dpost_lite.runs.folder import Run


def write_problems(path: Path) -> Path:
    rows = []
    for i, name in enumerate(NAMES * 2):
        left, right = (2, 2) if i % 3 else (2, 5)
        total = left + right
        answer = f"2\n{left}+{right}=<<{left}+{right}={total}>>{total}\n#### {total}"
        question = f"{name} {'in' if i < len(NAMES) else 'at'} {left} and {right}?"
        rows.append({"question": question, "answer": answer if i % 2 else str(total)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def start(base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stepwise")
    problems = write_problems(folder / "two.jsonl")

    def run(*overrides: str):
        settings = [
            f"model.name={base_dir}",
            f"data.train={problems}",
            "rounds=1",
            "pairs.stepwise=0.5",
            "dpo.gate=off",
        ]
        recipe = load_recipe(None, [*SETTINGS, *settings, "sft.epochs=24", "sampling.max_new_tokens=28", *overrides])
        events: list[dict] = []
        return recipe, folder / "run", execute(recipe, Run.create(folder / "run", recipe, (events.append,))), events

    return run


def test_a_step_controlled_run_from_problems_to_file(start, base_dir):
    recipe, path, outcome, events = start()
    assert outcome.solved is not None
    started = [event["stage"] for event in events if event["kind"] == "stage_started"]
    assert started == list(map(str, planned_stages(recipe)))
    rests = list(read_jsonl(path / "round-1/rests/rests.jsonl", Rest))
    pairs = list(read_jsonl(path / "round-1/pairs/pairs.jsonl", PreferencePair))
    stepwise = [pair for pair in pairs if pair.prefix_ids]
    assert rests
    assert stepwise
    assert 2 * len(stepwise) >= len(pairs)
    prompter = load_prompter(base_dir, ModelRecipe(prompt="plain"))
    wrong = {(rest.problem_id, rest.kept_ids, rest.token_ids) for rest in rests if is_usable(rest)}
    for pair in stepwise:
        assert prompter.text(pair.prefix_ids).endswith("\n")
        assert (pair.problem_id, pair.prefix_ids, pair.rejected_ids) in wrong
        assert prompter.text(pair.chosen_ids) == pair.chosen
        assert prompter.text(pair.rejected_ids) == pair.rejected
    (round_1,) = health.rounds(path)
    assert round_1.rests.num_rests == len(rests)
    assert round_1.pairs.num_stepwise == len(stepwise)
    again = start()[3]
    assert not [event for event in again if event["kind"] == "stage_started"]
