"""The format of solutions with code: text, Python code, and what the code printed (SCDPO, section 3.1).

    Natalia sold half as many clips in May.
    ```python
    may = 48 / 2
    print(48 + may)
    ```
    ```output
    72.0
    ```
    She sold 72 clips altogether.
    #### 72

The marks are Markdown's fences, which every tokenizer has tokens for, so nothing has to be added to the vocabulary (the
paper's eight added tokens would need embeddings that an adapter on a 4-bit base does not train). The model writes text
and code; the output, from the line feed after the code's closing fence to the one after its own, is inserted.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

FENCE = "```"
CODE_START = f"{FENCE}python\n"
_OUTPUT_START = f"\n{FENCE}output\n"
_CODE = re.compile(rf"(?:\A|(?<=\n)){CODE_START}(.*?)(?<=\n){FENCE}", re.DOTALL)
_OUTPUT = re.compile(rf"{_OUTPUT_START}(.*?)(?:(?<=\n){FENCE}(?:\n|\Z)|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a solution: `content` without fences, and where it lies in the text with them.

    An output starts at the line feed after its code's closing fence.
    """

    kind: Literal["text", "code", "output"]
    content: str
    start: int
    end: int


def blocks(text: str) -> Iterator[Block]:
    """Yield the parts of a solution in order; together they cover it.

    Code that is not closed counts as text. An output may be cut off by the end of the solution, as by a limit.
    """
    position = 0
    for code in _CODE.finditer(text):
        if code.start() < position:  # inside an output
            continue
        if position < code.start():
            yield Block("text", text[position : code.start()], position, code.start())
        yield Block("code", code[1], *code.span())
        position = code.end()
        rest = text[position : position + len(_OUTPUT_START)]
        if output := _OUTPUT.match(text, position):
            yield Block("output", output[1].removesuffix("\n"), *output.span())
            position = output.end()
        elif len(rest) > 1 and position + len(rest) == len(text) and _OUTPUT_START.startswith(rest):
            yield Block("output", "", position, len(text))
            position = len(text)
    if position < len(text):
        yield Block("text", text[position:], position, len(text))


def prose(text: str) -> str:
    """Return a solution without its code and outputs."""
    if CODE_START not in text:
        return text
    return "\n".join(block.content for block in blocks(text) if block.kind == "text")


def is_clean(text: str) -> bool:
    """Whether a right solution may be preferred to wrong ones.

    No block failed, and the text does not apologise, as in SCDPO (section 3.1); the model wrote no output itself.
    Solutions without code may always.
    """
    if imitates_output(text):
        return False
    parts = list(blocks(text))
    words = {kind: "".join(part.content for part in parts if part.kind == kind).lower() for kind in ("text", "output")}
    has_code = any(part.kind == "code" for part in parts)
    return not has_code or ("error" not in words["output"] and "apolog" not in words["text"])


def imitates_output(text: str) -> bool:
    """Whether the model wrote an output itself, where no code has run."""
    return any(f"{FENCE}output" in part.content for part in blocks(text) if part.kind != "output")


def inserted_text(output: str) -> str:
    """Return what follows the closing fence of code that printed `output`. Fences in it are made harmless."""
    content = output.replace(FENCE, "'''")
    return f"{_OUTPUT_START}{content}\n{FENCE}\n" if content else f"{_OUTPUT_START}{FENCE}\n"


def inserted_tokens(token_ids: Sequence[int], text_of: Callable[[int], str]) -> list[bool]:
    """Return for each token of a solution whether it belongs to an output, which the model did not write.

    A token that begins before an output, such as a fence with its line feed, is the model's. `text_of` gives the text
    of one token in the middle of a line.
    """
    pieces = [text_of(token_id) for token_id in token_ids]
    outputs = [(block.start, block.end) for block in blocks("".join(pieces)) if block.kind == "output"]
    inserted, position = [], 0
    for piece in pieces:
        inserted.append(any(start <= position < end for start, end in outputs) and bool(piece))
        position += len(piece)
    return inserted
