"""Prove that a GGUF file answers like the policy that was trained, before an export counts as done.

1. Prompts: the file's template renders as the tokenizer's (T5 has none), llama.cpp makes the same token ids of it, with
   as many BOS tokens as in training, and the token that ends an answer in training ends one in llama.cpp.
2. The 16-bit file: its probabilities are those of transformers in float32 (`BOUNDS`).
3. The quantised file beside the 16-bit one: KL divergence and equal top tokens, as quantisers publish them
   (`QUANT_BOUNDS` is far above what was measured).
4. Greedy answers of the solver beside the sampler's: reported, and an error only if `_is_far_below`.

Every failure is an ExportError that names the token, problem or tensor.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpost_lite.errors import ExportError
from dpost_lite.local import gguf, proof, t5
from dpost_lite.local.chat import render_chat
from dpost_lite.local.header import read_header
from dpost_lite.local.llama import file_type
from dpost_lite.local.proof import Difference, Row
from dpost_lite.models import exact
from dpost_lite.pipeline.evidence import NUM_RATIONALES, Evidence
from dpost_lite.problems.answers import is_right, predicted_answer
from dpost_lite.problems.comparing import bootstrap_mean, mcnemar
from dpost_lite.problems.grading import wilson_interval
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import GradedAnswer, Problem
from dpost_lite.problems.tools import Tools
from dpost_lite.recipe import Recipe

BOUNDS = {"f16": 1e-4, "bf16": 1e-3}
"""Largest mean KL divergence in nats of a 16-bit file from float32. Measured on SmolLM2-135M: 4e-7 and 2e-5; a norm
that is 2 % off gives 9e-5, a layer's q_proj in the wrong order 5e-2, a zeroed down_proj 9e-2.
"""
QUANT_BOUNDS = {"q8_0": 0.03, "q6_k": 0.06, "q5_k_m": 0.4, "q4_k_m": 0.4}
"""Largest mean KL divergence of a quantised file from 16 bit. Measured on SmolLM2-135M after training, where larger
models lose less: 1e-3, 3e-3, 2e-2 to 6e-2, 1e-2 to 2e-2.
"""
Solved = tuple[Mapping[str, GradedAnswer], float]
"""Greedy answers by problem, and the seconds that they took."""
NUM_EXACT = 4  # rationales that transformers evaluates in float32
MAX_BYTES = 2**30  # of the log-probabilities of one file, of which two lie on disk
MAX_LENGTH = 1024  # tokens of a prompt and its rationale


@dataclass(frozen=True, slots=True)
class Divergence:
    """A file's next-token distributions beside a reference's; means over rationales, with 95 % bootstrap intervals.

    `kl` in nats, `same_top` a share (0..1) of tokens; the others as in `local.proof.Difference`.
    """

    num_rationales: int
    num_tokens: int
    kl: float
    kl_low: float
    kl_high: float
    same_top: float
    same_top_low: float
    same_top_high: float
    largest_kl: float
    largest_gap: float

    @classmethod
    def of(cls, found: Sequence[Difference]) -> "Divergence":
        """Summarise the rationales."""
        kl, same_top = [one.kl for one in found], [one.same_top for one in found]
        return cls(
            len(found),
            sum(one.num_tokens for one in found),
            sum(kl) / len(kl),
            *bootstrap_mean(kl),
            sum(same_top) / len(same_top),
            *bootstrap_mean(same_top),
            largest_kl=max(one.largest_kl for one in found),
            largest_gap=max(one.largest_gap for one in found),
        )


@dataclass(frozen=True, slots=True)
class Answers:
    """A file's greedy answers through the solver: how many of `num_problems` are right, with 95 % Wilson interval.

    `num_same` have the same text as the reference's answers, `num_lost` are wrong where the reference is right,
    `num_won` right where it is wrong. `tokens_per_second` counts written tokens, over all the time.
    """

    part: str
    num_problems: int
    num_right: int
    low: float
    high: float
    num_same: int
    num_lost: int
    num_won: int
    tokens_per_second: float

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0..1."""
        return self.num_right / self.num_problems


