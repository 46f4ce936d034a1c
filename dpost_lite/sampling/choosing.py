"""One vectorised choice for all rows: temperature, top-k, top-p, and randomness that belongs to the row alone."""

import torch

_MASK = (1 << 64) - 1
_BLOCK = 256  # tokens whose probabilities are summed before the cumulative distribution is searched
_CPU_CHUNK = 2**18  # logits that stay in a core's cache through all passes over them


def choose(
    logits: torch.Tensor,
    *,
    temperature: list[float],
    top_k: list[int | None],
    top_p: list[float],
    seed: list[int],
    step: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution at a uniform number of the row's own.

    `logits` is `(rows, vocabulary)`; the lists hold one value a row. Temperature 0 is greedy; top-k, None for all
    tokens, is taken before top-p, which is a share of what top-k leaves, as in transformers. The uniform number
    is a hash of (seed, step), so it depends on neither batch nor device. Returns token ids `(rows,)` and log π of
    each at temperature 1, in nats, `(rows,)`; log π is NaN, and the token any, where a row's logits hold a NaN.
    """
    on_gpu = logits.is_cuda  # a pinned copy does not wait for the forward that is still running
    num_kept = [min(k or logits.shape[1], logits.shape[1]) for k in top_k]
    settings = torch.tensor([temperature, num_kept, top_p, list(map(uniform_number, seed, step))], pin_memory=on_gpu)
    settings = settings.to(logits.device, non_blocking=on_gpu)
    size = max(1, _CPU_CHUNK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    is_drawn, has_nucleus = any(temperature), min(top_p) < 1.0
    is_greedy = min(temperature) < torch.finfo(torch.float32).tiny  # which may be 0 on the device
    largest_k = max((k for k in num_kept if k < logits.shape[1]), default=None)
    chunks = [
        _choose(
            part,
            *setting.unbind(),
            is_drawn=is_drawn,
            is_greedy=is_greedy,
            largest_k=largest_k,
            has_nucleus=has_nucleus,
        )
        for part, setting in zip(logits.split(size), settings.split(size, dim=1), strict=True)
    ]
    tokens, logprobs = zip(*chunks, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _choose(
    logits: torch.Tensor, temperature: torch.Tensor, num_kept: torch.Tensor, top_p: torch.Tensor,
    uniform: torch.Tensor, *, is_drawn: bool, is_greedy: bool, largest_k: int | None, has_nucleus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    logits = logits.float()
    if is_greedy:
        peak, tokens = logits.max(dim=-1)
    else:  # without the index it is several times as fast on a CPU
        peak = logits.amax(dim=-1)
    below = logits - peak[:, None]  # so that no exponential overflows
    del logits  # a copy, if they are in 16 bits
    if is_drawn:
        probs = (below / temperature.where(temperature > 0, 1.0)[:, None]).exp_()
        if largest_k is not None:
            probs = _likeliest(probs, num_kept, largest_k)
        if has_nucleus:
            probs = _nucleus(probs, top_p)
        drawn = _invert(probs, uniform).clamp_(max=below.shape[1] - 1)
        tokens = torch.where(temperature > 0, drawn, tokens) if is_greedy else drawn
    chosen = below.gather(1, tokens[:, None])[:, 0]
    return tokens, chosen - below.exp_().sum(dim=-1).log()


def uniform_number(seed: int, step: int) -> float:
    """Return a number in (0, 1) that is a hash of both arguments (splitmix64, Steele et al. 2014).

    It has 23 bits, so that the largest one is below 1 in float32 too.
    """
    z = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xD1B54A32D192ED03) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return (((z ^ (z >> 31)) >> 41) + 0.5) / (1 << 23)


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return for each row the first token at which its cumulative weight passes its uniform number's share.

    Found in two steps, first the block and then the token in it, which is one pass over the weights less.
    """
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    by_block = weights.sum(dim=-1).cumsum(dim=-1)
    target = uniform[:, None] * by_block[:, -1:]
    block = _first_above(by_block, target)
    before = torch.nn.functional.pad(by_block, (1, 0)).gather(1, block)
    inside = weights.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0].cumsum(dim=-1)
    return (block * _BLOCK + _first_above(inside, (target - before).clamp_(min=0)))[:, 0]


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the first position at which `cumulative` exceeds `target`, `(rows, 1)`: one whose own weight is not 0.

    Rounding may put a target at or above the total; the last position that carries weight is meant then.
    """
    below_total = torch.nextafter(cumulative[:, -1:], torch.zeros((), device=cumulative.device))
    found = torch.searchsorted(cumulative, torch.minimum(target, below_total), right=True)
    return found.clamp_(max=cumulative.shape[1] - 1)  # beyond it for NaN


def _likeliest(weights: torch.Tensor, num_kept: torch.Tensor, largest_k: int) -> torch.Tensor:
    """Zero all weights below the `num_kept`-th largest of their row; equals of that one stay, as in transformers.

    `largest_k` is the largest of the `num_kept` that are below the size of the vocabulary.
    """
    ordered = weights.topk(largest_k, dim=-1).values
    index = (num_kept.long() - 1).clamp_(max=largest_k - 1)[:, None]
    least = ordered.gather(1, index).masked_fill_(num_kept[:, None] > largest_k, 0.0)
    return weights.masked_fill_(weights < least, 0.0)


def _nucleus(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero all but the smallest set of tokens that holds `top_p` of the mass (Holtzman et al. 2020)."""
    ordered, index = weights.sort(dim=-1, descending=True)
    cumulative = ordered.cumsum(dim=-1)
    outside = cumulative - ordered >= top_p[:, None] * cumulative[:, -1:]
    return torch.zeros_like(weights).scatter_(1, index, ordered.masked_fill(outside, 0.0))
