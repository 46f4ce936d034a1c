"""Rests: what comes after the first steps of a right rationale, sampled again until it is wrong (SCDPO, section 3.2).

All attempts at a cut read the same prompt, question and kept steps, which the engine computes once for a wave of them.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dpost_lite.problems.answers import is_right, predicted_answer
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import Problem, Rationale, Rest
from dpost_lite.problems.steps import is_usable
from dpost_lite.problems.tools import Tools
from dpost_lite.recipe import Recipe
from dpost_lite.sampling.engine import Engine
from dpost_lite.sampling.request import ATTEMPTS_PER_WAVE, Completion, Request
from dpost_lite.sampling.sampler import seed_of, share_gib, step_ids


@dataclass(frozen=True, slots=True)
class Cut:
    """A right rationale of a problem, and how many of its tokens are kept."""

    problem: Problem
    rationale: Rationale
    num_kept: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.problem.id, self.rationale.sample, self.num_kept

    @property
    def kept_ids(self) -> tuple[int, ...]:
        return self.rationale.token_ids[: self.num_kept]


def schedule(start: float, increase: float, highest: float) -> tuple[float, ...]:
    """Return the temperature of each step that is written: `increase` more each, up to `highest`."""
    temperatures = [start]
    while increase > 0 and temperatures[-1] < highest:
        temperatures.append(min(highest, round(start + increase * len(temperatures), 6)))
    return tuple(temperatures)


def sample_rests(
    model: Any, prompter: Prompter, cuts: Sequence[Cut], recipe: Recipe, *, purpose: str, done: Iterable[Rest] = ()
) -> Iterator[Rest]:
    """Yield rests of each cut, as they end, until one is usable as rejected or `rests.max_tries` were drawn.

    What is in `done` is not drawn again; in float32 the result is the same as without an interruption. Seeds are per
    (purpose, problem, rationale, cut, attempt).
    """
    if not cuts:
        return
    settings, sampling = recipe.rests, recipe.sampling
    drawn: dict[tuple[str, int, int], list[Rest]] = defaultdict(list)
    for rest in done:
        drawn[rest.cut].append(rest)
    tools = Tools.from_recipe(recipe)
    with tools.writer(prompter.token_text(), prompter.encode_text, prompter.text, prompter.notation) as writer:
        engine = Engine(
            model,
            writer=writer,
            max_rows=sampling.max_rows,
            memory_gib=sampling.memory_gib or share_gib(model.device),
            step_ids=step_ids(prompter, tools),
        )
        for start in range(0, settings.max_tries, ATTEMPTS_PER_WAVE):
            requests = [
                Request(
                    key=cut,
                    prompt_ids=prompter.prompt_ids(cut.problem.question),
                    prefix_ids=cut.kept_ids,
                    stop_ids=frozenset({prompter.stop_id}),
                    num_samples=min(start + ATTEMPTS_PER_WAVE, settings.max_tries),
                    done=frozenset((*range(start), *(rest.attempt for rest in drawn[cut.key]))),
                    temperature=schedule(settings.temperature, settings.temperature_increase, settings.max_temperature),
                    max_new_tokens=max(
                        1, sampling.max_new_tokens - cut.num_kept
                    ),  # of the whole rationale, as elsewhere
                    seed=seed_of(recipe.seed, purpose, *cut.key),
                )
                for cut in cuts
                if not any(is_usable(rest) for rest in drawn[cut.key] if rest.attempt < start)
            ]
            requests = [request for request in requests if request.indices]
            requests.sort(key=lambda request: len(request.read_ids), reverse=True)
            for finished in engine.run(requests):
                rest = _graded(finished, prompter)
                drawn[finished.key.key].append(rest)
                yield rest


def _graded(finished: Completion, prompter: Prompter) -> Rest:
    cut: Cut = finished.key
    right_ids = cut.rationale.token_ids[cut.num_kept :]
    text = prompter.text(finished.token_ids)
    predicted = predicted_answer(text, cut.problem.answer)
    return Rest(
        problem_id=cut.problem.id,
        sample=cut.rationale.sample,
        attempt=finished.index,
        kept=prompter.text(cut.kept_ids),
        right=prompter.text(right_ids),
        text=text,
        kept_ids=cut.kept_ids,
        right_ids=right_ids,
        token_ids=tuple(finished.token_ids),
        end=finished.end,
        predicted=predicted,
        correct=is_right(predicted, finished.end, cut.problem.answer),
    )
