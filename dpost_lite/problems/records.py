"""The records that flow through a run: frozen, and JSONL in and out.

Token ids travel with the text, from the sampler to the trainer: what a model wrote is never tokenised again.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar


@dataclass(frozen=True, slots=True)
class Problem:
    """One maths word problem.

    `answer` is the final number in canonical form ("18", "-2.5"). `rationale` is a worked solution that ends in
    `#### N`, where the source has one: such a problem is labelled.
    """

    id: str
    question: str
    answer: str
    rationale: str | None = None


@dataclass(frozen=True, slots=True)
class Rationale:
    """One sampled answer to a problem, graded.

    `token_ids` are the answer's tokens without the prompt, with the stop token if it was written; `forced` holds a 1
    for each token that the calculator wrote and a 0 for each that the model chose. `end` is "stop", or "limit" for an
    unfinished answer. `logprob` is the sum over sampled tokens of log π(token), in nats, at temperature 1.
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
    """A right rationale that SFT trains on: a gold one, or a pseudo-label the model wrote itself."""

    problem_id: str
    question: str
    text: str
    token_ids: tuple[int, ...]
    is_gold: bool


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One DPO example: a right (chosen) and a wrong (rejected) rationale of the same problem, as token ids."""

    problem_id: str
    question: str
    chosen: str
    rejected: str
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """One graded answer of an evaluation, with what was asked. Answers of a run's own scores carry no question."""

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
    """Greedy accuracy of one model on one set of problems; `low` and `high`: the 95 % Wilson interval of `strict`."""

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
    num_unparsed: int = 0
    """Answers without a number after `####`."""
    num_characters: int = 0
    """Of all answers together."""


@dataclass(frozen=True, slots=True)
class SampledScore:
    """What several samples per problem show: the chance that one of k is right, `pass_at[k]`, and that their majority
    is.
    """

    name: str
    num_problems: int
    num_samples: int
    pass_at: dict[int, float]
    majority: float
    calculator: bool = True


Record = TypeVar("Record")


def write_jsonl(path: Path, records: Iterable[Any]) -> int:
    """Write records to `path`, one JSON object a line, through a temporary file; return how many."""
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
    """Append one record to an open file, and let the system have it: a process that is killed loses no whole line."""
    file.write(as_line(record))
    file.flush()


def resume_jsonl(path: Path, kind: type[Record]) -> list[Record]:
    """Return the records that a process appended before it was stopped; from the first broken line on they are cut."""
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
    """Return a record as its JSON object, with the end of the line."""
    return json.dumps(asdict(record), ensure_ascii=False) + "\n"


def read_jsonl(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Yield the records of type `kind` in a file that `write_jsonl` wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield from_dict(kind, json.loads(line))


def from_dict(kind: type[Record], values: dict[str, Any]) -> Record:
    """Build a record from its JSON object; lists become tuples again."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})
