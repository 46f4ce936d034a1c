"""Score a finished run's policies, or any model, on problems it has not seen: the verb `eval`.

A run is scored as it was trained: its base in its precision, its prompt template, its token limit, and by default its
own test problems. A model is scored as it is, unquantised.
"""

import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError, RunError, nearest
from dpost_lite.models import adapters, backends
from dpost_lite.policies import answers, prompter_of
from dpost_lite.problems import datasets
from dpost_lite.problems.corpus import SYNTHETIC, load_corpus
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import Problem, Score, read_jsonl
from dpost_lite.problems.scoring import score
from dpost_lite.recipe import DataRecipe, Recipe
from dpost_lite.rundir import Run, read_json

Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Target:
    """What is scored: a recipe that says how, and policies by name, each a folder (None: the base alone)."""

    recipe: Recipe
    policies: dict[str, Path | None]
    run: Run | None = None


def find_target(name: str, policy: str | None = None) -> Target:
    """Return the run in folder `name`, or else the model of that name; `policy` picks one policy of a run.

    Raises RunError for a policy that the run does not have. A model is looked for when it is scored.
    """
    if not (Path(name) / "run.json").is_file():
        if policy is not None:
            raise RunError(f"--policy: {name} is not a run folder (no run.json); leave --policy out to score a model")
        recipe = Recipe()
        model = recipe.model.model_copy(update={"name": name, "precision": "16bit"})
        return Target(recipe.model_copy(update={"model": model}), {name: None})
    run = Run.open(Path(name))
    policies = policies_of(run) if policy is None else {policy: policy_dir(run, policy)}
    return Target(run.recipe, policies, run)


def policies_of(run: Run) -> dict[str, Path | None]:
    """Return the base and the finished SFT policies of a run by name, in order: base, sft-0, round-1, round-2 …"""
    rounds = sorted(
        (int(number[1]), folder)
        for folder in run.path.glob("round-*")
        if (number := re.fullmatch(r"round-(\d+)", folder.name)) and _is_policy(folder / "sft")
    )
    first = {"sft-0": run.path / "sft-0"} if _is_policy(run.path / "sft-0") else {}
    return {"base": None, **first, **{folder.name: folder / "sft" for _, folder in rounds}}


def policy_dir(run: Run, name: str) -> Path | None:
    """Return the folder of one policy: a name of `policies_of`, or its stage, such as round-1/dpo.

    Raises RunError if the run has no such policy.
    """
    known = policies_of(run)
    if name in known:
        return known[name]
    stage = run.path / name
    if _is_policy(stage):
        return stage
    near = nearest(name, list(known))
    raise RunError(f"--policy: {run.path} holds no policy {name}{near}; known: {', '.join(known)}")


def finished_export(run: Run) -> dict[str, Any]:
    """Return what a run's export stage recorded: `policy`, and `file` in RUN/export. RunError if it is not done."""
    done = run.path / "export" / "done.json"
    if not done.is_file():
        raise RunError(f"{run.path} has no exported model yet; give its `dpost-lite run` command again to finish it")
    return read_json(done)["metrics"]


def problems_for(target: Target, data: str | None, *, data_dir: Path | None, limit: int | None) -> list[Problem]:
    """Return the problems to score on: those that `data` names, or else the run's own test problems.

    Raises DataError if there are none, or if a run was trained on one of them.
    """
    if data is None:
        if target.run is None:
            raise DataError("--data: a model has no problems of its own; name gsm8k, synthetic, another set or a file")
        return list(_recorded(target.run, "test"))[:limit]
    recipe = target.recipe
    if data == SYNTHETIC:
        problems = load_corpus(DataRecipe(train=SYNTHETIC), recipe.synthetic, seed=recipe.seed).test
    else:
        problems = datasets.load(data, data_dir=data_dir or recipe.data.data_dir).problems
    if target.run is not None:
        trained = list(_recorded(target.run, "train"))
        datasets.check_overlap(trained, problems, train_name=f"of {target.run.path}", test_name=data)
    return problems[:limit]


def evaluate(
    target: Target, problems: Sequence[Problem], *, calculator: Sequence[bool], listener: Listener
) -> Iterator[Score]:
    """Yield a score of greedy answers for each policy, with and without calculator as `calculator` lists.

    `listener` gets the events of a run (see rundir.py), a stage for each score.
    """
    recipe = target.recipe
    model_dir = backends.find(recipe.model.name)
    prompter = prompter_of(recipe, model_dir)
    for name, adapter_dir in target.policies.items():
        model = adapters.load_policy(model_dir, adapter_dir, recipe)
        for has_calculator in calculator:
            settings = recipe.calculator.model_copy(update={"enabled": has_calculator})
            asked = recipe.model_copy(update={"calculator": settings})
            yield _score(name, model, prompter, problems, asked, listener)
        del model
        gc.collect()


def _score(
    name: str, model: Any, prompter: Prompter, problems: Sequence[Problem], recipe: Recipe, listener: Listener
) -> Score:
    graded = []
    num_right = 0
    stage = f"{name}, calculator {'on' if recipe.calculator.enabled else 'off'}"
    listener({"kind": "stage_started", "stage": stage})
    started = time.monotonic()
    for answer in answers(model, prompter, problems, recipe, purpose="eval"):
        graded.append(answer)
        num_right += answer.correct
        progress = {"done": len(graded), "total": len(problems), "unit": "answers"}
        listener({"kind": "progress", **progress, "metrics": {"right": num_right / len(graded)}})
    result = score(name, graded, problems, has_calculator=recipe.calculator.enabled)
    metrics = {"strict": asdict(result)}
    listener({"kind": "stage_finished", "stage": stage, "seconds": time.monotonic() - started, "metrics": metrics})
    return result


def _recorded(run: Run, part: str) -> Iterator[Problem]:
    path = run.path / "data" / f"{part}.jsonl"
    if not path.is_file():
        raise RunError(f"{run.path} has not read its problems yet; give its `dpost-lite run` command again to go on")
    return read_jsonl(path, Problem)


def _is_policy(folder: Path) -> bool:
    is_saved = adapters.is_adapter(folder) or (folder / "config.json").is_file()
    return is_saved and (folder / "done.json").is_file()
