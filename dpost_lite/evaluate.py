"""Score a finished run's policies, or any model, adapter or GGUF file, on problems it has not seen: the verb `eval`.

A run is scored as it was trained: its base in its precision, its prompt template, its token limit, and by default its
own test problems. A model is scored as it is, unquantised, an adapter on its base in 16 bit, and a GGUF file through
the solver; prompt template, calculator and grader are the same for all. Every answer is kept.
"""

import gc
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError, RunError, nearest
from dpost_lite.models import adapters, backends
from dpost_lite.policies import answers, calculator_of, prompter_of
from dpost_lite.problems import datasets
from dpost_lite.problems.comparing import score_samples
from dpost_lite.problems.corpus import SYNTHETIC, load_corpus
from dpost_lite.problems.grading import is_right
from dpost_lite.problems.records import Answered, Problem, Rationale, SampledScore, Score, read_jsonl, write_jsonl
from dpost_lite.problems.scoring import score
from dpost_lite.recipe import DataRecipe, Recipe
from dpost_lite.rundir import Run, read_json
from dpost_lite.sampling.sampler import seed_of

Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Target:
    """What is scored: a recipe that says how, and policies by name, each a folder, a GGUF file, or None: the base."""

    recipe: Recipe
    policies: dict[str, Path | None]
    run: Run | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Samples to draw besides the greedy answer."""

    num_samples: int
    temperature: float


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
    target: Target,
    problems: Sequence[Problem],
    *,
    calculator: Sequence[bool],
    out: Path,
    sampling: Sampling | None = None,
    listener: Listener,
) -> Iterator[Score | SampledScore]:
    """Yield a score of greedy answers for each policy, with and without calculator as `calculator` lists.

    With `sampling`, the score of that many samples per problem follows each. All answers are kept in `out`, in
    NAME/answers.jsonl and NAME/samples.jsonl; NAME-off holds those without calculator. `listener` gets the events of a
    run (see rundir.py), a stage for each score.
    """
    for name, policy in target.policies.items():
        with _answering(target, policy) as answer:
            for has_calculator in calculator:
                settings = target.recipe.calculator.model_copy(update={"enabled": has_calculator})
                recipe = target.recipe.model_copy(update={"calculator": settings})
                folder = out / (file_name(name) + ("" if has_calculator else "-off"))
                stage = f"{name}, calculator {'on' if has_calculator else 'off'}"
                drawn = _listened(stage, answer(recipe, problems, 1, 0.0), len(problems), listener)
                _keep(folder / "answers.jsonl", drawn, problems)
                yield score(name, drawn, problems, has_calculator=has_calculator)
                if sampling is not None:
                    number = sampling.num_samples
                    rationales = answer(recipe, problems, number, sampling.temperature)
                    drawn = _listened(f"{stage}, {number} samples", rationales, number * len(problems), listener)
                    _keep(folder / "samples.jsonl", drawn, problems)
                    yield score_samples(name, drawn, problems, has_calculator=has_calculator)
        del answer  # and the model with it, before the next one is loaded
        gc.collect()


Answer = Callable[[Recipe, Sequence[Problem], int, float], Iterator[Rationale]]


@contextmanager
def _answering(target: Target, policy: Path | None) -> Iterator[Answer]:
    """Load a policy and hand out `answer(recipe, problems, num_samples, temperature)`, which yields rationales."""
    if policy is not None and policy.suffix == ".gguf":
        yield partial(_solve, policy)
        return
    model_dir = backends.find(target.recipe.model.name)
    prompter = prompter_of(target.recipe, model_dir)
    model = adapters.load_policy(model_dir, policy, target.recipe)

    def answer(
        recipe: Recipe, problems: Sequence[Problem], num_samples: int, temperature: float
    ) -> Iterator[Rationale]:
        return answers(
            model, prompter, problems, recipe, purpose="eval", num_samples=num_samples, temperature=temperature
        )

    yield answer


def _solve(
    file: Path, recipe: Recipe, problems: Sequence[Problem], num_samples: int, temperature: float
) -> Iterator[Rationale]:
    """Answer with a GGUF file, one at a time; tokens and log-probabilities, which the solver keeps, stay empty."""
    from dpost_lite.local.solver_process import SolverProcess

    with SolverProcess(file, calculator=calculator_of(recipe), max_new_tokens=recipe.sampling.max_new_tokens) as solver:
        for problem in problems:
            for sample in range(num_samples):
                seed = seed_of(recipe.seed, "eval", problem.id, sample)
                solved = solver.solve(problem.question, temperature=temperature, seed=seed)
                yield Rationale(
                    problem_id=problem.id, sample=sample, text=solved.text, token_ids=(), forced=(), logprob=0.0,
                    end=solved.end, predicted=solved.strict,
                    correct=is_right(solved.strict, solved.end, problem.answer),
                    num_calculated=solved.num_calculated, num_refused=solved.num_refused,
                )  # fmt: skip


def _listened(stage: str, drawn: Iterator[Rationale], total: int, listener: Listener) -> list[Rationale]:
    """Draw all rationales, telling `listener` how far it is."""
    listener({"kind": "stage_started", "stage": stage})
    started, done, num_right = time.monotonic(), [], 0
    for rationale in drawn:
        done.append(rationale)
        num_right += rationale.correct
        progress = {"done": len(done), "total": total, "unit": "answers"}
        listener({"kind": "progress", **progress, "metrics": {"right": num_right / len(done)}})
    metrics = {"right": num_right, "answers": len(done)}
    listener({"kind": "stage_finished", "stage": stage, "seconds": time.monotonic() - started, "metrics": metrics})
    return done


def _keep(file: Path, rationales: Sequence[Rationale], problems: Sequence[Problem]) -> None:
    """Write graded answers, each with its question and the right answer, in the order of the problems."""
    by_id = {problem.id: (place, problem) for place, problem in enumerate(problems)}
    rows = [
        Answered(
            r.problem_id, r.sample, r.text, r.end, r.predicted, r.correct, r.num_calculated, r.num_refused,
            by_id[r.problem_id][1].question, by_id[r.problem_id][1].answer,
        )
        for r in sorted(rationales, key=lambda r: (by_id[r.problem_id][0], r.sample))
    ]  # fmt: skip
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(file, rows)
    except OSError as error:
        raise RunError(f"--out: {file} cannot be written ({error.strerror}); name another folder") from error


def file_name(text: str) -> str:
    """Return `text` as the name of a file or folder, on any system."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "model"


