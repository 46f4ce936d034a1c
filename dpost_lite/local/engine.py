"""Answers requests with a GGUF file, several side by side, with the calculator or the code that the model learned.

    while engine.has_unfinished(): events = engine.step()

The loop is our own because llama-cpp-python's generators cannot take tokens that the model did not choose, and answer
one prompt at a time. In each step llama.cpp reads all new tokens of all running rows in one batch: a part of a prompt,
the token that was chosen last, or the several that a writer made of it. A row whose writer has not replied yet waits
while the others go on. A row that has ended makes room for the next request at once.

Weights are read from memory once a step, whatever the number of rows: that is what makes rows side by side faster. The
rows share one cache, and prompts that begin alike share its cells. A row's draws depend on its own seed alone, but
llama.cpp's kernels round differently for one token and for several at a time: with a q8_0 file, its logits after the
same 60 tokens differ by up to 0.5. So beside others an answer may take another turn where two tokens are about equally
likely. A request that runs alone always gets the same answer, whatever `num_parallel` is.

Of an encoder–decoder (T5), only answers to one question are side by side. llama.cpp keeps what the encoder made of the
newest question, and makes the decoder's keys of it anew in every step: that costs as much as the question is long, once
for all its answers.
"""

import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from dpost_lite.errors import DataError, PromptTooLong, RecipeError
from dpost_lite.local.answer_text import AnswerText
from dpost_lite.local.choosing import Choose, chooser
from dpost_lite.local.llama import encode
from dpost_lite.local.model import open_model
from dpost_lite.local.request import Piece, Request, Solution
from dpost_lite.problems.answer_tokens import POLL_SECONDS, AnswerTokens
from dpost_lite.problems.answers import stated_answer
from dpost_lite.problems.code_format import prose
from dpost_lite.problems.grading import flexible_answer
from dpost_lite.problems.tools import Tools

Event = tuple[int, Piece | Solution]


@dataclass(slots=True, eq=False)
class _Row:
    """One request: queued while `sequence` is None, then running. `unread` are the tokens that the model reads next.

    `question_ids` are for an encoder, which not all models have.
    """

    number: int
    question_ids: list[int]
    prompt_ids: list[int]
    answer: AnswerTokens
    text: AnswerText
    choose: Choose
    sequence: int | None = None
    unread: list[int] = field(default_factory=list)
    num_read: int = 0

    @property
    def num_cells(self) -> int:
        """Cells of the cache that the row may come to need."""
        return len(self.prompt_ids) + self.answer.max_new_tokens

    @property
    def is_finished(self) -> bool:
        return self.answer.is_finished or self.text.is_stopped

    def solution(self, end: Literal["stop", "limit", "cancelled"] | None = None) -> Solution:
        text = self.text.text
        return Solution(
            text=text,
            strict=stated_answer(text),
            flexible=flexible_answer(prose(text)),
            num_calculated=self.answer.num_calculated,
            num_refused=self.answer.num_refused,
            end=end or ("stop" if self.text.is_stopped else self.answer.end),
            num_prompt_tokens=len(self.question_ids or self.prompt_ids),
            num_tokens=len(self.answer.token_ids),
        )


