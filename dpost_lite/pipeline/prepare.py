"""The tasks of the data stages: load problems, check them, and write them as the other tasks read them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError
from dpost_lite.models.loading import load_prompter
from dpost_lite.models.training import Progress
from dpost_lite.pipeline.tasks import ModelTask
from dpost_lite.problems.code_data import summary, with_code
from dpost_lite.problems.corpus import Corpus, load_also, load_corpus
from dpost_lite.problems.records import LabelledRationale, Problem, read_jsonl, write_jsonl
from dpost_lite.sandbox.choose import sandbox


@dataclass(frozen=True, slots=True)
class PrepareData(ModelTask):
    """Load, split and check problems; tokenise gold rationales. Writes train, dev, test and labels (gold) as JSONL."""

    def run(self, out: Path, progress: Progress) -> dict[str, Any]:
        corpus = load_corpus(self.recipe.data, self.recipe.synthetic, seed=self.recipe.seed)
        converted: dict[str, Any] = {}
        if self.recipe.solutions == "code":
            corpus, converted = self._with_code(corpus)
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
            **converted,
        }

    def _with_code(self, corpus: Corpus) -> tuple[Corpus, dict[str, Any]]:
        """Give the training problems solutions with code; return metrics too."""
        code = self.recipe.code
        with sandbox(code.sandbox, code.limits) as box:
            train, reasons = with_code(corpus.train, box, code)
        if reasons:
            print(f"rationales that did not become programs: {summary(reasons)}", flush=True)
        return replace(corpus, train=train), {"without_program": reasons.total()}

    def _gold(self, corpus: Corpus) -> list[LabelledRationale]:
        prompter = load_prompter(self.model_dir, self.recipe.model)
        gold = [
            LabelledRationale(p.id, p.question, p.rationale, prompter.answer_ids(p.rationale), is_gold=True)
            for p in corpus.train
            if p.rationale
        ]
        if not gold:
            raise DataError(
                f"data.train={self.recipe.data.train}: no problem has a worked solution ending in '#### N' or "
                "in a box of LaTeX (\\boxed{N}), and the warm-up needs some; add solutions to a few dozen problems"
            )
        return gold


@dataclass(frozen=True, slots=True)
class PrepareAlso(ModelTask):
    """Load the further test sets and compare them with the training problems in `data_dir`. Writes each as JSONL."""

    data_dir: Path

    def run(self, out: Path, progress: Progress) -> dict[str, Any]:
        recipe, train = self.recipe, list(read_jsonl(self.data_dir / "train.jsonl", Problem))
        sets = load_also(recipe.data, recipe.synthetic, train, seed=recipe.seed)
        for name, problems in sets.items():
            write_jsonl(out / f"{name}.jsonl", problems)
        return {name: len(problems) for name, problems in sets.items()}
