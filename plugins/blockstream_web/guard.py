"""Who may ask: the host that was meant, a page of ours, and whoever has the token.

* A name that is not this server's is refused: another site's name may have been pointed here (DNS rebinding).
* What changes something needs a header that another site's page cannot send, and comes from a page of ours.
* With a token every answer needs it, in a cookie that `/?token=...` sets.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "blockstream"
#: The header that the page sends with every change.
MARK = "x-blockstream"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE = frozenset({"GET", "HEAD"})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Return whether an address or name is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """An application behind these rules. `names` are those that the server is called by.

    `any_address` lets it be called by any address, as where it listens on all: an address cannot be
    pointed elsewhere as a name can.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str], any_address: bool, token: str | None) -> None:
        self._app, self._any_address, self._token = app, any_address, token
        self._names = LOOPBACK | {name.lower().rstrip(".") for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self._refused(scope) or self._without_token(scope) or self._app
        await answer(scope, receive, send_with_headers)

    def _refused(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            return _no(421, "this server is not called so; --allow-host NAME lets it be")
        from_elsewhere = headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        is_visit = (
            scope["method"] == "GET" and scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        )
        if from_elsewhere and not is_visit:
            return _no(403, "another site's page asks")
        if scope["method"] not in SAFE:
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != host:
                return _no(403, "another site's page asks")
            if headers.get(MARK) != "1":
                return _no(403, f"the header {MARK}: 1 is missing")
        return None

    def _is_ours(self, host: str) -> bool:
        name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
        if name.lower().rstrip(".") in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._any_address

    def _without_token(self, scope: Scope) -> Response | None:
        if self._token is None:
            return None
        headers = Headers(scope=scope)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[-1]
        if scope["path"] == "/" and given:
            if not self._is_token(given):
                return _no(401, "the token is not right; the terminal that the server runs in has it")
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, given, max_age=30 * 86_400, httponly=True, samesite="strict")
            return answer
        if self._is_token(_cookie(headers.get("cookie", ""))):
            return None
        return _no(401, "open the address with its token, as the terminal that the server runs in shows it")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self._token or "").encode())


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _no(status: int, why: str) -> Response:
    return PlainTextResponse(why + "\n", status)
