"""What clients send: OpenAI's chat and text completions, checked, as requests to a solver.

Fields that are unknown, or cannot change the answer (`user`, `metadata`, `store` …), are ignored. Those that would, and
are not supported, are refused by name.
"""

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from dpost_lite.local.request import Message, Request
from dpost_lite.server.errors import ApiError

MAX_CHOICES = 16
MAX_MESSAGES = 256
MAX_STOPS = 16


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds where a client says nothing: at most `max_new_tokens` (also the limit), greedy decoding.

    Several choices (`n`) are drawn at `temperature`: greedy ones would all be the same.
    """

    max_new_tokens: int
    temperature: float


def _unsupported(value: Any) -> Any:
    if value and value not in ({"type": "text"}, ["text"], "none"):
        raise ValueError("not supported by this server; leave it out")
    return value


def _joined_text(content: Any) -> Any:
    """Return the text of a message that may come in parts."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('only parts {"type": "text", "text": …} are supported')
    return "".join(part["text"] for part in content)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Unsupported = Annotated[Any, AfterValidator(_unsupported)]
Stops = Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)]


class StreamOptions(BaseModel):
    """`include_usage` asks for one more chunk, with the number of tokens."""

    include_usage: bool | None = None


class Completion(BaseModel):
    """What chat and text completions have in common. `calculator` is ours: false leaves out the calculator and code."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    calculator: bool | None = None

    logprobs: Unsupported = None
    top_logprobs: Unsupported = None
    logit_bias: Unsupported = None
    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _choices(self, defaults: Defaults, *, messages: tuple[Message, ...] = (), prompt: str | None) -> list[Request]:
        """Return one request for each choice, with seeds that count up from the given one."""
        count = self.n or 1
        temperature = self.temperature
        if temperature is None:
            temperature = defaults.temperature if count > 1 else 0.0
        if self.top_p == 0:  # the likeliest token
            temperature = 0.0
        asked = self.max_completion_tokens or self.max_tokens or defaults.max_new_tokens
        first_seed = secrets.randbits(32) if self.seed is None else self.seed
        return [
            Request(
                messages=messages,
                prompt=prompt,
                temperature=temperature,
                top_p=self.top_p or 1.0,
                seed=(first_seed + index) % 2**32,
                max_new_tokens=min(asked, defaults.max_new_tokens),
                stop=tuple(text for text in self.stop or () if text),
                uses_tools=self.calculator is not False,
            )
            for index in range(count)
        ]


class ChatMessage(BaseModel):
    """One message of a chat; `content` may come as a list of texts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_text)] = ""
    tool_calls: Unsupported = None

    def as_message(self) -> Message:
        return Message("system" if self.role == "developer" else self.role, self.content)


class ChatCompletion(Completion):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: Unsupported = None
    functions: Unsupported = None
    response_format: Unsupported = None
    modalities: Unsupported = None
    audio: Unsupported = None
    web_search_options: Unsupported = None

    def requests(self, defaults: Defaults) -> list[Request]:
        """Return one request for each choice."""
        messages = tuple(message.as_message() for message in self.messages)
        return self._choices(defaults, messages=messages, prompt=None)

    @property
    def is_side_job(self) -> bool:
        """Whether a front end asks for a title, tags or further questions, and not a user for a solution.

        Open WebUI's all begin with "### Task:" and ask for JSON.
        """
        last = self.messages[-1].content.lstrip()
        return last.startswith("### Task:") and "JSON" in last


class TextCompletion(Completion):
    """The body of /v1/completions. `prompt` is continued as it is, without the chat template."""

    prompt: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES), BeforeValidator(_as_list)]
    best_of: int | None = Field(None, ge=1, le=1)
    suffix: Unsupported = None
    echo: Unsupported = None

    def requests(self, defaults: Defaults) -> list[Request]:
        """Return one request for each choice of each prompt."""
        return [request for prompt in self.prompt for request in self._choices(defaults, prompt=prompt)]


Body = TypeVar("Body", bound=Completion)


def parsed(body: bytes, kind: type[Body]) -> Body:
    """Return the checked body of a request. Raises ApiError that names the field at fault."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{param}: {message}" if param else message, param=param or None) from None
