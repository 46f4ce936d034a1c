"""The solutions that a model learns to write code from: a user's own, or programs made of annotated rationales."""

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from dpost_lite.problems.answers import predicted_answer, same_answer
from dpost_lite.problems.code_format import CODE_START, FENCE, blocks, inserted_text
from dpost_lite.problems.programs import Refusal, all_to_code
from dpost_lite.problems.records import Problem
from dpost_lite.recipe import CodeRecipe
from dpost_lite.sandbox.base import Ran, Sandbox

NO_ANSWER = "its text does not give the answer"
OTHER_FENCES = "its code fences are not those of the format"
TOO_MUCH_CODE = "it has more or longer blocks of code than are run"

_OPENS = re.compile(rf"(?m)^[ \t]*{FENCE}[ \t]*(?:python|py|Python)[ \t]*\r?$")
_OUTPUT = re.compile(rf"(?m)^{FENCE}\n+(?={FENCE}output$)")


def with_code(problems: Sequence[Problem], sandbox: Sandbox, recipe: CodeRecipe) -> tuple[list[Problem], Counter[str]]:
    """Return the problems with solutions with code as their rationales, and why others lost theirs, with counts.

    Solutions that hold code keep it: every block is run, within the limits of `recipe`, and what it prints replaces
    the output in the data, if there is one. A solution is not kept if a block fails, though the data shows no error, or
    if its text does not give the answer. Other rationales become programs (`programs`). Raises SandboxError if the
    sandbox does not work.
    """
    own = {p.id: _normal(p.rationale) for p in problems if p.rationale and _OPENS.search(p.rationale)}
    started = {name: _started(text, sandbox, recipe) for name, text in own.items()}
    programs = all_to_code((problem for problem in problems if problem.id not in own), sandbox)
    made = {problem.id: found for problem, found in programs}
    result, reasons = list[Problem](), Counter[str]()
    for problem in problems:
        if problem.id in own:
            text, why = _finished(own[problem.id], started[problem.id])
            if text and not same_answer(predicted_answer(text, problem.answer), problem.answer):
                text, why = None, NO_ANSWER
            found = replace(problem, rationale=text)
        elif isinstance(program := made[problem.id], Refusal):
            why = "" if program == Refusal.NO_RATIONALE else str(program)
            found = replace(problem, rationale=None)
        else:
            found, why = program, ""
        reasons.update([why] if why else [])
        result.append(found)
    return result, reasons


def summary(reasons: Counter[str]) -> str:
    """Return the reasons in one line, the most frequent first."""
    return "; ".join(f"{number}: {reason}" for reason, number in reasons.most_common())


def _normal(text: str) -> str:
    """Write fences as the format does: at the start of a line, and an output right after its code."""
    text = _OPENS.sub(CODE_START.rstrip("\n"), text.replace("\r\n", "\n"))
    text = re.sub(rf"(?m)^[ \t]*{FENCE}[ \t]*(output)?[ \t]*$", rf"{FENCE}\1", text)
    return _OUTPUT.sub(f"{FENCE}\n", text)


def _started(text: str, sandbox: Sandbox, recipe: CodeRecipe) -> list[Future[Ran]] | str:
    """Have all blocks of a solution run; return why not if it is not in the format or beyond the limits."""
    parts = list(blocks(text))
    if any(FENCE in part.content for part in parts):
        return OTHER_FENCES
    codes = [part.content for part in parts if part.kind == "code"]
    if len(codes) > recipe.max_blocks or max(map(len, codes), default=0) > recipe.max_chars:
        return TOO_MUCH_CODE
    return [sandbox.run(codes[:number], code) for number, code in enumerate(codes)]


def _finished(text: str, started: list[Future[Ran]] | str) -> tuple[str | None, str]:
    """Return the solution with the outputs of its blocks, or None and why it is not kept."""
    if isinstance(started, str):
        return None, started
    parts, results, solution = list(blocks(text)), iter(started), ""
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if part.kind == "code":
            ran = next(results).result()
            shown = following.content if following and following.kind == "output" else ""
            if ran.error and "Error" not in shown:
                return None, f"a block of its code fails ({ran.error.partition(':')[0]})"
            solution += text[part.start : part.end] + inserted_text(ran.text)
        elif part.kind == "text":  # after code without an output it begins with the line feed that is inserted now
            solution += part.content.removeprefix("\n" if solution.endswith(f"\n{FENCE}\n") else "")
    return solution, ""
