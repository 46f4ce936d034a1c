"""What the stages that need a model do: read the inputs' folders, work, write the stage's own.

Each runs in a process of its own (pipeline/worker.py), which ends with it: what stays are files.
`out` is the stage's folder, `progress` as in `Run.progress`; what is returned are the stage's metrics.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpost_lite.errors import DataError
from dpost_lite.models import adapters
from dpost_lite.models.backends import load_prompter
from dpost_lite.models.training import Progress
from dpost_lite.pipeline.export import export_gguf
from dpost_lite.problems.corpus import Corpus, load_corpus
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
from dpost_lite.recipe import Recipe
from dpost_lite.runs.folder import UNFINISHED
from dpost_lite.sampling.sampler import sample_by_recipe


def prepare_data(out: Path, *, recipe: Recipe, model_dir: Path, progress: Progress) -> dict[str, Any]:
    """Load, split and check problems, tokenise gold rationales. Writes train, dev, test and labels (gold) as JSONL."""
    corpus = load_corpus(recipe.data, recipe.synthetic, seed=recipe.seed)
    gold = _gold(corpus, recipe, model_dir)
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


def train_sft(
    out: Path, labels_dir: Path, *, recipe: Recipe, model_dir: Path, micro_batch_size: int, progress: Progress
) -> dict[str, Any]:
    """Train on the labelled rationales in `labels_dir`, from the base. Writes the policy."""
    from dpost_lite.models import sft

    return sft.train_sft(
        adapters.load_for_sft(model_dir, recipe),
        load_prompter(model_dir, recipe.model),
        list(read_jsonl(labels_dir / "labels.jsonl", LabelledRationale)),
        out,
        recipe=recipe.sft.model_copy(update={"micro_batch_size": micro_batch_size}),
        seed=recipe.seed,
        progress=progress,
        checkpoint_s=recipe.checkpoint_s,
        report_to=recipe.report_to,
    )


def train_dpo(
    out: Path,
    pairs_dir: Path,
    policy_dir: Path,
    *,
    recipe: Recipe,
    model_dir: Path,
    micro_batch_size: int,
    progress: Progress,
) -> dict[str, Any]:
    """Train the policy in `policy_dir` on the preference pairs in `pairs_dir`. Writes the policy."""
    from dpost_lite.models import dpo

    return dpo.train_dpo(
        adapters.load_for_dpo(model_dir, policy_dir, recipe),
        load_prompter(model_dir, recipe.model),
        list(read_jsonl(pairs_dir / "pairs.jsonl", PreferencePair)),
        out,
        recipe=recipe.dpo.model_copy(update={"micro_batch_size": micro_batch_size}),
        seed=recipe.seed,
        progress=progress,
        checkpoint_s=recipe.checkpoint_s,
        report_to=recipe.report_to,
    )


def draw(
    out: Path,
    data_dir: Path,
    policy_dir: Path,
    *,
    recipe: Recipe,
    model_dir: Path,
    purpose: str,
    num_samples: int,
    memory_gib: float | None,
    progress: Progress,
) -> dict[str, Any]:
    """Draw and grade rationales for every training problem. Writes them in the order of (problem, sample)."""
    recipe = _with_memory(recipe, memory_gib)
    problems = list(read_jsonl(data_dir / "train.jsonl", Problem))
    drawn = _drawn(
        out / "rationales.jsonl",
        adapters.load_policy(model_dir, policy_dir, recipe),
        problems,
        recipe,
        model_dir,
        purpose=purpose,
        num_samples=num_samples,
        temperature=recipe.sampling.temperature,
        progress=progress,
    )
    return {
        "rationales": len(drawn),
        "right": sum(r.correct for r in drawn),
        "unfinished": sum(r.end == "limit" for r in drawn),
        "calculated": sum(r.num_calculated for r in drawn),
        "refused": sum(r.num_refused for r in drawn),
        "tokens": sum(len(r.token_ids) for r in drawn),
    }


def grade(
    out: Path,
    data_dir: Path,
    policy_dir: Path | None,
    *,
    recipe: Recipe,
    model_dir: Path,
    policy_name: str,
    parts: list[str],
    memory_gib: float | None,
    progress: Progress,
) -> dict[str, Any]:
    """Grade greedy answers to the problems of each part; no `policy_dir` grades the base. Writes them by part."""
    recipe = _with_memory(recipe, memory_gib)
    metrics = {}
    model = adapters.load_policy(model_dir, policy_dir, recipe)
    for part in parts:
        problems = list(read_jsonl(data_dir / f"{part}.jsonl", Problem))
        file = out / f"{part}.jsonl"
        graded = _drawn(file, model, problems, recipe, model_dir, purpose=f"score/{part}", progress=progress)
        metrics[part] = asdict(score(policy_name, graded, problems, has_calculator=recipe.calculator.enabled))
    return metrics


def export(
    out: Path, policy_dir: Path, *, recipe: Recipe, model_dir: Path, policy: str, progress: Progress
) -> dict[str, Any]:
    """Write the policy, whose name is `policy`, as a GGUF file."""
    file = export_gguf(recipe, model_dir, policy_dir, out / f"model-{recipe.export.quant}.gguf")
    return {"policy": policy, "file": file.name, "bytes": file.stat().st_size}


def _with_memory(recipe: Recipe, memory_gib: float | None) -> Recipe:
    sampling = recipe.sampling.model_copy(update={"memory_gib": memory_gib})
    return recipe.model_copy(update={"sampling": sampling})


def _drawn(
    file: Path,
    model: Any,
    problems: list[Problem],
    recipe: Recipe,
    model_dir: Path,
    *,
    purpose: str,
    num_samples: int = 1,
    temperature: float = 0.0,
    progress: Progress,
) -> list[Rationale]:
    """Draw rationales and write them to `file`, in the order of (problem, sample).

    As they end they are appended to a shard below; one that a stopped process left is gone on with.
    """
    total, shard = len(problems) * num_samples, file.parent / UNFINISHED / file.name
    if file.exists():  # a part of the stage that was done before it was stopped
        return list(read_jsonl(file, Rationale))
    done = resume_jsonl(shard, Rationale)
    num_right = sum(rationale.correct for rationale in done)
    with shard.open("a", encoding="utf-8", newline="\n") as appended:
        for rationale in sample_by_recipe(
            model,
            load_prompter(model_dir, recipe.model),
            problems,
            recipe,
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


def _gold(corpus: Corpus, recipe: Recipe, model_dir: Path) -> list[LabelledRationale]:
    prompter = load_prompter(model_dir, recipe.model)
    gold = [
        LabelledRationale(p.id, p.question, p.rationale, prompter.answer_ids(p.rationale), is_gold=True)
        for p in corpus.train
        if p.rationale
    ]
    if not gold:
        raise DataError(
            f"data.train={recipe.data.train}: no problem carries a worked solution ending in '#### N', "
            "and the warm-up needs some; add solutions to a few dozen problems"
        )
    return gold
