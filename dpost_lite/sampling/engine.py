"""The batched sampler: a queue of requests, a fixed number of rows, and no step that is not needed.

    while waiting or running: admit(); retire(choose(forward()))

The papers' code draws K samples by K padded passes and decodes every row as text at every step. Here a prompt is
computed once for its K rows, a finished row is refilled at once, and what the calculator writes enters a row in a
single forward: forced tokens need no step of their own. Randomness belongs to the request and the sample, not to the
batch, so neighbours, order and number of rows do not change what is drawn.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dpost_lite.problems.forcing import Forcer, RowForcer
from dpost_lite.sampling.choosing import choose
from dpost_lite.sampling.kvcache import Decode, KVCache, Prompts, register

MAX_PREFILL_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Ask for `num_samples` answers to one prompt. `key` is the caller's own handle and comes back with each answer.

    `prefix_ids` is an optional start of the answer; it is not part of the output. `temperature` 0 is greedy. Equal
    `(seed, sample)` draw equal answers.
    """

    key: Any
    prompt_ids: tuple[int, ...]
    stop_ids: frozenset[int]
    prefix_ids: tuple[int, ...] = ()
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 300
    seed: int = 0

    @property
    def max_length(self) -> int:
        """Positions that a row of this request can take in the cache."""
        return len(self.prompt_ids) + len(self.prefix_ids) + self.max_new_tokens


@dataclass(slots=True)
class Sample:
    """One finished answer. `forced[i]` is True where the calculator wrote token i; `logprobs[i]` is log π of a sampled
    token in nats at temperature 1, and 0.0 where forced. `end` is "stop" (its stop token is the last id) or "limit"."""

    key: Any
    sample: int
    token_ids: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    end: Literal["stop", "limit"] = "limit"
    num_calculated: int = 0
    num_refused: int = 0


@dataclass(slots=True)
class _Prefill:
    """A prompt that has been computed and waits for rows: its cache, and the logits of its first answer token."""

    request: Request
    keys: torch.Tensor  # (layers, kv_heads, tokens, head_dim)
    values: torch.Tensor
    logits: torch.Tensor  # (vocabulary,)
    num_started: int = 0


@dataclass(slots=True)
class _Row:
    """One running answer: `pending` tokens are written but not yet read by the model; `length` positions are cached."""

    request: Request
    sample: Sample
    forcer: RowForcer | None
    length: int
    pending: list[int] = field(default_factory=list)
    num_drawn: int = 0

    def take(self, token_id: int, logprob: float) -> bool:
        """Write the newest token and what the calculator makes of it; return True when the answer is finished."""
        ids = self.forcer.push(token_id) if self.forcer else None
        sample, room = self.sample, self.request.max_new_tokens - len(self.sample.token_ids)
        self.num_drawn += 1
        self.pending = ([token_id] if ids is None else ids)[:room]
        is_kept = self.pending[0] == token_id
        sample.token_ids += self.pending
        sample.forced += [not is_kept] + [True] * (len(self.pending) - 1)
        sample.logprobs += [logprob if is_kept else 0.0] + [0.0] * (len(self.pending) - 1)
        if token_id in self.request.stop_ids:
            sample.end = "stop"
        elif len(sample.token_ids) < self.request.max_new_tokens:
            return False
        if self.forcer:
            sample.num_calculated, sample.num_refused = self.forcer.num_calculated, self.forcer.num_refused
        return True


