"""The running servers of this user, each in a file of the state folder: for `hobbit ps` and `top`.

A file is written when a server takes requests and removed when it ends; one that was killed leaves
its file, which the next reader removes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..folders import remember, state_folder

_FOLDER = "servers"


@dataclass(frozen=True)
class Running:
    """A server. `born` tells its process from a later one of the same number; with `token` this
    user's commands may ask it, whatever keys it wants of others. `started`: seconds since 1970.
    """

    host: str
    pid: int
    born: str
    started: float
    url: str
    model: str
    token: str


def new_token() -> str:
    return secrets.token_urlsafe(24)


@contextmanager
def registered(url: str, model: str, token: str) -> Iterator[None]:
    """Be in the registry for the time; where the folder cannot be written, not."""
    pid, host = os.getpid(), socket.gethostname()
    name = f"{_FOLDER}/{host}-{pid}.json"
    own = Running(host, pid, _born(pid), time.time(), url, model, token)
    # `remember` makes it such that only this user may read it.
    remember(name, asdict(own), state_folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            (state_folder() / name).unlink()


def running() -> list[Running]:
    """Return the servers of this machine that live, those that started last first."""
    try:
        files = sorted((state_folder() / _FOLDER).glob("*.json"))
    except (OSError, RuntimeError):
        return []
    found = []
    for file in files:
        server = _read(file)
        # The folder may be shared with other machines and containers, of whose processes we know
        # nothing.
        if server is None or server.host != socket.gethostname():
            continue
        if _born(server.pid) == server.born:
            found.append(server)
        else:
            with contextlib.suppress(OSError):
                file.unlink()
    return sorted(found, key=lambda server: -server.started)


def _read(file: Path) -> Running | None:
    try:
        server = Running(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    words = (server.host, server.born, server.url, server.model, server.token)
    sound = isinstance(server.pid, int) and isinstance(server.started, int | float)
    sound = sound and all(isinstance(word, str) for word in words)
    return server if sound else None


def _born(pid: int) -> str:
    """Return when the process began, in ticks since the boot; empty if there is none."""
    try:
        # The command, in brackets, may have spaces and brackets of its own.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "" if not _lives(pid) else "unknown"


def _lives(pid: int) -> bool:
    """Whether there is such a process, where there is no /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
