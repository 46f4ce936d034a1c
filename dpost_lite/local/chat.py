"""Render the chat template of a GGUF file or model folder without loading transformers.

The jinja2 environment matches transformers' `apply_chat_template`: sandboxed, with trimmed blocks, `raise_exception`
and `strftime_now`.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from dpost_lite.errors import ExportError


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], *, bos: str, eos: str, add_generation_prompt: bool = True
) -> str:
    """Return `messages` rendered with the template.

    Raises ExportError if the template is broken or rejects the messages.
    """
    from jinja2 import TemplateError

    try:
        return _compiled(template).render(
            messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        is_usual = [message["role"] for message in messages] in (["user"], ["user", "assistant"])
        way_out = "fix chat_template.jinja" if is_usual else "ask with one message, from the user"
        raise ExportError(f"the model's chat template cannot be rendered ({error}); {way_out}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _raise(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
