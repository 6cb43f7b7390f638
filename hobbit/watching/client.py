"""Asks a server what it does."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from ..errors import HobbitError, UsageError

# A server answers at once, whatever its model does; its feed tells something every second.
_PATIENCE_S = 5.0
_SCHEMA = "hobbit.stats/1"


def checked_url(text: str) -> str:
    """Return a server's address without a path; `http://` need not be given."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UsageError(f"{text}: is no address of a server, as http://127.0.0.1:8080")
    return f"{parts.scheme}://{parts.netloc}"


def stats_of(url: str, key: str = "") -> dict[str, Any]:
    """Return what /hobbit/stats tells; raises HobbitError where that is nothing."""
    with _opened(url, "/hobbit/stats", key) as response:
        return _checked(url, response.read())


def feed_of(url: str, key: str = "") -> Iterator[dict[str, Any]]:
    """Yield the same every second, until the server ends; raises HobbitError where it is lost."""
    with _opened(url, "/hobbit/events", key) as response:
        for line in response:
            if line.startswith(b"data: "):
                yield _checked(url, line.removeprefix(b"data: "))


@contextmanager
def _opened(url: str, path: str, key: str) -> Iterator[Any]:
    request = urllib.request.Request(url + path)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    # What is here is not to be asked for elsewhere.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_PATIENCE_S) as response:
            yield response
    except urllib.error.HTTPError as exc:
        words = "it wants a key: give --api-key" if exc.code == 401 else f"it answers {exc.code}"
        raise HobbitError(f"{url}: {words}") from exc
    except (OSError, http.client.HTTPException, ValueError) as exc:
        reason = getattr(exc, "reason", exc)
        raise HobbitError(f"no hobbit serve answers at {url}: {reason}") from exc


def _checked(url: str, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("schema") != _SCHEMA:
        raise HobbitError(f"{url}: what answers is no hobbit serve of this version")
    return found
