"""The stages of a run: what each line of Algorithm 2 asks for, on which inputs, under which settings.

`selftrain.py` has their order, `tasks.py` the tasks that need a model, which run in a child process. Work on text alone
is done here.
"""

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpost_lite.errors import PromptTooLong
from dpost_lite.methods import METHODS
from dpost_lite.models.backend import choose_backend
from dpost_lite.models.family import family_of
from dpost_lite.pipeline.inputs import gold_of, problems_of, rationales_of, rests_of
from dpost_lite.pipeline.preflight import preflight
from dpost_lite.pipeline.prepare import PrepareAlso, PrepareData
from dpost_lite.pipeline.rests import SampleRests
from dpost_lite.pipeline.settings import MODEL_PARTS, StageSettings
from dpost_lite.pipeline.stage_runner import Section, StageRunner
from dpost_lite.pipeline.tasks import (
    CompareDraws,
    Export,
    GradeAnswers,
    SampleRationales,
    TrainDpo,
    TrainSft,
)
from dpost_lite.problems.answers import predicted_answer
from dpost_lite.problems.corpus import also_digests, digests
from dpost_lite.problems.gate import Yields, num_compared
from dpost_lite.problems.pairs import make_labels, make_pairs
from dpost_lite.problems.records import (
    PreferencePair,
    Problem,
    Score,
    from_dict,
    write_jsonl,
)
from dpost_lite.problems.steps import as_many, as_rationale, mixed, stepwise_pairs
from dpost_lite.problems.tools import Tools
from dpost_lite.recipe import Recipe
from dpost_lite.runs.folder import Artifact, Run, read_json, write_json
from dpost_lite.runs.stage_names import BASE, StageName, policy_name, policy_of

NO_CUTS = "no right rationale has two steps, so there are no step-controlled pairs; give problems of more steps"
NUM_SOLVED = 3  # problems to try the exported file on