class Prover:
    """Checks the files of one policy. `folder` takes log-probabilities, up to two times 1 GiB; `model_dir` holds the
    merged weights in 16 bit.
    """

    def __init__(self, prompter: Prompter, evidence: Evidence, folder: Path, model_dir: Path) -> None:
        self._prompter = prompter
        self._problems = evidence.problems
        self._folder = folder
        self._float32 = folder / "float32.npy"
        self._model_dir = model_dir
        config = gguf.read_config(model_dir)
        self._is_t5 = config["model_type"] == t5.MODEL_TYPE
        longest_prompt = t5.MAX_QUESTION if self._is_t5 else MAX_LENGTH
        self._rows = _rows(prompter, evidence, vocab_size=config["vocab_size"], longest_prompt=longest_prompt)
        prompts = [prompter.prompt(problem.question) for problem in self._problems]
        rationales = [prompter.notation.to_model(problem.rationale or "") for problem in self._problems]
        self._texts = [*prompts, *(prompt + text for prompt, text in zip(prompts, rationales, strict=True))]

    def evaluate(self, model: Any) -> None:
        """Keep the probabilities of `model`, the merged weights in transformers, which is not needed any longer."""
        rows = self._rows[:NUM_EXACT]
        proof.write_logprobs(self._float32, rows, lambda row: exact.logits(model, row.token_ids, row.start))

    def check_16_bit(self, file: Path) -> Divergence:
        """Check prompts and probabilities of a 16-bit file beside what was evaluated."""
        if not self._is_t5:  # it reads the bare question
            check_templates(file, self._prompter, self._problems)
        found = self._measure(file, reference=self._float32, written=self._folder / "16-bit.npy")
        kind = file_type(file)
        if not found.kl <= BOUNDS[kind]:  # NaN is no proof
            raise self._differs(file, f"the {kind} file", "float32", found, BOUNDS[kind])
        return found

    def compare_quantized(self, file: Path) -> Divergence:
        """Check a quantised file's prompts; compare it with the file of `check_16_bit`, which comes first."""
        written = self._folder / "quantised.npy"
        found = self._measure(file, reference=self._folder / "16-bit.npy", written=written)
        written.unlink()
        return found

    def check_quantized(self, file: Path, quant: str) -> Divergence:
        """As `compare_quantized`, within the bound of the type."""
        found = self.compare_quantized(file)
        if not is_within(found, quant):
            raise self._differs(file, f"the {quant} file", "16 bit", found, QUANT_BOUNDS[quant])
        return found

    def _measure(self, file: Path, *, reference: Path, written: Path) -> Divergence:
        stop = self._prompter.stop_id
        found = proof.measure(
            file, texts=self._texts, may_end=[stop], rows=self._rows, reference=reference, written=written
        )
        check_tokens(found.text_ids, self._texts, self._problems, self._prompter)
        if stop not in found.ending:
            token = self._prompter.tokenizer.convert_ids_to_tokens(stop)
            raise ExportError(
                f"llama.cpp would not stop at {token!r} (token {stop}), which ended every answer in training; name it "
                "as eos_token in the base's tokenizer_config.json"
            )
        return Divergence.of(found.differences)

    def _differs(self, file: Path, what: str, reference: str, found: Divergence, bound: float) -> ExportError:
        name, error = gguf.farthest_tensor(file, self._model_dir)
        where = (
            f"tensor {name} is farthest from the trained one (relative error {error:.2g})"
            if error > 0
            else "all tensors are equal, so a setting or the order of their rows differs"
        )
        return ExportError(
            f"{what} does not answer like the trained model: its KL divergence from {reference} is {found.kl:.2g} nats "
            f"a token on {found.num_rationales} rationales, at most {bound:g} is expected; {where}; export another "
            "type with --quant (export.quant), and report this"
        )


def is_within(divergence: Divergence, quant: str) -> bool:
    """Whether a quantised file is as near to 16 bit as its type should be."""
    return divergence.kl <= QUANT_BOUNDS[quant]  # NaN is not


def check_templates(file: Path, prompter: Prompter, problems: Sequence[Problem]) -> None:
    """Raise ExportError unless the file's chat template renders every question as the tokenizer's does."""
    header = read_header(file)
    if not (template := header.get("tokenizer.chat_template")):
        raise ExportError("the file carries no chat template; export from a model that has one")

    def token(name: str) -> str:
        number = header.get(f"tokenizer.ggml.{name}_token_id")
        return "" if number is None else prompter.tokenizer.convert_ids_to_tokens(number)

    bos, eos = token("bos"), token("eos")
    for problem in problems:
        asked = [{"role": "user", "content": problem.question}]
        rendered, trained = render_chat(template, asked, bos=bos, eos=eos), prompter.prompt(problem.question)
        if rendered != trained:
            at = _first_difference(rendered, trained)
            raise ExportError(
                f"the file's chat template writes the prompt of problem {problem.id} differently from character {at} "
                f"on: {rendered[at : at + 20]!r} instead of {trained[at : at + 20]!r}; use the template of training"
            )


def check_tokens(
    found: Sequence[Sequence[int]], texts: Sequence[str], problems: Sequence[Problem], prompter: Prompter
) -> None:
    """Raise ExportError unless `found` are the tokenizer's ids of `texts`, first the prompts of all problems, then
    prompts with rationales; and unless the prompts have as many BOS tokens as in training, one or none.
    """
    for place, (ids, text) in enumerate(zip(found, texts, strict=True)):
        problem = problems[place % len(problems)]
        bos, trained = prompter.tokenizer.bos_token_id, prompter.encode(text)
        counted, expected = _leading(ids, bos), _leading(prompter.prompt_ids(problem.question), bos)
        if counted != expected or expected > 1:
            raise ExportError(
                f"the prompt of problem {problem.id} starts with {counted} BOS tokens, in training with {expected}, "
                "and at most one is right; change bos_token in the chat template or tokenizer of the base"
            )
        if list(ids) != trained:
            at = _first_difference(ids, trained)
            names = [prompter.tokenizer.convert_ids_to_tokens(list(row[at : at + 1])) for row in (ids, trained)]
            raise ExportError(
                f"llama.cpp tokenises problem {problem.id} differently from token {at} on: {names[0]} instead of "
                f"{names[1]}, so it would answer worse; train from a base model with a supported tokenizer"
            )


