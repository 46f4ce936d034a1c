"""The batched sampler: a queue of requests, a fixed number of rows, and no step that is not needed.

    while waiting or running: admit(); retire(choose(forward()))

The papers' code draws K samples by K padded passes and decodes every row as text at every step. Here a prompt is
computed and kept once for its K rows, a finished row is refilled at once (on a GPU when a sixteenth of them is free),
and what the calculator writes enters a row in a single forward: forced tokens need no step of their own. Randomness
belongs to the request and the sample, not to the batch, so neighbours, order and number of rows do not change what is
drawn in float32. (In 16 bits a product rounds differently with its size, and a near tie may fall the other way.)
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from dpost_lite.errors import ModelError, OutOfMemory, is_out_of_memory
from dpost_lite.problems.forcing import Forcer
from dpost_lite.sampling.choosing import choose
from dpost_lite.sampling.graphs import Graphs
from dpost_lite.sampling.kvcache import KVCache, Prefill, check_layers, position_bytes, register
from dpost_lite.sampling.layout import Prompt, Row, Shape, bind, lay_out, multiple_of
from dpost_lite.sampling.request import MAX_PREFILL_TOKENS, Request, Sample, logit_copies, max_prompts

SEGMENT_ROWS = 64  # rows whose attention is one product; each segment reads as far as its longest row


@dataclass(slots=True)
class Statistics:
    """Where the time of a run went: `seconds` by part (prefill, plan, forward, choose, calculator), decode steps, and
    rows summed over steps. On a GPU the parts are as the host sees them: it waits in "choose", where tokens are copied.
    `num_rows` is what the memory allowed in the end, `num_shrunk` how often it ran out."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_steps: int = 0
    num_row_steps: int = 0
    num_rows: int = 0
    num_shrunk: int = 0

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a `with` block to `part`."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started


