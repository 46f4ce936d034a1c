"""Score a run's policies, or any model, adapter or GGUF file, on unseen problems (`dpost-lite eval`).

A run is scored with its own settings: base, precision, prompt template, token limit and, by default, test problems. A
model is scored unquantised, an adapter on its 16-bit base, a GGUF file through the solver; prompt template, calculator
and grader are the same for all. Every answer is saved.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dpost_lite.errors import RunError
from dpost_lite.evaluation.targets import Target
from dpost_lite.models import adapters, hub
from dpost_lite.models.loading import load_prompter
from dpost_lite.problems.answers import is_right, predicted_answer
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.comparing import score_samples
from dpost_lite.problems.records import (
    GradedAnswer,
    Problem,
    Rationale,
    SampledScore,
    Score,
    file_name,
    read_jsonl,
    write_jsonl,
)
from dpost_lite.problems.scoring import score
from dpost_lite.problems.tools import Tools
from dpost_lite.recipe import Recipe
from dpost_lite.runs.folder import Listener
from dpost_lite.sampling.sampler import sample_by_recipe, seed_of


@dataclass(frozen=True, slots=True)
class Sampling:
    """Samples per problem to draw in addition to the greedy answer."""

    num_samples: int
    temperature: float


def evaluate(
    target: Target,
    problems: Sequence[Problem],
    *,
    calculator: Sequence[bool],
    runs_code: bool = False,
    out: Path,
    sampling: Sampling | None = None,
    listener: Listener,
) -> Iterator[Score | SampledScore]:
    """Yield a Score of greedy answers for each policy and each calculator setting in `calculator`.

    Solutions with code (`solutions=code`) have one setting instead: their code is run only with `runs_code`.
    With `sampling`, each is followed by a SampledScore. Answers are saved in `out` as NAME/answers.jsonl and
    NAME/samples.jsonl (NAME-off without calculator). `listener` receives events as of a run (runs/journal.py), one
    stage per score. Raises RunError if `out` cannot be written, ModelError if a model cannot be loaded.
    """
    for name, policy in target.policies.items():
        with _answering(target, policy) as answer:
            for tools, mode, suffix in _modes(target.recipe, calculator, runs_code=runs_code):
                used = {
                    "has_calculator": tools.calculator is not None,
                    "has_code": bool(tools.code) and tools.runs_code,
                }
                folder = out / (file_name(name) + suffix)
                stage = f"{name}, {mode}"
                answers = _collect(stage, answer(tools, problems, 1, 0.0), len(problems), listener)
                _save(folder / "answers.jsonl", answers, problems)
                yield score(name, answers, problems, **used)
                if sampling is not None:
                    number = sampling.num_samples
                    rationales = answer(tools, problems, number, sampling.temperature)
                    samples = _collect(f"{stage}, {number} samples", rationales, number * len(problems), listener)
                    _save(folder / "samples.jsonl", samples, problems)
                    yield score_samples(name, samples, problems, **used)
        del answer  # frees the model before the next one is loaded
        gc.collect()


Answer = Callable[[Tools, Sequence[Problem], int, float], Iterator[Rationale]]


def _modes(recipe: Recipe, calculator: Sequence[bool], *, runs_code: bool) -> Iterator[tuple[Tools, str, str]]:
    """Yield the ways to answer: tools, what they are called, and the end of a folder's name."""
    if recipe.solutions == "code":
        tools = replace(Tools.from_recipe(recipe), runs_code=runs_code)
        yield tools, "code" if runs_code else "code not run", "" if runs_code else "-off"
        return
    for is_on in calculator:
        settings = recipe.calculator.model_copy(update={"enabled": is_on})
        tools = Tools(Calculator.from_recipe(settings))
        yield tools, f"calculator {'on' if is_on else 'off'}", "" if is_on else "-off"


