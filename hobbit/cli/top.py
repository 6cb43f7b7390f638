"""hobbit top: a running server, live."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import HobbitError
from ..render import Screen
from .console import write
from .flags import flag
from .shared import Color
from .signals import signal_code

if TYPE_CHECKING:
    from ..watching.window import Window

DEFAULT_URL = "http://127.0.0.1:8080"


def top(
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL]",
            help="The server's address; without one that which this user started last here, or "
            f"else {DEFAULT_URL}.",
        ),
    ] = None,
    api_key: Annotated[
        str | None, flag("--api-key", help="Key, where it is another user's or machine's.")
    ] = None,
    count: Annotated[
        int, flag("--count", "-n", min=0, help="End after so many seconds; 0: when stopped.")
    ] = 0,
    color: Color = "auto",
) -> int:
    """Show speed, hits, reads and memory of a running server as they change."""
    from ..watching.client import checked_url, feed_of
    from ..watching.window import Window

    found, key = _server(checked_url(url) if url else None)
    screen = Screen(color=color, stream=sys.stdout)
    window = Window()
    try:
        with _shown(window, found, screen) as show:
            for told in islice(feed_of(found, api_key or key), count or None):
                window.add(told)
                show()
    except (KeyError, TypeError, ValueError) as exc:
        raise HobbitError(f"{found}: what answers is no hobbit serve of this version") from exc
    except KeyboardInterrupt as exc:  # how one leaves it
        return signal_code(exc)
    return 0


def _server(url: str | None) -> tuple[str, str]:
    """Return the address and what opens it to this user."""
    from ..serve.registry import running

    servers = running()
    if url is None:
        return (servers[0].url, servers[0].token) if servers else (DEFAULT_URL, "")
    return url, next((server.token for server in servers if server.url == url), "")


def _shown(window: Window, url: str, screen: Screen) -> AbstractContextManager[Callable[[], None]]:
    """Return what shows the window: in place on a terminal, elsewhere a line each time."""
    from ..watching.panel import line, panel

    if not screen.terminal:
        return nullcontext(lambda: write(line(window) + "\n"))
    from ..watching.live import in_place

    return in_place(lambda: panel(window, url, shutil.get_terminal_size().columns), screen)
