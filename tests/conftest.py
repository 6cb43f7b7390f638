"""What every test gets: an environment of its own, and no network."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from gates import Bench

from hobbit import llama
from hobbit.planning.parts import PROCESS_RESIDENT

# Building the demo takes minutes, so it is shared between runs of the tests.
_CACHE = os.environ.get("HOBBIT_TEST_CACHE") or str(Path.home() / ".cache" / "hobbit")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hobbit-device", help="ggml's name of a device, for test_device_gates.py")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the user's settings, home folder and colours from the tests."""
    for name in [*os.environ]:
        if name.startswith(("HOBBIT_", "LLAMA_", "GGML_", "HF_", "XDG_")):
            monkeypatch.delenv(name)
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOBBIT_CACHE", _CACHE)
    # What one test uses must not be read ahead in another, nor be written to the shared folder.
    monkeypatch.setenv("HOBBIT_WARM_START", "0")
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that would open a connection."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a test tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def process_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have plans made for a process that only runs a model.

    That which runs all tests grows to a GiB, and while a test compares two plans.
    """
    monkeypatch.setattr(llama, "resident_bytes", lambda: PROCESS_RESIDENT)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Tiny models and stock's logits of them, made once a module."""
    made = Bench(tmp_path_factory.mktemp("models"))
    yield made
    made.close()
