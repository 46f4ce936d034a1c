"""What the engine is asked for, what it answers with, and how much it holds at once; no torch, the planner reads it."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

MAX_PREFILL_TOKENS = 2048  # of all prompts that are computed together


def max_prompts(num_rows: int, samples_per_prompt: float) -> int:
    """Return the prompts to hold for `num_rows` rows, so that hardly any is idle while a prompt waits.

    A prompt leaves the cache with its last sample. Of K answers of exponentially distributed length the longest is
    1 + 1/2 + … + 1/K times as long as the mean; real lengths vary less.
    """
    longest = sum(1 / k for k in range(1, math.ceil(samples_per_prompt) + 1))
    return min(num_rows, math.ceil(num_rows * longest / samples_per_prompt) + 1)


def logit_copies(top_p: float) -> int:
    """Return how many float32 copies of a step's logits are there at once while tokens are chosen; top-p sorts."""
    return 4 if top_p == 1 else 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Ask for `num_samples` answers to one prompt. `key` is the caller's own handle and comes back with each answer.

    `prefix_ids` is an optional start of the answer; it is not part of the output. `temperature` 0 is greedy; a tuple is
    a schedule by step of the rationale: its first value for the first step that is written (a prefix's do not count),
    its last for all that follow (SCDPO, section 3.2). Equal `(seed, sample)` draw equal answers; those in `done` are
    there already and not drawn again. Raises ValueError for what cannot be answered.
    """

    key: Any
    prompt_ids: tuple[int, ...]
    stop_ids: frozenset[int]
    prefix_ids: tuple[int, ...] = ()
    num_samples: int = 1
    done: frozenset[int] = frozenset()
    temperature: float | tuple[float, ...] = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.prompt_ids and self.max_new_tokens > 0 and 0 < self.top_p <= 1):
            raise ValueError("a request needs a prompt, a limit of at least one token, and top_p above 0 and up to 1")

    @property
    def samples(self) -> list[int]:
        """The samples to draw."""
        return [sample for sample in range(self.num_samples) if sample not in self.done]

    @property
    def read_ids(self) -> tuple[int, ...]:
        """What the model reads before it writes."""
        return self.prompt_ids + self.prefix_ids


@dataclass(slots=True)
class Sample:
    """One finished answer. `forced[i]` is True where the calculator wrote token i; `logprobs[i]` is log π of a sampled
    token in nats at temperature 1, and 0.0 where forced. `end` is "stop" (its stop token is the last id) or "limit"."""

    key: Any
    sample: int
    token_ids: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    end: Literal["stop", "limit"] = "limit"
    num_calculated: int = 0
    num_refused: int = 0
