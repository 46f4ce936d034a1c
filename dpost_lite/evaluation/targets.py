"""What can be scored (a run's policies, a model, an adapter, a GGUF file), and on which problems."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError, RunError, nearest
from dpost_lite.models import adapters
from dpost_lite.problems import datasets
from dpost_lite.problems.corpus import SYNTHETIC, load_corpus
from dpost_lite.problems.records import Problem, read_jsonl
from dpost_lite.recipe import DataRecipe, Recipe
from dpost_lite.runs.folder import Run, read_json
from dpost_lite.runs.stage_names import BASE, StageName, policy_name, rounds_in


@dataclass(frozen=True, slots=True)
class Target:
    """What is scored: a recipe that says how, and policies by name, each a folder, a GGUF file, or None: the base."""

    recipe: Recipe
    policies: dict[str, Path | None]
    run: Run | None = None


def find_target(name: str, policy: str | None = None, *, base: str | None = None) -> Target:
    """Return the run in folder `name`, or else the GGUF file, adapter or model.

    `policy` picks one policy of a run; `base` is the base of an adapter, where it is not the one that it names.

    Raises RunError for a policy that the run does not have, ModelError for an adapter that names no base. A model is
    looked for when it is scored.
    """
    path = Path(name)
    if base is not None and not adapters.is_adapter(path):
        raise RunError(f"--model names the base of an adapter, and {name} is none (no adapter_config.json)")
    if (path / "run.json").is_file():
        run = Run.open(path)
        policies = policies_of(run) if policy is None else {policy: policy_dir(run, policy)}
        return Target(run.recipe, policies, run)
    if policy is not None:
        raise RunError(f"--policy: {name} is not a run folder (no run.json); leave --policy out to score a model")
    if path.suffix == ".gguf":
        return Target(Recipe(), {path.name: path})
    is_adapter = adapters.is_adapter(path)
    model = {"name": (base or adapters.base_of(path)) if is_adapter else name, "precision": "16bit"}
    recipe = Recipe()
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})
    return Target(recipe, {path.name: path} if is_adapter else {name: None})


def describe(target: Target) -> str:
    """Say in a few words what is scored and how it answers."""
    recipe, policies = target.recipe, [policy for policy in target.policies.values() if policy is not None]
    trained = {"4bit": "trained as LoRA on 4 bits", "16bit": "trained as LoRA", "full": "all weights trained"}
    if target.run is not None:
        what = f"{recipe.model.name}, {trained[recipe.model.precision]}"
    elif policies and policies[0].suffix == ".gguf":
        what = policies[0].name
    else:
        what = f"{recipe.model.name}{' with a LoRA adapter' if policies else ''}"
    return f"{what}, greedy, at most {recipe.sampling.max_new_tokens} tokens"


def policies_of(run: Run) -> dict[str, Path | None]:
    """Return the base and the finished SFT policies of a run by name, in order: base, sft-0, round-1, round-2 …"""
    trained = {policy_name(i): run.path / str(StageName("sft", i)) for i in (0, *rounds_in(run.path))}
    return {BASE: None, **{name: folder for name, folder in trained.items() if _is_policy(folder)}}


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


def _recorded(run: Run, part: str) -> Iterator[Problem]:
    path = run.path / "data" / f"{part}.jsonl"
    if not path.is_file():
        raise RunError(f"{run.path} has not read its problems yet; give its `dpost-lite run` command again to go on")
    return read_jsonl(path, Problem)


def _is_policy(folder: Path) -> bool:
    is_saved = adapters.is_adapter(folder) or (folder / "config.json").is_file()
    return is_saved and (folder / "done.json").is_file()
