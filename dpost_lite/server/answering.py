"""Send an answer, whole or as a stream, and stop computing it when the client goes away."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dpost_lite.local.request import Piece, Solution
from dpost_lite.server.errors import ApiError
from dpost_lite.server.replies import DONE, Reply, event

Events = AsyncGenerator[tuple[int, Piece | Solution], None]
"""What `AsyncSolver.answer` yields."""
T = TypeVar("T")


async def send_whole(request: Request, events: Events, reply: Reply) -> Response:
    """Return the reply when all its choices are written. Raises ApiError as `events`, and ClientDisconnect."""

    async def solutions() -> list[Solution]:
        found: dict[int, Solution] = {}
        async with aclosing(events):
            async for index, news in events:
                if isinstance(news, Solution):
                    found[index] = news
        return [found[index] for index in sorted(found)]

    return JSONResponse(reply.whole(await _while_connected(request, solutions())))


async def send_stream(request: Request, events: Events, reply: Reply, *, includes_usage: bool) -> Response:
    """Return the reply as server-sent events.

    It starts with the first piece, so that a request that cannot be answered gets a status of its own. Raises as
    `send_whole`; later errors become an event.
    """
    first = await _while_connected(request, anext(events))
    return _EventStream(_written(first, events, reply, includes_usage=includes_usage), media_type="text/event-stream")


async def _written(
    first: tuple[int, Piece | Solution], events: Events, reply: Reply, *, includes_usage: bool
) -> AsyncGenerator[str, None]:
    opened: set[int] = set()
    found: dict[int, Solution] = {}
    async with aclosing(events):
        try:
            async for index, news in _chained(first, events):
                if index not in opened:
                    opened.add(index)
                    for text in reply.opening(index):
                        yield text
                if isinstance(news, Piece):
                    yield reply.piece(index, news)
                else:
                    found[index] = news
                    yield reply.closing(index, news)
        except ApiError as error:
            yield event(error.body)
            return
    if includes_usage:
        yield reply.usage([found[index] for index in sorted(found)])
    yield DONE


async def _chained(first: tuple[int, Piece | Solution], events: Events) -> Events:
    yield first
    async for news in events:
        yield news


class _EventStream(StreamingResponse):
    """Closes its generator however it ends, so that the answer is no longer computed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """Return the result of `work`; cancel it if the client goes away, and raise ClientDisconnect."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
