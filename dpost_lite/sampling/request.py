"""The engine's requests and completions, and how much it holds at once. Without torch: the planner imports it."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

ATTEMPTS_PER_WAVE = 2  # rests of a cut drawn side by side; more would share a prompt, but waste draws after a wrong one
MAX_PREFILL_TOKENS = 2048  # of all prompts computed in one forward


def max_prompts(num_rows: int, samples_per_prompt: float) -> int:
    """Return how many prompts the cache should hold so that rows are rarely idle while prompts are queued.

    A prompt leaves the cache with its last sample. The longest of K answers of exponentially distributed length is
    1 + 1/2 + … + 1/K times as long as the mean; real lengths vary less.
    """
    longest = sum(1 / k for k in range(1, math.ceil(samples_per_prompt) + 1))
    return min(num_rows, math.ceil(num_rows * longest / samples_per_prompt) + 1)


def logit_copies(top_p: float) -> int:
    """Return how many float32 copies of a step's logits exist at once while tokens are chosen; top-p sorts them.

    Counted by bench/dry_run.py: 3.0 and 8.3, to which a GPU's sort adds its workspace.
    """
    return 3 if top_p == 1 else 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request for `num_samples` answers to one prompt. `key` is the caller's own and is returned with each answer.

    `prefix_ids` is an optional start of the answer; it is not part of the output. `start_ids` is set by the engine, for
    models whose answers begin with a token of their own (encoder–decoders). `temperature` 0 is greedy; a tuple is
    a schedule by step of the rationale: the first value for the first step written (those of a prefix do not count),
    the last for all later steps (SCDPO, section 3.2). Equal `(seed, index)` give equal answers; the indices in `done`
    exist already and are skipped. Raises ValueError for an empty prompt or settings out of range.
    """

    key: Any
    prompt_ids: tuple[int, ...]
    stop_ids: frozenset[int]
    prefix_ids: tuple[int, ...] = ()
    start_ids: tuple[int, ...] = ()
    num_samples: int = 1
    done: frozenset[int] = frozenset()
    temperature: float | tuple[float, ...] = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    max_new_tokens: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        if not (
            self.prompt_ids
            and self.max_new_tokens > 0
            and 0 < self.top_p <= 1
            and (self.top_k is None or self.top_k >= 1)
        ):
            raise ValueError("a request needs a prompt, max_new_tokens and top_k of at least 1, and top_p in (0, 1]")

    @property
    def indices(self) -> list[int]:
        """The indices of the samples to draw."""
        return [index for index in range(self.num_samples) if index not in self.done]

    @property
    def read_ids(self) -> tuple[int, ...]:
        """The tokens that are read once for all samples."""
        return self.prompt_ids if self.start_ids else self.prompt_ids + self.prefix_ids

    @property
    def row_ids(self) -> tuple[int, ...]:
        """The tokens that each sample's row reads before it writes."""
        return self.start_ids + self.prefix_ids if self.start_ids else ()

    @property
    def row_length(self) -> int:
        """The most positions that a row takes."""
        return len(self.row_ids) + self.max_new_tokens


@dataclass(slots=True)
class Completion:
    """One finished answer: sample `index` of the request with this `key`. `forced[i]` is True where the calculator
    wrote token i; `logprobs[i]` is log π of a sampled token in nats at temperature 1, and 0.0 where forced. `end` is
    "stop" (its stop token is the last id) or "limit"."""

    key: Any
    index: int
    token_ids: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    end: Literal["stop", "limit"] = "limit"
    num_calculated: int = 0
    num_refused: int = 0


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Prompts and rows that the cache holds, their lengths in positions, and the copies of logits budgeted for."""

    num_prompts: int
    prompt_length: int
    num_rows: int
    row_length: int
    num_logit_copies: int

    def fits(self, request: Request) -> bool:
        """Whether the request can run on a cache of this size."""
        return (
            len(request.read_ids) <= self.prompt_length
            and request.row_length <= self.row_length
            and logit_copies(request.top_p) <= self.num_logit_copies
        )
