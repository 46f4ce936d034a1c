"""The prompt template, stored in the tokenizer and used by training, sampling, export and solver alike.

A model with a chat template keeps it. A base model without one gets `PLAIN_TEMPLATE`, saved in its tokenizer files, so
that anything that loads the exported model uses the prompt it was trained with. (The paper uses an Alpaca-style prompt;
the wording does not matter, consistency does.)

Prompt and answer are tokenised separately and concatenated as ids, so that training sees the same token boundary as
sampling.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ClassVar

from dpost_lite.errors import RecipeError
from dpost_lite.problems.notation import BRACKETS, GSM8K, Notation

PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}BOSQuestion: {{ message['content'] }}\nAnswer:\n"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}EOS{% endif %}{% endfor %}"
)


class Prompter:
    """Converts questions and rationales to token ids and back, for one tokenizer.

    `style` is "chat", "plain" or "auto" (the tokenizer's chat template if it has one). `stop_id` is the token that ends
    an answer. The template in use is set as the tokenizer's `chat_template`, so saving the tokenizer saves it.
    `notation` is that of the model's tokens; texts are in GSM8K's.
    """

    notation: ClassVar[Notation] = GSM8K

    def __init__(self, tokenizer: Any, style: str = "auto") -> None:
        self.tokenizer = tokenizer
        if style == "plain" or not tokenizer.chat_template:
            bos = tokenizer.bos_token if tokenizer("x").input_ids[0] == tokenizer.bos_token_id else ""
            template = PLAIN_TEMPLATE.replace("BOS", bos or "").replace("EOS", tokenizer.eos_token)
            tokenizer.chat_template = template
        self.stop_id = self._stop_id()

    def prompt(self, question: str) -> str:
        """Return the full prompt text for `question`."""
        messages = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def prompt_ids(self, question: str) -> tuple[int, ...]:
        """Return the prompt's token ids; special tokens spelled out in the question are encoded as plain text."""
        if not any(token in question for token in self.tokenizer.all_special_tokens):
            return tuple(self.encode(self.prompt(question)))
        before, _, after = self.prompt("\x00").partition("\x00")
        return (*self.encode(before), *self.encode_text(question), *self.encode(after))

    def answer_ids(self, rationale: str) -> tuple[int, ...]:
        """Return the token ids of a rationale, followed by the stop token."""
        return (*self.encode_text(self.notation.to_model(rationale)), self.stop_id)

    def text(self, token_ids: tuple[int, ...] | list[int]) -> str:
        """Return the text of sampled ids, without special tokens."""
        ids = list(token_ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self.notation.from_model(text)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of trusted text: special tokens are recognised, none are added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of any text: the names of special tokens in it are plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def token_text(self) -> Callable[[int], str]:
        """Return a cached function from token id to the text it adds mid-line ("" for special tokens)."""
        anchor = self.encode("a")[-1]
        decode = self.tokenizer.decode
        special = frozenset(self.tokenizer.all_special_ids)
        prefix = len(decode([anchor], clean_up_tokenization_spaces=False))

        @cache
        def text_of(token_id: int) -> str:
            if token_id in special:
                return ""
            return decode([anchor, token_id], clean_up_tokenization_spaces=False)[prefix:]

        return text_of

    def step_ids(self, mark: str = "\n") -> frozenset[int]:
        """Return the tokens that end a reasoning step: those containing `mark`, by default a line feed."""
        text_of = self.token_text()
        return frozenset(i for i in range(len(self.tokenizer)) if mark in text_of(i))

    def _stop_id(self) -> int:
        """The special token that the template puts after an answer, or else the end-of-sequence token."""
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\x00"}]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = self.encode(rendered.rpartition("\x00")[2])
        return ids[0] if ids and ids[0] in self.tokenizer.all_special_ids else self.tokenizer.eos_token_id


class EncoderDecoderPrompter(Prompter):
    """The prompter of an encoder–decoder (T5): the encoder reads the question, the decoder writes the answer.

    As in DPO-ST, it reads the bare question and `</s>`, and writes one line in the notation `BRACKETS`. There is no
    template to save with the tokenizer. Raises RecipeError if `style` asks for one ("chat").
    """

    notation = BRACKETS

    def __init__(self, tokenizer: Any, style: str = "auto") -> None:
        if style == "chat":
            raise RecipeError(
                "model.prompt: chat; an encoder–decoder such as T5 reads the bare question: leave model.prompt at auto"
            )
        self.tokenizer = tokenizer
        self.stop_id = tokenizer.eos_token_id

    def prompt(self, question: str) -> str:
        """Return what the encoder reads as text."""
        return self.tokenizer.decode(self.prompt_ids(question), clean_up_tokenization_spaces=False)

    def prompt_ids(self, question: str) -> tuple[int, ...]:
        """Return the encoder's token ids; special tokens spelled out in the question are encoded as plain text."""
        return (*self.encode_text(question), self.stop_id)

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of any text: the names of special tokens in it are plain text.

        T5's special tokens are pieces of its vocabulary too, so a name is found in a text unless a space breaks it.
        """
        return self.encode(without_names(text, self.tokenizer.all_special_tokens))


def without_names(text: str, names: Iterable[str]) -> str:
    """Return `text` with the names of special tokens broken up by a space."""
    for name in names:
        text = text.replace(name, f"{name[0]} {name[1:]}")
    return text