class Engine:
    """Samples from one model. `model` is any transformers decoder with a replaceable attention function.

    At most `max_rows` samples run side by side, and fewer if their cache and logits would take more than `memory_gib`.
    Tokens in `step_ids` end a step of the rationale, for temperatures by step. `static` asks for steps of few padded
    shapes, which on a GPU are replayed as CUDA graphs; None means on a GPU only. Raises ModelError for a model that
    keeps something other than keys and values.
    """

    def __init__(
        self, model: Any, *, forcer: Forcer | None, max_rows: int, memory_gib: float | None = None,
        step_ids: frozenset[int] = frozenset(), static: bool | None = None,
    ) -> None:  # fmt: skip
        check_layers(model.config)
        self._model = model
        self._forcer = forcer
        self._max_rows = max_rows
        self._memory_gib = memory_gib
        self._step_ids = step_ids
        self._device = model.device
        self._static = self._device.type == "cuda" if static is None else static
        self._forget()
        self.statistics = Statistics()

    def _forget(self) -> None:
        self._waiting: deque[tuple[Request, list[int]]] = deque()  # requests with the samples still to be drawn
        self._prompts: list[Prompt] = []  # in the cache, by slot
        self._running: list[Row] = []  # by slot

    @torch.inference_mode()
    def run(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Yield samples as they end. The model's attention function is put back when the iterator is done.

        Running out of memory halves the rows and draws the unfinished samples anew, as they would have been.
        Raises OutOfMemory when memory does not suffice for a single row, ModelError when the model computes NaN.
        """
        self._forget()
        self._waiting.extend((request, request.samples) for request in requests if request.samples)
        before, was_training = self._model.config._attn_implementation, self._model.training
        self._model.set_attn_implementation(register())
        self._model.eval()
        try:
            while self._waiting:
                try:
                    yield from self._serve()
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self._shrink(error)
        finally:
            self._model.set_attn_implementation(before)
            self._model.train(was_training)
            self._release()
            self._forget()

    def _serve(self) -> Iterator[Sample]:
        """The loop, on rows that fit the memory."""
        self._allocate()
        while self._waiting or self._prompts:
            yield from self._admit()
            if self._running:
                yield from self._retire(self._choose(self._running, self._forward()))

    def _allocate(self) -> None:
        """Make the cache: as many rows as are of use and fit, each as long as the longest request may get."""
        self._release()
        requests = [request for request, _ in self._waiting]
        num_samples = sum(len(samples) for _, samples in self._waiting)
        prompt_length = max(len(request.read_ids) for request in requests)
        row_length = max(request.max_new_tokens for request in requests)
        if self._static:  # a GPU's products want keys that begin at multiples of 16 bytes
            prompt_length, row_length = multiple_of(8, prompt_length), multiple_of(8, row_length)
        config, dtype = self._model.config, self._model.dtype
        copies = max(logit_copies(request.top_p) for request in requests)
        on_gpu, num_scratch = self._static and self._device.type == "cuda", int(self._static)

        def prompts_of(num_rows: int) -> int:
            return min(len(requests), max_prompts(num_rows, num_samples / len(requests)))

        def size_gib(num_rows: int) -> float:
            positions = prompts_of(num_rows) * prompt_length + (num_rows + num_scratch) * row_length
            logits = num_rows * config.vocab_size * (copies * torch.float32.itemsize + on_gpu * dtype.itemsize)
            return (positions * position_bytes(config, dtype) + logits) / 2**30

        num_rows = min(self._max_rows, num_samples)
        while self._memory_gib is not None and num_rows > 1 and size_gib(num_rows) > self._memory_gib:
            num_rows -= 1
        self.statistics.num_rows = num_rows
        self._cache = KVCache(
            config, num_prompts=prompts_of(num_rows), prompt_length=prompt_length,
            num_rows=num_rows, row_length=row_length, num_scratch=num_scratch, dtype=dtype, device=self._device,
        )  # fmt: skip
        self._step = Graphs(self._decode, self._device, max_rows=num_rows) if on_gpu else self._decode
        self._least_room = max(1, num_rows // 16) if self._static else 1  # admitting takes as long as several replays
        self._segment_rows = num_rows if self._static else SEGMENT_ROWS

    def _release(self) -> None:
        self._cache = self._step = None  # type: ignore[assignment]
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _shrink(self, error: Exception) -> None:
        """After memory ran out: halve the rows, and put what was not finished in front of the queue again."""
        if self.statistics.num_rows == 1:
            raise OutOfMemory(
                "memory does not suffice to sample a single row; close other programs or take a smaller model"
            ) from error
        self._max_rows = self.statistics.num_rows // 2
        self.statistics.num_shrunk += 1
        for prompt in reversed(self._prompts):
            begun = [row.sample.sample for row in self._running if row.prompt is prompt]
            self._waiting.appendleft((prompt.request, sorted(begun + prompt.todo)))
        self._prompts, self._running = [], []

    def _admit(self) -> Iterator[Sample]:
        """Fill free rows, if they are enough to be worth it: compute prompts as needed, draw their first tokens."""
        if self._running and self._cache.num_rows - len(self._running) < self._least_room:
            return
        while room := self._cache.num_rows - len(self._running):
            ready = [prompt for prompt in self._prompts if prompt.todo]
            if not ready and not (ready := self._prefill(room)):
                break
            first = len(self._running)
            for prompt in ready:
                taken, prompt.todo = prompt.todo[:room], prompt.todo[room:]
                room -= len(taken)
                prompt.num_running += len(taken)
                self._running += [
                    self._start(prompt, sample, slot) for slot, sample in enumerate(taken, len(self._running))
                ]
            new = self._running[first:]
            yield from self._retire(self._choose(new, torch.stack([row.prompt.logits for row in new])), first)

    def _start(self, prompt: Prompt, sample: int, slot: int) -> Row:
        forcer = self._forcer.row() if self._forcer else None
        owed: list[int] = []
        if forcer:
            for token_id in prompt.request.prefix_ids:
                if owed[:1] == [token_id]:  # the prefix holds what the calculator wrote
                    owed = owed[1:]
                else:
                    written = forcer.push(token_id) or []
                    owed = written[1:] if written[:1] == [token_id] else []
            forcer.num_calculated, forcer.num_refused = int(bool(owed)), 0  # all else is not this sample's
        return Row(prompt, Sample(prompt.request.key, sample), forcer, slot, owed=owed)

    def _prefill(self, room: int) -> list[Prompt]:
        """Compute the prompts that `room` free rows can use and the cache can hold, packed into one forward."""
        batch: list[tuple[Request, list[int]]] = []
        num_tokens = 0
        for request, samples in islice(self._waiting, self._cache.num_prompts - len(self._prompts)):
            num_tokens += len(request.read_ids)
            if room <= 0 or (batch and num_tokens > MAX_PREFILL_TOKENS):
                break
            batch.append((request, samples))
            room -= len(samples)
        if not batch:
            return []
        with self.statistics.timed("prefill"):
            texts = [request.read_ids for request, _ in batch]
            plan = Prefill(self._cache, tuple(map(len, texts)), first_slot=len(self._prompts))
            flat = [(token, position) for text in texts for position, token in enumerate(text)]
            ids, positions = torch.tensor(flat, device=self._device).T
            ends = torch.tensor(plan.lengths, device=self._device).cumsum(0) - 1
            logits = self._call(ids, positions, plan, ends)
        new = [Prompt(*self._waiting.popleft(), slot, row) for slot, row in enumerate(logits, start=len(self._prompts))]
        self._prompts += new
        return new

    def _forward(self) -> torch.Tensor:
        """Feed every row its pending tokens; return the logits behind each row's last one, `(rows, vocabulary)`."""
        rows = self._running
        with self.statistics.timed("plan"):
            shape = Shape.of(rows, self._prompts, self._segment_rows)
            shape = shape.rounded(self._cache) if self._static else shape
            numbers = torch.tensor(
                lay_out(rows, self._prompts, shape, self._cache.num_rows), pin_memory=self._device.type == "cuda"
            )
        with self.statistics.timed("forward"):
            logits = self._step(numbers, shape)
        for row in rows:
            row.length += len(row.pending)
        self.statistics.num_steps += 1
        self.statistics.num_row_steps += len(rows)
        return logits[: len(rows)]

    def _decode(self, numbers: torch.Tensor, shape: Shape) -> torch.Tensor:
        ids, positions, plan = bind(numbers.to(self._device), shape, self._cache)
        return self._call(ids, positions, plan, shape.num_rows)

    def _call(self, ids: torch.Tensor, positions: torch.Tensor, batch: Any, ends: torch.Tensor | int) -> torch.Tensor:
        """Run the model over a flat batch of tokens; return the logits at `ends`, or of the last `ends` tokens."""
        return self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=ids.new_empty(1, 1, 1, 1),  # four dimensions: taken as it is, no mask is built
            use_cache=False,
            batch=batch,
            logits_to_keep=ends,
        ).logits[0]

    def _choose(self, rows: list[Row], logits: torch.Tensor) -> list[tuple[int, float]]:
        """Draw one token for each row; return (token id, log-probability) pairs."""
        with self.statistics.timed("choose"):
            requests = [row.prompt.request for row in rows]
            tokens, logprobs = choose(
                logits,
                temperature=[row.temperature for row in rows],
                top_p=[request.top_p for request in requests],
                seed=[q.seed + (row.sample.sample << 32) for q, row in zip(requests, rows, strict=True)],
                step=[row.num_drawn for row in rows],
            )
            newest = torch.stack([tokens.double(), logprobs.double()]).tolist()  # the one copy to the host
        if any(map(math.isnan, newest[1])):
            raise ModelError(
                "the model computes NaN: its training diverged (lower sft.learning_rate or dpo.learning_rate and train "
                "it anew with --restart-from), or its weights are damaged (`dpost-lite verify` tells)"
            )
        return [(int(token), logprob) for token, logprob in zip(*newest, strict=True)]

    def _retire(self, drawn: list[tuple[int, float]], first: int = 0) -> Iterator[Sample]:
        """Hand each row (from `first` on) its token; yield finished samples and close the gaps they leave."""
        with self.statistics.timed("calculator"):
            finished = [
                row
                for row, (token, logprob) in zip(self._running[first:], drawn, strict=True)
                if row.take(token, logprob, ends_step=token in self._step_ids)
            ]
        for row in finished:
            row.length = 0  # nothing in it is of use
        for row in reversed(finished):
            self._close_gap(row.slot)
            row.prompt.num_running -= 1
            if not (row.prompt.num_running or row.prompt.todo):
                self._drop(row.prompt)
        for row in finished:
            yield row.sample

    def _close_gap(self, slot: int) -> None:
        """Fill a free row so that running ones stay in front, and long ones before short ones, segment by segment.

        The longest row of the next segment takes the place, the longest of the one behind takes its, and so on.
        """
        rows, size = self._running, self._segment_rows
        while slot < len(rows) - 1:
            following = rows[(slot // size + 1) * size :][:size]
            row = max(following, key=lambda row: row.length) if following else rows[-1]
            self._cache.move_row(row.slot, slot, row.length)
            rows[slot], row.slot, slot = row, slot, row.slot
        rows.pop()

    def _drop(self, prompt: Prompt) -> None:
        last = self._prompts.pop()
        if last is not prompt:
            self._cache.move_prompt(last.slot, prompt.slot, last.length)
            last.slot = prompt.slot
            self._prompts[last.slot] = last
