"""Who may ask: checks of Host, Origin and token before anything else of a request is read.

A page of another site could reach a server on this machine by a name that it points here (DNS rebinding), or by an
ordinary cross-site request. So Host must be an IP address, this machine's name for itself, or a name that was allowed,
and Origin, which browsers send, must be the server itself.
"""

import hmac
import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dpost_lite.server.errors import ApiError

OPEN_PATHS = ("/", "/health")  # without a token
ANY = "*"


@dataclass(frozen=True, slots=True)
class Access:
    """`api_key`: the bearer token, if one is needed; `hosts`: names of this server besides localhost; `origins`: other
    sites whose pages may ask, such as http://localhost:3000; "*" is any.
    """

    api_key: str | None = None
    hosts: Collection[str] = ()
    origins: Collection[str] = ()


class Gate:
    """An ASGI application that refuses what `access` does not allow, and passes on the rest."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope), scope["path"])
            except ApiError as error:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers, path: str) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_own(host):
            raise ApiError(403, "unknown Host; start the server with --allow-host NAME if it has this name")
        allowed = self._access.origins
        if origin is not None and not {origin, ANY} & {*allowed} and origin.partition("://")[2] != host:
            raise ApiError(403, "pages of other sites may not ask; start the server with --allow-origin to let them")
        if self._access.api_key is not None and path not in OPEN_PATHS:
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self._access.api_key}".encode()):
                raise ApiError(401, "wrong or missing API key", code="invalid_api_key")

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name == "localhost" or name in self._access.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
