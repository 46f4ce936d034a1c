"""Does a token's reward after DPO point at the error? AUROC against the place of an injected one.

    python bench/credit.py RUN [RUN …] [--data-dir DIR] [--problems 200] [--compute float32] [--save FILE.json]

RUN is a folder written by `dpost-lite run`; its last round with DPO is measured. The solutions are built-in ones of two
to four steps and, with --data-dir, those of GSM8K's test problems; in one step of each, the calculator's result becomes
another number of as many digits, and the later steps stay as they are. A score finds the error if it is lower in the
corrupted step than in the other steps of the same solution (1: always, 0.5: chance): token by token, by the mean of
each step, and by the tokens of the wrong result in `<<…>>`. Beside the reward, β (log π(token) - log π_ref(token)),
stand the log-probabilities under the SFT policy and under the DPO policy alone. All means are over solutions with 95 %
bootstrap intervals; differences are paired by solution. --intact is the control: no result is changed, and the scores
show what such a place is like without an error. In bfloat16 a small update would be rounded away where policies are
merged, hence --compute float32. The last line is one JSON object.
"""

import argparse
import gc
from dataclasses import asdict
from pathlib import Path
from typing import Any

from publish import publish, result_of

from dpost_lite.errors import RunError
from dpost_lite.evaluation.credit import (
    LEVELS,
    CorruptedSolution,
    corrupted,
    error_place,
    mean_auroc,
    mean_difference,
    solution_auroc,
)
from dpost_lite.evaluation.targets import policy_dir
from dpost_lite.models import adapters, hub
from dpost_lite.models.credit import token_logprobs, token_rewards
from dpost_lite.models.loading import load_prompter
from dpost_lite.problems import datasets
from dpost_lite.problems.synthetic import generate
from dpost_lite.recipe import Recipe
from dpost_lite.runs.folder import Run, read_json
from dpost_lite.runs.stage_names import StageName, rounds_in

SEED = 1
SCORES = {"reward": "reward", "sft": "log π of SFT", "dpo": "log π of DPO"}
Sets = dict[str, list[CorruptedSolution]]
Aurocs = dict[str, dict[str, dict[str, list[float]]]]
"""By set, level and score: an AUROC per solution."""


def main() -> None:
    """Measure, print a table for each run and the differences between runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data-dir", type=Path, help="with gsm8k/test.jsonl")
    parser.add_argument("--problems", type=int, default=200, help="of each set")
    parser.add_argument("--intact", action="store_true", help="the control: leave the result as it is")
    parser.add_argument("--compute", default="float32", choices=["float32", "bfloat16", "auto"])
    parser.add_argument("--save", type=Path, help="also write the JSON object to this file")
    arguments = parser.parse_args()
    own = generate(arguments.problems, seed=SEED, min_steps=2)
    sets = {"built-in": corrupted(own, arguments.problems, seed=SEED, intact=arguments.intact)}
    if arguments.data_dir:
        gsm8k = datasets.load("gsm8k", split="test", data_dir=arguments.data_dir).problems
        sets["gsm8k"] = corrupted(gsm8k, arguments.problems, seed=SEED, intact=arguments.intact)
    rows: dict[str, Any] = {}
    aurocs: dict[str, Aurocs] = {}
    reference: dict[tuple[str, str], list[list[float]]] = {}
    for path in arguments.runs:
        label = "/".join(path.resolve().parts[-2:])
        aurocs[label] = measured(path, sets, arguments.compute, reference)
        rows[label] = {name: {level: summary(aurocs[label][name][level]) for level in LEVELS} for name in sets}
        show(label, rows[label])
    differences = list(between_runs(aurocs))
    for one in differences:
        print(f"{one['b']} - {one['a']}, {one['set']}, {one['level']}: reward {as_text(one['difference'])}")
    sizes = {name: len(solutions) for name, solutions in sets.items()}
    publish(result_of("credit", solutions=sizes, runs=rows, differences=differences), arguments.save)


def measured(path: Path, sets: Sets, compute: str, reference: dict[tuple[str, str], list[list[float]]]) -> Aurocs:
    """Return a run's AUROCs. `reference` keeps what SFT policies gave: runs of one seed share theirs."""
    run = Run.open(path)
    dpo, sft, fingerprint = policies(run)
    recipe = run.recipe.model_copy(update={"model": run.recipe.model.model_copy(update={"compute_dtype": compute})})
    model_dir = hub.find(recipe.model.name)
    prompter = load_prompter(model_dir, recipe.model)
    text_of = prompter.token_text()
    found: Aurocs = {}
    answers = {
        name: [(prompter.prompt_ids(one.question), prompter.answer_ids(one.text)) for one in solutions]
        for name, solutions in sets.items()
    }
    if any((fingerprint, name) not in reference for name in sets):
        of_sft = logprobs_of(model_dir, sft, recipe, answers)
        reference.update({(fingerprint, name): values for name, values in of_sft.items()})
    of_dpo = logprobs_of(model_dir, dpo, recipe, answers)
    for name, solutions in sets.items():
        before, after = reference[fingerprint, name], of_dpo[name]
        scores = {"reward": token_rewards(after, before, recipe.dpo.beta), "sft": before, "dpo": after}
        places = [error_place(one, ids, text_of) for one, (_, ids) in zip(solutions, answers[name], strict=True)]
        found[name] = {
            level: {
                score: [solution_auroc(row, place, level) for row, place in zip(values, places, strict=True)]
                for score, values in scores.items()
            }
            for level in LEVELS
        }
    return found


