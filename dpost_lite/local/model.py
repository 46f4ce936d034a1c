"""A GGUF file opened in llama.cpp, with what is around the numbers: its chat template, its tokens and their text.

Decoder-only models and encoder–decoders (T5) differ in how they read a prompt, and in how they write.
"""

import ctypes
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from dpost_lite.errors import ExportError
from dpost_lite.local import llama, t5
from dpost_lite.local.answer_text import AnswerText, TranslatedText
from dpost_lite.local.chat import render_chat
from dpost_lite.local.header import read_header
from dpost_lite.local.request import Message, Request
from dpost_lite.problems.notation import BRACKETS, GSM8K, Notation
from dpost_lite.problems.prompts import without_names
from dpost_lite.system.machine import physical_cores

MAX_CONTEXT = 4096  # tokens of one sequence; a word problem and its rationale need a few hundred
_SPACES = re.compile(r"[^\S\x1c-\x1f]+")  # as Unicode and `tokenizers` have it
CELLS_PER_SEQUENCE = 1024  # of the cache, where there are several sequences


class GgufModel:
    """One GGUF file and one llama.cpp context for `num_sequences` sequences, which share a cache.

    This class is for decoder-only models. `num_context` is the most tokens of one sequence: the model's own context
    length, at most MAX_CONTEXT. `num_cells` is the size of the cache in tokens: CELLS_PER_SEQUENCE for each sequence,
    but never less than `num_context`.
    Raises ExportError if the file is missing, broken, or carries no chat template.
    """

    notation: ClassVar[Notation] = GSM8K
    """How the model writes calculations."""

    def __init__(
        self, path: Path, *, num_sequences: int, num_threads: int | None = None, extra_buffers: bool | None = None
    ) -> None:
        import llama_cpp

        settings = read_header(path)
        trained = settings.get(f"{settings.get('general.architecture')}.context_length", MAX_CONTEXT)
        self.num_context = min(trained, MAX_CONTEXT)
        self._template = self._read_template(path, settings)
        self.llm = llama.open_gguf(
            path,
            extra_buffers=llama.uses_extra_buffers(path) if extra_buffers is None else extra_buffers,
            num_sequences=num_sequences,
            n_ctx=max(self.num_context, min(self.num_context, CELLS_PER_SEQUENCE) * num_sequences),
            n_threads=num_threads or physical_cores(),
            n_threads_batch=num_threads or physical_cores(),
        )
        self.num_cells: int = self.llm.n_ctx()
        self._vocab = llama_cpp.llama_model_get_vocab(self.llm.model)
        self.text_of = lru_cache(2**16)(lambda token_id: self.text([token_id]))

    def _read_template(self, path: Path, settings: dict[str, Any]) -> str:
        template: str = settings.get("tokenizer.chat_template", "")
        if not template:
            raise ExportError(f"{path} carries no chat template; export from a model that has one")
        return template

    def close(self) -> None:
        """Free the model and its cache."""
        self.llm.close()

    def prompt_ids(self, request: Request) -> list[int]:
        """Return the tokens of a request's prompt, or of its messages in the chat template.

        The template writes the BOS token itself if there is one. The name of a special token in a message stays plain
        text, as in training; in a `prompt` it is the token. Raises ExportError if the template rejects the messages.
        """
        if request.prompt is not None:
            return self.llm.tokenize(_utf8(request.prompt), add_bos=True, special=True)
        contents = [message.content for message in request.messages]
        if not any(map(self._names_special, contents)):
            return self._encode_special(self._render(request.messages))
        marked = [Message(message.role, f"\0{place}\0") for place, message in enumerate(request.messages)]
        parts = re.split("\0([0-9]+)\0", self._render(marked))  # template, place, template, place, … template
        encoded = [
            self.encode(contents[int(part)]) if is_place else self._encode_special(part)
            for part, is_place in zip(parts, [False, True] * len(parts), strict=False)
        ]
        return [token_id for ids in encoded for token_id in ids]

    def split(self, prompt_ids: list[int]) -> tuple[list[int], list[int]]:
        """Return what an encoder reads of a prompt, and what the decoder reads before the answer."""
        return [], prompt_ids

    def answer_text(self, stop: Sequence[str]) -> AnswerText:
        """Return what makes text of an answer's tokens."""
        return AnswerText(stop)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text` in the middle of a line, none of them special.

        SentencePiece vocabularies put a space before the first word. A line feed before the text takes that space, and
        is cut off again; it is a byte token, which never merges with the next one.
        """
        anchor = self.llm.tokenize(b"\n", add_bos=False, special=False)
        if len(anchor) == 1:
            return self.llm.tokenize(_utf8(text), add_bos=False, special=False)
        return self.llm.tokenize(b"\n" + _utf8(text), add_bos=False, special=False)[len(anchor) :]

    def text(self, ids: list[int]) -> str:
        """Return the text that tokens add in the middle of a line; special tokens add none."""
        return b"".join(map(self.bytes_of, ids)).decode(errors="replace")

    def bytes_of(self, token_id: int) -> bytes:
        """Return what one token adds to a text, as bytes: a character may span tokens."""
        import llama_cpp

        buffer = ctypes.create_string_buffer(256)  # the longest tokens in use have 128 bytes
        num_bytes = llama_cpp.llama_token_to_piece(self._vocab, token_id, buffer, len(buffer), 0, False)
        return buffer.raw[: max(num_bytes, 0)]

    def is_stop(self, token_id: int) -> bool:
        """Return whether a token ends an answer."""
        import llama_cpp

        return llama_cpp.llama_vocab_is_eog(self._vocab, token_id)

    def _render(self, messages: "tuple[Message, ...] | list[Message]") -> str:
        return render_chat(
            self._template,
            [{"role": message.role, "content": message.content} for message in messages],
            bos=self._special_text(self.llm.token_bos()),
            eos=self._special_text(self.llm.token_eos()),
        )

    def _names_special(self, text: str) -> bool:
        return self._encode_special(text) != self.llm.tokenize(_utf8(text), add_bos=False, special=False)

    def _encode_special(self, text: str) -> list[int]:
        return self.llm.tokenize(_utf8(text), add_bos=False, special=True)

    def _special_text(self, token_id: int) -> str:
        return self.llm.detokenize([token_id], special=True).decode() if token_id >= 0 else ""


class EncoderDecoderModel(GgufModel):
    """T5: the encoder reads the bare question, the decoder writes the answer after a token that starts all of them.

    A question and an answer may have `num_context` tokens each. llama.cpp keeps what the encoder made of one question,
    so all answers at a time are to the same one.
    """

    notation = BRACKETS

    def __init__(
        self, path: Path, *, num_sequences: int, num_threads: int | None = None, extra_buffers: bool | None = None
    ) -> None:
        import llama_cpp

        super().__init__(path, num_sequences=num_sequences, num_threads=num_threads, extra_buffers=extra_buffers)
        self.num_context = min(self.num_context, self.llm.n_batch)
        self._start_ids = llama.start_ids(self.llm)
        special = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        self._special_names = [
            llama_cpp.llama_vocab_get_text(self._vocab, token_id).decode()
            for token_id in range(self.llm.n_vocab())
            if llama_cpp.llama_vocab_get_attr(self._vocab, token_id) & special
        ]

    def _read_template(self, path: Path, settings: dict[str, Any]) -> str:
        return ""

    def prompt_ids(self, request: Request) -> list[int]:
        """Return the tokens of a request's question, with the one that ends it. Raises ExportError if it has others."""
        if request.prompt is None and [message.role for message in request.messages] != ["user"]:
            raise ExportError("an encoder–decoder reads one question; ask with one message, from the user")
        question = request.messages[0].content if request.prompt is None else request.prompt
        return [*self.encode(question), self.llm.token_eos()]

    def split(self, prompt_ids: list[int]) -> tuple[list[int], list[int]]:
        """See `GgufModel`."""
        return prompt_ids, self._start_ids

    def answer_text(self, stop: Sequence[str]) -> AnswerText:
        """See `GgufModel`."""
        return TranslatedText(self.notation, stop)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, none of them special: their names are broken up, as in training."""
        words = _SPACES.sub(" ", without_names(text, self._special_names))
        return self.llm.tokenize(_utf8(words), add_bos=False, special=False)


def open_model(
    path: Path, *, num_sequences: int, num_threads: int | None = None, extra_buffers: bool | None = None
) -> GgufModel:
    """Open a GGUF file. Arguments and errors: `GgufModel`."""
    made = EncoderDecoderModel if read_header(path).get("general.architecture") == t5.ARCHITECTURE else GgufModel
    return made(path, num_sequences=num_sequences, num_threads=num_threads, extra_buffers=extra_buffers)


def _utf8(text: str) -> bytes:
    return text.encode(errors="replace")
