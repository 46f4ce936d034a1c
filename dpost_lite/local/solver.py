"""Answers questions with a GGUF file, and with the calculator or the code that the model was trained with.

The loop is our own because llama-cpp-python's generators cannot take tokens that the model did not choose. Each step
chooses a token from the last logits, appends it to an `AnswerTokens` (as the batched sampler does), where a writer may
insert more, and evaluates all new tokens in one forward. The prompt comes from the file's own chat template.
"""

import codecs
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from dpost_lite.errors import DataError, ExportError
from dpost_lite.local.chat import render_chat
from dpost_lite.local.header import read_header
from dpost_lite.local.llama import open_gguf, uses_extra_buffers
from dpost_lite.problems.answer_tokens import AnswerTokens
from dpost_lite.problems.answers import stated_answer
from dpost_lite.problems.code_format import prose
from dpost_lite.problems.grading import flexible_answer
from dpost_lite.problems.tools import Tools

MAX_CONTEXT = 4096  # tokens; a word problem and its rationale need a few hundred, and each costs cache memory

Choose = Callable[[Any], int]  # logits (vocab,) -> token id


@dataclass(frozen=True, slots=True)
class Solution:
    """One answer. `strict` is what the text states (`stated_answer`: the number after `####`, or else what is in its
    `\\boxed{…}`), `flexible` the last number; `end` is "limit" if cut off.
    """

    text: str
    strict: str | None
    flexible: str | None
    num_calculated: int
    num_refused: int
    end: Literal["stop", "limit"]


