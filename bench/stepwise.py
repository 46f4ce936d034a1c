"""Step-controlled pairs: how often is a hot rest wrong, and what does sharing the kept steps save?

    python bench/stepwise.py [--problems 160] [--out runs/bench-stepwise] [--save FILE.json] [key=value …]
    python bench/stepwise.py --data-dir DIR [--adapter DIR] [--questions 64] …      # the speed on GSM8K as well

Warms the rehearsal's model up on built-in problems of two steps, draws rationales, and cuts the right ones behind the
first step. Prints the share of wrong, right and unusable rests by temperature; then rests per second for four rests a
cut, drawn as attempts at one prompt and as four prompts, in turn. With --data-dir the same two ways are also timed on
GSM8K's test questions with their gold solutions, cut behind a random step, by the base with an adapter in 16 bit. The
last line is one JSON object.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from publish import publish, result_of

from dpost_lite.pipeline.preflight import preflight
from dpost_lite.pipeline.prepare import PrepareData
from dpost_lite.pipeline.tasks import SampleRationales, TrainSft
from dpost_lite.pipeline.worker import Task, run_in_child
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.folder import UNFINISHED, read_json, write_json

BASE = [
    "synthetic.min_steps=2", "synthetic.max_steps=2", "synthetic.num_test=1", "data.num_labelled=96", "sft.epochs=4",
    "sampling.max_new_tokens=96",
]  # fmt: skip
TEMPERATURES = (0.7, 0.9, 1.1, 1.3, 1.5)
NUM_TRIES = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=160)
    parser.add_argument("--data-dir", type=Path, help="folder with gsm8k/test.jsonl")
    parser.add_argument("--adapter", type=Path, help="a LoRA adapter for the base, to answer GSM8K with")
    parser.add_argument("--questions", type=int, default=64, help="of GSM8K")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-stepwise"))
    parser.add_argument("--save", type=Path, help="also write the JSON object to this file")
    parser.add_argument("overrides", nargs="*", help="recipe keys, key=value")
    arguments = parser.parse_intermixed_args()
    recipe = load_recipe("rehearsal", [*BASE, f"synthetic.num_train={arguments.problems}", *arguments.overrides])
    arguments.out.mkdir(parents=True, exist_ok=True)
    model_dir = preflight(recipe, arguments.out)
    data = work(arguments.out / "data", PrepareData(recipe, model_dir))
    sft = work(arguments.out / "sft", TrainSft(recipe, model_dir, data, recipe.sft.micro_batch_size, "plain"))
    drawing = SampleRationales(recipe, model_dir, data, sft, None, purpose="pairs", num_samples=NUM_TRIES)
    samples = work(arguments.out / "samples", drawing)
    measured = work(arguments.out / "rests", MeasureRests(recipe, model_dir, data, sft, samples))
    found = read_json(measured / "metrics.json")
    print(f"{found['cuts']} right rationales were cut behind their first step; {NUM_TRIES} rests each")
    print(f"{'temperature':>12}{'wrong':>8}{'right':>8}{'unfinished or repetitive':>26}")
    for row in found["by_temperature"]:
        print(f"{row['temperature']:>12}{row['wrong']:>8.1%}{row['right']:>8.1%}{row['unusable']:>26.1%}")
    print_speed("built-in problems", found)
    if arguments.data_dir:
        timed = work(
            arguments.out / "gsm8k",
            TimeOnGsm8k(recipe, model_dir, arguments.data_dir, arguments.adapter, arguments.questions),
        )
        found["gsm8k"] = read_json(timed / "metrics.json")
        print_speed("GSM8K", found["gsm8k"])
    publish(result_of("stepwise", **found), arguments.save)


def print_speed(name: str, found: dict[str, Any]) -> None:
    """Print the rests per second of both ways."""
    shared, apart = found["rests_per_s_shared"], found["rests_per_s_apart"]
    print(
        f"{name}: {shared:.1f} rests per second with one prompt for {NUM_TRIES} rests, {apart:.1f} with a prompt for "
        f"each: {shared / apart:.2f} times"
    )


def work(out: Path, task: Task) -> Path:
    """Return the folder of a task's work, done now or before; its metrics are in metrics.json."""
    if not (out / "metrics.json").exists():
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
        done = run_in_child(task, out, log=out / "log.txt", progress=lambda *_, **__: None)
        write_json(out / "metrics.json", done.metrics)
    return out