def new_folder(target: str, data: str | None) -> Path:
    """Return a folder below evals/ that holds no answers yet, named after what is scored and on what."""
    folder = Path("evals") / file_name(target) / file_name(Path(data or "test").stem)
    others = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return folder if not folder.exists() else next(other for other in others if not other.exists())


def kept_answers(path: Path) -> list[Answered]:
    """Return the answers that were kept in `path`: a file, or a folder of an evaluation or of a run's score.

    Raises RunError if there are none.
    """
    files = [path, path / "answers.jsonl", path / "test.jsonl"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        inside = sorted(str(found.parent) for found in path.glob("*/answers.jsonl"))
        way_out = f"name {' or '.join(inside)}" if inside else "name one that eval wrote, or RUN/score/NAME"
        raise RunError(f"--compare: {path} itself holds no answers; {way_out}")
    try:
        return list(read_jsonl(file, Answered))
    except (ValueError, TypeError) as error:
        raise RunError(f"--compare: {file} is no file of answers ({error}); name one that eval or run wrote") from error


def _recorded(run: Run, part: str) -> Iterator[Problem]:
    path = run.path / "data" / f"{part}.jsonl"
    if not path.is_file():
        raise RunError(f"{run.path} has not read its problems yet; give its `dpost-lite run` command again to go on")
    return read_jsonl(path, Problem)


def _is_policy(folder: Path) -> bool:
    is_saved = adapters.is_adapter(folder) or (folder / "config.json").is_file()
    return is_saved and (folder / "done.json").is_file()
