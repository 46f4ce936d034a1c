"""Read what finished stages wrote."""

from collections.abc import Iterable

from dpost_lite.problems.records import LabelledRationale, Problem, Rationale, Rest, read_jsonl
from dpost_lite.runs.folder import Artifact


def problems_of(data: Artifact, part: str) -> list[Problem]:
    """Return the train, dev or test problems of a data stage."""
    return list(read_jsonl(data.path / f"{part}.jsonl", Problem))


def rationales_of(sources: Iterable[Artifact]) -> list[Rationale]:
    """Return the rationales of sampling stages, in their order."""
    return [r for source in sources for r in read_jsonl(source.path / "rationales.jsonl", Rationale)]


def rests_of(sources: Iterable[Artifact]) -> list[Rest]:
    """Return the rests of stages that sampled some."""
    return [rest for source in sources for rest in read_jsonl(source.path / "rests.jsonl", Rest)]


def gold_of(data: Artifact) -> dict[str, LabelledRationale]:
    """Return the gold rationales of a data stage by problem."""
    return {gold.problem_id: gold for gold in read_jsonl(data.path / "labels.jsonl", LabelledRationale)}
