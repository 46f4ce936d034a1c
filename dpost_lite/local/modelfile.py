"""Write a Modelfile, with which Ollama serves a GGUF file with the prompt that the model was trained with.

Ollama does not run the chat template in the file: it compares it with the templates it knows and takes the nearest, or
sends the bare question if none is near. So the template is rendered here with markers in place of the messages, and
what surrounds them is written as an Ollama template.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpost_lite.errors import ExportError
from dpost_lite.local.chat import render_chat
from dpost_lite.local.header import read_header

_TOKENS = "tokenizer.ggml.tokens"
_SYSTEM, _USER, _ANSWER, _NEXT = "<<system>>", "<<user>>", "<<answer>>", "<<next>>"  # markers


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A chat template as Ollama can express it: the texts around a system message, questions and answers."""

    before_system: str | None
    """None if the template takes no system message."""
    after_system: str
    before_question: str
    """In a conversation without a system message, or after an earlier answer."""
    before_answer: str
    after_answer: str
    default_system: str
    """What the chat template says if there is no system message."""

    def as_go(self) -> str:
        """Return it in the syntax of Go's text/template. Raises ExportError if that would need quoting."""
        parts = (self.before_system or "", self.after_system, self.before_question, self.before_answer)
        for text in (*parts, self.after_answer, self.default_system):
            if "{{" in text or '"""' in text:
                raise ExportError('the chat template contains {{ or """')
        question = self.before_question
        if self.before_system is not None:
            with_system = f"{self.before_system}{{{{ .System }}}}{self.after_system}"
            question = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{question}{{{{ end }}}}"
        return f"{question}{{{{ .Prompt }}}}{self.before_answer}{{{{ .Response }}}}{self.after_answer}"


def write_modelfile(gguf: Path, out: Path, *, notes: Sequence[str] = (), max_new_tokens: int | None = None) -> None:
    """Write the Modelfile `out` for the file `gguf` in the same folder; `notes` become comments at its start.

    Raises ExportError if the GGUF file cannot be read.
    """
    header = read_header(gguf, arrays=(_TOKENS,))
    tokens: list[str] = header[_TOKENS]
    special = {
        name: tokens[header[key]]
        for name in ("bos", "eos", "eot")
        if header.get(key := f"tokenizer.ggml.{name}_token_id", len(tokens)) < len(tokens)
    }
    stops = list(dict.fromkeys(special[name] for name in ("eot", "eos") if name in special))
    lines = [f"# {line}" for line in notes]
    try:
        prompt = read_template(
            header.get("tokenizer.chat_template", ""),
            bos=special.get("bos", ""),
            stops=stops,
            adds_bos=bool(header.get("tokenizer.ggml.add_bos_token")),
        )
        template = ['TEMPLATE """' + prompt.as_go() + '"""']
        if prompt.default_system:
            template.append('SYSTEM """' + prompt.default_system + '"""')
    except ExportError as error:
        template = [f"# No TEMPLATE: the model's chat template is none that Ollama can express ({error})."]
    limit = [f"PARAMETER num_predict {max_new_tokens}"] if max_new_tokens else []
    lines += [
        f"FROM ./{gguf.name}",
        *template,
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",  # numbers have to be repeated
        *limit,
    ]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_template(template: str, *, bos: str, stops: Sequence[str], adds_bos: bool) -> PromptTemplate:
    """Return what a chat template puts around messages; `adds_bos`: llama.cpp itself puts `bos` before the prompt.

    `stops` are the tokens that may end an answer, the template's own first. Raises ExportError if there is no template,
    or it cannot be rendered, or changes messages.
    """
    if not template:
        raise ExportError("there is none")

    def parts(*messages: tuple[str, str]) -> list[str]:
        """Render messages, each a role and a marker; return what stands before, between and after the markers."""
        chat = [{"role": role, "content": marker} for role, marker in messages]
        rest, found = render_chat(template, chat, bos=bos, eos=stops[-1] if stops else ""), []
        for _, marker in messages:
            before, is_there, rest = rest.partition(marker)
            if not is_there:
                raise ExportError("it changes messages")
            found.append(before)
        if adds_bos and bos:
            found[0] = found[0].removeprefix(bos)
        return [*found, rest]

    question, answer = parts(("user", _USER))
    before_system, after_system, default = None, "", ""
    with contextlib.suppress(ExportError):  # many templates refuse a system message
        before, after, end = parts(("system", _SYSTEM), ("user", _USER))
        if end == answer:
            before_system, after_system = before, after
            if question.startswith(before) and question.endswith(after):
                default = question[len(before) : len(question) - len(after)]
    between = stops[0] if stops else ""
    with contextlib.suppress(ExportError):  # some refuse an earlier answer
        between = parts(("user", _USER), ("assistant", _ANSWER), ("user", _NEXT))[2]
    after_answer, next_question = _split(between, question, stops)
    return PromptTemplate(
        before_system, after_system, next_question if default else question, answer, after_answer, default
    )


def _split(between: str, question: str, stops: Sequence[str]) -> tuple[str, str]:
    """Split what stands between an answer and the next question into what ends the one and what begins the other."""
    if between.endswith(question):
        return between.removesuffix(question), question
    stop = next((stop for stop in stops if between.startswith(stop)), "")
    rest = between.removeprefix(stop)
    begin = rest.lstrip()
    return stop + rest[: len(rest) - len(begin)], begin
