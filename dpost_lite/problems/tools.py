"""What a model may use while it writes: the calculator, or code that a sandbox runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from dpost_lite.problems.answer_tokens import written
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.code_format import inserted_tokens
from dpost_lite.problems.coding import CodeWriter
from dpost_lite.problems.forcing import Forcer, Writer
from dpost_lite.problems.notation import GSM8K, Notation
from dpost_lite.recipe import CodeRecipe, Recipe
from dpost_lite.sandbox.choose import sandbox

Inserted = Callable[[Sequence[int]], list[bool]]
"""For the tokens of a solution, whether each was inserted and is left out of a loss."""


@dataclass(frozen=True, slots=True)
class Tools:
    """The calculator or code, at most one of them; neither, and the model computes by itself.

    Without `runs_code`, what a block printed is replaced by a note that it was not run.
    """

    calculator: Calculator | None = None
    code: CodeRecipe | None = None
    runs_code: bool = True

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "Tools":
        """Return what a recipe's solutions use."""
        return cls(Calculator.from_recipe(recipe.calculator), recipe.code if recipe.solutions == "code" else None)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Tools":
        """Return what `as_dict` was made of."""
        calculator, code = values["calculator"], values["code"]
        return cls(
            Calculator(**calculator) if calculator else None, CodeRecipe(**code) if code else None, values["runs_code"]
        )

    def as_dict(self) -> dict[str, Any]:
        """Return values for JSON."""
        return {
            "calculator": asdict(self.calculator) if self.calculator else None,
            "code": self.code.model_dump() if self.code else None,
            "runs_code": self.runs_code,
        }

    @contextmanager
    def writer(
        self,
        text_of: Callable[[int], str],
        encode: Callable[[str], list[int]],
        text: Callable[[list[int]], str],
        notation: Notation = GSM8K,
    ) -> Iterator[Writer | None]:
        """Open what inserts tokens into rows, for a `with` block; None if nothing does. For the arguments see
        `CodeWriter` and `Forcer`.

        Raises SandboxError if the sandbox is not installed or does not work.
        """
        if self.code is None:
            yield Forcer(text_of, encode, self.calculator, notation) if self.calculator else None
            return
        with sandbox(self.code.sandbox if self.runs_code else None, self.code.limits) as box:
            yield CodeWriter(text_of, encode, text, box, max_blocks=self.code.max_blocks, max_chars=self.code.max_chars)

    def inserted(
        self,
        text_of: Callable[[int], str],
        encode: Callable[[str], list[int]],
        notation: Notation = GSM8K,
        *,
        calculated_in_loss: bool,
    ) -> Inserted | None:
        """Return what finds the tokens to leave out of a loss; None if there are none.

        What code printed always is; what the calculator wrote, unless `calculated_in_loss`.
        """
        if self.code is not None:
            return lambda token_ids: inserted_tokens(token_ids, text_of)
        if self.calculator is None or calculated_in_loss:
            return None
        forcer = Forcer(text_of, encode, self.calculator, notation)
        return lambda token_ids: written(forcer.row(), token_ids)
