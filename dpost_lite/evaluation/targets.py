"""Find what to score (a run's policies, a model, an adapter or a GGUF file), and on which problems."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError, RunError, nearest
from dpost_lite.local.solver import recipe_of_file
from dpost_lite.methods import METHODS
from dpost_lite.problems import datasets
from dpost_lite.problems.corpus import SYNTHETIC, load_corpus
from dpost_lite.problems.records import Problem, read_jsonl
from dpost_lite.recipe import DataRecipe, Recipe, with_format
from dpost_lite.runs.folder import FORMAT_FILE, Run, read_json
from dpost_lite.runs.stage_names import BASE, Kind, StageName, policy_name, rounds_in

DEV = "dev"  # the run's own problems that were held out of training to choose the best round


@dataclass(frozen=True, slots=True)
class Target:
    """What to score: a recipe with the settings, and policies by name: a folder, a GGUF file, or None for the base."""

    recipe: Recipe
    policies: dict[str, Path | None]
    run: Run | None = None


def find_target(name: str, policy: str | None = None, *, base: str | None = None) -> Target:
    """Return the run in folder `name`, or else the GGUF file, adapter or model of that name.

    `policy` selects one policy of a run; `base` overrides the base model named by an adapter.

    Raises RunError if the run has no such policy, or `policy` or `base` does not apply; ModelError if an adapter names
    no base. Models are located later, when they are scored.
    """
    from dpost_lite.models import adapters  # which imports PyTorch

    path = Path(name)
    if base is not None and not adapters.is_adapter(path):
        raise RunError(f"--model: {name} is not an adapter (no adapter_config.json); leave out --model")
    if (path / "run.json").is_file():
        run = Run.open(path)
        policies = policies_of(run) if policy is None else {policy: policy_dir(run, policy)}
        return Target(run.recipe, policies, run)
    if policy is not None:
        raise RunError(f"--policy: {name} is not a run folder (no run.json); leave out --policy to score a model")
    if path.suffix == ".gguf":
        return Target(recipe_of_file(path), {path.name: path})
    is_adapter = adapters.is_adapter(path)
    note = _note_of(path)
    recipe = with_format(note)
    model = {
        "name": (base or adapters.base_of(path)) if is_adapter else name,
        "precision": "4bit" if is_adapter and note.get("precision") == "4bit" else "16bit",
    }
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})
    return Target(recipe, {path.resolve().name: path} if is_adapter else {name: None})


def file_to_solve_with(source: str) -> tuple[Path, Recipe]:
    """Return the GGUF file `source`, or that of the finished run in folder `source`, and the recipe of its solutions.

    Raises RunError if the run has no exported model, ExportError if the file is damaged.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return path, recipe_of_file(path)
    run = Run.open(path)
    return path / "export" / finished_export(run)["file"], run.recipe


def _note_of(path: Path) -> dict[str, Any]:
    """Return what a run has noted beside a policy (`FORMAT_FILE`). Raises RunError if it cannot be read."""
    note = path / FORMAT_FILE
    try:
        return dict(read_json(note)) if note.is_file() else {}
    except (ValueError, TypeError) as error:
        raise RunError(f"{note} is damaged ({error}); copy the folder again, or delete the file for text") from error


def describe_target(target: Target) -> str:
    """Return a short description of what is scored, and how it is decoded."""
    recipe, policies = target.recipe, [policy for policy in target.policies.values() if policy is not None]
    training = {"4bit": "LoRA on a 4-bit base", "16bit": "LoRA on a 16-bit base", "full": "all weights trained"}
    if target.run is not None:
        what = f"{recipe.model.name}, {training[recipe.model.precision]}"
    elif policies and policies[0].suffix == ".gguf":
        what = policies[0].name
    else:
        what = f"{recipe.model.name}{' with a LoRA adapter' if policies else ''}"
    return f"{what}, greedy, at most {recipe.sampling.max_new_tokens} tokens"


def policies_of(run: Run) -> dict[str, Path | None]:
    """Return a run's base and finished policies by name, in order: base, sft-0, round-1, round-2 …

    They are SFT policies; of a method without rounds, round-1 is the DPO policy.
    """
    last: Kind = "sft" if METHODS[run.recipe.method].has_rounds else "dpo"
    stages = [StageName("sft"), *(StageName(last, i) for i in rounds_in(run.path))]
    trained = {policy_name(stage.round): run.path / str(stage) for stage in stages}
    return {BASE: None, **{name: folder for name, folder in trained.items() if _is_policy(folder)}}


def policy_dir(run: Run, name: str) -> Path | None:
    """Return the folder of one policy, given a name from `policies_of` or a stage such as round-1/dpo (None: the base).

    Raises RunError if the run has no such policy.
    """
    known = policies_of(run)
    if name in known:
        return known[name]
    stage = run.path / name
    if _is_policy(stage):
        return stage
    near = nearest(name, list(known))
    raise RunError(f"--policy: {run.path} has no policy {name}{near}; known: {', '.join(known)}")


def finished_export(run: Run) -> dict[str, Any]:
    """Return the metrics of a run's export stage: `policy`, and `file` in RUN/export. Raises RunError if not done."""
    done = run.path / "export" / "done.json"
    if not done.is_file():
        raise RunError(f"{run.path} has no exported model yet; run its `dpost-lite run` command again to finish it")
    return read_json(done)["metrics"]


def problems_for(target: Target, data: str | None, *, data_dir: Path | None, limit: int | None) -> list[Problem]:
    """Return the problems to score on: those named by `data` (`dev`: the run's own), or else the run's test problems.

    Raises DataError if there are none, or if the run was trained on any of them.
    """
    if data is None:
        if target.run is None:
            raise DataError("--data: a model has no test problems of its own; give gsm8k, synthetic, … or a file")
        return list(_recorded(target.run, "test"))[:limit]
    if data == DEV:
        problems = list(_recorded(target.run, DEV)) if target.run is not None else []
        if not problems:
            raise DataError(
                f"--data dev: {'the run' if target.run else 'a model'} has no dev problems; name another set"
            )
        return problems[:limit]
    recipe = target.recipe
    if data == SYNTHETIC:
        problems = load_corpus(DataRecipe(train=SYNTHETIC), recipe.synthetic, seed=recipe.seed).test
    else:
        problems = datasets.load(data, data_dir=data_dir or recipe.data.data_dir).problems
    if target.run is not None:
        train = list(_recorded(target.run, "train"))
        datasets.check_overlap(train, problems, train_name=f"of {target.run.path}", test_name=data)
    return problems[:limit]


def _recorded(run: Run, part: str) -> Iterator[Problem]:
    path = run.path / "data" / f"{part}.jsonl"
    if not path.is_file():
        raise RunError(f"{run.path} has no problems yet; run its `dpost-lite run` command again to resume")
    return read_jsonl(path, Problem)


def _is_policy(folder: Path) -> bool:
    from dpost_lite.models import adapters

    is_saved = adapters.is_adapter(folder) or (folder / "config.json").is_file()
    return is_saved and (folder / "done.json").is_file()