@dataclass(slots=True)
class Statistics:
    """Where the time of a run went: `seconds` by part (prefill, forward, choose, calculator), decode steps, and rows
    summed over steps. On a GPU the parts are as the host sees them: it waits in "choose", where tokens are copied."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_steps: int = 0
    num_row_steps: int = 0

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a `with` block to `part`."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started


class Engine:
    """Samples from one model. `model` is any transformers decoder with a replaceable attention function."""

    def __init__(self, model: Any, *, forcer: Forcer | None, num_rows: int) -> None:
        self._model = model
        self._forcer = forcer
        self._num_rows = num_rows
        self._device = model.device
        self._waiting: deque[Request] = deque()
        self._prefilled: deque[_Prefill] = deque()
        self._running: list[_Row] = []
        self.statistics = Statistics()

    @torch.inference_mode()
    def run(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Yield samples as they end. The model's attention function is put back when the iterator is done."""
        self._waiting = deque(requests)
        if not self._waiting:
            return
        length = max(request.max_length for request in self._waiting)
        num_rows = min(self._num_rows, sum(request.num_samples for request in self._waiting))
        self._cache = KVCache(
            self._model.config, num_rows=num_rows, length=length, dtype=self._model.dtype, device=self._device
        )
        before, was_training = self._model.config._attn_implementation, self._model.training
        self._model.set_attn_implementation(register())
        self._model.eval()
        try:
            while self._waiting or self._prefilled or self._running:
                yield from self._admit()
                if self._running:
                    yield from self._retire(self._choose(self._running, self._forward()))
        finally:
            self._model.set_attn_implementation(before)
            self._model.train(was_training)
            self._running, self._prefilled, self._waiting = [], deque(), deque()
            del self._cache

    def _admit(self) -> Iterator[Sample]:
        """Fill free rows: compute prompts as needed, copy each prompt's cache to its rows, draw their first tokens."""
        while (room := self._cache.num_rows - len(self._running)) and (self._prefilled or self._waiting):
            if not self._prefilled:
                with self.statistics.timed("prefill"):
                    self._prefill(room)
            new, logits = [], []
            while self._prefilled and room:
                prompt = self._prefilled[0]
                request, num_new = prompt.request, min(room, prompt.request.num_samples - prompt.num_started)
                first = len(self._running)
                self._cache.load(range(first, first + num_new), prompt.keys, prompt.values)
                for sample in range(prompt.num_started, prompt.num_started + num_new):
                    new.append(self._start(request, sample))
                    logits.append(prompt.logits)
                self._running += new[-num_new:]
                prompt.num_started += num_new
                room -= num_new
                if prompt.num_started == request.num_samples:
                    self._prefilled.popleft()
            drawn = self._choose(new, torch.stack(logits))
            yield from self._retire(drawn, first=len(self._running) - len(new))

    def _start(self, request: Request, sample: int) -> _Row:
        forcer = self._forcer.row() if self._forcer else None
        if forcer:
            for token_id in request.prefix_ids:
                forcer.push(token_id)
            forcer.num_calculated = forcer.num_refused = 0  # the prefix is not this sample's
        length = len(request.prompt_ids) + len(request.prefix_ids)
        return _Row(request, Sample(request.key, sample), forcer, length)

    def _prefill(self, room: int) -> None:
        """Compute the prompts that `room` free rows can use, packed into one forward without padding."""
        batch: list[Request] = []
        num_tokens = num_samples = 0
        while self._waiting and num_samples < room:
            size = len(self._waiting[0].prompt_ids) + len(self._waiting[0].prefix_ids)
            if batch and num_tokens + size > MAX_PREFILL_TOKENS:
                break
            batch.append(self._waiting.popleft())
            num_tokens += size
            num_samples += batch[-1].num_samples
        prompts = [request.prompt_ids + request.prefix_ids for request in batch]
        rows = Prompts(lengths=tuple(map(len, prompts)), keys={}, values={})
        flat = [(token, position) for prompt in prompts for position, token in enumerate(prompt)]
        ids, positions = torch.tensor(flat, device=self._device).T
        ends = torch.tensor(rows.lengths, device=self._device).cumsum(0) - 1
        logits = self._call(ids, positions, rows, ends)
        layers = range(len(rows.keys))
        keys = torch.stack([rows.keys[i] for i in layers]).split(rows.lengths, dim=2)
        values = torch.stack([rows.values[i] for i in layers]).split(rows.lengths, dim=2)
        self._prefilled.extend(map(_Prefill, batch, keys, values, logits))

    def _forward(self) -> torch.Tensor:
        """Feed every row its pending tokens; return the logits behind each row's last one, `(rows, vocabulary)`."""
        with self.statistics.timed("forward"):
            ids, plan, ends = self._plan()
            logits = self._call(ids, plan.position, plan, ends)
        self.statistics.num_steps += 1
        self.statistics.num_row_steps += len(self._running)
        return logits

    def _plan(self) -> tuple[torch.Tensor, Decode, torch.Tensor]:
        """Lay the pending tokens of all rows flat: where each goes, what it may see, and which ones end their row."""
        rows = self._running
        token = [i for row in rows for i in row.pending]
        slot = [s for s, row in enumerate(rows) for _ in row.pending]
        column = [c for row in rows for c in range(len(row.pending))]
        position = [row.length + c for row in rows for c in range(len(row.pending))]
        num_columns = max(len(row.pending) for row in rows)
        length = max(row.length + len(row.pending) for row in rows)
        ids, *index = torch.tensor([token, slot, column, position], device=self._device)
        starts = torch.tensor([row.length for row in rows], device=self._device)
        by_row = starts[:, None] + torch.arange(num_columns, device=self._device)  # (rows, columns)
        hidden = torch.arange(length, device=self._device) > by_row[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=self._model.dtype, device=self._device).masked_fill_(hidden, -torch.inf)
        plan = Decode(
            cache=self._cache,
            slot=index[0],
            column=index[1],
            position=index[2],
            num_rows=len(rows),
            num_columns=num_columns,
            length=length,
            mask=mask,
            positions_by_row=by_row,
        )
        ends = torch.tensor([len(row.pending) for row in rows], device=self._device).cumsum(0) - 1
        for row in rows:
            row.length += len(row.pending)
        return ids, plan, ends

    def _call(self, ids: torch.Tensor, positions: torch.Tensor, rows: Prompts | Decode, ends: torch.Tensor) -> Any:
        """Run the model over a flat batch of tokens; return the logits at `ends`, `(len(ends), vocabulary)`."""
        return self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=ids.new_empty(1, 1, 1, 1),  # four dimensions: taken as it is, no mask is built
            use_cache=False,
            rows=rows,
            logits_to_keep=ends,
        ).logits[0]

    def _choose(self, rows: list[_Row], logits: torch.Tensor) -> list[tuple[int, float]]:
        """Draw one token for each row; return (token id, log-probability) pairs."""
        with self.statistics.timed("choose"):
            tokens, logprobs = choose(
                logits,
                temperature=[row.request.temperature for row in rows],
                top_p=[row.request.top_p for row in rows],
                seed=[row.request.seed + (row.sample.sample << 32) for row in rows],
                step=[row.num_drawn for row in rows],
            )
            newest = torch.stack([tokens.double(), logprobs.double()]).tolist()  # the one copy to the host
        return [(int(token), logprob) for token, logprob in zip(*newest, strict=True)]

    def _retire(self, drawn: list[tuple[int, float]], first: int = 0) -> Iterator[Sample]:
        """Hand each row (from `first` on) its token; yield finished samples and close the gaps they leave."""
        with self.statistics.timed("calculator"):
            finished = [i for i, token in enumerate(drawn, start=first) if self._running[i].take(*token)]
        for slot in reversed(finished):
            row, last = self._running[slot], self._running.pop()
            if last is not row:
                self._running[slot] = last
                self._cache.move(len(self._running), slot, last.length)
            yield row.sample
