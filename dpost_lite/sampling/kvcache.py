"""Keys and values of a fixed number of rows, and the attention function that reads them.

One tensor pair per layer, `(rows, kv_heads, length, head_dim)`. Running rows stay at the front: a row that ends is
overwritten by its successor or by the last running row, so attention always reads one dense slice and never gathers.
The model's forward sees a flat batch `(1, tokens)` without padding; only attention spreads the tokens over rows, and
multiplies the query heads that share a key head as one group instead of repeating keys.

Any transformers model that looks its attention up by name can run on it: `attend` is registered as `dpost_rows`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

ATTENTION_NAME = "dpost_rows"


@dataclass(frozen=True, slots=True)
class Prompts:
    """A packed prefill: `lengths` of the prompts that stand one behind the other in the batch, none of them padded."""

    lengths: tuple[int, ...]
    keys: dict[int, torch.Tensor]  # layer -> (kv_heads, tokens, head_dim), filled by `attend`
    values: dict[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Decode:
    """A decode step: every running row brings one token, a row with forced ones several.

    `slot` and `column` say for each token which row it belongs to and where it stands among that row's new tokens,
    `position` where its key goes. `mask` is additive, `(rows, 1, columns, length)`.
    """

    cache: "KVCache"
    slot: torch.Tensor  # (tokens,)
    column: torch.Tensor  # (tokens,)
    position: torch.Tensor  # (tokens,)
    num_rows: int
    num_columns: int
    length: int
    mask: torch.Tensor
    positions_by_row: torch.Tensor  # (rows, columns), for sliding windows


class KVCache:
    """Fixed rows of keys and values for every layer of one model."""

    def __init__(self, config: Any, *, num_rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        heads, head_dim = kv_shape(config)
        self.num_rows, self.length = num_rows, length
        shape = (config.num_hidden_layers, num_rows, heads, length, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def load(self, slots: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy one prompt's keys and values, `(layers, kv_heads, tokens, head_dim)`, to each of `slots`."""
        length = keys.shape[2]
        for slot in slots:
            self.keys[:, slot, :, :length] = keys
            self.values[:, slot, :, :length] = values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` over row `target`."""
        for store in (self.keys, self.values):
            store[:, target, :, :length] = store[:, source, :, :length]


def kv_shape(config: Any) -> tuple[int, int]:
    """Return (key-value heads, head dimension) of a transformers config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, head_dim


def row_bytes(config: Any, length: int, dtype: torch.dtype) -> int:
    """Return the bytes that one row of `length` positions takes over all layers."""
    heads, head_dim = kv_shape(config)
    return 2 * config.num_hidden_layers * heads * head_dim * length * dtype.itemsize


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
    rows: Prompts | Decode,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over a flat batch; the signature is transformers'.

    `query` is `(1, heads, tokens, head_dim)`, `key` and `value` `(1, kv_heads, tokens, head_dim)`; returns
    `(1, tokens, heads, head_dim)`. The model's own causal mask is not used: `rows` knows better.
    """
    if isinstance(rows, Prompts):
        return _attend_prompts(module, query, key, value, rows, scaling, sliding_window, softcap), None
    return _attend_rows(module, query, key, value, rows, scaling, sliding_window, softcap), None


def _attend_prompts(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Prompts, scaling: float,
    sliding_window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    rows.keys[module.layer_idx], rows.values[module.layer_idx] = key[0], value[0]
    outputs = []
    parts = zip(*(t.split(rows.lengths, dim=2) for t in (query, key, value)), strict=True)
    for q, k, v in parts:
        q = q.unflatten(1, (k.shape[1], -1))  # (1, kv_heads, group, tokens, head_dim)
        k, v = k.unsqueeze(2), v.unsqueeze(2)
        at = torch.arange(q.shape[3], device=q.device)
        mask = _visible(at[:, None], at[None, :], sliding_window, q.dtype)
        outputs.append(_attention(q, k, v, mask, scaling, softcap).flatten(1, 2))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend_rows(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Decode, scaling: float,
    sliding_window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    keys, values = rows.cache.keys[module.layer_idx], rows.cache.values[module.layer_idx]
    keys[rows.slot, :, rows.position] = key[0].transpose(0, 1)
    values[rows.slot, :, rows.position] = value[0].transpose(0, 1)
    k = keys[: rows.num_rows, :, : rows.length]  # (rows, kv_heads, length, head_dim)
    v = values[: rows.num_rows, :, : rows.length]
    heads, head_dim = query.shape[1], query.shape[3]
    group = heads // k.shape[1]
    flat = query[0].transpose(0, 1)  # (tokens, heads, head_dim)
    single = rows.num_columns == 1
    if single:
        q = flat.view(rows.num_rows, k.shape[1], group, head_dim)
    else:
        spread = flat.new_zeros(rows.num_rows, rows.num_columns, heads, head_dim)
        spread[rows.slot, rows.column] = flat
        q = spread.unflatten(2, (k.shape[1], group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = rows.mask
    if sliding_window is not None and rows.length > sliding_window:
        at = torch.arange(rows.length, device=q.device)
        mask = _visible(rows.positions_by_row[:, None, :, None], at, sliding_window, q.dtype)
    if not single:
        mask = mask.repeat(1, 1, group, 1)
    out = _attention(q, k, v, mask, scaling, softcap)  # (rows, kv_heads, group * columns, head_dim)
    if single:
        return out.reshape(1, -1, heads, head_dim)
    out = out.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out[rows.slot, rows.column].unsqueeze(0)


def _visible(query_at: torch.Tensor, key_at: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Additive causal mask: 0 where a query may look, −inf where it may not."""
    seen = key_at <= query_at
    if window is not None:
        seen = seen & (key_at > query_at - window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float, softcap: float | None
) -> torch.Tensor:
    if softcap is None:
        mask = mask.expand(*mask.shape[:-2], q.shape[-2], -1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    scores = torch.tanh(torch.matmul(q, k.transpose(-1, -2)) * scaling / softcap) * softcap
    weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(weights, v)
