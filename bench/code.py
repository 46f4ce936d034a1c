"""Solutions with code: what does the sandbox cost, and do they solve more than plain solutions?

    python bench/code.py CODE_RUN [--beside TEXT_RUN] [--rows 200] [--repeats 3] [--save FILE.json]
    python bench/code.py --programs --data-dir DIR     # how many rationales become programs

CODE_RUN is a finished run with `solutions=code`, TEXT_RUN one with the same problems and `solutions=text`. Prints the
time of a small block in each sandbox that works here; then how fast the warm-up of CODE_RUN samples with so many rows,
with a sandbox and with the same outputs at hand at once; then pairs and strict accuracy of both runs, compared problem
by problem. The last line is one JSON object.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

from publish import publish, result_of

from dpost_lite.errors import SandboxError
from dpost_lite.problems import datasets, tools
from dpost_lite.problems.code_data import summary, with_code
from dpost_lite.problems.comparing import compare
from dpost_lite.problems.records import Problem, read_jsonl
from dpost_lite.problems.synthetic import generate
from dpost_lite.recipe import CodeRecipe
from dpost_lite.report import health, results
from dpost_lite.report.summary import method_difference
from dpost_lite.runs.folder import Run
from dpost_lite.runs.stage_names import WARM_UP
from dpost_lite.sandbox.base import Limits, Ran, Sandbox
from dpost_lite.sandbox.choose import sandbox

BLOCK = "clips = 48/2\nprint(48+clips)\n"
NUM_BLOCKS = 200


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="CODE_RUN", nargs="?")
    parser.add_argument("--programs", action="store_true", help="only count programs made of rationales")
    parser.add_argument("--data-dir", type=Path, help="folder with gsm8k/train.jsonl")
    parser.add_argument("--beside", type=Path, metavar="TEXT_RUN")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", type=Path, help="also write the JSON object to this file")
    arguments = parser.parse_args()
    if arguments.programs:
        publish(result_of("code", programs=programs(arguments.data_dir)), arguments.save)
        return
    if arguments.run is None:
        parser.error("give CODE_RUN, or --programs")
    found: dict[str, Any] = {"round_trip": round_trips()}
    found["sampling"] = sampling_speed(arguments.run, arguments.rows, arguments.repeats)
    if arguments.beside:
        found["runs"] = compared(arguments.run, arguments.beside)
    publish(result_of("code", **found), arguments.save)


def programs(data_dir: Path | None) -> dict[str, Any]:
    """Return and print how many rationales become programs that print what they should, and why others do not."""
    sets = {"built-in": generate(2000, seed=1)}
    if data_dir:
        sets["gsm8k"] = datasets.load("gsm8k", split="train", data_dir=data_dir).problems
    rows = {}
    for name, problems in sets.items():
        with sandbox("monty", Limits()) as box:
            _, reasons = with_code(problems, box, CodeRecipe())
        rows[name] = {"rationales": len(problems), "programs": len(problems) - reasons.total(), **reasons}
        print(f"{name}: {rows[name]['programs']} of {len(problems)}; {summary(reasons)}", flush=True)
    return rows


def round_trips() -> list[dict[str, Any]]:
    """Return and print the time of a small block, one after the other and many at once, for each sandbox."""
    rows = []
    for name in ("monty", "sandlock", "bubblewrap"):
        try:
            with sandbox(name, Limits()) as box:
                box.run((), BLOCK).result()
                alone = [_seconds(box, 1) for _ in range(20 if name != "monty" else NUM_BLOCKS)]
                row = {
                    "sandbox": name,
                    "ms": 1000 * median(alone),
                    "blocks_per_s": NUM_BLOCKS / _seconds(box, NUM_BLOCKS),
                }
        except SandboxError as error:
            print(f"{name}: {error}")
            continue
        print(f"{name}: a small block in {row['ms']:.2f} ms, {row['blocks_per_s']:.0f} blocks/s", flush=True)
        rows.append(row)
    return rows


def _seconds(box: Sandbox, num_blocks: int) -> float:
    started = time.perf_counter()
    for future in [box.run((), BLOCK) for _ in range(num_blocks)]:
        future.result()
    return time.perf_counter() - started


class Remembering:
    """A sandbox that runs each call once, and then has its result at hand."""

    def __init__(self, inner: Sandbox) -> None:
        self.inner, self.limits = inner, inner.limits
        self.known: dict[tuple[tuple[str, ...], str], Ran] = {}
        self.num_calls = 0

    def run(self, earlier: Sequence[str], code: str) -> Future[Ran]:
        key = tuple(earlier), code
        self.num_calls += 1
        if key not in self.known:
            self.known[key] = self.inner.run(earlier, code).result()
        future: Future[Ran] = Future()
        future.set_result(self.known[key])
        return future

    def close(self) -> None:
        self.inner.close()


def sampling_speed(run: Path, num_rows: int, repeats: int) -> dict[str, Any]:
    """Return and print the tokens per second with the sandbox and with outputs at hand, in turn."""
    from dpost_lite.models import adapters, hub
    from dpost_lite.models.loading import load_prompter
    from dpost_lite.sampling.sampler import sample_by_recipe

    recipe = Run.open(run).recipe
    recipe = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"max_rows": num_rows})})
    problems = list(read_jsonl(run / "data/test.jsonl", Problem))[:num_rows]
    model_dir = hub.find(recipe.model.name)
    model, prompter = adapters.load_policy(model_dir, run / "sft-0", recipe), load_prompter(model_dir, recipe.model)

    def timed() -> tuple[float, int]:
        started = time.perf_counter()
        drawn = list(sample_by_recipe(model, prompter, problems, recipe, purpose="bench", temperature=0.7))
        return time.perf_counter() - started, sum(len(rationale.token_ids) for rationale in drawn)

    rates: dict[str, list[float]] = {"sandbox": [], "at hand": []}
    num_blocks = 0
    with sandbox(recipe.code.sandbox, recipe.code.limits) as inner:
        remembering, opened = Remembering(inner), tools.sandbox

        @contextmanager
        def at_hand(*_: Any) -> Iterator[Sandbox]:
            yield remembering

        for repeat in range(-1, repeats):  # the first fills the memory
            for name, opens in (("at hand", at_hand), ("sandbox", opened)):
                tools.sandbox = opens
                remembering.num_calls = 0
                seconds, num_tokens = timed()
                if repeat >= 0:
                    rates[name].append(num_tokens / seconds)
                if name == "at hand":
                    num_blocks = remembering.num_calls
    with_sandbox, without = (median(rates[name]) for name in ("sandbox", "at hand"))
    print(
        f"{len(problems)} rows, {num_blocks} blocks: {with_sandbox:.0f} tokens/s with the sandbox, {without:.0f} with "
        f"outputs at hand: {with_sandbox / without - 1:+.1%}",
        flush=True,
    )
    return {"rows": len(problems), "blocks": num_blocks, "tokens_per_s": rates}


def compared(code: Path, text: Path) -> dict[str, Any]:
    """Return and print the pairs and accuracies of two runs, and their difference for warm-up and last round."""
    rows: dict[str, Any] = {}
    for policy in (WARM_UP, "round-1"):
        right = {name: results.right(run, policy) for name, run in (("code", code), ("text", text))}
        difference = compare(right["text"], right["code"])
        rows[policy] = {
            "code": mean(right["code"].values()),
            "text": mean(right["text"].values()),
            **asdict(difference),
        }
        for key in ("only_a", "only_b"):
            rows[policy].pop(key)
        print(f"{policy}: code {rows[policy]['code']:.1%}, text {rows[policy]['text']:.1%}")
        print(method_difference("text", "code", [difference]))
    for name, run in (("code", code), ("text", text)):
        pairs = health.rounds(run)[0].pairs
        rows[f"{name}_pairs"] = pairs.num_pairs if pairs else 0
        print(f"{name}: {rows[f'{name}_pairs']} pairs")
    return rows


if __name__ == "__main__":
    main()
