"""Keys and values of running samples, and the attention function that reads them.

Reading the cache is what a decode step waits for, so nothing is stored or read twice: a prompt is kept once for all of
its samples, and each sample's row holds only what it wrote itself. Attention runs over both parts and joins them by
their log-sum-exp. The model's forward sees a flat batch `(1, tokens)` without padding, `attend` alone knows rows.

Any transformers model that looks its attention up by name can run on it: `attend` is registered as `dpost_rows`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from dpost_lite.errors import ModelError

ATTENTION_NAME = "dpost_rows"


class KVCache:
    """Keys and values of all layers: `num_prompts` prompts of `prompt_length` positions, `num_rows` rows of
    `row_length` and `num_scratch` more rows that padding may be written to.

    Values are `(layers, prompts or rows, kv_heads, length, head_dim)`; keys `(…, head_dim, length)`, the order in which
    a product with queries reads them, a quarter to a third faster on a CPU than the other.
    """

    def __init__(
        self, config: Any, *, num_prompts: int, prompt_length: int, num_rows: int, row_length: int,
        num_scratch: int, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        heads, head_dim = kv_shape(config)
        self.num_prompts, self.prompt_length = num_prompts, prompt_length
        self.num_rows, self.row_length = num_rows, row_length

        def store(number: int, *shape: int) -> torch.Tensor:
            return torch.zeros((config.num_hidden_layers, number, heads, *shape), dtype=dtype, device=device)

        self.prompt_keys = store(num_prompts, head_dim, prompt_length)
        self.prompt_values = store(num_prompts, prompt_length, head_dim)
        self.row_keys = store(num_rows + num_scratch, head_dim, row_length)
        self.row_values = store(num_rows + num_scratch, row_length, head_dim)

    def move_prompt(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of prompt `source` over prompt `target`."""
        self.prompt_keys[:, target, ..., :length] = self.prompt_keys[:, source, ..., :length]
        self.prompt_values[:, target, :, :length] = self.prompt_values[:, source, :, :length]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` over row `target`."""
        self.row_keys[:, target, ..., :length] = self.row_keys[:, source, ..., :length]
        self.row_values[:, target, :, :length] = self.row_values[:, source, :, :length]


def kv_shape(config: Any) -> tuple[int, int]:
    """Return (key-value heads, head dimension) of a transformers config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, head_dim


def position_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes that one cached position takes over all layers."""
    heads, head_dim = kv_shape(config)
    return 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize


def check_layers(config: Any) -> None:
    """Raise ModelError where a model's config names layers that keep something other than keys and values."""
    unknown = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(
            f"{config.model_type}: layers of {', '.join(sorted(unknown))} cannot be sampled from; take a model whose "
            "layers are all plain or windowed attention (Llama, Mistral, Qwen2, Qwen3, Gemma, …)"
        )


@dataclass(frozen=True, slots=True)
class Prefill:
    """A packed batch of prompts, one behind the other without padding; they fill the cache from `first_slot` on."""

    cache: KVCache
    lengths: tuple[int, ...]
    first_slot: int


@dataclass(slots=True)
class Part:
    """Some tokens of a decode step, and the part of the cache they look at.

    `tokens` picks `n * width` tokens of the flat batch, `(n, width)`, or is a slice of `n`; `slots` picks the `n`
    prompts or rows they look at. Of each slot `length` positions are read, of which those up to `last` count.
    `at` is where a query stands, counted from the slot's first position: windows reach back from there. `place` says
    where the results of this part's tokens lie among the `n * width`; None takes all.
    """

    tokens: slice | torch.Tensor
    slots: slice | torch.Tensor
    length: int
    last: torch.Tensor  # (n, width) or (n, 1)
    at: torch.Tensor  # (n, width)
    place: torch.Tensor | None = None
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """Additive float32 mask, `(n, width or 1, length)`; as good as −∞, but finite: a window may hide all."""
        if window not in self._masks:
            positions = torch.arange(self.length, device=self.last.device)
            hidden = positions > self.last[..., None]
            if window is not None:
                hidden = hidden | (positions <= self.at[..., None] - window)
            mask = torch.zeros(hidden.shape, device=hidden.device)
            self._masks[window] = mask.masked_fill_(hidden, torch.finfo(torch.float32).min)
        return self._masks[window]


@dataclass(frozen=True, slots=True)
class Decode:
    """A decode step over a flat batch: token i is written to `row[i]` at `position[i]`, then `own` parts look at what
    their rows hold and `prompts` parts at the prompts; both lists cover all tokens, in their order."""

    cache: KVCache
    row: torch.Tensor  # (tokens,)
    position: torch.Tensor  # (tokens,)
    own: list[Part]
    prompts: list[Part]


def register() -> str:
    """Make `attend` known to transformers (idempotent) and return the name it answers to."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)
    return ATTENTION_NAME


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    batch: Prefill | Decode,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over a flat batch; the signature is transformers'.

    `query` is `(1, heads, tokens, head_dim)`, `key` and `value` `(1, kv_heads, tokens, head_dim)`; returns
    `(1, tokens, heads, head_dim)`. The model's own causal mask is not used: `batch` knows better. Raises ModelError for
    attention sinks (`s_aux`), which it does not know.
    """
    if s_aux is not None:
        raise ModelError("this model's attention has sinks, which cannot be sampled from yet; take another model")
    layer = _Layer(int(module.layer_idx), scaling, sliding_window, softcap)  # type: ignore[arg-type]
    if isinstance(batch, Prefill):
        return layer.prefill(query, key, value, batch), None
    return layer.decode(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), batch)[None], None


@dataclass(frozen=True, slots=True)
class _Layer:
    index: int
    scaling: float
    window: int | None
    softcap: float | None

    def prefill(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Prefill) -> torch.Tensor:
        outputs = []
        parts = zip(*(t.split(batch.lengths, dim=2) for t in (query, key, value)), strict=True)
        for slot, (q, k, v) in enumerate(parts, start=batch.first_slot):
            length = q.shape[2]
            batch.cache.prompt_keys[self.index, slot, ..., :length] = k[0].transpose(1, 2)
            batch.cache.prompt_values[self.index, slot, :, :length] = v[0]
            if self.softcap is None and (self.window is None or length <= self.window):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=self.scaling, enable_gqa=True
                )
            else:
                at = torch.arange(length, device=q.device)
                part = Part(slice(None), slice(None), length, last=at[None], at=at[None])
                grouped = q.unflatten(1, (k.shape[1], -1)).transpose(2, 3).flatten(2, 3)  # tokens before heads
                mixed, _ = self._look(grouped * self.scaling, k.transpose(2, 3), v, part.mask(self.window))
                out = mixed.unflatten(2, (length, -1)).transpose(2, 3).flatten(1, 2)
            outputs.append(out)
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Decode) -> torch.Tensor:
        """Attention for `query` `(tokens, heads, head_dim)`, after `key` and `value` were written to their rows."""
        cache, layer = batch.cache, self.index
        cache.row_keys[layer][batch.row, :, :, batch.position] = key
        cache.row_values[layer][batch.row, :, batch.position] = value
        query = query * self.scaling
        own, own_weight = self._parts(query, cache.row_keys[layer], cache.row_values[layer], batch.own)
        asked, asked_weight = self._parts(query, cache.prompt_keys[layer], cache.prompt_values[layer], batch.prompts)
        share = torch.sigmoid(own_weight - asked_weight)  # of the softmax's mass that lies on the row's own positions
        return torch.lerp(asked, own, share[..., None].to(own.dtype))

    def _parts(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parts: list[Part]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what each token finds in its part, `(tokens, heads, head_dim)`, and log-sum-exp `(tokens, heads)`."""
        found = [self._part(query, keys, values, part) for part in parts]
        if len(found) == 1:
            return found[0]
        outputs, weights = zip(*found, strict=True)
        return torch.cat(outputs), torch.cat(weights)

    def _part(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: Part
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, kv_heads, head_dim, _ = keys.shape
        q = query[part.tokens]
        q = q.view(*(q.shape[:-2] if q.dim() == 4 else (len(q), 1)), kv_heads, -1, head_dim)
        num, width, _, group, _ = q.shape
        q = q.transpose(1, 2).reshape(num, kv_heads, width * group, head_dim)
        k, v = keys[part.slots, ..., : part.length], values[part.slots, :, : part.length]
        out, weight = self._look(q, k, v, part.mask(self.window))
        out = out.view(num, kv_heads, width, group, head_dim).transpose(1, 2).reshape(num * width, -1, head_dim)
        weight = weight.view(num, kv_heads, width, group).transpose(1, 2).reshape(num * width, -1)
        return (out, weight) if part.place is None else (out[part.place], weight[part.place])

    def _look(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax attention of scaled `q` `(n, kv_heads, width * group, head_dim)`, and its log-sum-exp.

        `k` is `(n, kv_heads, head_dim, length)`, `v` `(n, kv_heads, length, head_dim)`.

        The heads that share a key head are rows of one product: keys are never repeated.
        """
        scores = torch.matmul(q, k).float()
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores.view(*scores.shape[:2], mask.shape[1], -1, scores.shape[3]).add_(mask[:, None, :, None])
        weights = torch.softmax(scores, dim=-1)
        log_sum_exp = scores.amax(dim=-1) - weights.amax(dim=-1).log()  # the largest weight is exp(peak) / sum of exp
        return torch.matmul(weights.to(v.dtype), v), log_sum_exp
