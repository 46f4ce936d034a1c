"""T5's forward on the engine's flat batches.

The encoder runs once per problem. The keys and values that the decoder's cross-attentions make of its output are the
shared prompt that all of the problem's rows read. A row holds the decoder's own keys and values, beginning with the
token that starts every answer. That token takes no step of its own: it is read in the step that draws the first one.

T5 has no positions but a bias on the scores of self-attention, by head and distance.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dpost_lite.sampling.attention import Decode, Layer, register
from dpost_lite.sampling.cache import KVCache

ATTENTION_NAME = "dpost_t5"


@dataclass(frozen=True, slots=True)
class Encode:
    """A packed batch of questions without padding. `bias` is by head and position of the key relative to the query's,
    of which 0 is in the middle: `(heads, 2 * longest - 1)`."""

    lengths: tuple[int, ...]
    bias: torch.Tensor
    _biases: dict[int, torch.Tensor] = field(default_factory=dict)

    def bias_of(self, length: int) -> torch.Tensor:
        """Return the bias of a text, `(heads, length, length)`."""
        if length not in self._biases:
            positions = torch.arange(length, device=self.bias.device)
            self._biases[length] = self.bias[:, positions - positions[:, None] + self.bias.shape[1] // 2]
        return self._biases[length]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    batch: Encode | Decode,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one T5 layer over a flat batch; the signature is transformers'. Shapes as in `attention.attend`."""
    if isinstance(batch, Encode):
        parts = zip(*(t.split(batch.lengths, dim=2) for t in (query, key, value)), strict=True)
        outputs = [
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=batch.bias_of(q.shape[2]).to(q.dtype), scale=scaling
            )
            for q, k, v in parts
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2), None
    layer = Layer(int(module.layer_idx), scaling=1.0, window=None, softcap=None)  # type: ignore[arg-type]
    query, key, value = (t[0].transpose(0, 1) for t in (query * scaling, key, value))
    if module.is_causal:
        return layer.of_row(query, key, value, batch)[0][None], None
    return layer.of_prompt(query, batch)[0][None], None


class EncoderDecoder:
    """Forward of T5; see `forward.Forward`."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self._model = model
        self._encoder, self._decoder = model.get_encoder(), model.get_decoder()
        self._scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        self._no_encoding = torch.zeros(1, 1, config.d_model, dtype=model.dtype, device=model.device)
        self._no_keys = torch.zeros(1, 1, config.num_heads * config.d_kv, dtype=model.dtype, device=model.device)
        self.start_ids: tuple[int, ...] = (config.decoder_start_token_id,)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Replace the attention functions, and do without what transformers would compute in each step: biases of a
        flat batch, and keys and values of the encoder's output, which are in the cache.

        Raises RuntimeError while another engine runs on the model.
        """
        before = self._model.config._attn_implementation
        if isinstance(self._decoder.block[0].layer[1].EncDecAttention.k, _Skipped):
            raise RuntimeError("another engine is running on this model; let it end, or close it, first")
        with ExitStack() as stack:
            self._model.set_attn_implementation(register(ATTENTION_NAME, attend))
            stack.callback(self._model.set_attn_implementation, before)
            for part in (self._encoder, self._decoder):
                module = part.block[0].layer[0].SelfAttention
                module.compute_bias = _no_bias
                stack.callback(module.__dict__.pop, "compute_bias", None)
            for block in self._decoder.block:
                attention = block.layer[1].EncDecAttention
                for name in ("k", "v"):
                    projection = getattr(attention, name)
                    setattr(attention, name, _Skipped(projection, self._no_keys))
                    stack.callback(setattr, attention, name, projection)
            yield

    def prefill(self, cache: KVCache, texts: list[tuple[int, ...]], first_slot: int) -> None:
        """Encode questions, packed into one forward, and store what the decoder's rows read of them."""
        longest = max(map(len, texts))
        bias = _bias(self._encoder, 2 * longest - 1, longest - 1)
        batch = Encode(tuple(map(len, texts)), bias)
        ids = torch.tensor([[token for text in texts for token in text]], device=self._model.device)
        encoded = self._encoder(input_ids=ids, batch=batch).last_hidden_state[0]
        for index, block in enumerate(self._decoder.block):
            attention = block.layer[1].EncDecAttention
            for store, skipped in ((cache.prompt_keys, attention.k), (cache.prompt_values, attention.v)):
                heads = skipped.projection(encoded).unflatten(1, (attention.n_heads, -1)).transpose(0, 1)
                for slot, text in enumerate(heads.split(batch.lengths, dim=1), start=first_slot):
                    store[index, slot, :, : text.shape[1]] = text

    def decode(self, ids: torch.Tensor, positions: torch.Tensor, plan: Decode, num_last: int) -> torch.Tensor:
        """See `forward.Forward`; `positions` have no use here."""
        length = plan.cache.size.row_length
        bias = _bias(self._decoder, length, length - 1).flip(1)
        for part in plan.rows:
            part.bias = bias
        found = self._decoder(
            input_ids=ids[None], encoder_hidden_states=self._no_encoding, use_cache=False, batch=plan
        ).last_hidden_state[0, -num_last:]
        return self._model.get_output_embeddings()(found * self._scale)


class _Skipped(torch.nn.Module):
    """Stands in for a projection where its result is not used, and returns `value` instead."""

    def __init__(self, projection: torch.nn.Module, value: torch.Tensor) -> None:
        super().__init__()
        self.projection, self._value = projection, value

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self._value


def _bias(stack: Any, num_keys: int, query: int) -> torch.Tensor:
    """Return the bias that a query at position `query` adds to `num_keys` keys, `(heads, keys)`, float32."""
    module = stack.block[0].layer[0].SelfAttention
    return type(module).compute_bias(module, 1, num_keys, past_seen_tokens=query)[0, :, 0].float()


def _no_bias(query_length: int, key_length: int, device: Any = None, **_: Any) -> torch.Tensor:
    """Stand in for `T5Attention.compute_bias`, which makes a number for each head and pair of tokens of the batch."""
    return torch.zeros(1, 1, 1, 1, device=device)
