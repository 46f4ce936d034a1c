"""What is asked of a solver, and what it tells while it answers."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Request:
    """A chat to answer, or a `prompt` to continue as plain text.

    `temperature` 0 is greedy decoding. `top_p` keeps the likeliest tokens that together have this probability.
    `max_new_tokens` is never more than the solver's own limit; None is that limit. A `stop` text ends the answer and is
    not part of it. Without `uses_tools` neither the calculator nor code is used.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    uses_tools: bool = True

    @classmethod
    def of(cls, question: str, *, temperature: float = 0.0, seed: int = 0) -> "Request":
        """Return the request for the answer to one question."""
        return cls((Message("user", question),), temperature=temperature, seed=seed)


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer as it is written; `is_inserted` if the calculator or the sandbox wrote it, not the model."""

    text: str
    is_inserted: bool = False


@dataclass(frozen=True, slots=True)
class Solution:
    """One answer. `strict` is what the text states (`stated_answer`: the number after `####`, or else what is in its
    `\\boxed{…}`), `flexible` the last number. `num_calculated` and `num_refused` count the annotations that the
    calculator completed, and those that it left to the model.

    `end` is "stop" after a stop token or a stop text, "limit" if the answer is cut off. `num_tokens` are those of the
    answer, inserted ones and the stop token included.
    """

    text: str
    strict: str | None
    flexible: str | None
    num_calculated: int
    num_refused: int
    end: Literal["stop", "limit", "cancelled"]
    num_prompt_tokens: int
    num_tokens: int
