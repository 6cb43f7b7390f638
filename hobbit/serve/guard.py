"""Who may ask, and how much at once: what is checked before any endpoint sees a request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import HttpError

# Without a key: whether the server lives, and the page, which asks for the key.
OPEN_PATHS = frozenset({"/health", "/v1/health", "/"})
OPEN_FOLDER = "/ui/"

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Rules:
    """`keys` empty: no key is needed. `local` is a server that only this machine can reach:
    requests that name another host than `host` or this machine are refused, for they come from a
    web page that has made its own name mean this machine. `origins` are the web pages that may use
    the server besides its own. A body that does not go on for `patience_s` is given up.
    """

    keys: Collection[str] = ()
    origins: Collection[str] = ()
    local: bool = True
    host: str = ""
    max_body: int = 16 << 20
    patience_s: float = 60.0


class Guard:
    """The middleware that applies Rules."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules
        self._digests = [hashlib.sha256(key.encode()).digest() for key in rules.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limited = _Limited(receive, self._rules)
        try:
            self._check(scope, headers)
            limited.check(headers)
        except HttpError as error:
            response = JSONResponse(error.body(), error.status, error.headers)
            await response(scope, receive, send)
            return
        await self._app(scope, limited.receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._rules.local and _name_of(f"//{host}") not in {*_LOCAL_NAMES, self._rules.host}:
            raise HttpError(403, f"this server is for this machine alone, not for {host!r}")
        origin = headers.get("origin")
        if origin is not None and not self._is_welcome(origin, host):
            raise HttpError(403, f"pages of {origin} may not use this server: see --cors-origins")
        path: str = scope["path"]
        if self._digests and path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
            self._check_key(headers)

    def _is_welcome(self, origin: str, host: str) -> bool:
        own = origin.partition("://")[2] == host
        return own or "*" in self._rules.origins or origin in self._rules.origins

    def _check_key(self, headers: Headers) -> None:
        """Compare with every key, in a time that does not tell how much of one is right."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Headers come decoded as Latin-1, whatever they are.
        sent = key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        given = hashlib.sha256(sent).digest()
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(found):
            raise HttpError(401, "a valid API key is needed: Authorization: Bearer KEY", _CHALLENGE)


class _Limited:
    """Counts what a request's body comes to, and does not wait for it without end."""

    def __init__(self, receive: Receive, rules: Rules) -> None:
        self._receive, self._limit, self._patience_s = receive, rules.max_body, rules.patience_s
        self._read, self._is_complete = 0, False

    def check(self, headers: Headers) -> None:
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        if self._is_complete:  # what comes now is that the client has gone
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._patience_s)
        except asyncio.TimeoutError:
            raise HttpError(408, f"no more came for {self._patience_s:g} s") from None
        self._read += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._read > self._limit:
            raise self._too_large()
        return message

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the request is larger than {self._limit} bytes: see --max-body")


_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def _name_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # it is no URL
        return ""
