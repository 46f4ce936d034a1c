"""The tasks behind the stages that need a model: read the inputs' folders, do the work, write the stage's own folder.

Each runs in a process of its own (worker.py) and ends with it; only files stay.
"""

import gc
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpost_lite.models import adapters
from dpost_lite.models.backend import Backend
from dpost_lite.models.loading import load_prompter
from dpost_lite.models.training import Progress
from dpost_lite.pipeline.export import export_gguf
from dpost_lite.problems.dev_draws import compare_draws
from dpost_lite.problems.gate import compare_yields
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import (
    LabelledRationale,
    PreferencePair,
    Problem,
    Rationale,
    append_jsonl,
    read_jsonl,
    resume_jsonl,
    write_jsonl,
)
from dpost_lite.problems.scoring import score
from dpost_lite.problems.tools import Inserted, Tools
from dpost_lite.recipe import Recipe, solution_format
from dpost_lite.runs.folder import FORMAT_FILE, UNFINISHED, write_json
from dpost_lite.sampling.sampler import sample_by_recipe


@dataclass(frozen=True, slots=True)
class ModelTask:
    """What every task has: the recipe, and the base model's folder. `run` is that of `worker.Task`."""

    recipe: Recipe
    model_dir: Path


def _inserted(prompter: Prompter, recipe: Recipe, *, calculated_in_loss: bool) -> Inserted | None:
    """Return what finds the tokens to leave out of a loss."""
    return Tools.from_recipe(recipe).inserted(
        prompter.token_text(), prompter.encode_text, prompter.notation, calculated_in_loss=calculated_in_loss
    )


def _note_format(out: Path, recipe: Recipe) -> None:
    """Note beside a policy what its base was trained in, and how code in its solutions is run: for `eval`, `export`."""
    write_json(out / FORMAT_FILE, {"precision": recipe.model.precision, **solution_format(recipe)})


@dataclass(frozen=True, slots=True)
class TrainSft(ModelTask):
    """Train the base on the labelled rationales in `labels_dir`. Writes the policy."""

    labels_dir: Path
    micro_batch_size: int
    backend: Backend

    def run(self, out: Path, progress: Progress) -> dict[str, Any]:
        from dpost_lite.models import sft

        recipe = self.recipe
        _note_format(out, recipe)
        return sft.train_sft(
            adapters.load_for_sft(self.model_dir, recipe, self.backend),
            prompter := load_prompter(self.model_dir, recipe.model),
            list(read_jsonl(self.labels_dir / "labels.jsonl", LabelledRationale)),
            out,
            recipe=recipe.sft.model_copy(update={"micro_batch_size": self.micro_batch_size}),
            seed=recipe.seed,
            progress=progress,
            checkpoint_s=recipe.checkpoint_s,
            report_to=recipe.report_to,
            inserted=_inserted(prompter, recipe, calculated_in_loss=recipe.sft.calculated_in_loss),
        )


@dataclass(frozen=True, slots=True)
class TrainDpo(ModelTask):
    """Train the policy in `policy_dir` on the preference pairs in `pairs_dir`. Writes the policy, and rewards.jsonl
    with the token rewards of a few rejected rationales (not where all weights are trained).
    """

    pairs_dir: Path
    policy_dir: Path
    micro_batch_size: int
    backend: Backend

    def run(self, out: Path, progress: Progress) -> dict[str, Any]:
        from dpost_lite.models import dpo

        recipe = self.recipe
        _note_format(out, recipe)
        return dpo.train_dpo(
            adapters.load_for_dpo(self.model_dir, self.policy_dir, recipe, self.backend),
            prompter := load_prompter(self.model_dir, recipe.model),
            list(read_jsonl(self.pairs_dir / "pairs.jsonl", PreferencePair)),
            out,
            recipe=recipe.dpo.model_copy(update={"micro_batch_size": self.micro_batch_size}),
            seed=recipe.seed,
            progress=progress,
            checkpoint_s=recipe.checkpoint_s,
            report_to=recipe.report_to,
            inserted=_inserted(prompter, recipe, calculated_in_loss=recipe.dpo.calculated_in_loss),
        )


@dataclass(frozen=True, slots=True)
class SamplingTask(ModelTask):
    """What a task that samples has: `memory_gib` bounds cache and logits; None takes a share of the machine's."""

    data_dir: Path
    policy_dir: Path | None
    """None is the base."""
    memory_gib: float | None

    def _model(self) -> Any:
        return adapters.load_policy(self.model_dir, self.policy_dir, self.recipe)

    def _sample(
        self,
        file: Path,
        model: Any,
        problems: list[Problem],
        *,
        purpose: str,
        num_samples: int = 1,
        temperature: float = 0.0,
        progress: Progress,
    ) -> list[Rationale]:
        """Sample rationales and write them to `file`, in the order of (problem, sample).

        As they end they are appended to a file in the folder of unfinished work; what a stopped process left there is
        not sampled again.
        """
        total, unfinished = len(problems) * num_samples, file.parent / UNFINISHED / file.name
        if file.exists():  # a part of the stage that was done before it was stopped
            return list(read_jsonl(file, Rationale))
        done = resume_jsonl(unfinished, Rationale)
        num_right = sum(rationale.correct for rationale in done)
        sampling = self.recipe.sampling.model_copy(update={"memory_gib": self.memory_gib})
        with unfinished.open("a", encoding="utf-8", newline="\n") as appended:
            for rationale in sample_by_recipe(
                model,
                load_prompter(self.model_dir, self.recipe.model),
                problems,
                self.recipe.model_copy(update={"sampling": sampling}),
                purpose=purpose,
                num_samples=num_samples,
                temperature=temperature,
                done=list(done),
            ):
                append_jsonl(appended, rationale)
                done.append(rationale)
                num_right += rationale.correct
                progress(len(done), total, "rationales", right=num_right / len(done))
        order = {problem.id: i for i, problem in enumerate(problems)}
        done.sort(key=lambda r: (order[r.problem_id], r.sample))
        write_jsonl(file, done)
        return done


