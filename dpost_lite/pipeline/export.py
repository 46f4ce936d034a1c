"""Export a policy, an adapter on its base or weights of its own, to GGUF, and prove that the file answers like it."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dpost_lite.errors import ExportError, is_out_of_memory
from dpost_lite.local import gguf, llama
from dpost_lite.local.gguf import QUANTS, Quant
from dpost_lite.local.header import read_header
from dpost_lite.models import adapters
from dpost_lite.models.adapters import Base
from dpost_lite.models.loading import load_prompter, return_freed_memory
from dpost_lite.models.onednn_layout import use_blocked_layout
from dpost_lite.models.training import Progress
from dpost_lite.pipeline.evidence import Evidence, built_in, of_run
from dpost_lite.pipeline.proof import (
    Answers,
    Divergence,
    Prover,
    Solved,
    answer_all,
    check_answers,
    compare_answers,
    is_within,
)
from dpost_lite.pipeline.streaming import can_be_streamed, export_streamed
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import GradedAnswer, Problem
from dpost_lite.recipe import Recipe, solution_format
from dpost_lite.sampling.sampler import sample_by_recipe

NUM_ANSWERS = 50  # problems that the file answers, to compare with the sampler
DIGESTED_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class Size:
    """One quantisation of a policy: `divergence` from 16 bit (None: it is the 16-bit file), and dev `answers` beside
    those of the 16-bit file.
    """

    quant: Quant
    num_bytes: int
    divergence: Divergence | None
    answers: Answers


@dataclass(frozen=True, slots=True)
class Merges:
    """Right greedy answers of the sampler to `num_problems` dev problems, by the base that was merged onto."""

    num_problems: int
    dequantized: int
    original: int


@dataclass(frozen=True, slots=True)
class Proof:
    """What an export was checked on: prompts whose tokens are equal, the 16-bit file beside transformers in float32
    (`exact`), the file beside the 16-bit one, its greedy answers beside the sampler's, and what a choice was made by.
    """

    num_prompts: int
    exact: Divergence
    quantized: Divergence | None
    answers: Answers | None
    sizes: tuple[Size, ...] = ()
    merges: Merges | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """The file, its quantisation, the base that was merged onto (None if there was one way only), and its proof (None
    where llama.cpp is missing).
    """

    file: Path
    quant: Quant
    merge: Base | None
    proof: Proof | None

    def named(self) -> "Exported":
        """Give the file the name of its quantisation if it was written as model-auto.gguf."""
        return replace(self, file=self.file.replace(self.file.with_stem(self.file.stem.replace("auto", self.quant))))

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures as a stage records them: the main ones, and all as `proof`."""
        proof = self.proof
        found = {
            "file": self.file.name, "bytes": self.file.stat().st_size, "quant": self.quant, "merge": self.merge,
        }  # fmt: skip
        if proof is None:
            return {**found, "proof": None}
        return {
            **found,
            "kl_to_16_bit": proof.quantized.kl if proof.quantized else None,
            "same_top_token": proof.quantized.same_top if proof.quantized else None,
            "flipped": proof.answers.num_lost + proof.answers.num_won if proof.answers else None,
            "proof": {**asdict(proof), "sizes": [asdict(size) for size in proof.sizes]},  # a list, as in JSON
        }