@contextmanager
def _answering(target: Target, policy: Path | None) -> Iterator[Answer]:
    """Load a policy; the context is `answer(tools, problems, num_samples, temperature)`, which yields rationales."""
    recipe = target.recipe
    if policy is not None and policy.suffix == ".gguf":
        yield partial(_solve, policy, recipe)
        return
    model_dir = hub.find(recipe.model.name)
    prompter = load_prompter(model_dir, recipe.model)
    model = adapters.load_policy(model_dir, policy, recipe)

    def answer(tools: Tools, problems: Sequence[Problem], num_samples: int, temperature: float) -> Iterator[Rationale]:
        return sample_by_recipe(
            model, prompter, problems, recipe, purpose="eval", num_samples=num_samples, temperature=temperature,
            tools=tools,
        )  # fmt: skip

    yield answer


def _solve(
    file: Path, recipe: Recipe, tools: Tools, problems: Sequence[Problem], num_samples: int, temperature: float
) -> Iterator[Rationale]:
    """Answer with a GGUF file; the rationales have no token ids or log-probabilities.

    One problem at a time: beside others, a greedy answer may differ (local/engine.py), and a score would depend on how
    many are computed side by side.
    """
    from dpost_lite.local.solver_process import SolverProcess

    with SolverProcess(file, tools=tools, max_new_tokens=recipe.sampling.max_new_tokens) as solver:
        for problem in problems:
            for sample in range(num_samples):
                seed = seed_of(recipe.seed, "eval", problem.id, sample)
                solved = solver.solve(problem.question, temperature=temperature, seed=seed)
                predicted = predicted_answer(solved.text, problem.answer)
                yield Rationale(
                    problem_id=problem.id, sample=sample, text=solved.text, token_ids=(), forced=(), logprob=0.0,
                    end="stop" if solved.end == "stop" else "limit", predicted=predicted,
                    correct=is_right(predicted, solved.end, problem.answer),
                    num_calculated=solved.num_calculated, num_refused=solved.num_refused,
                )  # fmt: skip


def _collect(stage: str, rationales: Iterator[Rationale], total: int, listener: Listener) -> list[Rationale]:
    """Return all rationales, reporting progress to `listener`."""
    listener({"kind": "stage_started", "stage": stage})
    started, done, num_right = time.monotonic(), [], 0
    for rationale in rationales:
        done.append(rationale)
        num_right += rationale.correct
        progress = {"done": len(done), "total": total, "unit": "answers"}
        listener({"kind": "progress", **progress, "metrics": {"right": num_right / len(done)}})
    metrics = {"right": num_right, "answers": len(done)}
    listener({"kind": "stage_finished", "stage": stage, "seconds": time.monotonic() - started, "metrics": metrics})
    return done


def _save(file: Path, rationales: Sequence[Rationale], problems: Sequence[Problem]) -> None:
    """Write graded answers in the order of the problems, each with its question and right answer."""
    by_id = {problem.id: (place, problem) for place, problem in enumerate(problems)}
    rows = [
        GradedAnswer(
            r.problem_id, r.sample, r.text, r.end, r.predicted, r.correct, r.num_calculated, r.num_refused,
            by_id[r.problem_id][1].question, by_id[r.problem_id][1].answer,
        )
        for r in sorted(rationales, key=lambda r: (by_id[r.problem_id][0], r.sample))
    ]  # fmt: skip
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(file, rows)
    except OSError as error:
        raise RunError(f"--out: {file} cannot be written ({error.strerror}); give another folder") from error


def new_folder(target: str, data: str | None) -> Path:
    """Return a folder below evals/ that does not exist yet, named after what is scored and on which data."""
    folder = Path("evals") / file_name(target) / file_name(Path(data or "test").stem)
    others = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return folder if not folder.exists() else next(other for other in others if not other.exists())


def saved_answers(path: Path) -> list[GradedAnswer]:
    """Return the answers saved in `path`: a file, a folder written by `eval`, or RUN/score/NAME.

    Raises RunError if there are none.
    """
    files = [path, path / "answers.jsonl", path / "test.jsonl"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        inside = sorted(str(found.parent) for found in path.glob("*/answers.jsonl"))
        remedy = f"give {' or '.join(inside)}" if inside else "give a folder written by eval, or RUN/score/NAME"
        raise RunError(f"--compare: {path} contains no answers itself; {remedy}")
    try:
        return list(read_jsonl(file, GradedAnswer))
    except (ValueError, TypeError) as error:
        raise RunError(f"--compare: {file} is not a file of answers; give one written by eval or run") from error
