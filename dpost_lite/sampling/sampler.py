"""The public face of the engine: problems in, graded rationales out.

Seeds are per (purpose, problem, sample), so a rationale depends on neither its neighbours nor the number of rows
(except for rounding, in 16 bits).
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dpost_lite.problems.answers import is_right, predicted_answer
from dpost_lite.problems.code_format import FENCE
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import Problem, Rationale
from dpost_lite.problems.tools import Tools
from dpost_lite.recipe import Recipe
from dpost_lite.sampling.engine import Engine
from dpost_lite.sampling.request import Completion, Request
from dpost_lite.system.machine import ram_share_gib


def sample(
    model: Any,
    prompter: Prompter,
    problems: Sequence[Problem],
    *,
    tools: Tools,
    purpose: str,
    num_samples: int = 1,
    temperature: float | tuple[float, ...] = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    max_new_tokens: int = 300,
    max_rows: int = 256,
    memory_gib: float | None = None,
    seed: int = 0,
    done: Iterable[Rationale] = (),
) -> Iterator[Rationale]:
    """Yield `num_samples` graded rationales for each problem, as they end, except for those in `done`.

    `purpose` names the stage that asks and is part of the seed; `temperature` 0 is greedy, a tuple gives one for each
    step of the rationale (`step_ids`), the last for all that follow. `memory_gib` bounds cache and logits; None takes a
    share of the machine's. A rationale is right when the answer it gives equals the problem's (problems/answers.py, as
    in DPO-ST, section 4.1); an unfinished one never is. Raises SandboxError if the tools need a sandbox that does not
    work, and what `Engine.step` raises.
    """
    drawn = defaultdict(set)
    for rationale in done:
        drawn[rationale.problem_id].add(rationale.sample)
    requests = [
        Request(
            key=problem,
            prompt_ids=prompter.prompt_ids(problem.question),
            stop_ids=frozenset({prompter.stop_id}),
            num_samples=num_samples,
            done=frozenset(drawn[problem.id]),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed_of(seed, purpose, problem.id),
        )
        for problem in problems
    ]
    requests.sort(key=lambda request: len(request.prompt_ids), reverse=True)  # the long ones do not trail alone
    with tools.writer(prompter.token_text(), prompter.encode_text, prompter.text, prompter.notation) as writer:
        engine = Engine(
            model,
            writer=writer,
            max_rows=max_rows,
            memory_gib=memory_gib or share_gib(model.device),
            step_ids=step_ids(prompter, tools) if isinstance(temperature, tuple) else frozenset(),
        )
        for finished in engine.run(requests):
            yield _grade(finished, prompter)


def sample_by_recipe(
    model: Any,
    prompter: Prompter,
    problems: Sequence[Problem],
    recipe: Recipe,
    *,
    purpose: str,
    num_samples: int = 1,
    temperature: float = 0.0,
    done: Iterable[Rationale] = (),
    tools: Tools | None = None,
) -> Iterator[Rationale]:
    """Call `sample` with what the recipe says, or with other `tools`; greedy unless a temperature is given."""
    sampling = recipe.sampling
    return sample(
        model,
        prompter,
        problems,
        tools=tools or Tools.from_recipe(recipe),
        purpose=purpose,
        num_samples=num_samples,
        temperature=temperature,
        top_k=sampling.top_k if temperature else None,
        top_p=sampling.top_p if temperature else 1.0,
        max_new_tokens=sampling.max_new_tokens,
        max_rows=sampling.max_rows,
        memory_gib=sampling.memory_gib,
        seed=recipe.seed,
        done=done,
    )


def step_ids(prompter: Prompter, tools: Tools) -> frozenset[int]:
    """Return the tokens after which a step ends: a line, or in solutions with code a block of text or code."""
    return prompter.step_ids(FENCE if tools.code else "\n")


def share_gib(device: Any) -> float:
    """Return how much memory sampling may take: a third of the RAM, or four fifths of what the model leaves of a GPU.

    It depends on the machine and not on what happens to be free, for the number of rows follows from it, and in 16 bits
    a product may round differently with its number of rows.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()  # so that what a merge leaves behind does not run the memory out
        total = torch.cuda.mem_get_info(device)[1] * torch.cuda.get_per_process_memory_fraction(device)
        return 0.8 * (total - torch.cuda.memory_allocated(device)) / 2**30
    return ram_share_gib()


def seed_of(*parts: object) -> int:
    """Return a 32-bit seed that depends on every part and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _grade(finished: Completion, prompter: Prompter) -> Rationale:
    problem: Problem = finished.key
    text = prompter.text(finished.token_ids)
    predicted = predicted_answer(text, problem.answer)
    return Rationale(
        problem_id=problem.id,
        sample=finished.index,
        text=text,
        token_ids=tuple(finished.token_ids),
        forced=tuple(map(int, finished.forced)),
        logprob=sum(finished.logprobs),
        end=finished.end,
        predicted=predicted,
        correct=is_right(predicted, finished.end, problem.answer),
        num_calculated=finished.num_calculated,
        num_refused=finished.num_refused,
    )
