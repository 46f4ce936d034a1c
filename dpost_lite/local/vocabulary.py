"""A model folder's tokenizer, in the words of GGUF.

llama.cpp has two tokenizers that matter here. "gpt2" is byte-level BPE: tokens, merges, and the name of a pre-tokenizer
whose regular expression is compiled into llama.cpp. "llama" is SentencePiece's BPE: tokens and scores, the best-scored
neighbours merged first.

llama.cpp's own converter knows a pre-tokenizer by a hash of the ids it gives to one text, which ties it to published
vocabularies. Here its structure in tokenizer.json is compared: a tokenizer trained by the user is known as well.
Scores are rebuilt from the order of the merges, hence `tokenizer.model` is never needed.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dpost_lite.errors import ExportError
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
# (steps of the pre-tokenizer, does a whole word in the vocabulary skip the merges) -> llama.cpp's name
_PRE_TOKENIZERS = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "dbrx",
    ((_TEKKEN, "bytes"), True): "tekken",
}
_ENDED = "18."  # an assistant's message of which only the stop token after it matters


@dataclass(frozen=True)
class Vocabulary:
    """What `read_vocabulary` found in a folder; `special` maps bos, eos, unk, pad and eot to ids, where they exist."""

    path: Path
    spec: dict[str, Any] = field(repr=False)  # tokenizer.json
    size: int  # rows of the embedding, at least the number of tokens
    special: dict[str, int]
    chat_template: str | None = field(repr=False)

    @property
    def is_sentencepiece(self) -> bool:
        return bool(self.spec["model"].get("byte_fallback"))

    @cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`: what the trained model saw."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(self.spec))

    @cached_property
    def pre(self) -> str:
        """llama.cpp's name of the pre-tokenizer. Raises ExportError if it has none that is the same."""
        if self.is_sentencepiece:
            return "default"
        model = self.spec["model"]
        key = (_steps(self.spec.get("pre_tokenizer")), bool(model.get("ignore_merges")))
        if key not in _PRE_TOKENIZERS or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise ExportError(
                f"{self.path}: llama.cpp has no pre-tokenizer known to equal this one; train from a base model whose "
                f"tokenizer is of one of these kinds: {', '.join(_PRE_TOKENIZERS.values())}, SentencePiece BPE"
            )
        return _PRE_TOKENIZERS[key]

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        pairs = self.spec["model"].get("merges", [])
        halves = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in pairs)
        return [(left, right) for left, right in halves]

    def tokens_and_types(self) -> tuple[list[str], list[int]]:
        """Return each id's token and its `gguf.TokenType`; ids that the tokenizer leaves out are unused."""
        from gguf import TokenType

        tokens = [f"[PAD{i}]" for i in range(self.size)]
        types: list[int] = [TokenType.UNUSED] * self.size
        for token, i in self.spec["model"]["vocab"].items():
            is_byte = self.is_sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            tokens[i], types[i] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
        for added in self.spec.get("added_tokens", []):
            i = added["id"]
            tokens[i], types[i] = added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if self.is_sentencepiece and (unk := self.spec["model"].get("unk_token")) in tokens:
            types[tokens.index(unk)] = TokenType.UNKNOWN
        return tokens, types

    def scores(self, tokens: list[str]) -> list[float]:
        """Return SentencePiece scores: minus the rank of the first merge that makes the token.

        llama.cpp merges the neighbours whose joint token scores best, as SentencePiece does: the same order.
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
        """Whether a word right after a special token, where a prompt's text begins, gets a space before it."""
        start = self.tokenizer.id_to_token(self.special["bos"]) if "bos" in self.special else ""
        encoded = self.tokenizer.encode(start + "x", add_special_tokens=False)
        return encoded.tokens[1 if start else 0].startswith("▁")

    def prompt(self, question: str) -> str:
        """Return the question as the chat template puts it to the model (the bare question without a template)."""
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
        """Return the special token that the chat template writes after an answer, if it writes one."""
        if not self.chat_template:
            return None
        messages = [{"role": "user", "content": "9+9?"}, {"role": "assistant", "content": _ENDED}]
        rest = self._render(messages, add_generation_prompt=False).rpartition(_ENDED)[2].lstrip()
        special = [added for added in self.spec.get("added_tokens", []) if added["special"]]
        return next((added["id"] for added in special if rest.startswith(added["content"])), None)

    def write(self, writer: Any) -> None:
        """Put the whole vocabulary into a `gguf.GGUFWriter`. Raises ExportError for an unknown pre-tokenizer."""
        tokens, types = self.tokens_and_types()
        writer.add_tokenizer_model("llama" if self.is_sentencepiece else "gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        if self.is_sentencepiece:
            writer.add_token_scores(self.scores(tokens))
            writer.add_add_space_prefix(self.adds_space)
        else:
            writer.add_token_merges([" ".join(pair) for pair in self.merges])
        for name, i in self.special.items():
            getattr(writer, f"add_{name}_token_id")(i)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(model_dir: Path, config: dict[str, Any]) -> Vocabulary:
    """Read tokenizer.json, tokenizer_config.json and the chat template of a model folder.

    Raises ExportError if tokenizer.json is missing or broken, is not BPE, or has more tokens than the model.
    """
    path = model_dir / "tokenizer.json"
    spec = read_json(path)
    if spec.get("model", {}).get("type") != "BPE":
        raise ExportError(f"{path}: only BPE tokenizers can be exported; train from a base model that has one")
    ids = [*spec["model"]["vocab"].values(), *(added["id"] for added in spec.get("added_tokens", []))]
    if max(ids) >= config["vocab_size"]:
        raise ExportError(
            f"{path}: token {max(ids)} has no row in the model's embedding (vocab_size {config['vocab_size']}); "
            "put the tokenizer that belongs to these weights there"
        )
    settings_path = model_dir / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    vocabulary = Vocabulary(
        path, spec, config["vocab_size"], _special_ids(spec, settings, config), _template(model_dir, settings)
    )
    stop = vocabulary.template_stop()
    if stop is not None and stop != vocabulary.special.get("eos"):
        vocabulary.special["eot"] = stop
    return vocabulary


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of a model folder. Raises ExportError if it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(
            f"{path} is missing; export from a whole model folder, as save_pretrained writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read ({error}); write the model folder again") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} holds no JSON object; write the model folder again")
    return value


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Return the steps of a pre-tokenizer, each named or given by its regular expression; "?" for an unknown one."""
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
    """Return the ids of bos, eos, unk and pad: as the tokenizer names them, else as the model's config does."""
    ids = {**spec["model"]["vocab"], **{added["content"]: added["id"] for added in spec.get("added_tokens", [])}}
    special = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        i = ids.get(token, config.get(f"{name}_token_id"))
        i = i[0] if isinstance(i, list) and i else i
        if isinstance(i, int) and 0 <= i < config["vocab_size"]:
            special[name] = i
    return special


def _template(model_dir: Path, settings: dict[str, Any]) -> str | None:
    """Return the chat template: its own file (transformers 5), else the one named default in tokenizer_config.json."""
    path = model_dir / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template