class RunStages:
    """`selftrain.Stages` in a run's folder. Scores are collected as stages finish; all else passes through files.

    `memory_share` is the share of the GPU's memory that a stage may take; None sets no limit.
    """

    def __init__(self, recipe: Recipe, run: Run, *, memory_share: float | None = None) -> None:
        self._recipe = recipe
        self._run = run
        self._runner = StageRunner(recipe, run, memory_share)
        self._model_dir = preflight(recipe, run.path)
        self._settings = StageSettings(recipe, self._model_dir).of
        self._backend = choose_backend(recipe.model, family_of(self._model_dir))
        self._method = METHODS[recipe.method]
        self._data: Artifact
        self._also: Artifact | None = None
        self._for_pairs: list[Artifact] = []
        self._rests: list[Artifact] = []
        self._gates: dict[int, Artifact] = {}
        self._scores: dict[StageName, Artifact] = {}
        self.test_scores: list[Score] = []
        self.dev_scores: list[Score] = []  # without the base's
        self.also_scores: dict[str, list[Score]] = {}  # by further test set
        self.best: Artifact | None = None
        self.exported: Artifact | None = None
        self.solved: Artifact | None = None

    def data(self) -> Artifact:
        """Load, split and check problems; tokenise gold rationales. Files: train, dev, test, labels (gold)."""
        settings = {**self._settings("data", "synthetic", "model"), "files": digests(self._recipe.data)}
        self._data = self._runner.in_child(
            StageName("data"), PrepareData(self._recipe, self._model_dir), settings=settings
        )
        if also := self._recipe.data.also_test:
            prepare = PrepareAlso(self._recipe, self._model_dir, self._data.path)
            settings = {"also_test": also, "files": also_digests(self._recipe.data)}  # the limits are settings of data
            self._also = self._runner.in_child(StageName("data-also"), prepare, self._data, settings=settings)
        return self._data

    def score_base(self) -> None:
        """Grade greedy answers of the base."""
        self._score(BASE, None)

    def sft(self, number: int, labels: Artifact) -> Artifact:
        """Train the base on the labelled rationales of `labels`, and score the policy."""
        micro = self._micro_batch_size("sft")
        task = TrainSft(self._recipe, self._model_dir, labels.path, micro, self._backend)
        settings = self._settings("model", "lora", "sft", *self._calculator_in("sft"))
        policy = self._runner.train(StageName("sft", number), "sft", task, labels, settings=settings)
        self._score(policy_name(number), policy)
        return policy

    def sample_for_pairs(self, number: int, policy: Artifact) -> Artifact:
        """Sample rationales for every training problem from an SFT policy."""
        name = StageName("samples-pairs", number)
        samples = self._sample(name, policy, self._recipe.sampling.samples_for_pairs)
        self._for_pairs.append(samples)
        return samples

    def sample_for_labels(self, number: int, policy: Artifact) -> Artifact:
        """Sample K rationales for every training problem from the policy that the round goes on with."""
        name = StageName("samples-labels", number)
        gate = [self._gates[number]] if number in self._gates else []
        return self._sample(name, policy, self._recipe.sampling.samples_for_labels, *gate)

    def pairs(self, number: int, policy: Artifact, samples: list[Artifact]) -> Artifact:
        """Make preference pairs from graded rationales, of earlier rounds too if the recipe pools."""
        recipe, kinds = self._recipe.pairs, self._method.pairs
        if has_rests := self._method.samples_rests(recipe.stepwise):
            self._rests.append(self._sample_rests(number, policy, samples[-1]))
        sources = _pooled(samples, recipe.pool_rounds)
        rests = _pooled(self._rests, recipe.pool_rounds)

        def pair(out: Path) -> dict[str, Any]:
            problems = problems_of(self._data, "train")
            rationales, gold, seed = rationales_of(sources), gold_of(self._data), self._recipe.seed

            def ordinary(max_pairs: int) -> list[PreferencePair]:
                return make_pairs(
                    problems,
                    rationales,
                    gold,
                    threshold=recipe.jaccard_threshold,
                    max_pairs=max_pairs,
                    gold_first=recipe.gold_first,
                    unfinished_rejected=recipe.unfinished_rejected,
                    equal_steps=recipe.equal_steps,
                )

            pairs = ordinary(recipe.max_per_problem)
            if has_rests:
                questions = {problem.id: problem.question for problem in problems}
                stepwise = stepwise_pairs(questions, rests_of(rests), max_pairs=recipe.max_per_problem)
                pairs = mixed(pairs, stepwise, recipe.stepwise if kinds == "by share" else 0, seed)
            wanted = len(pairs)
            if kinds == "as many":
                pairs = as_many(ordinary, wanted, recipe.max_per_problem, seed)
            write_jsonl(out / "pairs.jsonl", pairs)
            counts = {"stepwise": sum(bool(pair.prefix_ids) for pair in pairs)} if has_rests else {}
            lacking = {"lacking": wanted - len(pairs)} if len(pairs) < wanted else {}
            return {"pairs": len(pairs), "problems": len({pair.problem_id for pair in pairs}), **counts, **lacking}

        name, settings = StageName("pairs", number), self._settings("pairs")
        if kinds != "by share":
            settings["pairs"].pop("stepwise", None)  # without effect
            settings["pairs"] |= {"kinds": kinds} if has_rests else {}
        made = self._run.stage(str(name), pair, self._data, *sources, *rests, settings=settings)
        if lacking := made.metrics.get("lacking"):
            self._run.emit(
                "notice",
                text=f"{name}: scdpo has {lacking} pairs more than there are ordinary ones; raise "
                "sampling.samples_for_pairs to have as many",
            )
        return made

    def _sample_rests(self, number: int, policy: Artifact, samples: Artifact) -> Artifact:
        """Sample the rests of right rationales again, for step-controlled pairs."""
        name = StageName("rests", number)
        task = SampleRests(**self._to_sample(policy), samples_dir=samples.path, purpose=str(name))
        settings = self._settings(*MODEL_PARTS, "sampling", "rests")
        for key in ("temperature", "top_k", "top_p"):  # the rests have their own
            settings["sampling"].pop(key, None)
        stage = self._runner.sampled(name, task, policy, samples, self._data, settings=settings)
        if not stage.metrics["cuts"]:
            self._run.emit("notice", text=f"{name}: {NO_CUTS}")
        return stage

    def dpo(self, number: int, policy: Artifact, pairs: Artifact) -> Artifact:
        """Train the policy on preference pairs; return it, or `policy` if it does not clearly draw more (`dpo.gate`).

        Without any pair the policy itself is returned, with a notice.
        """
        name = StageName("dpo", number)
        if not pairs.metrics["pairs"]:
            self._run.emit(
                "notice",
                text=f"{name}: no preference pairs, so DPO is skipped; more sampling.samples_for_pairs may find some",
            )
            return policy
        task = TrainDpo(
            self._recipe, self._model_dir, pairs.path, policy.path, self._micro_batch_size("dpo"), self._backend
        )
        trained = self._runner.train(
            name, "dpo", task, policy, pairs, settings=self._settings("model", "dpo", *self._calculator_in("dpo"))
        )
        if failed := trained.metrics.get("rewards_failed"):
            self._run.emit("notice", text=f"{name}: the report will lack its token rewards ({failed}); see logs/")
        if not self._method.has_rounds:
            self._score(policy_name(number), trained)
            return trained
        has_old_labels = self._recipe.dpo.keep == "better" and self._was_drawn_without_gate(number)
        if not self._recipe.dpo.gate or has_old_labels:
            return trained
        return self._better(number, policy, trained)

    def _was_drawn_without_gate(self, number: int) -> bool:
        """Whether the round's labels were drawn from the DPO policy before there was a gate: the round keeps them."""
        record = self._run.path / str(StageName("samples-labels", number)) / "done.json"
        inputs = read_json(record)["inputs"] if record.is_file() else {}
        gate = str(StageName("gate", number))
        has_none = gate not in inputs and not (self._run.path / gate / "done.json").is_file()
        return has_none and str(StageName("dpo", number)) in inputs

    def _better(self, number: int, policy: Artifact, trained: Artifact) -> Artifact:
        """Return the policy after DPO if it clearly draws more distinct right rationales, else the one before."""
        name, sampling = StageName("gate", number), self._recipe.sampling
        num_train, per_problem = self._data.metrics["train"], sampling.samples_for_labels
        num_problems = num_compared(self._recipe.dpo.gate, num_train, sampling.samples_for_pairs, per_problem)
        task = CompareDraws(
            **self._to_sample(policy), dpo_dir=trained.path, purpose=str(name), num_problems=num_problems
        )
        settings = {**self._settings(*MODEL_PARTS, "sampling"), "num_samples": per_problem, "problems": num_problems}
        labels = self._settings("labels")["labels"]
        settings |= {key: labels[key] for key in ("jaccard_threshold", "duplicates") if key in labels}
        # What is drawn on dev follows from these too: a gate that was made without it keeps its fingerprint.
        is_kept = self._recipe.dpo.keep == "always"
        if is_kept:
            settings["keep"] = "always"
        stage = self._runner.sampled(name, task, policy, trained, self._data, settings=settings)
        if is_kept:
            return trained
        self._gates[number] = stage
        return trained if from_dict(Yields, stage.metrics).is_better else policy

    def labels(self, number: int, samples: list[Artifact]) -> Artifact:
        """Keep right rationales, deduplicate, cap, and join them with the gold ones."""
        recipe = self._recipe.labels
        drawn = [samples, self._for_pairs] if recipe.from_pairs else [samples]
        sources = [artifact for kind in drawn for artifact in _pooled(kind, recipe.pool_rounds)]
        rests = _pooled(self._rests, recipe.pool_rounds) if recipe.from_rests else []

        def label(out: Path) -> dict[str, Any]:
            labels = make_labels(
                problems_of(self._data, "train"),
                [*rationales_of(sources), *map(as_rationale, rests_of(rests))],
                gold_of(self._data),
                threshold=recipe.threshold,
                cap_percentile=recipe.cap_percentile,
                max_per_problem=recipe.max_per_problem,
            )
            write_jsonl(out / "labels.jsonl", labels)
            return {"labels": len(labels), "gold": sum(label.is_gold for label in labels)}

        settings = self._settings("labels")
        return self._run.stage(str(StageName("labels", number)), label, self._data, *sources, *rests, settings=settings)

    def has_converged(self) -> bool:
        """True when dev accuracy has not risen above its best for `patience` rounds."""
        patience = self._recipe.patience
        accuracies = [score.strict for score in self.dev_scores]
        if patience is None or not accuracies:
            return False
        return len(accuracies) - 1 - accuracies.index(max(accuracies)) >= patience

    def best_policy(self, policies: list[Artifact]) -> Artifact:
        """The policy with the best dev accuracy, the earlier of equals; without dev problems or rounds, the last."""
        accuracies = [score.strict for score in self.dev_scores] if self._method.has_rounds else []
        self.best = policies[accuracies.index(max(accuracies))] if accuracies else policies[-1]
        return self.best

    def export(self, policy: Artifact) -> Artifact:
        """Merge the adapter in 16 bit, write the GGUF file, and prove that it answers like the policy."""
        task = Export(self._recipe, self._model_dir, policy.path, policy.name, self._run.path)
        settings = self._settings("model", "export")
        score = self._scores[StageName.score(policy_of(policy.name))]  # whose answers the file's are compared with
        self.exported = self._runner.in_child(StageName("export"), task, policy, score, settings=settings, renew=True)
        return self.exported

    def solve(self, export: Artifact) -> Artifact:
        """Solve a few unseen problems with the exported file, with the calculator or code."""
        from dpost_lite.local.solver_process import SolverProcess

        def answer(out: Path) -> dict[str, Any]:
            with SolverProcess(
                export.path / export.metrics["file"],
                tools=Tools.from_recipe(self._recipe),
                max_new_tokens=self._recipe.sampling.max_new_tokens,
            ) as solver:
                solved: list[tuple[Problem, Any]] = []
                for problem in problems_of(self._data, "test"):
                    if len(solved) == NUM_SOLVED:
                        break
                    with contextlib.suppress(PromptTooLong):  # that one is not shown
                        solved.append((problem, solver.solve(problem.question)))
            rows = [
                {**asdict(p), "solution": {**asdict(s), "strict": predicted_answer(s.text, p.answer)}}
                for p, s in solved
            ]
            write_json(out / "solved.json", rows)
            return {"solved": len(solved)}

        name, settings = str(StageName("solved")), self._settings(*MODEL_PARTS)
        self.solved = self._run.stage(name, answer, export, self._data, settings=settings, renew=True)
        return self.solved

    def _score(self, name: str, policy: Artifact | None) -> None:
        """Grade greedy answers on dev, test and the further test sets; None scores the base model."""
        parts = tuple(part for part in ("dev", "test") if self._data.metrics[part])
        scores = self._graded(StageName.score(name), policy, self._data, parts)
        self.test_scores.append(scores["test"])
        if "dev" in scores and policy is not None:
            self.dev_scores.append(scores["dev"])
        if self._also is not None:
            scores = self._graded(StageName.score(name, also=True), policy, self._also, tuple(self._also.metrics))
            for part, score in scores.items():
                self.also_scores.setdefault(part, []).append(score)

    def _graded(
        self, name: StageName, policy: Artifact | None, data: Artifact, parts: tuple[str, ...]
    ) -> dict[str, Score]:
        """Grade greedy answers to the problems in some files of `data`."""
        settings = self._settings(*MODEL_PARTS, "sampling")
        for key in ("temperature", "top_k", "top_p"):  # a greedy answer depends on none of them
            settings["sampling"].pop(key, None)
        fields = {**self._to_sample(policy), "data_dir": data.path}
        task = GradeAnswers(**fields, policy_name=name.policy, parts=parts)
        inputs = (data,) if policy is None else (data, policy)
        self._scores[name] = stage = self._runner.sampled(name, task, *inputs, settings=settings)
        return {part: from_dict(Score, metrics) for part, metrics in stage.metrics.items()}

    def _sample(self, name: StageName, policy: Artifact, num_samples: int, *chosen_by: Artifact) -> Artifact:
        task = SampleRationales(**self._to_sample(policy), purpose=str(name), num_samples=num_samples)
        settings = {**self._settings(*MODEL_PARTS, "sampling"), "num_samples": num_samples}
        return self._runner.sampled(name, task, policy, self._data, *chosen_by, settings=settings)

    def _to_sample(self, policy: Artifact | None) -> dict[str, Any]:
        """The fields of a `SamplingTask`."""
        return {
            "recipe": self._recipe,
            "model_dir": self._model_dir,
            "data_dir": self._data.path,
            "policy_dir": policy.path if policy else None,
            "memory_gib": self._recipe.sampling.memory_gib,
        }

    def _calculator_in(self, section: Section) -> list[str]:
        """The calculator as a part that a training depends on, if what it writes is left out of the loss."""
        return [] if getattr(self._recipe, section).calculated_in_loss else ["calculator"]

    def _micro_batch_size(self, section: Section) -> int:
        settings = getattr(self._recipe, section)
        return min(settings.micro_batch_size, settings.batch_size)


def _pooled(rounds: list[Artifact], is_pooled: bool) -> list[Artifact]:
    """All rounds, or the newest alone."""
    return rounds if is_pooled else rounds[-1:]