@dataclass(frozen=True)
class MeasureRests:
    """Draws rests at each temperature, and times both ways of asking for them."""

    recipe: Recipe
    model_dir: Path
    data: Path
    policy: Path
    samples: Path

    def run(self, out: Path, progress: Any) -> dict[str, Any]:
        from dpost_lite.models import adapters
        from dpost_lite.models.loading import load_prompter
        from dpost_lite.pipeline.rests import SampleRests
        from dpost_lite.problems.steps import is_usable
        from dpost_lite.sampling import rests

        prompter = load_prompter(self.model_dir, self.recipe.model)
        recipe = self.recipe.model_copy(update={"rests": self.recipe.rests.model_copy(update={"max_tries": NUM_TRIES})})
        task = SampleRests(
            recipe, self.model_dir, self.data, self.policy, None, samples_dir=self.samples, purpose="bench"
        )
        cuts = task.cuts(prompter)
        model = adapters.load_policy(self.model_dir, self.policy, recipe)
        rests.ATTEMPTS_PER_WAVE = NUM_TRIES  # all attempts at once
        rows = []
        for temperature in TEMPERATURES:
            settings = {"temperature": temperature, "temperature_increase": 0.0, "max_temperature": temperature}
            at = recipe.model_copy(update={"rests": recipe.rests.model_copy(update=settings)})
            found = list(rests.sample_rests(model, prompter, cuts, at, purpose="bench"))
            number = max(1, len(found))
            wrong, right = sum(map(is_usable, found)) / number, sum(rest.correct for rest in found) / number
            rows.append({"temperature": temperature, "wrong": wrong, "right": right, "unusable": 1 - wrong - right})
        return {"cuts": len(cuts), "by_temperature": rows, **speeds(model, prompter, cuts, recipe)}


@dataclass(frozen=True)
class TimeOnGsm8k:
    """Times both ways of asking for rests of GSM8K's gold solutions."""

    recipe: Recipe
    model_dir: Path
    data_dir: Path
    adapter: Path | None
    questions: int

    def run(self, out: Path, progress: Any) -> dict[str, Any]:
        from dpost_lite.models import adapters
        from dpost_lite.models.loading import load_tokenizer
        from dpost_lite.problems.datasets import load
        from dpost_lite.problems.prompts import Prompter
        from dpost_lite.problems.records import Rationale
        from dpost_lite.problems.steps import choose_cuts, step_ends
        from dpost_lite.sampling import rests

        prompter = Prompter(load_tokenizer(self.model_dir))
        text_of = prompter.token_text()
        cuts = []
        for problem in load("gsm8k", split="test", data_dir=self.data_dir).problems:
            ids = prompter.answer_ids(problem.rationale or "")
            gold = Rationale(
                problem.id, 0, problem.rationale or "", ids, (0,) * len(ids), 0.0, "stop", problem.answer, True
            )
            cuts += [rests.Cut(problem, gold, end) for end in choose_cuts(step_ends(ids, text_of), "random", len(cuts))]
        cuts = cuts[: self.questions]
        recipe = self.recipe.model_copy(
            update={
                "sampling": self.recipe.sampling.model_copy(update={"max_new_tokens": 300, "max_rows": 256}),
                "rests": self.recipe.rests.model_copy(update={"max_tries": NUM_TRIES}),
            }
        )
        model = adapters.load_merged(
            self.model_dir, self.adapter, self.recipe.model.model_copy(update={"precision": "16bit"})
        )
        rests.ATTEMPTS_PER_WAVE = NUM_TRIES
        prompts = [len(prompter.prompt_ids(cut.problem.question)) + cut.num_kept for cut in cuts]
        mean_prompt = sum(prompts) / len(prompts)
        return {"cuts": len(cuts), "prompt_tokens": mean_prompt, **speeds(model, prompter, cuts, recipe)}


def speeds(model: Any, prompter: Any, cuts: list[Any], recipe: Recipe) -> dict[str, float]:
    """Return rests per second, with one prompt for all attempts at a cut and with a prompt for each, in turn."""
    from dpost_lite.sampling import rests

    once = recipe.model_copy(update={"rests": recipe.rests.model_copy(update={"max_tries": 1})})
    apart = [  # every attempt is a prompt of its own, with a seed of its own
        replace(cut, rationale=replace(cut.rationale, sample=cut.rationale.sample + 100 * attempt))
        for cut in cuts
        for attempt in range(NUM_TRIES)
    ]
    found: dict[str, list[float]] = {"shared": [], "apart": []}
    tokens = []
    for name in ("shared", "apart", "apart", "shared"):
        asked, one = (cuts, recipe) if name == "shared" else (apart, once)
        started = time.perf_counter()
        drawn = list(rests.sample_rests(model, prompter, asked, one, purpose="bench"))
        found[name].append(len(drawn) / (time.perf_counter() - started))
        tokens += [len(rest.token_ids) for rest in drawn]
    rates = {f"rests_per_s_{name}": sum(values) / len(values) for name, values in found.items()}
    return {**rates, "tokens_per_rest": sum(tokens) / len(tokens)}


if __name__ == "__main__":
    main()
