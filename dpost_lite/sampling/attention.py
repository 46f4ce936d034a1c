"""The attention function that reads the cache, registered with transformers as `dpost_rows`.

Any transformers model that looks its attention up by name can run on it. The model's forward sees a flat batch
`(1, tokens)` without padding; only `attend` knows about rows. A row attends to two parts, the prompt it shares with
other samples and its own tokens, and the two results are combined by their log-sum-exp. A kernel that returns it
computes both where there is one (`kernel_for`), else matrix products do.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dpost_lite.errors import ModelError
from dpost_lite.sampling.cache import KVCache
from dpost_lite.system.gpu_record import switched_off

ATTENTION_NAME = "dpost_rows"
PRODUCTS_FROM = 16  # rows or prompts; timed on random numbers on a Zen 4, where smaller parts are faster with flash

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""`(q, k, v, mask) -> (output, log-sum-exp)`, the softmax attention of a step's part.

All four have one type. Scaled `q` is `(n, kv_heads, queries, head_dim)`: heads that share a key head are further
queries, so keys are never repeated. `k` and `v` are `(n, kv_heads, length, head_dim)`, `mask` is `(n, kv_heads or 1,
queries or 1, length)`; the output is like `q`, its log-sum-exp `(n, kv_heads, queries)` in float32.
"""


def kernel_for(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, is_padded: bool = True, is_checked: bool = True
) -> Kernel | None:
    """Return the kernel of decode steps, or None if there is none for this device, type and head dimension.

    That of GPUs wants `is_padded` steps and 16 bits: what float32 gives there is the reference. With `is_checked` it is
    None too where it failed its check.
    """
    if device.type == "cpu":
        has_amx = torch.cpu._is_amx_tile_supported()  # there, flash alone is faster (bench/README.md)
        return products_if_many if dtype == torch.bfloat16 and not has_amx else flash_for_cpu
    if device.type != "cuda" or dtype == torch.float32 or head_dim % 8 or not is_padded:
        return None
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return None if is_checked and "attention" in switched_off() else memory_efficient


def flash_for_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's flash attention on CPUs, as a `Kernel`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=1)


def products_if_many(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For bfloat16 on CPUs without AMX, as a `Kernel`: products from `PRODUCTS_FROM` rows or prompts on, else flash.

    Flash computes a small product for each row and head. A row's rounding depends on how many others are in its part.
    """
    return (flash_for_cpu if len(q) < PRODUCTS_FROM else products)(q, k, v, mask)


def memory_efficient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's memory-efficient attention on GPUs, which takes a mask, as a `Kernel`; lengths are multiples of 8."""
    mask = mask.expand(*q.shape[:3], -1)
    out, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, compute_log_sumexp=True, scale=1.0
    )
    return out, log_sum_exp[..., : q.shape[2]]  # it is padded to a multiple of 32 queries


def products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what a `Kernel` does by matrix products; `mask` may be in float32 too.

    Scores are rounded to the type of `q`; their softmax is in float32. Each row of the mask serves equally many
    consecutive queries.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # a product would copy them itself, transposed and slowly
        k, v = k.contiguous(), v.contiguous()
    scores = torch.matmul(q, k.transpose(2, 3)).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores.view(*scores.shape[:2], mask.shape[2], -1, scores.shape[3]).add_(mask[:, :, :, None])
    weights = torch.softmax(scores, dim=-1)
    log_sum_exp = scores.amax(dim=-1) - weights.amax(dim=-1).log()  # the largest weight is exp(peak) / sum of exp
    return torch.matmul(weights.to(v.dtype), v), log_sum_exp


@dataclass(frozen=True, slots=True)
class Prefill:
    """A packed batch of prompts without padding, stored in the cache's prompt slots from `first_slot` on."""

    cache: KVCache
    lengths: tuple[int, ...]
    first_slot: int


@dataclass(slots=True)
class Part:
    """Some tokens of a decode step, and the part of the cache they attend to.

    `tokens` selects `n * width` tokens of the flat batch: `(n, width)`, or a slice. `slots` selects the `n` prompts or
    rows they attend to. `length` positions of each slot are read, and those after `max_key_position` are
    masked. `query_position` is counted from the slot's first position: a window reaches back from there.
    `scatter_index` says where the results of this part's tokens lie among the `n * width`; None means all, in order.
    `bias` is added to the scores by head and distance, from the query back to the key (T5's relative positions).
    """

    tokens: slice | torch.Tensor
    slots: slice | torch.Tensor
    length: int
    max_key_position: torch.Tensor  # (n, width) or (n, 1)
    query_position: torch.Tensor  # (n, width), never broadcast
    scatter_index: torch.Tensor | None = None
    bias: torch.Tensor | None = None  # (heads, distances), float32
    _masks: dict[tuple[int | None, torch.dtype, int], torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype = torch.float32, group: int = 1) -> torch.Tensor:
        """Additive mask, `(n, heads or 1, width * group or 1, length)`, with the bias; each token's row `group` times.

        Finite instead of −∞, since a window may hide every position; half of the smallest number, since a kernel may
        multiply it by log₂ e.
        """
        if (window, dtype, group) not in self._masks:
            positions = torch.arange(self.length, device=self.max_key_position.device)
            hidden = positions > self.max_key_position[..., None]
            if window is not None:
                hidden = hidden | (positions <= self.query_position[..., None] - window)
            mask = torch.zeros(hidden.shape, device=hidden.device)
            mask = mask.masked_fill_(hidden, torch.finfo(dtype).min / 2)[:, None]
            if self.bias is not None:
                distance = (self.query_position[..., None] - positions).clamp_(0, self.bias.shape[1] - 1)
                mask = mask + self.bias[:, distance].transpose(0, 1)
            if mask.shape[2] > 1 and group > 1:
                mask = mask.repeat_interleave(group, dim=2)
            self._masks[window, dtype, group] = mask.to(dtype)
        return self._masks[window, dtype, group]


