"""The page at /: one HTML file that loads nothing, and may run only its own script."""

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.responses import HTMLResponse, Response


def page() -> Callable[[], Awaitable[Response]]:
    """Return the handler that sends page.html."""
    html = files("dpost_lite.server").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "content-security-policy": content_security_policy(html),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def ask() -> Response:
        return HTMLResponse(html, headers=headers)

    return ask


def content_security_policy(html: str) -> str:
    """Return the policy that allows the page's own script and style, by their hashes, and requests to this server."""

    def hashes(tag: str) -> str:
        digests = [
            hashlib.sha256(text.encode()).digest() for text in re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        ]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