class Solver:
    """Answers questions with one GGUF file, one at a time (not from two threads at once).

    `tools` is what the model uses while it writes; without any it computes by itself. `extra_buffers` lets llama.cpp
    repack weights into its extra buffers; None means whatever works on this machine. A crash of llama.cpp ends the
    process: see `SolverProcess`.
    Raises ExportError if the file is missing, broken, or carries no chat template; SandboxError if it cannot run code.
    """

    def __init__(
        self,
        gguf_path: Path,
        *,
        tools: Tools,
        max_new_tokens: int = 300,
        num_threads: int | None = None,
        extra_buffers: bool | None = None,
    ) -> None:
        import llama_cpp

        settings = read_header(gguf_path)
        num_context = settings.get(f"{settings.get('general.architecture')}.context_length", MAX_CONTEXT)
        self._template: str = settings.get("tokenizer.chat_template", "")
        if not self._template:
            raise ExportError(f"{gguf_path} carries no chat template; export from a model that has one")
        self._llm = open_gguf(
            gguf_path,
            extra_buffers=uses_extra_buffers(gguf_path) if extra_buffers is None else extra_buffers,
            n_ctx=min(num_context, MAX_CONTEXT),
            n_threads=num_threads,  # None: llama-cpp-python uses half the logical cores, the physical ones
            n_threads_batch=num_threads,
        )
        self._vocab = llama_cpp.llama_model_get_vocab(self._llm.model)
        self._max_new_tokens = max_new_tokens
        self._opened = ExitStack()
        self._writer = self._opened.enter_context(
            tools.writer(lru_cache(2**16)(self._text_of), self._encode, self._text)
        )

    def close(self) -> None:
        """End what the tools have started."""
        self._opened.close()

    def solve(self, question: str, *, temperature: float = 0.0, seed: int = 0) -> Solution:
        """Answer `question`, greedily or by sampling from the whole vocabulary at `temperature`.

        Raises DataError if the question leaves no room in the model's context.
        """
        prompt_ids = self._prompt_ids(question)
        answer = self._new_answer(prompt_ids)
        for _ in self._steps(prompt_ids, answer, _chooser(temperature, seed)):
            pass
        text = self._text(answer.token_ids)
        return Solution(
            text=text,
            strict=stated_answer(text),
            flexible=flexible_answer(prose(text)),
            num_calculated=answer.num_calculated,
            num_refused=answer.num_refused,
            end=answer.end,
        )

    def stream(self, question: str, *, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """Yield the answer in pieces as it is written, forced text included. Raises DataError as `solve` does."""
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        prompt_ids = self._prompt_ids(question)
        for new in self._steps(prompt_ids, self._new_answer(prompt_ids), _chooser(temperature, seed)):
            if piece := decode(self._bytes_of(new)):
                yield piece
        if rest := decode(b"", final=True):
            yield rest

    def _new_answer(self, prompt_ids: list[int]) -> AnswerTokens:
        room = min(self._max_new_tokens, self._llm.n_ctx() - len(prompt_ids))
        return AnswerTokens(self._writer.row() if self._writer else None, self._is_stop, room)

    def _steps(self, prompt_ids: list[int], answer: AnswerTokens, choose: Choose) -> Iterator[list[int]]:
        """Write the answer; yield the new tokens of each step. Blocks while the writer's reply is pending."""
        self._llm.reset()
        new = prompt_ids
        while not answer.is_finished:
            self._llm.eval(new)
            new = answer.append_token(choose(self._logits())) or answer.wait()
            yield new

    def _prompt_ids(self, question: str) -> list[int]:
        """Return the tokens of the question in the chat template, which also writes the BOS token if there is one.

        The name of a special token in the question stays plain text, as in training.
        """
        ids = self._encode_prompt(self._render(question))
        if self._encode_prompt(question) != self._llm.tokenize(_utf8(question), add_bos=False, special=False):
            before, _, after = self._render("\0").partition("\0")
            ids = self._encode_prompt(before) + self._encode(question) + self._encode_prompt(after)
        if len(ids) >= self._llm.n_ctx():
            raise DataError(
                f"the question has {len(ids)} tokens with its template, the model reads {self._llm.n_ctx()}; shorten it"
            )
        return ids

    def _render(self, question: str) -> str:
        return render_chat(
            self._template,
            [{"role": "user", "content": question}],
            bos=self._special_text(self._llm.token_bos()),
            eos=self._special_text(self._llm.token_eos()),
        )

    def _encode_prompt(self, text: str) -> list[int]:
        return self._llm.tokenize(_utf8(text), add_bos=False, special=True)

    def _special_text(self, token_id: int) -> str:
        return self._llm.detokenize([token_id], special=True).decode() if token_id >= 0 else ""

    def _logits(self) -> Any:
        import llama_cpp
        import numpy as np

        pointer = llama_cpp.llama_get_logits_ith(self._llm.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._llm.n_vocab(),))

    def _is_stop(self, token_id: int) -> bool:
        import llama_cpp

        return llama_cpp.llama_vocab_is_eog(self._vocab, token_id)

    def _bytes_of(self, ids: list[int]) -> bytes:
        """Return the text that tokens add in the middle of a line, as bytes: a character may span tokens."""
        import ctypes

        import llama_cpp

        pieces = []
        for token_id in ids:
            buffer = ctypes.create_string_buffer(256)  # the longest tokens in use have 128 bytes
            num_bytes = llama_cpp.llama_token_to_piece(self._vocab, token_id, buffer, len(buffer), 0, False)
            pieces.append(buffer.raw[: max(num_bytes, 0)])
        return b"".join(pieces)

    def _text_of(self, token_id: int) -> str:
        return self._text([token_id])

    def _text(self, ids: list[int]) -> str:
        return self._bytes_of(ids).decode(errors="replace")

    def _encode(self, text: str) -> list[int]:
        """Return the tokens of `text` in the middle of a line.

        SentencePiece vocabularies put a space before the first word. A line feed before the text takes that space, and
        is cut off again; it is a byte token, which never merges with the next one.
        """
        anchor = self._llm.tokenize(b"\n", add_bos=False, special=False)
        if len(anchor) == 1:
            return self._llm.tokenize(_utf8(text), add_bos=False, special=False)
        return self._llm.tokenize(b"\n" + _utf8(text), add_bos=False, special=False)[len(anchor) :]


def _utf8(text: str) -> bytes:
    return text.encode(errors="replace")


def _chooser(temperature: float, seed: int) -> Choose:
    """Return the choice of the next token: the likeliest, or a draw by the Gumbel trick, seeded."""
    import numpy as np

    if temperature <= 0:
        return lambda logits: int(np.argmax(logits))
    random = np.random.default_rng(seed)
    return lambda logits: int(np.argmax(logits.astype(np.float64) / temperature + random.gumbel(size=logits.shape)))