def policies(run: Run) -> tuple[Path | None, Path | None, str]:
    """Return the folders of the last DPO policy and of the SFT policy it started from, and the latter's fingerprint."""
    for number in reversed(rounds_in(run.path)):
        stage = StageName("dpo", number)
        record = run.path / str(stage) / "done.json"
        if record.is_file():
            inputs = read_json(record)["inputs"]
            (sft,) = (name for name in inputs if name != str(stage.beside("pairs")))
            return policy_dir(run, str(stage)), policy_dir(run, sft), inputs[sft]
    raise RunError(f"{run.path} has no DPO policy (round-N/dpo); give a run of the method dpo-st")


def logprobs_of(model_dir: Path, policy: Path | None, recipe: Recipe, answers: dict[str, Any]) -> dict[str, Any]:
    """Return the token log-probabilities of each set under one policy, loaded for that and dropped again."""
    model = adapters.load_policy(model_dir, policy, recipe)
    found = {name: token_logprobs(model, some) for name, some in answers.items()}
    del model
    gc.collect()
    return found


def summary(by_score: dict[str, list[float]]) -> dict[str, Any]:
    """Return the mean AUROC of each score, and the reward's paired differences to the other two."""
    means = {score: asdict(mean_auroc(values)) for score, values in by_score.items()}
    more = {
        f"reward_minus_{other}": asdict(mean_difference(by_score["reward"], by_score[other]))
        for other in ("sft", "dpo")
    }
    return {**means, **more}


def between_runs(aurocs: dict[str, Aurocs]) -> list[dict[str, Any]]:
    """Return the paired differences of the reward's AUROC: each run minus the first."""
    first, *others = aurocs
    return [
        {
            "a": first, "b": other, "set": name, "level": level,
            "difference": asdict(mean_difference(aurocs[other][name][level]["reward"], by_level[level]["reward"])),
        }
        for other in others
        for name, by_level in aurocs[first].items()
        for level in LEVELS
    ]  # fmt: skip


def show(label: str, row: dict[str, Any]) -> None:
    """Print a run's means, a line for each set and level."""
    print(f"{label}: AUROC of a low score against the place of the error, mean and 95 % interval")
    print(f"{'':<18}" + "".join(f"{name:<25}" for name in [*SCORES.values(), "reward - log π of SFT"]))
    for name, by_level in row.items():
        for level, found in by_level.items():
            shown = [as_text(found[score]) for score in (*SCORES, "reward_minus_sft")]
            print(f"{name + ', ' + level:<18}" + "".join(f"{text:<25}" for text in shown), flush=True)


def as_text(found: dict[str, float]) -> str:
    """`0.512 (0.490 to 0.534)`."""
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


if __name__ == "__main__":
    main()
