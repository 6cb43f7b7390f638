"""What the tests of the server share: a server in a process of its own, and a client for it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_connect = socket.socket.connect


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of `no_network`: the server under test may be reached, and nothing else."""

    def connect(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0].startswith(("127.", "::1")), address
        _connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


@dataclass
class Reply:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def ask(self, path: str, body: Any = None, **headers: str) -> Reply:
        """GET, or POST JSON; a reply with an error is a reply."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data)
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return Reply(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, error.headers, error.read())

    def stream(self, path: str, body: Any) -> Any:
        """Return a response whose lines come as they are sent."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data)
        return urllib.request.urlopen(request, timeout=120)

    def stream_get(self, path: str) -> Any:
        """Return the response of a feed."""
        return urllib.request.urlopen(self.url + path, timeout=120)

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Ask again and again until something holds."""
        for _ in range(2000):
            if holds():
                return
            threading.Event().wait(0.02)
        raise AssertionError(f"never: {what}; {self.lines[-5:]}")

    def slot_is_free(self) -> bool:
        return not self.ask("/slots").json[0]["is_processing"]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def served(
    model: Path | str, *arguments: str, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """Serve a model on a free port until the block ends."""
    command = [sys.executable, "-m", "hobbit", "serve", str(model), "--port", "0", "-t", "1"]
    if "--memory" not in arguments:
        command += ["--memory", "1G"]
    process = subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    assert process.stderr
    server = Server("", process)
    reader = None
    try:
        for line in process.stderr:
            server.lines.append(line.rstrip())
            if line.startswith("listening on "):
                server.url = line.split()[2]
            if line.startswith("{") and "url" in (said := json.loads(line)):
                server.url = said["url"]
                break
            if line == "ready\n":
                break
        assert server.url, server.lines
        reader = threading.Thread(target=_drain, args=(process.stderr, server.lines))
        reader.start()
        yield server
    finally:
        process.kill()
        process.wait()
        if reader:
            reader.join()
        process.stderr.close()


def _drain(stream: Any, lines: list[str]) -> None:
    lines.extend(line.rstrip() for line in stream)


def data_of(response: Any) -> Iterator[Any]:
    """Yield the JSON of a stream's events, and its comments as text."""
    for raw in response:
        line = raw.decode().strip()
        if line.startswith(": "):
            yield line[2:]
        elif line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])
