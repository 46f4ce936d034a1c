"""The web application: OpenAI's interface under /v1, the page at /, and /health."""

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from dpost_lite.local.request import Piece, Solution
from dpost_lite.server.answering import Events, send_stream, send_whole
from dpost_lite.server.async_solver import AsyncSolver
from dpost_lite.server.errors import ApiError
from dpost_lite.server.gate import Access, Gate
from dpost_lite.server.page import page
from dpost_lite.server.replies import Reply
from dpost_lite.server.schema import ChatCompletion, Completion, Defaults, TextCompletion, parsed

MAX_BODY = 2**16  # bytes: 16 for each token that the model reads; llama.cpp takes minutes for 1 MiB of special tokens
BODY_SECONDS = 30.0
CLIENT_GONE = 499  # nginx's number; nobody reads it
NOTHING = "{}"  # a front end that gets no title or tags from this uses its own


def create_app(solver: AsyncSolver, *, model: str, tools: str, defaults: Defaults, access: Access) -> FastAPI:
    """Return the application.

    `model` is the name that clients see; `tools` is how the page names the switch: "calculator" or "code".
    """
    app = FastAPI(openapi_url=None)  # its /docs would load scripts from the network
    card = {
        "id": model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "dpost-lite",
        "dpost_lite": {"tools": tools},
    }

    def check_model(name: str | None) -> None:
        if name is not None and name != model:
            message = f"the model {name!r} does not exist; this server has {model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def complete(request: Request, asked: Completion, events: Events, *, is_chat: bool) -> Response:
        reply = Reply(model, is_chat, num_choices=asked.n or 1)
        if asked.stream:
            return await send_stream(request, events, reply, includes_usage=asked.includes_usage)
        return await send_whole(request, events, reply)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        check_model(name)
        return card

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parsed(await _body(request), ChatCompletion)
        check_model(asked.model)
        requests = asked.requests(defaults)
        events = _nothing(len(requests)) if asked.is_side_job else solver.answer(requests)
        return await complete(request, asked, events, is_chat=True)

    @app.post("/v1/completions")
    async def text(request: Request) -> Response:
        asked = parsed(await _body(request), TextCompletion)
        check_model(asked.model)
        return await complete(request, asked, solver.answer(asked.requests(defaults)), is_chat=False)

    app.get("/")(page())
    _tell_errors(app)
    app.add_middleware(Gate, access=access)
    if access.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(access.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


async def _body(request: Request) -> bytes:
    """Return the body of a request. Raises ApiError if it is too large or too slow."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise ApiError(413, f"the request is larger than {MAX_BODY:,} bytes")
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:g} s") from None
    return bytes(body)


async def _nothing(num_choices: int) -> Events:
    """Answer a side job of a front end (`ChatCompletion.is_side_job`) without the model, which only solves problems."""
    for index in range(num_choices):
        yield index, Piece(NOTHING)
        yield index, Solution(
            text=NOTHING, strict=None, flexible=None, num_calculated=0, num_refused=0, end="stop", num_prompt_tokens=0,
            num_tokens=0,
        )  # fmt: skip


def _tell_errors(app: FastAPI) -> None:
    """Have all errors told in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown_path(_: Request, error: HTTPException) -> Response:
        return JSONResponse(ApiError(error.status_code, error.detail).body, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(*_: object) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def bug(*_: object) -> Response:
        return JSONResponse(ApiError(500, "the server has a bug; it printed a traceback").body, 500)
