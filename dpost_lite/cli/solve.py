"""The command `solve`: solve word problems with an exported model."""

import contextlib
import json
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from dpost_lite.cli.options import Debug
from dpost_lite.errors import DataError, PromptTooLong

if TYPE_CHECKING:
    from rich.console import Console

    from dpost_lite.local.solver import Answer
    from dpost_lite.local.solver_process import SolverProcess
    from dpost_lite.problems.tools import Tools
    from dpost_lite.recipe import Recipe

NUM_REMEMBERED = 1000  # questions of conversations


def solve(
    source: Annotated[str, typer.Argument(metavar="RUN|FILE.gguf", help="A finished run's folder, or a GGUF file.")],
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION",
            help="A word problem. [default: ask for one after the other, or read standard input, one per line]",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Draw N solutions and put them to the vote.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per question.")] = False,
    no_calculator: Annotated[
        bool, typer.Option("--no-calculator", help="Let the model compute by itself, also after <<3*4=.")
    ] = False,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Run the code in solutions, in a sandbox.")] = False,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", min=0, help="0: greedy decoding. [default: 0, or 0.7 with --samples]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Make sampled answers reproducible.")] = None,
    debug: Debug = False,
) -> None:
    """Solve word problems with an exported model, locally.

    On a terminal, what the calculator wrote is in another colour. Without a question it is a conversation: Ctrl-C stops
    an answer, Ctrl-D ends. Each question stands alone, because the model was trained on single questions: it does not
    know those before. Many questions on standard input are solved side by side, 8 at a time; beside others, an answer
    may differ where two words were about equally likely.
    """
    from rich.console import Console

    from dpost_lite.evaluation.targets import file_to_solve_with
    from dpost_lite.local.solver import NUM_PARALLEL
    from dpost_lite.local.solver_process import SolverProcess

    file, recipe = file_to_solve_with(source)
    tools = tools_of(recipe, allow_code=allow_code)
    if no_calculator:
        tools = replace(tools, calculator=None)
    is_single = question is not None or sys.stdin.isatty()
    with SolverProcess(
        file,
        tools=tools,
        max_new_tokens=recipe.sampling.max_new_tokens,
        num_parallel=min(samples, NUM_PARALLEL) if is_single else NUM_PARALLEL,
    ) as process:
        asking = _Asking(process, Console(highlight=False), samples, temperature, seed, as_json)
        if question is not None:
            asking.answer(question)
        elif is_single:
            _converse(asking)
        else:
            asking.answer_all([line.strip() for line in sys.stdin if line.strip()])


def tools_of(recipe: "Recipe", *, allow_code: bool) -> "Tools":
    """Return what the solutions of a recipe use; prints a note if --allow-code is missing or has no effect."""
    from dpost_lite.problems.tools import Tools

    tools = replace(Tools.from_recipe(recipe), runs_code=allow_code)
    if tools.code is None and allow_code:
        typer.echo("note: this model writes no code, so --allow-code has no effect", err=True)
    if tools.code is not None and not allow_code:
        typer.echo("note: this model writes code, which is run only with --allow-code", err=True)
    return tools


