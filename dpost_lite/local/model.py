"""A GGUF file opened in llama.cpp, with what is around the numbers: its chat template, its tokens and their text."""

import ctypes
import re
from functools import lru_cache
from pathlib import Path

from dpost_lite.errors import ExportError
from dpost_lite.local.chat import render_chat
from dpost_lite.local.header import read_header
from dpost_lite.local.llama import open_gguf, uses_extra_buffers
from dpost_lite.local.request import Message, Request
from dpost_lite.system.machine import physical_cores

MAX_CONTEXT = 4096  # tokens of one sequence; a word problem and its rationale need a few hundred
CELLS_PER_SEQUENCE = 1024  # of the cache, where there are several sequences


class GgufModel:
    """One GGUF file and one llama.cpp context for `num_sequences` sequences, which share a cache.

    `num_context` is the most tokens of one sequence: the model's own context length, at most MAX_CONTEXT. `num_cells`
    is the size of the cache in tokens: CELLS_PER_SEQUENCE for each sequence, but never less than `num_context`.
    Raises ExportError if the file is missing, broken, or carries no chat template.
    """

    def __init__(
        self, path: Path, *, num_sequences: int, num_threads: int | None = None, extra_buffers: bool | None = None
    ) -> None:
        import llama_cpp

        settings = read_header(path)
        trained = settings.get(f"{settings.get('general.architecture')}.context_length", MAX_CONTEXT)
        self.num_context = min(trained, MAX_CONTEXT)
        self._template: str = settings.get("tokenizer.chat_template", "")
        if not self._template:
            raise ExportError(f"{path} carries no chat template; export from a model that has one")
        self.llm = open_gguf(
            path,
            extra_buffers=uses_extra_buffers(path) if extra_buffers is None else extra_buffers,
            num_sequences=num_sequences,
            n_ctx=max(self.num_context, min(self.num_context, CELLS_PER_SEQUENCE) * num_sequences),
            n_threads=num_threads or physical_cores(),
            n_threads_batch=num_threads or physical_cores(),
        )
        self.num_cells: int = self.llm.n_ctx()
        self._vocab = llama_cpp.llama_model_get_vocab(self.llm.model)
        self.text_of = lru_cache(2**16)(lambda token_id: self.text([token_id]))

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


def _utf8(text: str) -> bytes:
    return text.encode(errors="replace")