def answer_all(
    file: Path, recipe: Recipe, problems: Sequence[Problem], answered: Callable[[int], None] = lambda _: None
) -> Solved:
    """Return the solver's greedy answers by problem, and the seconds they took; side by side where the model can.

    `answered` is called with the number of answers so far. Raises ExportError as the solver.
    """
    from dpost_lite.local.request import Request
    from dpost_lite.local.solver import NUM_PARALLEL
    from dpost_lite.local.solver_process import SolverProcess

    answers = {}
    limit = recipe.sampling.max_new_tokens
    tools, requests = Tools.from_recipe(recipe), [Request.of(problem.question) for problem in problems]
    with SolverProcess(file, tools=tools, max_new_tokens=limit, num_parallel=NUM_PARALLEL) as solver:
        started = time.monotonic()
        for problem, solved in zip(problems, solver.solve_all(requests), strict=True):
            predicted = predicted_answer(solved.text, problem.answer)
            right = is_right(predicted, solved.end, problem.answer)
            end: Literal["stop", "limit"] = "stop" if solved.end == "stop" else "limit"
            answers[problem.id] = GradedAnswer(problem.id, 0, solved.text, end, predicted, right)
            answered(len(answers))
        return answers, time.monotonic() - started


def compare_answers(
    part: str,
    found: Mapping[str, GradedAnswer],
    seconds: float,
    reference: Mapping[str, GradedAnswer],
    prompter: Prompter,
) -> Answers:
    """Compare answers with the reference's to the same problems."""
    pairs = [(answer, reference[i]) for i, answer in found.items()]
    num_right = sum(new.correct for new, _ in pairs)
    low, high = wilson_interval(num_right, len(pairs))
    return Answers(
        part,
        len(pairs),
        num_right,
        low,
        high,
        num_same=sum(new.text.strip() == old.text.strip() for new, old in pairs),
        num_lost=sum(old.correct and not new.correct for new, old in pairs),
        num_won=sum(new.correct and not old.correct for new, old in pairs),
        tokens_per_second=sum(len(prompter.answer_ids(new.text)) - 1 for new, _ in pairs) / max(seconds, 1e-9),
    )


def disk_bytes(vocab_size: int, max_new_tokens: int) -> int:
    """Return the most that the log-probabilities take on disk."""
    return 2 * min(MAX_BYTES, 4 * vocab_size * max_new_tokens * NUM_RATIONALES)


def check_answers(
    quant: str, answers: Answers, found: Mapping[str, GradedAnswer], sampled: Mapping[str, GradedAnswer]
) -> None:
    """Raise ExportError if the file's answers are far below the sampler's: less than half as many right, and more lost
    than chance explains (McNemar, p < 0.001). Smaller losses are quantisation's, and reported.
    """
    before = answers.num_right + answers.num_lost - answers.num_won
    if 2 * answers.num_right < before and mcnemar(answers.num_won, answers.num_lost) < 0.001:
        lost = next(i for i, answer in found.items() if sampled[i].correct and not answer.correct)
        is_exact = quant in ("f16", "q8_0")
        way_out = "report this" if is_exact else "choose a larger type with --quant (export.quant), such as q8_0"
        raise ExportError(
            f"the file solves {answers.num_right} of {answers.num_problems} {answers.part} problems, the policy "
            f"{before}; the first lost is {lost}; {way_out}"
        )


def _rows(prompter: Prompter, evidence: Evidence, *, vocab_size: int, longest_prompt: int = MAX_LENGTH) -> list[Row]:
    """Return the rationales that fit the limits with their prompts; if none does, a part of the first one."""
    rows: list[Row] = []
    room = MAX_BYTES // (4 * vocab_size)
    for rationale in evidence.rationales:
        prompt, answer = prompter.prompt_ids(rationale.question), rationale.token_ids
        fits = len(prompt) <= longest_prompt and len(prompt) + len(answer) <= MAX_LENGTH
        if fits and len(answer) <= room:
            rows.append(Row((*prompt, *answer), len(prompt)))
            room -= len(answer)
    if not rows:
        first = evidence.rationales[0]
        answer = first.token_ids[: MAX_LENGTH // 2]
        prompt = prompter.prompt_ids(first.question)[-min(longest_prompt, MAX_LENGTH - len(answer)) :]
        rows.append(Row((*prompt, *answer), len(prompt)))
    return rows


def _leading(ids: Sequence[int], bos: int | None) -> int:
    """Count the BOS tokens at the start."""
    return next((place for place, i in enumerate(ids) if i != bos), len(ids))


def _first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    pairs = zip(a, b, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(a), len(b)))