@dataclass(frozen=True, slots=True)
class SampleRationales(SamplingTask):
    """Sample and grade rationales for every training problem; `purpose` is part of the seed."""

    purpose: str
    num_samples: int

    def run(self, out: Path, progress: Progress) -> dict[str, Any]:
        samples = self._sample(
            out / "rationales.jsonl",
            self._model(),
            list(read_jsonl(self.data_dir / "train.jsonl", Problem)),
            purpose=self.purpose,
            num_samples=self.num_samples,
            temperature=self.recipe.sampling.temperature,
            progress=progress,
        )
        return {
            "rationales": len(samples),
            "right": sum(r.correct for r in samples),
            "unfinished": sum(r.end == "limit" for r in samples),
            "calculated": sum(r.num_calculated for r in samples),
            "refused": sum(r.num_refused for r in samples),
            "tokens": sum(len(r.token_ids) for r in samples),
        }


@dataclass(frozen=True, slots=True)
class CompareDraws(SamplingTask):
    """Draw rationales from the policies in `policy_dir` and `dpo_dir` with the same random numbers, for `num_problems`
    training problems, and compare how many distinct right ones each yields. Writes before.jsonl and after.jsonl.

    For the report, if there are dev problems: dev.jsonl, the DPO policy's greedy answers to them; dev-before.jsonl and
    dev-after.jsonl, as many rationales for each of at most `num_problems` of them.
    """

    dpo_dir: Path
    purpose: str
    num_problems: int

    def run(self, out: Path, progress: Progress) -> dict[str, Any]:
        sampling, dice = self.recipe.sampling, random.Random(self.recipe.seed)
        train, dev = (list(read_jsonl(self.data_dir / f"{part}.jsonl", Problem)) for part in ("train", "dev"))
        problems = dice.sample(train, self.num_problems)
        on_dev = dice.sample(dev, min(self.num_problems, len(dev)))
        gold = {label.problem_id: label for label in read_jsonl(self.data_dir / "labels.jsonl", LabelledRationale)}
        before, after = {"before": problems, "dev-before": on_dev}, {"after": problems, "dev-after": on_dev, "dev": dev}
        total = 2 * (len(problems) + len(on_dev)) * sampling.samples_for_labels + len(dev)
        drawn: dict[str, list[Rationale]] = {}

        def report(done: int, _: int, *rest: Any, **more: Any) -> None:
            progress(sum(map(len, drawn.values())) + done, total, *rest, **more)

        for policy_dir, given in ((self.policy_dir, before), (self.dpo_dir, after)):
            parts = {name: some for name, some in given.items() if some}
            is_done = all((out / f"{name}.jsonl").exists() for name in parts)  # before the stage was stopped
            model = None if is_done else adapters.load_policy(self.model_dir, policy_dir, self.recipe)
            for name, some in parts.items():
                drawn[name] = self._sample(
                    out / f"{name}.jsonl",
                    model,
                    some,
                    purpose=self.purpose,
                    num_samples=1 if name == "dev" else sampling.samples_for_labels,
                    temperature=0.0 if name == "dev" else sampling.temperature,
                    progress=report,
                )
            del model
            gc.collect()  # before the next one is loaded
        threshold = self.recipe.labels.threshold
        yields = compare_yields(problems, drawn["before"], drawn["after"], gold, threshold=threshold)
        is_kept = yields.is_better or self.recipe.dpo.keep == "always"
        found = {"goes_on_with": "dpo" if is_kept else "sft", **asdict(yields)}
        if dev:
            found["dev"] = sum(answer.correct for answer in drawn["dev"]) / len(dev)
            pair = drawn["dev-before"], drawn["dev-after"]
            each = sampling.samples_for_labels
            found["dev_draws"] = asdict(compare_draws(on_dev, *pair, num_samples=each, threshold=threshold))
        return found


@dataclass(frozen=True, slots=True)
class GradeAnswers(SamplingTask):
    """Grade greedy answers to the problems of each of `parts` (such as dev and test). Writes them by part."""

    policy_name: str
    parts: tuple[str, ...]

    def run(self, out: Path, progress: Progress) -> dict[str, Any]:
        metrics = {}
        model = self._model()
        for part in self.parts:
            problems = list(read_jsonl(self.data_dir / f"{part}.jsonl", Problem))
            graded = self._sample(out / f"{part}.jsonl", model, problems, purpose=f"score/{part}", progress=progress)
            used = {
                "has_calculator": self.recipe.calculator.enabled, "has_code": self.recipe.solutions == "code",
            }  # fmt: skip
            metrics[part] = asdict(score(self.policy_name, graded, problems, **used))
        return metrics


@dataclass(frozen=True, slots=True)
class Export(ModelTask):
    """Write the policy in `policy_dir`, whose name is `policy`, as a GGUF file, proved on the run in `run_dir`."""

    policy_dir: Path
    policy: str
    run_dir: Path

    def run(self, out: Path, progress: Progress) -> dict[str, Any]:
        exported = export_gguf(
            self.recipe,
            self.model_dir,
            self.policy_dir,
            out / f"model-{self.recipe.export.quant}.gguf",
            run=self.run_dir,
            stage=self.policy,
            progress=progress,
        )
        return {"policy": self.policy, **exported.named().metrics}
