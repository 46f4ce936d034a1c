"""Runs the model: allocates the cache, computes prompts, decodes one step, chooses tokens. The scheduler says for whom.

On a GPU, steps are padded to few shapes and replayed as CUDA graphs, and attention has a fused kernel, unless these
failed their checks there.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dpost_lite.errors import ModelError
from dpost_lite.sampling.attention import kernel_for
from dpost_lite.sampling.cache import KVCache, check_layers, kv_shape, position_bytes
from dpost_lite.sampling.choosing import choose
from dpost_lite.sampling.encoder_decoder import EncoderDecoder
from dpost_lite.sampling.forward import DecoderOnly, Forward
from dpost_lite.sampling.graphs import Graphs
from dpost_lite.sampling.request import CacheSize, Request, logit_copies, max_prompts
from dpost_lite.sampling.scheduler import Prompt, Queued, Row
from dpost_lite.sampling.statistics import Statistics
from dpost_lite.sampling.step_inputs import StepInputs, StepShape, multiple_of
from dpost_lite.system.gpu_record import switched_off

SEGMENT_ROWS = 64  # rows whose attention is one product; each segment reads as far as its longest row


class ModelRunner:
    """One model and its cache. `model` is T5, or any transformers decoder with a replaceable attention function.

    An answer begins with `start_ids`, which are not part of it. With `static`, steps have few padded shapes; None means
    on a GPU only. With `graphs`, these become CUDA graphs; None means on a GPU unless they failed their check there.
    Raises ModelError for a model that keeps something other than keys and values.
    """

    cache: KVCache | None

    def __init__(self, model: Any, statistics: Statistics, *, static: bool | None, graphs: bool | None = None) -> None:
        check_layers(model.config)
        self._model = model
        self._forward: Forward = EncoderDecoder(model) if model.config.is_encoder_decoder else DecoderOnly(model)
        self.start_ids = self._forward.start_ids
        self._statistics = statistics
        self._device = model.device
        self.static = self._device.type == "cuda" if static is None else static
        if graphs is None:
            graphs = self._device.type == "cuda" and "graphs" not in switched_off()
        self._has_graphs = self.static and graphs
        self._kernel = kernel_for(model.device, model.dtype, kv_shape(model.config)[1], is_padded=self.static)
        self._shapes: set[StepShape] = set()
        self.release()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Replace the model's attention function and put it in eval mode for a `with` block; then restore both."""
        was_training = self._model.training
        self._model.eval()
        try:
            with self._forward.ready():
                yield
        finally:
            self._model.train(was_training)
            self.release()

    def size_for(self, queue: Sequence[Queued], max_rows: int, memory_gib: float | None) -> CacheSize:
        """Return the cache for these requests: as many rows as are useful and fit, as long as the longest request.

        At least one row, even if that does not fit `memory_gib`, which counts the cache and the logits of a step.
        """
        requests = [queued.request for queued in queue]
        num_samples = sum(len(queued.indices) for queued in queue)
        prompt_length = max(len(request.read_ids) for request in requests)
        row_length = max(request.row_length for request in requests)
        if self.static:  # a GPU's fused kernel wants masks aligned to 16 bytes
            prompt_length, row_length = multiple_of(8, prompt_length), multiple_of(8, row_length)
        copies = max(logit_copies(request.top_p) for request in requests)

        def size(num_rows: int) -> CacheSize:
            num_prompts = min(len(requests), max_prompts(num_rows, num_samples / len(requests)))
            return CacheSize(num_prompts, prompt_length, num_rows, row_length, copies)

        num_rows = min(max_rows, num_samples)
        while memory_gib is not None and num_rows > 1 and self._size_gib(size(num_rows)) > memory_gib:
            num_rows -= 1
        return size(num_rows)

    def _size_gib(self, size: CacheSize) -> float:
        config, dtype = self._model.config, self._model.dtype
        positions = size.num_prompts * size.prompt_length + (size.num_rows + self.static) * size.row_length
        logit_bytes = size.num_logit_copies * torch.float32.itemsize + self._has_graphs * dtype.itemsize
        logits = size.num_rows * config.vocab_size * logit_bytes
        return (positions * position_bytes(config, dtype) + logits) / 2**30

    def allocate(self, size: CacheSize) -> KVCache:
        """Replace the cache with an empty one."""
        self.release()
        self.cache = KVCache(
            self._model.config, size, num_scratch=int(self.static), dtype=self._model.dtype, device=self._device
        )
        self._step = self._decode
        if self._has_graphs:
            self._step = Graphs(self._decode, self._device, self._statistics, max_rows=size.num_rows)
        self.segment_rows = size.num_rows if self.static else SEGMENT_ROWS
        return self.cache

    def release(self) -> None:
        """Free the cache and the graphs."""
        self.cache = self._step = None  # type: ignore[assignment]
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def prefill(self, requests: list[Request], first_slot: int) -> torch.Tensor | None:
        """Compute prompts and store them in the cache from `first_slot` on.

        Returns the logits of the first answer token, `(prompts, vocabulary)`, or None if each row computes its own.
        """
        assert self.cache is not None
        with self._statistics.timed("prefill"):
            return self._forward.prefill(self.cache, [request.read_ids for request in requests], first_slot)

    def decode(self, rows: list[Row], prompts: list[Prompt]) -> torch.Tensor:
        """Feed every row its unread tokens; return the logits after each row's last one, `(rows, vocabulary)`."""
        assert self.cache is not None
        statistics = self._statistics
        with statistics.timed("plan"):
            shape = StepShape.of(rows, prompts, self.segment_rows)
            if self.static:
                shape = shape.padded(self.cache.size)
                self._shapes.add(shape)
                statistics.num_shapes = len(self._shapes)
            inputs = StepInputs.of(rows, prompts, shape, scratch_row=self.cache.size.num_rows)
            packed = inputs.pack(pin_memory=self._device.type == "cuda")
        with statistics.timed("forward"):
            logits = self._step(packed, shape)
        for row in rows:
            row.length += len(row.unread)
        statistics.num_steps += 1
        statistics.num_row_steps += len(rows)
        statistics.num_positions_read += shape.num_positions_read
        return logits[: len(rows)]

    def _decode(self, packed: torch.Tensor, shape: StepShape) -> torch.Tensor:
        assert self.cache is not None
        inputs = StepInputs.unpack(packed.to(self._device), shape)
        plan = inputs.plan(shape, self.cache, self._kernel)
        return self._forward.decode(inputs.ids, inputs.absolute_position, plan, shape.num_rows)

    def choose(self, rows: list[Row], logits: torch.Tensor) -> list[tuple[int, float]]:
        """Draw one token for each row; return (token id, log-probability) pairs. Raises ModelError on NaN."""
        with self._statistics.timed("choose"):
            requests = [row.prompt.request for row in rows]
            tokens, logprobs = choose(
                logits,
                temperature=[row.temperature for row in rows],
                top_k=[request.top_k for request in requests],
                top_p=[request.top_p for request in requests],
                seed=[request.seed + (row.index << 32) for request, row in zip(requests, rows, strict=True)],
                step=[row.answer.num_chosen for row in rows],
            )
            newest = torch.stack([tokens.double(), logprobs.double()]).tolist()  # the one copy to the host
        if any(map(math.isnan, newest[1])):
            raise ModelError(
                "the model computes NaN: its training diverged (lower sft.learning_rate or dpo.learning_rate and train "
                "it again with --restart-from), or its weights are damaged (check with `dpost-lite verify`)"
            )
        return [(int(token), logprob) for token, logprob in zip(*newest, strict=True)]
