"""Translate a model folder's tokenizer to GGUF metadata.

Three of llama.cpp's tokenizers matter here. "gpt2" is byte-level BPE: tokens, merges, and the name of a pre-tokenizer
whose regular expression is compiled into llama.cpp. "llama" is SentencePiece BPE: tokens and scores; the pair with the
best score is merged first. "t5" is SentencePiece Unigram: tokens, their log-probabilities, and a map of characters.

llama.cpp's own converter identifies a pre-tokenizer by hashing the ids of a test text, which works for published
vocabularies only. Here its structure in tokenizer.json is compared, so user-trained tokenizers are recognised too.
Scores are reconstructed from the order of the merges, so `tokenizer.model` is not needed.
"""

import base64
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dpost_lite.errors import ExportError
from dpost_lite.local import t5
from dpost_lite.local.chat import render_chat

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
# (pre-tokenizer steps, ignore_merges) -> llama.cpp's name
_PRE_TOKENIZERS = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "dbrx",
    ((_TEKKEN, "bytes"), True): "tekken",
}
_UNIGRAM_STEPS = [  # of a pre-tokenizer; what llama.cpp does for T5
    {"type": "WhitespaceSplit"},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
]
_UNUSED_SCORE = -10000.0  # of rows of the embedding without a token, whose names may be in a text
_ENDED = "18."  # an arbitrary assistant message; only the stop token after it matters


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as read by `read_vocabulary`; `special` maps bos, eos, unk, pad and eot to ids, if they exist."""

    path: Path
    spec: dict[str, Any] = field(repr=False)  # tokenizer.json
    size: int  # rows of the embedding: at least the number of tokens
    special: dict[str, int]
    chat_template: str | None = field(repr=False)

    @property
    def model_name(self) -> str:
        """llama.cpp's name of the tokenizer."""
        return "llama" if self.is_sentencepiece else "gpt2"

    @property
    def is_sentencepiece(self) -> bool:
        return bool(self.spec["model"].get("byte_fallback"))

    @cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` the model was trained with."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(self.spec))

    @cached_property
    def pre(self) -> str:
        """llama.cpp's name of the pre-tokenizer. Raises ExportError if it has no equivalent."""
        if self.is_sentencepiece:
            return "default"
        model = self.spec["model"]
        key = (_steps(self.spec.get("pre_tokenizer")), bool(model.get("ignore_merges")))
        if key not in _PRE_TOKENIZERS or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise ExportError(
                f"{self.path}: llama.cpp has no equivalent of this pre-tokenizer; train from a base model with one of "
                f"these: {', '.join(_PRE_TOKENIZERS.values())}, SentencePiece BPE"
            )
        return _PRE_TOKENIZERS[key]

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        pairs = self.spec["model"].get("merges", [])
        halves = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in pairs)
        return [(left, right) for left, right in halves]

    def tokens_and_types(self) -> tuple[list[str], list[int]]:
        """Return each id's token and its `gguf.TokenType`; ids without a token are UNUSED."""
        from gguf import TokenType

        tokens = [f"[PAD{i}]" for i in range(self.size)]
        types: list[int] = [TokenType.UNUSED] * self.size
        for token, i in _model_ids(self.spec).items():
            is_byte = self.is_sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            tokens[i], types[i] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
        for added in self.spec.get("added_tokens", []):
            i = added["id"]
            tokens[i], types[i] = added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if (unk := self._unknown()) is not None:
            types[unk] = TokenType.UNKNOWN
        return tokens, types

    def _unknown(self) -> int | None:
        """Return the token that stands for what the vocabulary lacks; byte-level ones lack nothing."""
        return _ids(self.spec).get(self.spec["model"].get("unk_token") or "") if self.is_sentencepiece else None

    def scores(self, tokens: list[str]) -> list[float]:
        """Return SentencePiece scores: minus the rank of the first merge that yields the token.

        Like SentencePiece, llama.cpp merges the pair whose merged token has the best score, so the order is the same.
        """
        rank: dict[str, int] = {}
        for i, (left, right) in enumerate(self.merges):
            rank.setdefault(left + right, i)
        return [-float(rank.get(token, len(self.merges))) for token in tokens]

    @property
    def adds_bos(self) -> bool:
        return self.tokenizer.encode("x").ids[:1] == [self.special.get("bos")]

    @property
    def adds_eos(self) -> bool:
        return self.tokenizer.encode("x").ids[-1:] == [self.special.get("eos")]

    @property
    def adds_space(self) -> bool:
        """Whether a word directly after a special token, as at the start of a prompt, gets a space before it."""
        start = self.tokenizer.id_to_token(self.special["bos"]) if "bos" in self.special else ""
        encoded = self.tokenizer.encode(start + "x", add_special_tokens=False)
        return encoded.tokens[1 if start else 0].startswith("▁")

    def prompt(self, question: str) -> str:
        """Return the question in the chat template, or as it is if there is no template."""
        return self._render([{"role": "user", "content": question}]) if self.chat_template else question

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        names = {name: self.tokenizer.id_to_token(i) for name, i in self.special.items()}
        return render_chat(
            self.chat_template or "",
            messages,
            bos=names.get("bos", ""),
            eos=names.get("eos", ""),
            add_generation_prompt=add_generation_prompt,
        )

    def template_stop(self) -> int | None:
        """Return the special token that the chat template puts after an answer, if any."""
        if not self.chat_template:
            return None
        messages = [{"role": "user", "content": "9+9?"}, {"role": "assistant", "content": _ENDED}]
        rest = self._render(messages, add_generation_prompt=False).rpartition(_ENDED)[2].lstrip()
        special = [added for added in self.spec.get("added_tokens", []) if added["special"]]
        return next((added["id"] for added in special if rest.startswith(added["content"])), None)

    def write(self, writer: Any) -> None:
        """Add the vocabulary to a `gguf.GGUFWriter`. Raises ExportError for an unsupported pre-tokenizer."""
        tokens, types = self.tokens_and_types()
        writer.add_tokenizer_model(self.model_name)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        self._write_model(writer, tokens)
        for name, i in self.special.items():
            getattr(writer, f"add_{name}_token_id")(i)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)

    def _write_model(self, writer: Any, tokens: list[str]) -> None:
        if self.is_sentencepiece:
            writer.add_token_scores(self.scores(tokens))
            writer.add_add_space_prefix(self.adds_space)
        else:
            writer.add_token_merges([" ".join(pair) for pair in self.merges])


class UnigramVocabulary(Vocabulary):
    """T5's: each word between spaces is split into the pieces that are likeliest together."""

    model_name = "t5"

    @cached_property
    def pre(self) -> str:
        """See `Vocabulary`."""
        steps = (self.spec.get("pre_tokenizer") or {}).get("pretokenizers")
        normaliser = (self.spec.get("normalizer") or {"type": "Precompiled"})["type"]
        if steps != _UNIGRAM_STEPS or normaliser != "Precompiled" or self.spec["model"].get("byte_fallback"):
            raise ExportError(
                f"{self.path}: llama.cpp has no equivalent of this normaliser and pre-tokenizer; train from a base "
                "model with those of T5"
            )
        return "default"

    def scores(self, tokens: list[str]) -> list[float]:
        """Return the log-probabilities of tokens."""
        known = dict(self.spec["model"]["vocab"])
        return [known.get(token, _UNUSED_SCORE) for token in tokens]

    def prompt(self, question: str) -> str:
        """See `Vocabulary`. Spaces and line feeds are one space to the tokenizer."""
        return " ".join(question.split())

    def _unknown(self) -> int | None:
        return int(self.spec["model"]["unk_id"])

    def _write_model(self, writer: Any, tokens: list[str]) -> None:
        writer.add_token_scores(self.scores(tokens))
        writer.add_add_space_prefix(True)
        writer.add_remove_extra_whitespaces(True)
        if characters := (self.spec.get("normalizer") or {}).get("precompiled_charsmap"):
            writer.add_precompiled_charsmap(base64.b64decode(characters))


def read_vocabulary(model_dir: Path, config: dict[str, Any]) -> Vocabulary:
    """Read tokenizer.json, tokenizer_config.json and the chat template of a model folder.

    Raises ExportError if tokenizer.json is missing, damaged, of another type than the model's family has, or has more
    tokens than the embedding.
    """
    path = model_dir / "tokenizer.json"
    spec = read_model_json(path)
    is_t5 = config["model_type"] == t5.MODEL_TYPE
    kind, made = ("Unigram", UnigramVocabulary) if is_t5 else ("BPE", Vocabulary)
    if spec.get("model", {}).get("type") != kind:
        raise ExportError(f"{path}: only {kind} tokenizers can be exported; train from a base model with one")
    ids = _ids(spec).values()
    if max(ids) >= config["vocab_size"]:
        raise ExportError(
            f"{path}: token {max(ids)} has no row in the model's embedding (vocab_size {config['vocab_size']}); "
            "replace it by the tokenizer that belongs to these weights"
        )
    settings_path = model_dir / "tokenizer_config.json"
    settings = read_model_json(settings_path) if settings_path.exists() else {}
    vocabulary = made(
        path, spec, config["vocab_size"], _special_ids(spec, settings, config), _template(model_dir, settings)
    )
    stop = vocabulary.template_stop()
    if stop is not None and stop != vocabulary.special.get("eos"):
        vocabulary.special["eot"] = stop
    return vocabulary


def read_model_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model folder. Raises ExportError if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(
            f"{path} is missing; export from a complete model folder, as written by save_pretrained"
        ) from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read ({error}); save or download the model again") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} is not a JSON object; save or download the model again")
    return value


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Return the steps of a pre-tokenizer, each as a name or a regular expression; "?" if unknown."""
    steps = []
    for step in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}]):
        name = "?"
        if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            name = "words" if step.get("use_regex", True) else "bytes"
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            name = "digits"
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            name = step.get("pattern", {}).get("Regex", "?")
        steps.append(name)
    return tuple(steps)


def _special_ids(spec: dict[str, Any], settings: dict[str, Any], config: dict[str, Any]) -> dict[str, int]:
    """Return the ids of bos, eos, unk and pad from the tokenizer's settings, else from the model's config."""
    ids = _ids(spec)
    special = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        i = ids.get(token or "", config.get(f"{name}_token_id"))
        i = i[0] if isinstance(i, list) and i else i
        if isinstance(i, int) and 0 <= i < config["vocab_size"]:
            special[name] = i
    return special


def _ids(spec: dict[str, Any]) -> dict[str, int]:
    """Return the id of each token."""
    return {**_model_ids(spec), **{added["content"]: added["id"] for added in spec.get("added_tokens", [])}}


def _model_ids(spec: dict[str, Any]) -> dict[str, int]:
    """Return the id of each token but those that were added."""
    vocab = spec["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}


def _template(model_dir: Path, settings: dict[str, Any]) -> str | None:
    """Return the chat template: its own file (transformers 5), else the default one in tokenizer_config.json."""
    path = model_dir / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template