@dataclass(slots=True)
class _Asking:
    """How questions are asked, and their answers printed."""

    process: "SolverProcess"
    console: "Console"
    samples: int
    temperature: float | None
    seed: int | None
    as_json: bool
    num_asked: int = 0

    def answer(self, question: str) -> None:
        """Answer one question; a single sample is printed while it is written."""
        if self.samples > 1 or self.as_json:
            self.answer_all([question])
        else:
            self._print_answer_line(self._stream(question))

    def answer_all(self, questions: list[str]) -> None:
        """Answer questions side by side, and print the answers in order, with an empty line between."""
        from dpost_lite.local.solver import solve_all

        answers = solve_all(
            self.process, questions, samples=self.samples, temperature=self.temperature,
            seeds=[self._next_seed() for _ in questions],
        )  # fmt: skip
        num_answered = 0
        try:
            for answer in answers:
                self._print("\n" if num_answered and not self.as_json else "")
                self._print_answer(answer)
                num_answered += 1
        except PromptTooLong as error:
            which = f"question {num_answered + 1}: " if len(questions) > 1 else ""
            raise PromptTooLong(f"{which}{error}") from error

    def _print_answer(self, answer: "Answer") -> None:
        if self.as_json:
            typer.echo(json.dumps(answer.as_dict(), ensure_ascii=False))
            return
        self._print(answer.text.rstrip() + "\n")
        if answer.votes is not None:
            self._print(f"{_votes(answer.votes, self.samples)}\n")
        self._print_answer_line(answer)

    def _stream(self, question: str) -> "Answer":
        from dpost_lite.local.request import Piece
        from dpost_lite.local.solver import answer_of, requests_for

        started = time.monotonic()
        (request,) = requests_for(question, samples=1, temperature=self.temperature, seed=self._next_seed())
        end_of_line = ""  # printed once more text follows, so that the answer's line is the next one
        for event in self.process.stream(request):
            if isinstance(event, Piece):
                text = end_of_line + event.text
                end_of_line = text[len(text.rstrip("\n")) :]
                self._print(text.rstrip("\n"), "bold green" if event.is_inserted else "")
            else:
                self._print("\n")
                answer = answer_of(question, [event], seconds=time.monotonic() - started)
        return answer

    def _next_seed(self) -> int:
        """Return the first seed of the next question's samples."""
        self.num_asked += 1
        if self.seed is None:
            return secrets.randbits(32)
        return self.seed + (self.num_asked - 1) * self.samples

    def _print_answer_line(self, answer: "Answer") -> None:
        if answer.answer is not None:
            self._print(f"answer: {answer.answer}\n", "bold")
        elif answer.votes is not None:
            self._print("no answer: no solution ends in one\n")
        elif answer.is_finished:
            self._print("no answer: the solution does not end in one\n")
        else:
            self._print(f"no answer: the solution was cut off after {answer.num_tokens} tokens\n")

    def _print(self, text: str, style: str = "") -> None:
        from dpost_lite.report.terminal import plain

        self.console.print(plain(text, style), end="", soft_wrap=True)


def _votes(votes: dict[str, int], samples: int) -> str:
    """Return `votes: 18 (5), 20 (2), no answer (1)`."""
    numbers = [*votes.items()]
    if without := samples - sum(votes.values()):
        numbers.append(("no answer", without))
    is_tie = len(votes) > 1 and len({number for _, number in [*votes.items()][:2]}) == 1
    tie = "; of equal numbers the first drawn wins" if is_tie else ""
    return f"votes: {', '.join(f'{answer} ({number})' for answer, number in numbers)}{tie}"


def _converse(asking: _Asking) -> None:
    """Ask for questions and answer them, until Ctrl-D."""
    console = asking.console
    prompt = "> " if console.is_terminal else ""
    typer.echo("one word problem after the other; Ctrl-C stops an answer, Ctrl-D ends", err=True)
    with _history():
        for question in _asked(prompt):
            try:
                asking.answer(question)
            except KeyboardInterrupt:
                console.print("\n(stopped)")
            except DataError as error:
                typer.echo(f"{error}", err=True)
            if prompt:
                console.print()


def _asked(prompt: str) -> Iterator[str]:
    """Yield the lines that are typed and not blank."""
    while True:
        try:
            line = input(prompt).strip()
        except KeyboardInterrupt:  # there is no answer to stop: it drops the line, as in a shell
            typer.echo()
            continue
        except EOFError:
            typer.echo()
            return
        if line:
            yield line


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Edit lines with readline where Python has it, and keep them in the cache folder for the next conversation."""
    from dpost_lite.system.machine import cache_dir

    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    file = cache_dir() / "questions"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(NUM_REMEMBERED)
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
