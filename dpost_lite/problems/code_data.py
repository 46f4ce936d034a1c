"""The solutions that a model learns to write code from: a user's own, or programs made of annotated rationales."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dpost_lite.problems.code_format import CODE_START, blocks, inserted_text
from dpost_lite.problems.programs import Refusal, all_to_code
from dpost_lite.problems.records import Problem
from dpost_lite.sandbox.base import Sandbox


def with_code(problems: Sequence[Problem], sandbox: Sandbox) -> tuple[list[Problem], Counter[str]]:
    """Return the problems with solutions with code as their rationales, and why others lost theirs, with counts.

    Solutions that hold code are kept; where a block has no output, its own is inserted. Others become programs
    (`programs`). Problems whose rationale cannot are unlabelled then. Raises SandboxError if the sandbox does not work.
    """
    reasons = Counter[str]()
    written = {problem.id: problem for problem in problems if CODE_START in (problem.rationale or "")}
    others = (problem for problem in problems if problem.id not in written)
    found = {problem.id: made for problem, made in all_to_code(others, sandbox)}
    result = []
    for problem in problems:
        made = found.get(problem.id)
        if isinstance(made, Refusal):
            if made != Refusal.NO_RATIONALE:
                reasons[made] += 1
            made = replace(problem, rationale=None)
        result.append(made or replace(problem, rationale=_completed(written[problem.id].rationale or "", sandbox)))
    return result, reasons


def _completed(solution: str, sandbox: Sandbox) -> str:
    """Return a solution in which an output follows each block of code."""
    return "".join(_parts(solution, sandbox))


def _parts(solution: str, sandbox: Sandbox) -> Iterator[str]:
    parts, earlier = list(blocks(solution)), list[str]()
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        yield solution[part.start : part.end]
        if part.kind != "code":
            continue
        if following is None or following.kind != "output":
            yield inserted_text(sandbox.run(earlier, part.content).result().text).removesuffix("\n")
            if following is None or not following.content.startswith("\n"):
                yield "\n"
        earlier.append(part.content)


def summary(reasons: Counter[str]) -> str:
    """Return the reasons in one line, the most frequent first."""
    return "; ".join(f"{number}: {reason}" for reason, number in reasons.most_common())
