"""A model's forward on the engine's flat batches: that of decoder-only models, and what both kinds of models have.

`encoder_decoder.py` has the other one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from dpost_lite.sampling import attention
from dpost_lite.sampling.attention import Decode, Prefill
from dpost_lite.sampling.cache import KVCache


class Forward(Protocol):
    """`start_ids` are tokens that an answer begins with and that are not part of it."""

    start_ids: tuple[int, ...]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Make the model read the cache, for a `with` block."""

    def prefill(self, cache: KVCache, texts: list[tuple[int, ...]], first_slot: int) -> torch.Tensor | None:
        """Compute prompts and store them in the cache from `first_slot` on.

        Returns the logits of the first answer token, `(prompts, vocabulary)`, or None if each row computes its own.
        """

    def decode(self, ids: torch.Tensor, positions: torch.Tensor, plan: Decode, num_last: int) -> torch.Tensor:
        """Return the logits of the last `num_last` tokens of a flat batch, `(num_last, vocabulary)`.

        `positions` count from the start of the prompt.
        """


class DecoderOnly:
    """Forward of a transformers decoder with a replaceable attention function."""

    start_ids: tuple[int, ...] = ()

    def __init__(self, model: Any) -> None:
        self._model = model

    @contextmanager
    def ready(self) -> Iterator[None]:
        """See `Forward`."""
        before = self._model.config._attn_implementation
        self._model.set_attn_implementation(attention.register(attention.ATTENTION_NAME, attention.attend))
        try:
            yield
        finally:
            self._model.set_attn_implementation(before)

    def prefill(self, cache: KVCache, texts: list[tuple[int, ...]], first_slot: int) -> torch.Tensor | None:
        """See `Forward`. The prompts are packed into one forward."""
        plan = Prefill(cache, tuple(map(len, texts)), first_slot)
        flat = [(token, position) for text in texts for position, token in enumerate(text)]
        ids, positions = torch.tensor(flat, device=self._model.device).T
        ends = torch.tensor(plan.lengths, device=self._model.device).cumsum(0) - 1
        return self._forward(ids, positions, plan, ends)

    def decode(self, ids: torch.Tensor, positions: torch.Tensor, plan: Decode, num_last: int) -> torch.Tensor:
        """See `Forward`."""
        return self._forward(ids, positions, plan, num_last)

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, batch: Prefill | Decode, ends: torch.Tensor | int
    ) -> torch.Tensor:
        """Run the model over a flat batch of tokens; return the logits at `ends`, or of the last `ends` tokens."""
        return self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=ids.new_empty(1, 1, 1, 1),  # four dimensions: used as is, no mask is built
            use_cache=False,
            batch=batch,
            logits_to_keep=ends,
        ).logits[0]
