"""The records of a run, and how they are written to and read from JSONL.

Field names are the keys in the files. Token ids are kept with the text from sampler to trainer: model output is never
tokenised again.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar


@dataclass(frozen=True, slots=True)
class Problem:
    """One maths word problem.

    `answer` is the final number in canonical form ("18", "-2.5"), or else LaTeX (`\\frac{\\pi}{2}`). `rationale` is a
    worked solution ending in `#### N` or in `\\boxed{…}`, if the source has one; the problem is then labelled.
    """

    id: str
    question: str
    answer: str
    rationale: str | None = None


@dataclass(frozen=True, slots=True)
class Rationale:
    """One sampled and graded answer to a problem.

    `token_ids` are the answer's tokens: without the prompt, with the stop token if there was one. `forced` has a 1 for
    each token the calculator inserted and a 0 for each token the model chose. `end` is "stop", or "limit" if the answer
    was cut off. `logprob` is the sum of log π(token) over the sampled tokens, in nats, at temperature 1.
    `num_calculated` counts expressions the calculator completed, `num_refused` those it left to the model.
    """

    problem_id: str
    sample: int
    text: str
    token_ids: tuple[int, ...]
    forced: tuple[int, ...]
    logprob: float
    end: Literal["stop", "limit"]
    predicted: str | None
    correct: bool
    num_calculated: int = 0
    num_refused: int = 0


@dataclass(frozen=True, slots=True)
class LabelledRationale:
    """A right rationale for SFT: a gold one, or a pseudo-label written by the model itself."""

    problem_id: str
    question: str
    text: str
    token_ids: tuple[int, ...]
    is_gold: bool


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One DPO example: a right (chosen) and a wrong (rejected) rationale of the same problem, as token ids.

    In a step-controlled pair they are two rests after the same first steps, `prefix`.
    """

    problem_id: str
    question: str
    chosen: str
    rejected: str
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    prefix: str = ""
    prefix_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Rest:
    """A rest that was sampled again after the first steps of a right rationale, and graded.

    `kept` are those steps, of the problem's rationale with the number `sample`, and `right` its own rest; `text` is the
    new one. `attempt` counts the rests of one cut. `end`, `predicted` and `correct` as in `Rationale`.
    """

    problem_id: str
    sample: int
    attempt: int
    kept: str
    right: str
    text: str
    kept_ids: tuple[int, ...]
    right_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    end: Literal["stop", "limit"]
    predicted: str | None
    correct: bool

    @property
    def cut(self) -> tuple[str, int, int]:
        """The problem, its rationale, and the number of tokens that are kept of it."""
        return self.problem_id, self.sample, len(self.kept_ids)


@dataclass(frozen=True, slots=True)
class RewardedRationale:
    """A rejected rationale with the reward of each of its tokens after DPO (models/credit.py).

    `tokens` are their texts ("" for special tokens), `rewards` are dimensionless, below 0 where DPO made the token less
    likely. `kept` are the first steps of a step-controlled pair, which have no rewards. `answer` is the paired right
    one.
    """

    problem_id: str
    question: str
    answer: str
    kept: str
    tokens: tuple[str, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GradedAnswer:
    """One graded answer of an evaluation, with its question and right answer (both empty in a run's own scores).

    `num_calculated` and `num_refused` as in `Rationale`.
    """

    problem_id: str
    sample: int
    text: str
    end: Literal["stop", "limit"]
    predicted: str | None
    correct: bool
    num_calculated: int = 0
    num_refused: int = 0
    question: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """Greedy accuracy (0..1) of one model on one set of problems.

    `low` and `high` are the 95 % Wilson interval of `strict`; `num_calculated` and `num_refused` are sums over all
    answers, as in `Rationale`.
    """

    name: str
    num_problems: int
    strict: float
    flexible: float
    low: float
    high: float
    num_unfinished: int
    num_calculated: int
    num_refused: int
    calculator: bool = True
    code: bool = False
    """Whether code in the answers was run; `num_calculated` and `num_refused` then count its blocks."""
    num_unparsed: int = 0
    """Answers without a prediction, such as those with no number after `####`."""
    num_characters: int = 0
    """Total length of all answers."""


@dataclass(frozen=True, slots=True)
class SampledScore:
    """Accuracy (0..1) over several samples per problem: `pass_at[k]`, at least one of k is right; `majority`, the most
    frequent answer of all samples is.
    """

    name: str
    num_problems: int
    num_samples: int
    pass_at: dict[int, float]
    majority: float
    calculator: bool = True
    code: bool = False


Record = TypeVar("Record")


def file_name(text: str) -> str:
    """Return `text` as a file name that is valid on any system."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "model"


def write_jsonl(path: Path, records: Iterable[Any]) -> int:
    """Write records to `path` as JSONL through a temporary file, flushed to disk and renamed; return how many."""
    temporary = path.with_name(path.name + ".partial")
    num_records = 0
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(as_line(record))
            num_records += 1
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return num_records


def append_jsonl(file: TextIO, record: Any) -> None:
    """Append one record to an open file and flush it, so that a killed process loses no complete line."""
    file.write(as_line(record))
    file.flush()


def resume_jsonl(path: Path, kind: type[Record]) -> list[Record]:
    """Return the records that an interrupted process appended; truncate the file at the first broken line."""
    if not path.exists():
        return []
    records, whole = [], 0
    with path.open("rb") as file:
        for line in file:
            try:
                record = from_dict(kind, json.loads(line)) if line.endswith(b"\n") else None
            except (ValueError, TypeError, AttributeError):
                record = None
            if record is None:
                break
            records.append(record)
            whole += len(line)
    os.truncate(path, whole)
    return records


def as_line(record: Any) -> str:
    """Return a record as one line of JSON, newline included."""
    return json.dumps(asdict(record), ensure_ascii=False) + "\n"


def read_jsonl(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Yield the records of type `kind` from a JSONL file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield from_dict(kind, json.loads(line))


def from_dict(kind: type[Record], values: dict[str, Any]) -> Record:
    """Build a record from its JSON object: lists become tuples, unknown keys are ignored."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})
