"""How fast does a GGUF file answer, beside plain llama.cpp, and with several questions side by side?

    python bench/solver.py MODEL.gguf --data QUESTIONS.jsonl --out bench/results/solver.json

(a) One question at a time, greedy: the solver without and with the calculator, and llama-cpp-python's own `generate` on
the same prompts, in turns within each repetition. The solver without the calculator writes the same tokens as
`generate`, so their rates are compared. What the calculator inserts takes no steps of its own: that shows in tokens per
second (seconds per answer also depend on how long the answers get). (b) All questions with 1, 4, 8 and 16 rows.
Intervals: 95 %, by bootstrap over repetitions, of the ratios within one. Loading the model is not counted.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from publish import publish, result_of

from dpost_lite.local.engine import Engine
from dpost_lite.local.request import Request
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.tools import Tools

Timing = tuple[int, float]  # tokens, seconds


def timed(work: Callable[[], int]) -> Timing:
    """Run `work`, which returns a number of tokens."""
    started = time.perf_counter()
    num_tokens = work()
    return num_tokens, time.perf_counter() - started


def solve(engine: Engine, questions: list[str], *, uses_tools: bool = True) -> int:
    requests = [Request.of(question) for question in questions]
    if not uses_tools:
        requests = [Request(request.messages, uses_tools=False) for request in requests]
    return sum(solution.num_tokens for solution in engine.run(requests))


def generate(engine: Engine, question: str, max_new_tokens: int) -> int:
    """Answer with llama-cpp-python's own loop, greedily, in the engine's context; return the number of tokens."""
    import llama_cpp

    llm = engine.model.llm
    llm.reset()  # else it skips what it believes to be in the cache from its last prompt
    num_tokens = 0
    for token_id in llm.generate(engine.model.prompt_ids(Request.of(question)), temp=0.0, reset=True):
        num_tokens += 1
        if engine.model.is_stop(token_id) or num_tokens == max_new_tokens:
            break
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), False)  # the engine begins with an empty cache
    return num_tokens


def interval(values: list[float], generator: random.Random) -> list[float]:
    """Return the 95 % interval of the median, by bootstrap."""
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(2000))
    return [medians[50], medians[1949]]


def one_at_a_time(engine: Engine, questions: list[str], repeats: int, max_new_tokens: int) -> dict[str, Any]:
    """Compare the three ways to answer a question, in turns."""
    kinds: dict[str, Callable[[str], int]] = {
        "llama.cpp": lambda question: generate(engine, question, max_new_tokens),
        "solver": lambda question: solve(engine, [question], uses_tools=False),
        "solver with calculator": lambda question: solve(engine, [question]),
    }
    timings: dict[str, list[Timing]] = {kind: [] for kind in kinds}
    for repeat in range(repeats):
        order = list(kinds)[repeat % 3 :] + list(kinds)[: repeat % 3]
        for kind in order:
            timings[kind].append(timed(lambda kind=kind: sum(map(kinds[kind], questions))))
    rates = {kind: [tokens / seconds for tokens, seconds in timings[kind]] for kind in kinds}
    generator = random.Random(0)
    ratios = [a / b for a, b in zip(rates["solver"], rates["llama.cpp"], strict=True)]
    per_token = [a / b for a, b in zip(rates["solver with calculator"], rates["llama.cpp"], strict=True)]
    return {
        kind: {
            "tokens": timings[kind][0][0],
            "tokens_per_s": statistics.median(rates[kind]),
            "seconds_per_answer": statistics.median(seconds for _, seconds in timings[kind]) / len(questions),
        }
        for kind in kinds
    } | {
        "rate_of_llama_cpp": {"median": statistics.median(ratios), "interval": interval(ratios, generator)},
        "with_calculator": {"median": statistics.median(per_token), "interval": interval(per_token, generator)},
    }


def side_by_side(path: Path, questions: list[str], rows: list[int], max_new_tokens: int) -> list[dict[str, Any]]:
    """Answer all questions with different numbers of rows."""
    found = []
    for num_parallel in rows:
        engine = Engine(path, tools=Tools(Calculator()), num_parallel=num_parallel, max_new_tokens=max_new_tokens)
        num_tokens, seconds = timed(lambda engine=engine: solve(engine, questions))
        engine.close()
        found.append(
            {"rows": num_parallel, "tokens": num_tokens, "seconds": seconds, "tokens_per_s": num_tokens / seconds}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with a `question`")
    parser.add_argument("--questions", type=int, default=32, help="for the rows side by side")
    parser.add_argument("--alone", type=int, default=4, help="questions in each repetition of one at a time")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with options.data.open(encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file][: options.questions]
    engine = Engine(options.model, tools=Tools(Calculator()), max_new_tokens=options.max_new_tokens)
    solve(engine, questions[:1])  # the first one reads the weights from disk
    alone = one_at_a_time(engine, questions[: options.alone], options.repeats, options.max_new_tokens)
    engine.close()
    rows = side_by_side(options.model, questions, options.rows, options.max_new_tokens)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    publish(result_of("solver", one_at_a_time=alone, side_by_side=rows, load_average=load), options.out)


if __name__ == "__main__":
    main()
