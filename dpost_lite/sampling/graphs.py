"""Decode steps as CUDA graphs: one launch per step instead of a thousand.

On a GPU, a step of a small model takes less time than Python needs to launch its kernels. A graph is recorded for each
shape that recurs, and replayed on new inputs; all graphs share one memory pool and one buffer for logits.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from dpost_lite.errors import is_out_of_memory
from dpost_lite.sampling.statistics import Statistics
from dpost_lite.sampling.step_inputs import StepShape

RECORD_AT = 4  # recording takes as long as a few steps without a graph, so rare shapes are not recorded


class Graphs:
    """Runs `step(packed, shape)`, as a graph from the RECORD_AT-th time that a shape occurs.

    The next call overwrites the returned logits. A model whose step cannot be recorded runs without graphs.
    """

    def __init__(
        self,
        step: Callable[[torch.Tensor, StepShape], torch.Tensor],
        device: torch.device,
        statistics: Statistics,
        *,
        max_rows: int,
    ) -> None:
        self._step, self._device, self._statistics, self._max_rows = step, device, statistics, max_rows
        self._num_seen: Counter[StepShape] = Counter()
        self._recorded: dict[StepShape, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: Any = None
        self._logits: torch.Tensor | None = None  # (max_rows, vocabulary), shared by all graphs to save memory
        self._can_record = True

    def __call__(self, packed: torch.Tensor, shape: StepShape) -> torch.Tensor:
        """Return the logits of the step whose packed inputs are given, on the CPU."""
        self._num_seen[shape] += 1
        if self._can_record and self._num_seen[shape] == RECORD_AT:
            try:
                self._recorded[shape] = self._record(packed, shape)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._can_record = False
                why = (str(error).strip() or repr(error)).splitlines()[0]
                warnings.warn(f"this model's steps cannot be CUDA graphs, so sampling is slower: {why}", stacklevel=2)
        if shape not in self._recorded:
            return self._step(packed.to(self._device, non_blocking=True), shape)
        assert self._logits is not None
        graph, inputs = self._recorded[shape]
        inputs.copy_(packed, non_blocking=True)
        graph.replay()
        self._statistics.num_replayed += 1
        return self._logits[: shape.num_rows]

    def _record(self, packed: torch.Tensor, shape: StepShape) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        current, side = torch.cuda.current_stream(self._device), _stream(self._device)
        inputs = packed.to(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # warm-up: libraries choose kernels and allocate workspaces
            logits = self._step(inputs, shape)  # harmless: writes the same keys to the same places
        current.wait_stream(side)
        if self._logits is None:
            self._logits = logits.new_empty(self._max_rows, logits.shape[1])
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # the outer block restores the stream if ending the recording fails
        with torch.cuda.stream(current), torch.cuda.graph(graph, pool=self._pool, stream=side):
            self._logits[: shape.num_rows].copy_(self._step(inputs, shape))
        return graph, inputs


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which all graphs are recorded: libraries keep a workspace for each stream they see."""
    return torch.cuda.Stream(device)
