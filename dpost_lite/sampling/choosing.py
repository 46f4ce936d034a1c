"""One vectorised choice for all rows: temperature, top-p, and randomness that belongs to the row alone."""

import torch

_MASK = (1 << 64) - 1


def choose(
    logits: torch.Tensor, *, temperature: list[float], top_p: list[float], seed: list[int], step: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution at a uniform number of the row's own.

    `logits` is `(rows, vocabulary)`; the lists hold one value a row, temperature 0 meaning greedy. The uniform number
    is a hash of (seed, step), so it depends on neither batch nor device. Returns token ids `(rows,)` and log π of
    each at temperature 1, in nats, `(rows,)`.
    """
    logits = logits.float()
    greedy = logits.argmax(dim=-1)
    tokens = greedy
    if any(temperature):
        scale = torch.tensor([t or 1.0 for t in temperature], device=logits.device)
        probs = torch.softmax(logits / scale[:, None], dim=-1)
        if min(top_p) < 1.0:
            probs = _nucleus(probs, torch.tensor(top_p, device=logits.device))
        uniform = torch.tensor(list(map(uniform_number, seed, step)), device=logits.device)
        drawn = _invert(probs, uniform)
        tokens = torch.where(torch.tensor([t > 0 for t in temperature], device=logits.device), drawn, greedy)
    chosen = logits.gather(1, tokens[:, None])[:, 0]
    return tokens, chosen - logits.logsumexp(dim=-1)


def uniform_number(seed: int, step: int) -> float:
    """Return a number in (0, 1) that is a hash of both arguments (splitmix64, Steele et al. 2014).

    It has 23 bits, so that the largest one is below 1 in float32 too.
    """
    z = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xD1B54A32D192ED03) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return (((z ^ (z >> 31)) >> 41) + 0.5) / (1 << 23)


def _invert(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return for each row the first token at which the cumulative probability passes its uniform number."""
    cumulative = probs.cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]  # rounding: the sum need not be 1
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)


def _nucleus(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero all but the smallest set of tokens that holds `top_p` of the mass (Holtzman et al. 2020)."""
    ordered, index = probs.sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p[:, None]
    return torch.zeros_like(probs).scatter_(1, index, ordered.masked_fill(outside, 0.0))