def export_gguf(
    recipe: Recipe,
    model_dir: Path,
    policy_dir: Path | None,
    out: Path,
    *,
    run: Path | None = None,
    stage: str | None = None,
    solves: bool = True,
    progress: Progress = lambda *_, **__: None,
) -> Exported:
    """Merge a policy in 16 bit, write `out` as GGUF, quantised as `recipe.export` says, and prove it.

    `run` is the folder of the run whose `stage` trained the policy: the proof is on its problems and rationales;
    without it, or before it has any, on built-in ones. `solves` is False where the model must not answer any, because
    its answers hold code. `progress` hears of answers. The merged model is in memory until its own probabilities are
    known. Where llama.cpp cannot be imported, f16 and q8_0 are written one tensor at a time (`streaming.py`) and not
    proved. Raises ExportError if the file cannot be made, or fails its proof; nothing is left then.
    """
    noted = {**solution_format(recipe), gguf.POLICY_KEY: digest(recipe, model_dir, policy_dir)}
    try:
        llama.system_info()
    except ExportError as error:
        quant = recipe.export.quant
        if not can_be_streamed(policy_dir):
            raise
        if quant not in ("f16", "q8_0"):
            raise ExportError(f"{error}; or export f16 or q8_0, which need no llama.cpp") from error
        onto: Base = "original" if recipe.export.merge == "original" else "dequantized"
        export_streamed(recipe, model_dir, policy_dir, out, quant=quant, onto=onto, noted=noted)
        return Exported(out, quant, onto if adapters.has_two_merges(recipe.model, policy_dir) else None, None)
    prompter = load_prompter(model_dir, recipe.model)  # its tokenizer carries the prompt as the chat template
    evidence = of_run(run, stage, prompter) if run and (run / "data" / "done.json").is_file() else built_in(prompter)
    if recipe.export.quant == "auto" and not (evidence.dev and solves):
        lacking = "there are no dev problems" if solves else "the solutions hold code, which is run in `run` only"
        raise ExportError(f"--quant auto (export.quant): {lacking}; name a type such as q4_k_m")
    folder = out.with_name(f"{out.name}.merged")
    shutil.rmtree(folder, ignore_errors=True)  # left by a command that was killed
    folder.mkdir(parents=True)
    try:
        model, merge, merges = _merged(recipe, model_dir, policy_dir, prompter, evidence, solves=solves)
        for key, value in noted.items():
            setattr(model.config, f"dpost_lite_{key}", value)  # for the GGUF file's metadata
        adapters.save_merged(model, prompter.tokenizer, folder / "model")
        prover = Prover(prompter, evidence, folder, folder / "model")
        prover.evaluate(model)
        del model
        return_freed_memory()  # for llama.cpp
        writer = _Writer(recipe, prompter, evidence, prover, folder / "model", solves, progress)
        quant, proof = writer.smallest(out) if recipe.export.quant == "auto" else writer.one(recipe.export.quant, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Exported(out, quant, merge, replace(proof, merges=merges))


def digest(recipe: Recipe, model_dir: Path, policy_dir: Path | None) -> str:
    """Return what tells one export from another, whatever its type: of the base, the policy, and the way to merge.

    Of weights, names, sizes and the last bytes are taken: training changes all of them.
    """
    found = hashlib.sha256(recipe.model.precision.encode())
    if adapters.has_two_merges(recipe.model, policy_dir):
        found.update(recipe.export.merge.encode())
    for folder in filter(None, (model_dir, policy_dir)):
        for file in sorted(folder.glob("*.safetensors")):
            size = file.stat().st_size
            found.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                stream.seek(max(0, size - DIGESTED_BYTES))
                found.update(stream.read())
    return found.hexdigest()[:16]


def holds(file: Path, recipe: Recipe, model_dir: Path, policy_dir: Path | None) -> bool:
    """Whether a GGUF file is the export of this policy, in the type that `recipe.export` names."""
    is_same = read_header(file).get(f"dpost_lite.{gguf.POLICY_KEY}") == digest(recipe, model_dir, policy_dir)
    return is_same and recipe.export.quant in ("auto", llama.file_type(file))


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes and proves files of one policy, whose weights in 16 bit are in the folder `merged`."""

    recipe: Recipe
    prompter: Prompter
    evidence: Evidence
    prover: Prover
    merged: Path
    solves: bool
    progress: Progress

    def one(self, quant: Quant, out: Path) -> tuple[Quant, Proof]:
        """Write one type; `out` is there only once it is proved."""
        proofs = []

        def check(source: Path, file: Path) -> None:
            exact = self.prover.check_16_bit(source)
            quantized = None if file == source else self.prover.check_quantized(file, quant)
            proofs.append(self._proof(exact, quantized, self._beside_sampler(file, quant)))

        gguf.export(self.merged, out, quant=quant, check=check)
        return quant, proofs[0]

    def smallest(self, out: Path) -> tuple[Quant, Proof]:
        """Write all types, and keep the smallest whose dev accuracy is within `max_loss` points of 16 bit."""
        files: dict[Quant, Path] = {quant: out.with_name(f"{out.name}.{quant}") for quant in QUANTS}
        try:
            with gguf.source_file(self.merged, out, QUANTS) as source:
                exact = self.prover.check_16_bit(source)
                dev = self.evidence.dev
                answers: dict[Quant, Solved] = {"f16": self._answers(source, dev, 0, len(QUANTS))}
                sizes = [self._size("f16", source, None, answers)]
                for place, quant in enumerate(reversed(QUANTS[:-1]), start=1):
                    gguf.quantize(self.merged, source, files[quant], quant)
                    answers[quant] = self._answers(files[quant], dev, place, len(QUANTS))
                    divergence = self.prover.compare_quantized(files[quant])
                    sizes.append(self._size(quant, files[quant], divergence, answers))
                best = smallest_within(sizes, self.recipe.export.max_loss)
                compared = self._compared(best.quant, *answers[best.quant])
                (source if best.quant == "f16" else files[best.quant]).replace(out)
        finally:
            for file in files.values():
                file.unlink(missing_ok=True)
        return best.quant, replace(self._proof(exact, best.divergence, compared), sizes=tuple(sizes))

    def _size(self, quant: Quant, file: Path, divergence: Divergence | None, answers: Mapping[Quant, Solved]) -> Size:
        compared = compare_answers("dev", *answers[quant], answers["f16"][0], self.prompter)
        return Size(quant, file.stat().st_size, divergence, compared)

    def _beside_sampler(self, file: Path, quant: Quant) -> Answers | None:
        """Let a file answer, if it may and the sampler's answers are there."""
        problems = self.evidence.answered[:NUM_ANSWERS] if self.solves else ()
        return self._compared(quant, *self._answers(file, problems, 0, 1)) if problems else None

    def _answers(self, file: Path, problems: Sequence[Problem], place: int, num_files: int) -> Solved:
        """Answer with the file in this `place` of several."""
        before, total = place * len(problems), num_files * len(problems)
        return answer_all(file, self.recipe, problems, lambda done: self.progress(before + done, total, "answers"))

    def _compared(self, quant: Quant, found: Mapping[str, GradedAnswer], seconds: float) -> Answers | None:
        """Compare answers with the sampler's, if it has given some."""
        sampled = self.evidence.sampled
        if not found.keys() <= sampled.keys():
            return None
        answers = compare_answers(self.evidence.part, found, seconds, sampled, self.prompter)
        check_answers(quant, answers, found, sampled)
        return answers

    def _proof(self, exact: Divergence, quantized: Divergence | None, answers: Answers | None) -> Proof:
        return Proof(len(self.evidence.problems), exact, quantized, answers)


def smallest_within(sizes: Sequence[Size], max_loss: float) -> Size:
    """Return the smallest file whose accuracy is at most `max_loss` points below that of f16, which is among them.

    One whose distributions are farther from 16 bit than its type's should be is not taken, however it answers.
    """
    best = next(size.answers.num_right for size in sizes if size.quant == "f16")
    near = [
        size
        for size in sizes
        if 100 * (best - size.answers.num_right) <= max_loss * size.answers.num_problems
        and (size.divergence is None or is_within(size.divergence, size.quant))
    ]
    return min(near, key=lambda size: size.num_bytes)


def _merged(
    recipe: Recipe,
    model_dir: Path,
    policy_dir: Path | None,
    prompter: Prompter,
    evidence: Evidence,
    *,
    solves: bool,
) -> tuple[Any, Base | None, Merges | None]:
    """Return the merged model, what it was merged onto if there are two ways, and what decided that."""
    # on the CPU if the GPU had no room for merged weights to sample from
    on = None if recipe.sampling.weights == "merged" else "cpu"
    if policy_dir is None or not adapters.has_two_merges(recipe.model, policy_dir):
        return adapters.load_merged(model_dir, policy_dir, recipe.model, on=on), None, None
    onto, merges = recipe.export.merge, None
    if onto == "auto":
        if evidence.merges is not None:
            merges = Merges(**evidence.merges)
        elif on is None and solves:
            merges = _measured(recipe, model_dir, policy_dir, prompter, evidence)
        onto = "original" if merges and merges.original > merges.dequantized else "dequantized"
    return adapters.load_merged(model_dir, policy_dir, recipe.model, onto=onto, on=on), onto, merges


def _measured(
    recipe: Recipe, model_dir: Path, policy_dir: Path, prompter: Prompter, evidence: Evidence
) -> Merges | None:
    """Count the right greedy answers on dev of both ways to merge. Those of the run are onto the dequantised base.

    None without dev problems, or if there is not enough memory.
    """
    dev = evidence.dev
    if not dev:
        return None

    def num_right(onto: Base) -> int:
        merged = adapters.load_merged(model_dir, policy_dir, recipe.model, onto=onto)
        model = use_blocked_layout(merged)
        return sum(r.correct for r in sample_by_recipe(model, prompter, dev, recipe, purpose="score/dev"))

    known = evidence.sampled if evidence.part == "dev" else {}
    is_known = all(problem.id in known for problem in dev)
    try:
        dequantized = sum(known[p.id].correct for p in dev) if is_known else num_right("dequantized")
        return Merges(len(dev), dequantized, num_right("original"))
    except Exception as error:
        if is_out_of_memory(error):
            return None
        raise
