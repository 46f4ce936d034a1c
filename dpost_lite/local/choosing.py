"""How the solver chooses the next token from logits."""

from collections.abc import Callable
from typing import Any

Choose = Callable[[Any], int]  # logits (vocabulary size,) -> token id


def chooser(temperature: float, seed: int, top_p: float = 1.0) -> Choose:
    """Return the choice of the next token: the likeliest, or a draw by the Gumbel trick, seeded.

    The noise depends on the seed and the number of the draw alone. With `top_p` below 1, only the likeliest tokens that
    together have this probability can be drawn (at least one).
    """
    import numpy as np

    if temperature <= 0:
        return lambda logits: int(np.argmax(logits))
    random = np.random.default_rng(seed)

    def draw(logits: Any) -> int:
        scaled = (logits.astype(np.float64) - logits.max()) / temperature  # of tiny temperatures, no infinity
        if top_p < 1:
            scaled = _nucleus(scaled, top_p)
        return int(np.argmax(scaled + random.gumbel(size=logits.shape)))

    return draw


def _nucleus(logits: Any, top_p: float) -> Any:
    """Return the logits with -inf for all but the likeliest tokens that together have the probability `top_p`."""
    import numpy as np

    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    likely = np.flatnonzero(probabilities >= (1 - top_p) / len(logits))  # all others together have less than 1 - top_p
    order = likely[np.argsort(-probabilities[likely])]
    before = probabilities[order].cumsum() - probabilities[order]
    kept = order[before < max(top_p, 0)]
    masked = np.full_like(logits, -np.inf)
    kept = kept if len(kept) else order[:1]
    masked[kept] = logits[kept]
    return masked
