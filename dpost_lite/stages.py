"""What each line of Algorithm 2 does with files: read the inputs' folders, work, write the stage's own.

`selftrain.py` says in which order. Weights are loaded inside a stage and gone when it ends: adapters are what stays.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError
from dpost_lite.local import gguf
from dpost_lite.local.config import read_config
from dpost_lite.models import adapters, backends
from dpost_lite.models.dpo import check_loss, train_dpo
from dpost_lite.models.sft import train_sft
from dpost_lite.policies import answers, calculator_of, export_gguf, memory_returned
from dpost_lite.problems.corpus import Corpus, digests, load_corpus
from dpost_lite.problems.pairs import make_labels, make_pairs
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import (
    LabelledRationale,
    PreferencePair,
    Problem,
    Rationale,
    Score,
    from_dict,
    read_jsonl,
    write_jsonl,
)
from dpost_lite.problems.scoring import score
from dpost_lite.recipe import Recipe
from dpost_lite.rundir import Artifact, Run, write_json

MODEL_PARTS = ("model", "calculator")
MACHINE_KEYS = (
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
    model_dir = backends.find(recipe.model.name)
    read_config(model_dir)
    weights = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    gguf.check_disk(folder / "export", 3 * weights)  # merged 16-bit weights, f16 GGUF, quantised GGUF
    return model_dir


class Stages:
    """The stages of one run. Scores gather as stages finish; everything else passes through files."""

    def __init__(self, recipe: Recipe, run: Run) -> None:
        self._recipe = recipe
        self._run = run
        self._model_dir = preflight(recipe, run.path)
        self.test_scores: list[Score] = []
        self._dev_scores: list[Score] = []

    @property
    def num_rounds(self) -> int:
        """Rounds of self-training that the method asks for."""
        return 0 if self._recipe.method == "sft" else self._recipe.rounds

    def data(self) -> Artifact:
        """Load, split and check problems; tokenise gold rationales. Files: train, dev, test, labels (gold)."""
        recipe = self._recipe

        def work(out: Path) -> dict[str, Any]:
            corpus = load_corpus(recipe.data, recipe.synthetic, seed=recipe.seed)
            gold = self._gold(corpus)
            for name in ("train", "dev", "test"):
                write_jsonl(out / f"{name}.jsonl", getattr(corpus, name))
            write_jsonl(out / "labels.jsonl", gold)
            return {
                "train": len(corpus.train),
                "labelled": len(gold),
                "dev": len(corpus.dev),
                "test": len(corpus.test),
                "refused": corpus.num_refused,
            }

        settings = self._settings("data", "synthetic", "model")
        return self._run.stage("data", work, settings={**settings, "files": digests(recipe.data)})

    def sft(self, name: str, labels: Artifact) -> Artifact:
        """Train a fresh adapter on the labelled rationales of `labels`, from the base."""
        recipe = self._recipe

        def work(out: Path) -> dict[str, Any]:
            with memory_returned():
                return train_sft(
                    backends.load(self._model_dir, recipe.model.quantization),
                    self._prompter(),
                    list(read_jsonl(labels.path / "labels.jsonl", LabelledRationale)),
                    out,
                    recipe=recipe.sft,
                    lora=recipe.lora,
                    seed=recipe.seed,
                    progress=self._run.progress,
                )

        return self._run.stage(name, work, labels, settings=self._settings("model", "lora", "sft"))

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

        def work(out: Path) -> dict[str, Any]:
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

        return self._run.stage(name, work, data, *sources, settings=self._settings("pairs"))

    def dpo(self, name: str, policy: Artifact, pairs: Artifact) -> Artifact:
        """Train the policy's adapter on preference pairs. Without any pair the policy itself goes on, with a notice."""
        recipe = self._recipe
        if not pairs.metrics["pairs"]:
            self._run.emit(
                "notice",
                text=f"{name}: no preference pairs, so DPO is skipped; more sampling.samples_for_pairs may find some",
            )
            return policy

        def work(out: Path) -> dict[str, Any]:
            with memory_returned():
                return train_dpo(
                    backends.load(self._model_dir, recipe.model.quantization),
                    self._prompter(),
                    list(read_jsonl(pairs.path / "pairs.jsonl", PreferencePair)),
                    policy.path,
                    out,
                    recipe=recipe.dpo,
                    seed=recipe.seed,
                    progress=self._run.progress,
                )

        return self._run.stage(name, work, policy, pairs, settings=self._settings("model", "dpo"))

    def labels(self, name: str, drawn: list[Artifact], data: Artifact) -> Artifact:
        """Keep right rationales, deduplicate, cap, and join them with the gold ones."""
        recipe = self._recipe.labels
        sources = drawn if recipe.pool_rounds else drawn[-1:]

        def work(out: Path) -> dict[str, Any]:
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

        return self._run.stage(name, work, data, *sources, settings=self._settings("labels"))

    def score(self, name: str, policy: Artifact | None, data: Artifact) -> None:
        """Grade greedy answers on dev and test; None scores the base model."""
        recipe = self._recipe
        parts = [part for part in ("dev", "test") if data.metrics[part]]

        def work(out: Path) -> dict[str, Any]:
            metrics = {}
            for part in parts:
                problems = _problems(data, part)
                graded = self._draw(policy, problems, f"score/{part}", num_samples=1, temperature=0.0)
                metrics[part] = asdict(score(name, graded, problems, has_calculator=recipe.calculator.enabled))
                write_jsonl(out / f"{part}.jsonl", graded)
            return metrics

        inputs = (data,) if policy is None else (data, policy)
        stage = self._run.stage(f"score/{name}", work, *inputs, settings=self._settings(*MODEL_PARTS, "sampling"))
        self.test_scores.append(from_dict(Score, stage.metrics["test"]))
        if "dev" in stage.metrics:
            self._dev_scores.append(from_dict(Score, stage.metrics["dev"]))

    def has_converged(self) -> bool:
        """True when dev accuracy has not risen above its best for `patience` rounds."""
        patience = self._recipe.patience
        accuracies = [score.strict for score in self._dev_scores[1:]]  # without the base
        if patience is None or not accuracies:
            return False
        return len(accuracies) - 1 - accuracies.index(max(accuracies)) >= patience

    def best_policy(self, policies: list[Artifact]) -> Artifact:
        """The policy with the best dev accuracy, the earlier one of equals; without dev problems, the last."""
        accuracies = [score.strict for score in self._dev_scores[1:]]
        return policies[accuracies.index(max(accuracies))] if accuracies else policies[-1]

    def export(self, policy: Artifact) -> Artifact:
        """Merge the adapter in 16 bit and write the GGUF file."""
        quant = self._recipe.export.quant

        def work(out: Path) -> dict[str, Any]:
            file = export_gguf(self._recipe, self._model_dir, policy.path, out / f"model-{quant}.gguf")
            return {"policy": policy.name, "file": file.name, "bytes": file.stat().st_size}

        return self._run.stage("export", work, policy, settings=self._settings("model", "export"), renew=True)

    def solve(self, export: Artifact, data: Artifact, num_problems: int = 3) -> Artifact:
        """Solve a few unseen problems with the exported file, through the calculator."""
        from dpost_lite.local.solver import Solver

        def work(out: Path) -> dict[str, Any]:
            solver = Solver(
                export.path / export.metrics["file"],
                calculator=calculator_of(self._recipe),
                max_new_tokens=self._recipe.sampling.max_new_tokens,
            )
            solved = [
                {**asdict(problem), "solution": asdict(solver.solve(problem.question))}
                for problem in _problems(data, "test")[:num_problems]
            ]
            write_json(out / "solved.json", solved)
            return {"solved": len(solved)}

        return self._run.stage("solved", work, export, data, settings=self._settings(*MODEL_PARTS), renew=True)

    def _sample(self, name: str, policy: Artifact, data: Artifact, num_samples: int) -> Artifact:
        recipe = self._recipe.sampling

        def work(out: Path) -> dict[str, Any]:
            problems = _problems(data, "train")
            drawn = self._draw(policy, problems, name, num_samples=num_samples, temperature=recipe.temperature)
            write_jsonl(out / "rationales.jsonl", drawn)
            return _yield_of(drawn)

        return self._run.stage(
            name, work, policy, data, settings={**self._settings(*MODEL_PARTS, "sampling"), "num_samples": num_samples}
        )

    def _draw(
        self, policy: Artifact | None, problems: list[Problem], purpose: str, *, num_samples: int, temperature: float
    ) -> list[Rationale]:
        """Sample from a policy; rationales come back in the order of (problem, sample)."""
        recipe = self._recipe
        total, num_right, done = len(problems) * num_samples, 0, []
        with memory_returned():
            model = adapters.load_policy(self._model_dir, policy.path if policy else None, recipe)
            for rationale in answers(
                model,
                self._prompter(),
                problems,
                recipe,
                purpose=purpose,
                num_samples=num_samples,
                temperature=temperature,
            ):
                done.append(rationale)
                num_right += rationale.correct
                self._run.progress(len(done), total, "rationales", right=num_right / len(done))
            del model
        order = {problem.id: i for i, problem in enumerate(problems)}
        return sorted(done, key=lambda r: (order[r.problem_id], r.sample))

    def _prompter(self) -> Prompter:
        return Prompter(backends.load_tokenizer(self._model_dir), self._recipe.model.prompt)

    def _gold(self, corpus: Corpus) -> list[LabelledRationale]:
        prompter = self._prompter()
        gold = [
            LabelledRationale(p.id, p.question, p.rationale, prompter.answer_ids(p.rationale), is_gold=True)
            for p in corpus.train
            if p.rationale
        ]
        if not gold:
            raise DataError(
                f"data.train={self._recipe.data.train}: no problem carries a worked solution ending in '#### N', "
                "and the warm-up needs some; add solutions to a few dozen problems"
            )
        return gold

    def _settings(self, *parts: str) -> dict[str, Any]:
        """The parts of the recipe that a stage depends on; how work is cut to fit the machine changes no result."""
        values = self._recipe.model_dump(mode="json")
        for part, key in MACHINE_KEYS:
            values[part].pop(key)
        return {"seed": values["seed"], **{part: values[part] for part in parts}}


def _problems(data: Artifact, part: str) -> list[Problem]:
    return list(read_jsonl(data.path / f"{part}.jsonl", Problem))


def _rationales(sources: Iterable[Artifact]) -> list[Rationale]:
    return [r for source in sources for r in read_jsonl(source.path / "rationales.jsonl", Rationale)]


def _gold_by_problem(data: Artifact) -> dict[str, LabelledRationale]:
    return {gold.problem_id: gold for gold in read_jsonl(data.path / "labels.jsonl", LabelledRationale)}


def _yield_of(drawn: list[Rationale]) -> dict[str, Any]:
    """Figures of one sampling stage: how many were right, unfinished, and what the calculator did."""
    return {
        "rationales": len(drawn),
        "right": sum(r.correct for r in drawn),
        "unfinished": sum(r.end == "limit" for r in drawn),
        "calculated": sum(r.num_calculated for r in drawn),
        "refused": sum(r.num_refused for r in drawn),
        "tokens": sum(len(r.token_ids) for r in drawn),
    }
