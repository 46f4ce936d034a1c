"""Decode steps as CUDA graphs: one launch a step instead of a thousand.

A step of a small model takes less time on a GPU than Python takes to launch its kernels. A graph is recorded for each
shape that comes back, and replayed on new numbers; they all share one pool of memory.
"""

from collections.abc import Callable

import torch

from dpost_lite.sampling.layout import Shape

NUM_WARMUP = 2


class Graphs:
    """Runs `step(numbers, shape)`, from the second time on that a shape comes as a graph.

    What it returns is overwritten by the next call.
    """

    def __init__(self, step: Callable[[torch.Tensor, Shape], torch.Tensor], device: torch.device) -> None:
        self._step, self._device = step, device
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: set[Shape] = set()
        self._recorded: dict[Shape, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    def __call__(self, numbers: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Return the logits of the step that `numbers`, on the CPU, describe."""
        if shape not in self._recorded:
            if shape not in self._seen:
                self._seen.add(shape)
                return self._step(numbers.to(self._device), shape)
            self._recorded[shape] = self._record(numbers, shape)
        graph, inputs, logits = self._recorded[shape]
        inputs.copy_(numbers, non_blocking=True)
        graph.replay()
        return logits

    def _record(self, numbers: torch.Tensor, shape: Shape) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        inputs = numbers.to(self._device)
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):  # libraries choose their kernels and make their workspaces before recording
            for _ in range(NUM_WARMUP):
                self._step(inputs, shape)  # writes the same keys to the same places
        torch.cuda.current_stream(self._device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(inputs, shape)
        return graph, inputs, logits