@dataclass(frozen=True, slots=True)
class Decode:
    """A decode step over a flat batch. Token i is written to `row[i]` at `position[i]`; then the parts in `rows` attend
    to the rows and those in `prompts` to the prompts. Both lists cover all tokens, in order. `kernel` is None where
    matrix products compute them."""

    cache: KVCache
    row: torch.Tensor  # (tokens,)
    position: torch.Tensor  # (tokens,)
    rows: list[Part]
    prompts: list[Part]
    kernel: Kernel | None


def register(name: str, function: Callable[..., Any]) -> str:
    """Register an attention function with transformers (idempotent), with no mask of its own, and return its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    return name


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
    `(1, tokens, heads, head_dim)`. The model's own causal mask is not used; `batch` replaces it. Raises ModelError for
    attention sinks (`s_aux`), which are not supported.
    """
    if s_aux is not None:
        raise ModelError("this model's attention has sinks, which cannot be sampled from yet; use another model")
    layer = Layer(int(module.layer_idx), scaling, sliding_window, softcap)  # type: ignore[arg-type]
    if isinstance(batch, Prefill):
        return layer.prefill(query, key, value, batch), None
    return layer.decode(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), batch)[None], None


@dataclass(frozen=True, slots=True)
class Layer:
    """The attention of layer `index`; `scaling` is a factor on queries."""

    index: int
    scaling: float
    window: int | None
    softcap: float | None

    def prefill(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Prefill) -> torch.Tensor:
        outputs = []
        parts = zip(*(t.split(batch.lengths, dim=2) for t in (query, key, value)), strict=True)
        for slot, (q, k, v) in enumerate(parts, start=batch.first_slot):
            length = q.shape[2]
            batch.cache.prompt_keys[self.index, slot, :, :length] = k[0]
            batch.cache.prompt_values[self.index, slot, :, :length] = v[0]
            if self.softcap is None and (self.window is None or length <= self.window):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=self.scaling, enable_gqa=True
                )
            else:
                position = torch.arange(length, device=q.device)[None]
                part = Part(slice(None), slice(None), length, max_key_position=position, query_position=position)
                grouped = q.unflatten(1, (k.shape[1], -1)).transpose(2, 3).flatten(2, 3)  # tokens before heads
                mixed, _ = products(grouped * self.scaling, k, v, part.mask(self.window), self.softcap)
                out = mixed.unflatten(2, (length, -1)).transpose(2, 3).flatten(1, 2)
            outputs.append(out)
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Decode) -> torch.Tensor:
        """Attention for `query` `(tokens, heads, head_dim)`, after `key` and `value` were written to their rows."""
        query = query * self.scaling
        of_row, row_weight = self.of_row(query, key, value, batch)
        of_prompt, prompt_weight = self.of_prompt(query, batch)
        share = torch.sigmoid(row_weight - prompt_weight)  # the softmax mass on the row's own positions
        return torch.lerp(of_prompt, of_row, share[..., None].to(of_row.dtype))

    def of_row(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Decode
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `key` and `value` to their rows, and return what `_parts` does for them. `query` is scaled."""
        keys, values = batch.cache.row_keys[self.index], batch.cache.row_values[self.index]
        keys[batch.row, :, batch.position] = key
        values[batch.row, :, batch.position] = value
        return self._parts(query, keys, values, batch.rows, batch.kernel)

    def of_prompt(self, query: torch.Tensor, batch: Decode) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `_parts` does for the prompts. `query` is scaled."""
        keys, values = batch.cache.prompt_keys[self.index], batch.cache.prompt_values[self.index]
        return self._parts(query, keys, values, batch.prompts, batch.kernel)

    def _parts(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parts: list[Part], kernel: Kernel | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each token's attention output `(tokens, heads, head_dim)` and log-sum-exp `(tokens, heads)`."""
        found = [self._part(query, keys, values, part, kernel) for part in parts]
        if len(found) == 1:
            return found[0]
        outputs, weights = zip(*found, strict=True)
        return torch.cat(outputs), torch.cat(weights)

    def _part(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: Part, kernel: Kernel | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, kv_heads, _, head_dim = keys.shape
        index, (num, width) = part.scatter_index, part.query_position.shape
        q = _select(query, part.tokens).view(num, width, kv_heads, -1, head_dim)
        group = q.shape[3]
        q = q.transpose(1, 2).reshape(num, kv_heads, width * group, head_dim)
        k, v = (_select(store[:, :, : part.length], part.slots) for store in (keys, values))
        if kernel is None or self.softcap is not None:
            out, weight = products(q, k, v, part.mask(self.window), self.softcap)
        else:
            out, weight = kernel(q, k, v, part.mask(self.window, q.dtype, group))
        out = out.unflatten(2, (width, group)).transpose(1, 2).reshape(num * width, -1, head_dim)
        weight = weight.unflatten(2, (width, group)).transpose(1, 2).reshape(num * width, -1)
        return (out, weight) if index is None else (_select(out, index), _select(weight, index))


def _select(tensor: torch.Tensor, index: slice | torch.Tensor) -> torch.Tensor:
    """Return what `index` selects in the first dimension, flattened. On CPUs `index_select` is faster than `[]`."""
    return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index.flatten())
