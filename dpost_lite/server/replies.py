"""What clients get: OpenAI's objects for chat and text completions, whole or in chunks.

Two additions of ours, which other clients ignore: `dpost_lite.answer` beside `finish_reason` is the answer that a
finished solution states, if any, and `delta.dpost_lite.inserted` marks text that the calculator or the sandbox wrote.
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dpost_lite.local.request import Piece, Solution

FINISH = {"stop": "stop", "limit": "length", "cancelled": "length"}
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply, to a chat or to a text completion."""

    model: str
    is_chat: bool
    num_choices: int = 1
    """Of each prompt (`n`)."""
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, solutions: Sequence[Solution]) -> dict[str, Any]:
        """Return the reply with all its choices."""
        choices = [self._choice(index, solution) for index, solution in enumerate(solutions)]
        return {**self._head(is_chunk=False), "choices": choices, "usage": self._usage(solutions)}

    def opening(self, index: int) -> list[str]:
        """Return the events that open a choice: a chat's first chunk gives the role."""
        return [self._event(index, {"role": "assistant", "content": ""})] if self.is_chat else []

    def piece(self, index: int, piece: Piece) -> str:
        """Return the event for a piece of text."""
        mark = {"dpost_lite": {"inserted": True}} if piece.is_inserted else {}
        return self._event(index, {"content": piece.text, **mark})

    def closing(self, index: int, solution: Solution) -> str:
        """Return the last event of a choice."""
        return self._event(index, {}, solution)

    def usage(self, solutions: Sequence[Solution]) -> str:
        """Return the event without choices that clients ask for by `stream_options.include_usage`."""
        return event({**self._head(is_chunk=True), "choices": [], "usage": self._usage(solutions)})

    def _event(self, index: int, delta: dict[str, Any], solution: Solution | None = None) -> str:
        body = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        choice = {"index": index, **body, "logprobs": None, **_ending(solution)}
        return event({**self._head(is_chunk=True), "choices": [choice]})

    def _choice(self, index: int, solution: Solution) -> dict[str, Any]:
        text = solution.text
        body: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return {"index": index, **body, "logprobs": None, **_ending(solution)}

    def _usage(self, solutions: Sequence[Solution]) -> dict[str, int]:
        """Return the token counts; the choices of one prompt share its tokens."""
        prompt_tokens = sum(solution.num_prompt_tokens for solution in solutions[:: self.num_choices])
        completion_tokens = sum(solution.num_tokens for solution in solutions)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def _head(self, *, is_chunk: bool) -> dict[str, Any]:
        if self.is_chat:
            prefix, kind = "chatcmpl", "chat.completion.chunk" if is_chunk else "chat.completion"
        else:
            prefix, kind = "cmpl", "text_completion"
        return {"id": f"{prefix}-{self.number}", "object": kind, "created": self.created, "model": self.model}


def event(value: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def _ending(solution: Solution | None) -> dict[str, Any]:
    if solution is None:
        return {"finish_reason": None}
    answer = solution.strict if solution.end == "stop" else None
    return {"finish_reason": FINISH[solution.end], "dpost_lite": {"answer": answer}}
