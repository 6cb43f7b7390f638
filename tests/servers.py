"""ggml's RPC server with the CPU, in a process of its own: a device whose memory is not ours."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hobbit.devices import connect
from hobbit.errors import DeviceError

# It ends when its stdin does, so that it never outlives the tests.
_SERVER = """
import ctypes, os, sys, threading
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: nor when it is stopped
from hobbit.devices import serve
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
serve(sys.argv[1])
"""
_PATIENCE_S = 60.0


@dataclass
class Server:
    """A running server; `device` is ggml's name for its device in this process."""

    endpoint: str
    device: str
    process: subprocess.Popen[str]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start_again(self) -> None:
        """Where it was."""
        self.process, _ = _started(self.endpoint)


@contextlib.contextmanager
def running(connects: bool = True) -> Iterator[Server]:
    """Start a server; unless it `connects` from this process, `device` is left empty."""
    process, endpoint = _started()
    server = Server(endpoint, "", process)
    try:
        server.device = connect(endpoint) if connects else ""
        yield server
    finally:
        server.kill()


def _started(at: str = "") -> tuple[subprocess.Popen[str], str]:
    """Return a server that listens; a port that somebody took meanwhile is tried no more."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        endpoint = at or f"127.0.0.1:{_free_port()}"
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, endpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        # It says nothing when it is ready: a connection is the only sign.
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(DeviceError):
                connect(endpoint)
                return process, endpoint
            time.sleep(0.01)
        process.kill()
        process.wait()
    raise AssertionError("no RPC server starts")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def in_a_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code that may lose a device; it can import what is in this folder."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parent,
    )