class Engine:
    """Answers requests with one GGUF file, up to `num_parallel` side by side. Not for use from two threads at once.

    `tools` is what the model uses while it writes; without any it computes by itself. `max_new_tokens` limits every
    answer. `extra_buffers` lets llama.cpp repack weights into its extra buffers; None means whatever works on this
    machine. Memory: see `GgufModel`. A crash of llama.cpp ends the process: see `SolverProcess`.
    Raises ExportError if the file is missing, broken, or carries no chat template; SandboxError if it cannot run code.
    """

    def __init__(
        self,
        gguf_path: Path,
        *,
        tools: Tools,
        max_new_tokens: int = 300,
        num_parallel: int = 1,
        num_threads: int | None = None,
        extra_buffers: bool | None = None,
    ) -> None:
        import llama_cpp

        if num_parallel < 1:
            raise RecipeError(f"num_parallel: {num_parallel}; give 1 or more")
        self.model = open_model(
            gguf_path, num_sequences=num_parallel, num_threads=num_threads, extra_buffers=extra_buffers
        )
        self._max_new_tokens = max_new_tokens
        self._num_parallel = num_parallel
        self._opened = ExitStack()
        self._opened.callback(self.model.close)
        self._batch_size: int = self.model.llm.n_batch
        self._batch = llama_cpp.llama_batch_init(self._batch_size, 0, 1)
        self._opened.callback(llama_cpp.llama_batch_free, self._batch)
        self._memory = llama_cpp.llama_get_memory(self.model.llm.ctx)
        self._can_share = not (
            llama_cpp.llama_model_is_recurrent(self.model.llm.model)
            or llama_cpp.llama_model_is_hybrid(self.model.llm.model)
        )
        try:
            self._writer = self._opened.enter_context(
                tools.writer(self.model.text_of, self.model.encode, self.model.text, self.model.notation)
            )
        except BaseException:
            self.close()
            raise
        self._question_ids: list[int] = []  # what the encoder has read
        self._queue: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._free = list(range(num_parallel))[::-1]
        self._num_added = 0

    def close(self) -> None:
        """Free the model, and end what the tools have started."""
        self._opened.close()

    def add_request(self, request: Request) -> int:
        """Queue a request; return its number.

        Raises PromptTooLong if the prompt leaves no room in the model's context, DataError if it is empty or the
        request allows no token, ExportError if the chat template rejects the messages.
        """
        prompt_ids = self.model.prompt_ids(request)
        question_ids, start_ids = self.model.split(prompt_ids)
        room = self.model.num_context - len(start_ids)
        if room <= 0 or len(question_ids) > self.model.num_context:
            raise PromptTooLong(
                f"the question has {len(prompt_ids)} tokens with all that the prompt adds to it, the model reads "
                f"{self.model.num_context}; shorten it"
            )
        wanted = self._max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        if wanted < 1 or not prompt_ids:
            raise DataError("the prompt is empty" if not prompt_ids else f"max_new_tokens: {wanted}; give 1 or more")
        writer = self._writer.row() if self._writer and request.uses_tools else None
        answer = AnswerTokens(writer, self.model.is_stop, min(wanted, self._max_new_tokens, room))
        choose = chooser(request.temperature, request.seed, request.top_p)
        self._num_added += 1
        text = self.model.answer_text(request.stop)
        self._queue.append(_Row(self._num_added, question_ids, start_ids, answer, text, choose))
        return self._num_added

    def cancel(self, number: int) -> Solution | None:
        """Drop a request; return what there is of its answer, or None if it has ended before."""
        for row in [*self._running, *self._queue]:
            if row.number == number:
                self._end(row)
                return row.solution("cancelled")
        return None

    def has_unfinished(self) -> bool:
        """Whether a request is queued or running."""
        return bool(self._queue or self._running)

    def run(self, requests: list[Request]) -> list[Solution]:
        """Return the answers to `requests`, in their order. Raises as `add_request`."""
        numbers = [self.add_request(request) for request in requests]
        solved: dict[int, Solution] = {}
        while self.has_unfinished():
            solved.update((number, event) for number, event in self.step() if isinstance(event, Solution))
        return [solved[number] for number in numbers]

    def step(self) -> list[Event]:
        """Start queued requests, have the model read one batch, and choose a token for each row that was read.

        Returns the pieces of text that are new, and a Solution for each request that ended, with their numbers. If all
        rows wait for their writers, it sleeps a moment instead.
        """
        events: list[Event] = []
        for row in self._running:
            if row.answer.is_waiting:
                self._append(row, row.answer.poll(), events)
        self._admit()
        for row, logits in self._read():
            self._append(row, row.answer.append_token(row.choose(logits)), events)
        for row in [row for row in self._running if row.is_finished]:
            self._end(row)
            events += [(row.number, piece) for piece in row.text.finish()]
            events.append((row.number, row.solution()))
        if self._running and all(row.answer.is_waiting for row in self._running) and not events:
            time.sleep(POLL_SECONDS)
        return events

    def _append(self, row: _Row, new: list[int] | None, events: list[Event]) -> None:
        """Take the tokens that follow; None if the writer has not replied yet."""
        row.unread = new or []
        marks = row.answer.forced[len(row.answer.forced) - len(row.unread) :]
        for is_inserted, group in groupby(zip(row.unread, marks, strict=True), key=lambda pair: pair[1]):
            data = b"".join(self.model.bytes_of(token_id) for token_id, _ in group)
            events += [(row.number, piece) for piece in row.text.add(data, is_inserted=is_inserted)]

    def _admit(self) -> None:
        """Start queued requests while there are sequences and cells; what is the same in running rows is not computed.

        A request whose prompt is just being read by another row waits until it can be shared. An encoder's output is
        kept for one question, so all running rows answer the same one.
        """
        while self._queue and self._free:
            row, taken = self._queue[0], sum(row.num_cells for row in self._running)
            if taken + row.num_cells > self.model.num_cells or self._is_being_read(row.prompt_ids):
                return
            if row.question_ids != self._question_ids:
                if self._running:
                    return
                self._question_ids = []  # if this fails
                encode(self.model.llm, row.question_ids, self._num_parallel)
                self._question_ids = row.question_ids
            self._queue.popleft()
            row.sequence = self._free.pop()
            row.num_read = self._share_prompt(row)
            row.unread = row.prompt_ids[row.num_read :]
            self._running.append(row)

    def _is_being_read(self, prompt_ids: list[int]) -> bool:
        reading = (row for row in self._running if row.num_read < len(row.prompt_ids))
        return self._can_share and any(row.prompt_ids == prompt_ids for row in reading)

    def _share_prompt(self, row: _Row) -> int:
        """Copy from a running row the beginning that its prompt has in common; return its length.

        A copy takes no new cells. The last token of a prompt is always read, for its logits.
        """
        import llama_cpp

        if not self._can_share or not self._running:
            return 0
        lengths = [
            (_common_length(other.prompt_ids[: other.num_read], row.prompt_ids[:-1]), other.sequence)
            for other in self._running
        ]
        length, source = max(lengths, key=lambda pair: pair[0])
        if length:
            llama_cpp.llama_memory_seq_cp(self._memory, source, row.sequence, 0, length)
        return length

    def _read(self) -> list[tuple[_Row, Any]]:
        """Have the model read one batch; return the rows that have nothing left to read, with their logits.

        Rows that read their answers come before prompts, of which the batch takes as much as it has room for.
        """
        unread = (row for row in self._running if row.unread and not row.is_finished)  # a late reply may have ended it
        rows = sorted(unread, key=lambda row: row.num_read < len(row.prompt_ids))
        room, ends = self._batch_size, []
        self._batch.n_tokens = 0
        for row in rows:
            part, row.unread = row.unread[:room], row.unread[room:]
            room -= len(part)
            if part:
                self._add_to_batch(row, part)
            if part and not row.unread:
                ends.append((row, self._batch.n_tokens - 1))
        if rows:
            self._decode()
        return [(row, self._logits(place)) for row, place in ends]

    def _add_to_batch(self, row: _Row, token_ids: list[int]) -> None:
        batch, start = self._batch, self._batch.n_tokens
        for place, token_id in enumerate(token_ids, start):
            batch.token[place] = token_id
            batch.pos[place] = row.num_read + place - start
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row.sequence
            batch.logits[place] = False
        batch.n_tokens = start + len(token_ids)
        batch.logits[batch.n_tokens - 1] = not row.unread
        row.num_read += len(token_ids)

    def _decode(self) -> None:
        import llama_cpp.llama_cpp as bindings

        if code := bindings.llama_decode(self.model.llm.ctx, self._batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def _logits(self, place: int) -> Any:
        import llama_cpp
        import numpy as np

        pointer = llama_cpp.llama_get_logits_ith(self.model.llm.ctx, place)
        return np.ctypeslib.as_array(pointer, shape=(self.model.llm.n_vocab(),))

    def _end(self, row: _Row) -> None:
        """Take a row out, and free its sequence; cells that others share stay."""
        import llama_cpp

        if row.sequence is None:
            self._queue.remove(row)
            return
        self._running.remove(row)
        llama_cpp.llama_memory_seq_rm(self._memory, row.sequence, -1, -1)
        self._free.append(row.sequence)


def _common_length(a: list[int], b: list[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
