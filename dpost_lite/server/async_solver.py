"""Answers for many clients at once from one solver process, which is replaced if it dies."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from dpost_lite.errors import DpostError, PromptTooLong
from dpost_lite.local.request import Piece, Request, Solution
from dpost_lite.server.errors import ApiError

RETRY_SECONDS = 1
GRACE_SECONDS = 10.0  # for a solver to end an answer that was cut off
STOPPING = "the server is shutting down"
_LOGGER = logging.getLogger("uvicorn.error")


Tell = Callable[[Piece | Solution | DpostError], None]
Events = asyncio.Queue[tuple[int, Piece | Solution | Exception]]


class Process(Protocol):
    """What is needed of a `SolverProcess`."""

    def start(self, request: Request, tell: Tell) -> int: ...
    def cancel(self, number: int) -> None: ...
    @property
    def is_alive(self) -> bool: ...
    def close(self, *, at_once: bool = False) -> None: ...


class AsyncSolver:
    """Has a solver process answer, and opens another if it dies; its methods belong to one event loop.

    At most `max_outstanding` are answered or waiting at a time; after `max_seconds` an answer is cut off.
    Raises what `open_process` raises.
    """

    def __init__(self, open_process: Callable[[], Process], *, max_outstanding: int, max_seconds: float) -> None:
        self._open = open_process
        self._max_outstanding = max_outstanding
        self._max_seconds = max_seconds
        self._num_outstanding = 0
        self._queues: set[Events] = set()
        self._is_stopping = False
        self._reopening: asyncio.Task[None] | None = None
        self._process = open_process()

    async def answer(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Piece | Solution], None]:
        """Yield the pieces of all answers as they are written, with the index of the request; each ends in a Solution.

        Closing the generator cancels what is unfinished. Raises ApiError: 429 if there is no room, 400 if a request
        cannot be answered, 503 if the process dies, the server stops, or no answer gets a turn within `max_seconds`.
        """
        if len(requests) > self._max_outstanding:
            raise ApiError(400, f"{len(requests)} answers in one request; at most {self._max_outstanding}", param="n")
        if self._num_outstanding + len(requests) > self._max_outstanding:
            busy = "too many requests at once; try again"
            raise ApiError(429, busy, code="rate_limit_exceeded", retry_after=RETRY_SECONDS)
        loop = asyncio.get_running_loop()
        events: Events = asyncio.Queue()
        timer = loop.call_later(self._max_seconds, events.put_nowait, (0, TimeoutError()))
        running: dict[int, int] = {}
        unbegun: list[tuple[int, Solution]] = []  # told last: if there is nothing else, they are an error
        process: Process | None = None
        self._num_outstanding += len(requests)
        self._queues.add(events)
        try:
            process = await self._living_process()
            for index, request in enumerate(requests):
                running[index] = _started(process, request, _putter(loop, events, index))
            while running:
                index, event = await events.get()
                if isinstance(event, DpostError):
                    raise _api_error(event, died=not process.is_alive)
                if isinstance(event, TimeoutError):
                    silent = ApiError(503, "the solver does not answer", retry_after=RETRY_SECONDS)
                    timer = loop.call_later(GRACE_SECONDS, events.put_nowait, (0, silent))
                    for number in running.values():
                        process.cancel(number)  # its Solution has what was written so far
                    continue
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Solution):
                    del running[index]
                    if event.num_tokens == 0:
                        unbegun.append((index, event))
                        continue
                yield index, event
            if len(unbegun) == len(requests):
                raise ApiError(503, "no answer was begun in time; try again", retry_after=RETRY_SECONDS)
            for index, event in unbegun:
                yield index, event
        finally:
            timer.cancel()
            self._queues.discard(events)
            self._num_outstanding -= len(requests)
            for number in running.values():
                assert process is not None
                process.cancel(number)

    def stop(self) -> None:
        """End all answers with an error, and take no more."""
        self._is_stopping = True
        for events in self._queues:
            events.put_nowait((0, ApiError(503, STOPPING)))

    def close(self) -> None:
        """End the solver process, after the event loop or as its last act."""
        self._process.close(at_once=True)

    async def _living_process(self) -> Process:
        if self._is_stopping:
            raise ApiError(503, STOPPING)
        if self._reopening is None and not self._process.is_alive:
            self._reopening = asyncio.create_task(self._reopen())
        if self._reopening is not None:
            try:
                await asyncio.shield(self._reopening)  # a client that goes away must not stop it for the others
            except DpostError as error:
                raise ApiError(503, f"{error}", code="solver_died") from error
        return self._process

    async def _reopen(self) -> None:
        try:
            await asyncio.to_thread(self._replace_process)
        finally:
            self._reopening = None

    def _replace_process(self) -> None:
        _LOGGER.warning("the solver process died; it is started again")
        self._process.close(at_once=True)
        self._process = self._open()


def _started(process: Process, request: Request, tell: Tell) -> int:
    try:
        return process.start(request, tell)
    except DpostError as error:  # it died just now
        raise _api_error(error, died=True) from error


def _putter(loop: asyncio.AbstractEventLoop, events: Events, index: int) -> Tell:
    """Return the `tell` of one request: called by the solver's thread, it puts events into the loop's queue."""

    def tell(event: Piece | Solution | DpostError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    return tell


def _api_error(error: DpostError, *, died: bool) -> ApiError:
    if died:
        return ApiError(503, f"{error}", code="solver_died")
    return ApiError(400, f"{error}", code="context_length_exceeded" if isinstance(error, PromptTooLong) else None)
