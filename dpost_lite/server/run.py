"""Listen on a port and serve an application until Ctrl-C."""

import contextlib
import socket

import uvicorn
from fastapi import FastAPI

from dpost_lite.errors import RecipeError
from dpost_lite.server.async_solver import AsyncSolver

SECONDS_TO_END = 5
MAX_CONNECTIONS = 512


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises RecipeError if `host` is not this machine's, or the port is in use."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise RecipeError(
            f"--host, --port: cannot listen on {host}:{port} ({error}); give another port, or 0 for any free one"
        ) from error


def url_of(listening: socket.socket) -> str:
    """Return the address for a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Ends open streams when it is told to stop, instead of waiting for them."""

    def __init__(self, app: FastAPI, solver: AsyncSolver) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, proxy_headers=False, ws="none",
                limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=SECONDS_TO_END,
            )
        )  # fmt: skip
        self._solver = solver

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._solver.stop()
        await super().shutdown(sockets)
        self._solver.close()  # uvicorn raises SIGTERM again after this


def serve(app: FastAPI, solver: AsyncSolver, listening: socket.socket) -> None:
    """Serve until Ctrl-C (or SIGTERM)."""
    with contextlib.suppress(KeyboardInterrupt):
        Server(app, solver).run(sockets=[listening])
