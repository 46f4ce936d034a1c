"""What an exported file is compared on: a run's own problems, rationales and greedy answers, or built-in problems."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dpost_lite.local.t5 import MAX_QUESTION
from dpost_lite.problems.prompts import EncoderDecoderPrompter, Prompter
from dpost_lite.problems.records import GradedAnswer, LabelledRationale, Problem, Rationale, read_jsonl
from dpost_lite.problems.synthetic import generate
from dpost_lite.runs.folder import read_json
from dpost_lite.runs.stage_names import BASE, StageName, policy_of, rounds_in

NUM_PROMPTS = 200
NUM_RATIONALES = 16
NUM_DEV = 200


@dataclass(frozen=True, slots=True)
class Evidence:
    """Problems to tokenise, right rationales to compare probabilities on, the dev problems, and the problems of `part`
    (dev or test) whose greedy answers by the sampler are in `sampled`.
    """

    problems: tuple[Problem, ...]
    rationales: tuple[LabelledRationale, ...]
    dev: tuple[Problem, ...] = ()
    part: str = "dev"
    answered: tuple[Problem, ...] = ()
    sampled: Mapping[str, GradedAnswer] = field(default_factory=dict)
    merges: Mapping[str, int] | None = None
    """What the run's own export of the policy measured of the two ways to merge."""


def of_run(run: Path, stage: str | None, prompter: Prompter) -> Evidence:
    """Return the evidence in a run's folder for a policy, given its name or the `stage` that trained it (None: the
    base).

    Without samples that are right, the gold rationales are used. An unscored policy has no greedy answers. Problems
    that the file cannot read are left out.
    """
    parts = {
        part: tuple(p for p in read_jsonl(run / "data" / f"{part}.jsonl", Problem) if is_readable(p, prompter))
        for part in ("dev", "test", "train")
    }
    part = "dev" if parts["dev"] else "test"
    sampled = {answer.problem_id: answer for answer in _sampled(run, stage or BASE, part)}
    return Evidence(
        problems=(*parts["dev"], *parts["test"], *parts["train"])[:NUM_PROMPTS],
        rationales=_rationales(run, {problem.id: problem for problem in parts["train"]}),
        dev=parts["dev"][:NUM_DEV],
        part=part,
        answered=tuple(problem for problem in parts[part] if problem.id in sampled)[:NUM_DEV],
        sampled=sampled,
        merges=_merges(run, stage or BASE),
    )


def is_readable(problem: Problem, prompter: Prompter) -> bool:
    """Whether llama.cpp can read a question: an encoder reads MAX_QUESTION tokens, other models all that fit."""
    if not isinstance(prompter, EncoderDecoderPrompter):
        return True
    return len(prompter.prompt_ids(problem.question)) <= MAX_QUESTION


def _merges(run: Path, stage: str) -> Mapping[str, int] | None:
    file = run / "export" / "done.json"
    found = read_json(file)["metrics"] if file.is_file() else {}
    trained = found.get("policy", "")
    is_same = stage in (trained, policy_of(trained))
    return (found.get("proof") or {}).get("merges") if is_same else None


def _sampled(run: Path, stage: str, part: str) -> Iterator[GradedAnswer]:
    """Yield the sampler's greedy answers for a policy, if it was scored: of a round, one of two policies is."""
    policy = policy_of(stage)
    folder = run / str(StageName.score(policy))
    if (folder / "done.json").is_file() and stage in (policy, *read_json(folder / "done.json")["inputs"]):
        yield from read_jsonl(folder / f"{part}.jsonl", GradedAnswer)


def built_in(prompter: Prompter) -> Evidence:
    """Return built-in problems with their own rationales, for a model without a run."""
    problems = generate(NUM_PROMPTS, seed=0)
    written = [(p, p.rationale) for p in problems[:NUM_RATIONALES] if p.rationale]
    rationales = (LabelledRationale(p.id, p.question, text, prompter.answer_ids(text), True) for p, text in written)
    return Evidence(tuple(problems), tuple(rationales))


def _rationales(run: Path, problems: Mapping[str, Problem]) -> tuple[LabelledRationale, ...]:
    """Return a right rationale for each of a few problems: of the last sampling stage, else gold ones."""
    for number in reversed(rounds_in(run)):
        for kind in ("samples-labels", "samples-pairs"):
            file = run / f"round-{number}" / kind / "rationales.jsonl"
            if file.is_file() and (found := _one_each(read_jsonl(file, Rationale))):
                return tuple(
                    LabelledRationale(r.problem_id, problems[r.problem_id].question, r.text, r.token_ids, False)
                    for r in found
                    if r.problem_id in problems
                )[:NUM_RATIONALES]
    gold = read_jsonl(run / "data" / "labels.jsonl", LabelledRationale)
    return tuple(label for label in gold if label.problem_id in problems)[:NUM_RATIONALES]


def _one_each(rationales: Iterator[Rationale]) -> list[Rationale]:
    first: dict[str, Rationale] = {}
    for rationale in rationales:
        if rationale.correct and rationale.end == "stop":
            first.setdefault(rationale.problem_id, rationale)
    return list(first.values())
