"""Decode steps as CUDA graphs: one launch a step instead of a thousand.

A step of a small model takes less time on a GPU than Python takes to launch its kernels. A graph is recorded for each
shape that keeps coming back, and replayed on new numbers; they all share one pool of memory and one place for logits.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from dpost_lite.errors import is_out_of_memory
from dpost_lite.sampling.layout import Shape

RECORD_AT = 4  # recording takes about as long as some steps without a graph: it has to pay


class Graphs:
    """Runs `step(numbers, shape)`, as a graph once a shape has come RECORD_AT times.

    What it returns is overwritten by the next call. A model whose step cannot be recorded runs without graphs.
    """

    def __init__(
        self, step: Callable[[torch.Tensor, Shape], torch.Tensor], device: torch.device, *, max_rows: int
    ) -> None:
        self._step, self._device, self._max_rows = step, device, max_rows
        self._num_seen: Counter[Shape] = Counter()
        self._recorded: dict[Shape, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: Any = None
        self._logits: torch.Tensor | None = None  # (max_rows, vocabulary): each graph's own would stay in the pool
        self._can_record = True

    def __call__(self, numbers: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Return the logits of the step that `numbers`, on the CPU, describe."""
        self._num_seen[shape] += 1
        if self._can_record and self._num_seen[shape] == RECORD_AT:
            try:
                self._recorded[shape] = self._record(numbers, shape)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._can_record = False
                why = (str(error).strip() or repr(error)).splitlines()[0]
                warnings.warn(f"this model's steps cannot be CUDA graphs, so sampling is slower: {why}", stacklevel=2)
        if shape not in self._recorded:
            return self._step(numbers.to(self._device, non_blocking=True), shape)
        assert self._logits is not None
        graph, inputs = self._recorded[shape]
        inputs.copy_(numbers, non_blocking=True)
        graph.replay()
        return self._logits[: shape.num_rows]

    def _record(self, numbers: torch.Tensor, shape: Shape) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        current, aside = torch.cuda.current_stream(self._device), _stream(self._device)
        inputs = numbers.to(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):  # libraries choose their kernels and make their workspaces before recording
            logits = self._step(inputs, shape)  # writes the same keys to the same places
        current.wait_stream(aside)
        if self._logits is None:
            self._logits = logits.new_empty(self._max_rows, logits.shape[1])
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # the outer block puts the stream back where the end of a recording fails
        with torch.cuda.stream(current), torch.cuda.graph(graph, pool=self._pool, stream=aside):
            self._logits[: shape.num_rows].copy_(self._step(inputs, shape))
        return graph, inputs


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream on which graphs are recorded: libraries keep a workspace for each that they meet."""
    return torch.cuda.Stream(device)
