"""The stages of a run: which work each line of Algorithm 2 asks for, on which inputs, under which settings.

`selftrain.py` says in which order; `tasks.py` what is done. Text is worked on here; what needs a model runs in a child
process.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from dpost_lite.errors import OutOfMemory
from dpost_lite.local import gguf
from dpost_lite.local.config import read_config
from dpost_lite.models import backends
from dpost_lite.models.dpo import check_loss
from dpost_lite.models.tracking import check_trackers
from dpost_lite.pipeline import tasks
from dpost_lite.pipeline.worker import run_in_child
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.corpus import digests
from dpost_lite.problems.pairs import make_labels, make_pairs
from dpost_lite.problems.records import (
    LabelledRationale,
    Problem,
    Rationale,
    Score,
    from_dict,
    read_jsonl,
    write_jsonl,
)
from dpost_lite.recipe import Recipe
from dpost_lite.runs.folder import Artifact, Run, write_json
from dpost_lite.system.machine import minor_version, ram_share_gib

MODEL_PARTS = ("model", "calculator")
# whose minor version may change results
PACKAGES = ("dpost-lite", "torch", "transformers", "trl", "peft", "bitsandbytes")
LEAST_GIB = 0.1  # for the cache and logits of a sampling stage
UNITS = {"sft": "rationale", "dpo": "pair"}
MACHINE_KEYS = (
    ("model", "backend"),
    ("sft", "micro_batch_size"),
    ("dpo", "micro_batch_size"),
    ("sampling", "weights"),
    ("sampling", "max_rows"),
    ("sampling", "memory_gib"),
)


def preflight(recipe: Recipe, folder: Path) -> Path:
    """Check, before hours are spent, that a run in `folder` can be finished; return the base model's folder.

    Raises RecipeError, ModelError or ExportError.
    """
    check_loss(recipe.dpo.loss)
    check_trackers(recipe.report_to)
    backends.first_import(recipe.model)
    model_dir = backends.find(recipe.model.name)
    read_config(model_dir)
    weights = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    trains_all = recipe.model.precision == "full"
    num_policies = 1 + 2 * recipe.rounds if trains_all else 0  # each in float32
    num_states = 2 * 3 if trains_all else 0  # weights and two moments of a checkpoint, and of the one before it
    # merged 16-bit weights, f16 GGUF, quantised
    gguf.check_disk(folder / "export", (3 + 2 * num_policies + 2 * num_states) * weights)
    return model_dir


class Stages:
    """The stages of one run. Scores gather as stages finish; everything else passes through files.

    `memory_share` is the share of the GPU's memory that a stage may take; None sets no limit.
    """

    def __init__(self, recipe: Recipe, run: Run, *, memory_share: float | None = None) -> None:
        self._recipe = recipe
        self._run = run
        self._memory_share = memory_share
        self._model_dir = preflight(recipe, run.path)
        self._base = backends.fingerprint(self._model_dir)
        self._compute_dtype = str(backends.compute_dtype(recipe.model.compute_dtype)).removeprefix("torch.")
        self._packages = {name: minor_version(name) for name in PACKAGES}
        self.test_scores: list[Score] = []
        self.dev_scores: list[Score] = []  # without the base's

    @property
    def num_rounds(self) -> int:
        """Rounds of self-training that the method asks for."""
        return 0 if self._recipe.method == "sft" else self._recipe.rounds

    def data(self) -> Artifact:
        """Load, split and check problems; tokenise gold rationales. Files: train, dev, test, labels (gold)."""
        settings = {**self._settings("data", "synthetic", "model"), "files": digests(self._recipe.data)}
        return self._in_child("data", tasks.prepare_data, settings=settings)

    def sft(self, name: str, labels: Artifact) -> Artifact:
        """Train on the labelled rationales of `labels`, from the base."""
        settings = self._settings("model", "lora", "sft")
        return self._train(name, "sft", tasks.train_sft, labels, settings=settings, labels_dir=labels.path)

    def sample_for_pairs(self, name: str, policy: Artifact, data: Artifact) -> Artifact:
        """Draw rationales for every training problem from an SFT policy."""
        return self._sample(name, policy, data, self._recipe.sampling.samples_for_pairs)

    def sample_for_labels(self, name: str, policy: Artifact, data: Artifact) -> Artifact:
        """Draw K rationales for every training problem from the DPO policy (plain self-training: the SFT policy)."""
        return self._sample(name, policy, data, self._recipe.sampling.samples_for_labels)

    def pairs(self, name: str, sampled: list[Artifact], data: Artifact) -> Artifact:
        """Make preference pairs from graded rationales, of earlier rounds too if the recipe pools."""
        recipe = self._recipe.pairs
        sources = sampled if recipe.pool_rounds else sampled[-1:]

        def pair(out: Path) -> dict[str, Any]:
            pairs = make_pairs(
                _problems(data, "train"),
                _rationales(sources),
                _gold_by_problem(data),
                threshold=recipe.jaccard_threshold,
                max_pairs=recipe.max_per_problem,
                gold_first=recipe.gold_first,
                unfinished_rejected=recipe.unfinished_rejected,
            )
            write_jsonl(out / "pairs.jsonl", pairs)
            return {"pairs": len(pairs), "problems": len({pair.problem_id for pair in pairs})}

        return self._run.stage(name, pair, data, *sources, settings=self._settings("pairs"))

    def dpo(self, name: str, policy: Artifact, pairs: Artifact) -> Artifact:
        """Train the policy on preference pairs. Without any pair the policy itself goes on, with a notice."""
        if not pairs.metrics["pairs"]:
            self._run.emit(
                "notice",
                text=f"{name}: no preference pairs, so DPO is skipped; more sampling.samples_for_pairs may find some",
            )
            return policy

        return self._train(
            name,
            "dpo",
            tasks.train_dpo,
            policy,
            pairs,
            settings=self._settings("model", "dpo"),
            pairs_dir=pairs.path,
            policy_dir=policy.path,
        )

    def labels(self, name: str, drawn: list[Artifact], data: Artifact) -> Artifact:
        """Keep right rationales, deduplicate, cap, and join them with the gold ones."""
        recipe = self._recipe.labels
        sources = drawn if recipe.pool_rounds else drawn[-1:]

        def label(out: Path) -> dict[str, Any]:
            labels = make_labels(
                _problems(data, "train"),
                _rationales(sources),
                _gold_by_problem(data),
                threshold=recipe.jaccard_threshold,
                cap_percentile=recipe.cap_percentile,
                max_per_problem=recipe.max_per_problem,
            )
            write_jsonl(out / "labels.jsonl", labels)
            return {"labels": len(labels), "gold": sum(label.is_gold for label in labels)}

        return self._run.stage(name, label, data, *sources, settings=self._settings("labels"))

    def score(self, name: str, policy: Artifact | None, data: Artifact) -> None:
        """Grade greedy answers on dev and test; None scores the base model."""
        settings = self._settings(*MODEL_PARTS, "sampling")
        for key in ("temperature", "top_p"):  # a greedy answer depends on neither
            settings["sampling"].pop(key)
        stage = self._answered(
            f"score/{name}",
            tasks.grade,
            *((data,) if policy is None else (data, policy)),
            settings=settings,
            data_dir=data.path,
            policy_dir=policy.path if policy else None,
            policy_name=name,
            parts=[part for part in ("dev", "test") if data.metrics[part]],
        )
        self.test_scores.append(from_dict(Score, stage.metrics["test"]))
        if "dev" in stage.metrics and policy is not None:
            self.dev_scores.append(from_dict(Score, stage.metrics["dev"]))

    def has_converged(self) -> bool:
        """True when dev accuracy has not risen above its best for `patience` rounds."""
        patience = self._recipe.patience
        accuracies = [score.strict for score in self.dev_scores]
        if patience is None or not accuracies:
            return False
        return len(accuracies) - 1 - accuracies.index(max(accuracies)) >= patience

    def best_policy(self, policies: list[Artifact]) -> Artifact:
        """The policy with the best dev accuracy, the earlier one of equals; without dev problems, the last."""
        accuracies = [score.strict for score in self.dev_scores]
        return policies[accuracies.index(max(accuracies))] if accuracies else policies[-1]

    def export(self, policy: Artifact) -> Artifact:
        """Merge the adapter in 16 bit and write the GGUF file."""
        settings = self._settings("model", "export")
        return self._in_child(
            "export", tasks.export, policy, settings=settings, renew=True, policy_dir=policy.path, policy=policy.name
        )

    def solve(self, export: Artifact, data: Artifact, num_problems: int = 3) -> Artifact:
        """Solve a few unseen problems with the exported file, through the calculator."""
        from dpost_lite.local.solver_process import SolverProcess

        def answer(out: Path) -> dict[str, Any]:
            with SolverProcess(
                export.path / export.metrics["file"],
                calculator=Calculator.from_recipe(self._recipe.calculator),
                max_new_tokens=self._recipe.sampling.max_new_tokens,
            ) as solver:
                solved = [
                    {**asdict(problem), "solution": asdict(solver.solve(problem.question))}
                    for problem in _problems(data, "test")[:num_problems]
                ]
            write_json(out / "solved.json", solved)
            return {"solved": len(solved)}

        return self._run.stage("solved", answer, export, data, settings=self._settings(*MODEL_PARTS), renew=True)

    def _sample(self, name: str, policy: Artifact, data: Artifact, num_samples: int) -> Artifact:
        return self._answered(
            name,
            tasks.draw,
            policy,
            data,
            settings={**self._settings(*MODEL_PARTS, "sampling"), "num_samples": num_samples},
            data_dir=data.path,
            policy_dir=policy.path,
            purpose=name,
            num_samples=num_samples,
        )

    def _answered(self, name: str, do: Callable[..., Any], *inputs: Artifact, **arguments: Any) -> Artifact:
        """A stage that samples. When the system kills it for want of memory, cache and logits get half of it."""
        memory_gib = self._recipe.sampling.memory_gib
        while True:
            try:
                return self._in_child(name, do, *inputs, resumes=True, memory_gib=memory_gib, **arguments)
            except OutOfMemory as error:
                memory_gib = (memory_gib or ram_share_gib()) / 2
                if memory_gib < LEAST_GIB:
                    raise
                self._run.emit(
                    "notice",
                    text=f"{name}: memory ran out ({error}); going on with sampling.memory_gib={memory_gib:.2f}",
                )

    def _train(
        self,
        name: str,
        kind: Literal["sft", "dpo"],
        train: Callable[..., Any],
        *inputs: Artifact,
        settings: dict[str, Any],
        **arguments: Any,
    ) -> Artifact:
        """A training stage. When memory runs out it goes on from its last checkpoint with micro-batches of half the
        size; the effective batch stays.
        """
        section = getattr(self._recipe, kind)
        micro = min(section.micro_batch_size, section.batch_size)
        while True:
            try:
                return self._in_child(
                    name,
                    train,
                    *inputs,
                    settings=settings,
                    resumes=True,
                    first_import=backends.first_import(self._recipe.model),
                    micro_batch_size=micro,
                    **arguments,
                )
            except OutOfMemory as error:
                if micro == 1:
                    raise OutOfMemory(
                        f"{name} ran out of memory with one {UNITS[kind]} at a time ({error}); "
                        f"lower {kind}.max_length, or take a smaller model"
                    ) from error
                micro = max(n for n in range(1, micro // 2 + 1) if section.batch_size % n == 0)
                self._run.emit(
                    "notice",
                    text=f"{name}: memory ran out ({error}); going on with {kind}.micro_batch_size={micro}, "
                    f"{section.batch_size // micro} of them to a step",
                )

    def _in_child(
        self,
        name: str,
        do: Callable[..., Any],
        *inputs: Artifact,
        settings: dict[str, Any],
        renew: bool = False,
        resumes: bool = False,
        first_import: str | None = None,
        **arguments: Any,
    ) -> Artifact:
        """A stage whose work `do`, of tasks.py, is done in a process of its own."""

        def in_child(out: Path) -> dict[str, Any]:
            return run_in_child(
                do,
                log=self._run.path / "logs" / f"{name.replace('/', '-')}.log",
                progress=self._run.progress,
                memory_share=self._memory_share,
                first_import=first_import,
                recipe=self._recipe,
                model_dir=self._model_dir,
                out=out,
                **arguments,
            )

        return self._run.stage(name, in_child, *inputs, settings=settings, renew=renew, resumes=resumes)

    def _settings(self, *parts: str) -> dict[str, Any]:
        """The parts of the recipe that a stage depends on; how work is cut to fit the machine changes no result."""
        values = self._recipe.model_dump(mode="json")
        for part, key in MACHINE_KEYS:
            values[part].pop(key)
        values["model"]["compute_dtype"] = self._compute_dtype
        for key in ("samples_for_pairs", "samples_for_labels"):  # of no stage but those that draw so many
            values["sampling"].pop(key)
        made_by = {"base": self._base, "packages": self._packages} if "model" in parts else {}
        return {"seed": values["seed"], **made_by, **{part: values[part] for part in parts}}


def _problems(data: Artifact, part: str) -> list[Problem]:
    return list(read_jsonl(data.path / f"{part}.jsonl", Problem))


def _rationales(sources: Iterable[Artifact]) -> list[Rationale]:
    return [r for source in sources for r in read_jsonl(source.path / "rationales.jsonl", Rationale)]


def _gold_by_problem(data: Artifact) -> dict[str, LabelledRationale]:
    return {gold.problem_id: gold for gold in read_jsonl(data.path / "labels.jsonl", LabelledRationale)}
