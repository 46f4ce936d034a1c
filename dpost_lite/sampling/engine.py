"""The batched sampler: a queue of requests, a fixed number of rows, and no step that is not needed.

    while waiting or running: admit(); retire(choose(forward()))

The papers' code draws K samples by K padded passes and decodes every row as text at every step. Here a prompt is
computed and stored once for its K rows, a finished row is refilled at once (on a GPU when a sixteenth of them is free),
and what the calculator inserts enters a row in a single forward: forced tokens need no step of their own. Randomness
belongs to the request and the sample, not to the batch, so neighbours, order and number of rows do not change the
samples in float32. (In 16 bits a product rounds differently with its size, and a near tie may fall the other way.)

A writer that inserts tokens may reply late. Its row then waits and the others continue; as the draws do not depend on
the batch, the samples are the same as with a writer that replies at once.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dpost_lite.errors import OutOfMemory, is_out_of_memory
from dpost_lite.problems.answer_tokens import POLL_SECONDS
from dpost_lite.problems.forcing import Writer
from dpost_lite.sampling.model_runner import ModelRunner
from dpost_lite.sampling.request import CacheSize, Completion, Request
from dpost_lite.sampling.scheduler import Row, Scheduler
from dpost_lite.sampling.statistics import Statistics
from dpost_lite.system.turns import turns


class Engine:
    """Samples from one model: T5, or any transformers decoder with a replaceable attention function.

    `run` answers a list of requests. To add requests while others run:

        with engine.serving():
            engine.add_request(request)
            while engine.has_unfinished():
                for completion in engine.step(): ...

    At most `max_rows` samples run side by side, and fewer if their cache and logits would take more than `memory_gib`.
    `writer` inserts tokens into the answers, None for none. Tokens in `step_ids` end a step of the rationale, for
    temperatures by step. With `static`, steps have few padded shapes; None means on a GPU only. With `graphs`, these
    are CUDA graphs; None means on a GPU unless they failed their check there. Raises ModelError for a model that keeps
    something other than keys and values.
    """

    def __init__(
        self, model: Any, *, writer: Writer | None, max_rows: int, memory_gib: float | None = None,
        step_ids: frozenset[int] = frozenset(), static: bool | None = None, graphs: bool | None = None,
    ) -> None:  # fmt: skip
        self.statistics = Statistics()
        self._runner = ModelRunner(model, self.statistics, static=static, graphs=graphs)
        self._scheduler = Scheduler(writer, step_ids)
        self._max_rows = max_rows
        self._memory_gib = memory_gib
        self._turns = turns() if model.device.type == "cpu" else None
        self._has_new_requests = False
        self._is_serving = False

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield samples as they end. The model's attention function is restored when the iterator is done.

        Raises OutOfMemory and ModelError as `step` does.
        """
        with self.serving():
            for request in requests:
                self.add_request(request)
            while self.has_unfinished():
                yield from self.step()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Prepare the model for a `with` block; then restore it and drop what is unfinished.

        Raises RuntimeError inside another such block: an engine does one thing at a time.
        """
        if self._is_serving:
            raise RuntimeError("the engine is already serving or running")
        self._is_serving = True
        try:
            with self._runner.ready():
                yield
        finally:
            self._is_serving = False
            self._scheduler.clear()
            if self._turns:
                self._turns.end()

    def add_request(self, request: Request) -> None:
        """Queue a request, before the first step or later.

        The cache is sized for the requests that are queued at the first step. A later request that is too long for
        it waits, and those behind it, until all running samples have ended and a new cache is made. The same happens
        if later requests could use at least twice as many rows or prompts. Raises RuntimeError outside of `serving`.
        """
        self._check_serving()
        self._scheduler.add(replace(request, start_ids=self._runner.start_ids))
        self._has_new_requests = True

    def has_unfinished(self) -> bool:
        """Whether a sample is queued or running."""
        return self._scheduler.has_unfinished

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Fill free rows, decode one token for each running row, and return the samples that ended.

        If all rows wait for their writers, it sleeps a moment instead. If memory runs out, it halves the rows, for as
        long as this engine lives; the unfinished samples are drawn again, with the same result. Raises OutOfMemory when
        memory does not suffice for a single row, ModelError when the model computes NaN, and RuntimeError outside of
        `serving`.
        """
        self._check_serving()
        if self._turns:
            self._turns.take()
        try:
            self._step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._shrink(error)
        if self._turns and not self.has_unfinished():
            self._turns.end()
        return self._scheduler.take_completions()

    def _check_serving(self) -> None:
        if not self._is_serving:
            raise RuntimeError("the engine needs a `with engine.serving()` block around this call")

    def _step(self) -> None:
        scheduler = self._scheduler
        self._prepare_cache()
        scheduler.settle(scheduler.poll())
        self._admit()
        if scheduler.running:
            self._choose(scheduler.running, self._runner.decode(scheduler.running, scheduler.prompts))
        elif scheduler.parked:
            time.sleep(POLL_SECONDS)

    def _prepare_cache(self) -> None:
        """Allocate the cache if there is none, or if it is empty and too small for what is queued."""
        scheduler, runner = self._scheduler, self._runner
        if self._has_new_requests and scheduler.queue and runner.cache:
            wanted, size = self._wanted_size(), runner.cache.size
            scheduler.wants_larger_cache = (
                wanted.num_rows >= 2 * size.num_rows or wanted.num_prompts >= 2 * size.num_prompts
            )
        self._has_new_requests = False
        if scheduler.needs_cache:
            scheduler.close()
            size = self.statistics.cache_size = self._wanted_size()
            self.statistics.num_caches += 1
            min_free = max(1, size.num_rows // 16) if runner.static else 1  # admitting takes as long as several replays
            scheduler.open(runner.allocate(size), min_free=min_free, segment_rows=runner.segment_rows)

    def _wanted_size(self) -> CacheSize:
        return self._runner.size_for(self._scheduler.queue, self._max_rows, self._memory_gib)

    def _admit(self) -> None:
        """Fill free rows: compute prompts as needed, and draw the first tokens."""
        if not self._scheduler.should_admit:
            return
        while rows := self._start_rows():
            if rows[0].prompt.logits is not None:
                self._choose(rows, torch.stack([row.prompt.logits for row in rows]))

    def _start_rows(self) -> list[Row]:
        scheduler = self._scheduler
        if batch := scheduler.next_requests():
            requests = [queued.request for queued in batch]
            logits = self._runner.prefill(requests, first_slot=len(scheduler.prompts))
            scheduler.add_prompts([None] * len(batch) if logits is None else logits)
        return scheduler.start_rows()

    def _choose(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Draw a token for each row and append it."""
        chosen = self._runner.choose(rows, logits)
        with self.statistics.timed("calculator"):
            for row, (token_id, logprob) in zip(rows, chosen, strict=True):
                row.append_token(token_id, logprob)
        self._scheduler.settle(rows)

    def _shrink(self, error: Exception) -> None:
        """After memory ran out: halve the rows, and queue unfinished samples again."""
        if self.statistics.num_rows == 1:
            raise OutOfMemory(
                "there is not enough memory to sample a single row; close other programs or use a smaller model"
            ) from error
        self._max_rows = self.statistics.num_rows // 2
        self.statistics.num_shrunk += 1
        self._scheduler.requeue()
        self._runner.release()
