"""The server process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from ..errors import HobbitError, UsageError
from .engine import Engine
from .ports import holder

# For answers to reach their clients when all that is left of a request is its end.
_LAST_WORDS_S = 5
_SIGNALS = signal.SIGTERM, signal.SIGINT


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is a free one. Raises HobbitError when it is taken."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as exc:
        raise UsageError(f"--host {host}: {exc}") from exc
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            who = holder(port) or "another process"
            raise HobbitError(
                f"port {port} of {host} is in use by {who}: stop it, or name another port with "
                "--port (0: a free one)"
            ) from exc
        raise HobbitError(f"cannot listen on {host}, port {port}: {exc.strerror}") from exc
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket) -> str:
    """Return where a browser on this machine finds the server."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: ASGIApp, sock: socket.socket, engine: Engine, ready: Callable[[], None]) -> int:
    """Serve until SIGTERM, which lets requests finish, or SIGINT, which ends them.

    `ready` is called when requests are taken. Returns the signal's number; from then on another
    signal ends the process, as what is left is to wait for the model.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=30
    )
    server = _Server(config, engine)
    asyncio.run(_run(server, sock, ready))
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: os._exit(128 + number))
    return server.signal


async def _run(server: _Server, sock: socket.socket, ready: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, server.told, number)
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    ready()
    await serving


class _Server(uvicorn.Server):
    """uvicorn with our meaning of signals."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        self.signal = int(signal.SIGTERM)

    def told(self, number: int) -> None:
        """SIGTERM drains; SIGINT, or a second signal, stops at once."""
        again, self.signal = self._engine.draining, number
        if number == signal.SIGINT or again:
            self._engine.stop()
            loop = asyncio.get_running_loop()
            loop.call_later(_LAST_WORDS_S, setattr, self, "force_exit", True)
        self._engine.drain()
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would raise them again."""
        yield
