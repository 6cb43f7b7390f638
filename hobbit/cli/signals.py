"""Ctrl-C and SIGTERM on their way to an exit code."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM; handled like Ctrl-C, with an exit code of its own."""


class Interrupted(Exception):
    """A KeyboardInterrupt on its way through typer, which would make its own of it."""


def signal_code(exc: KeyboardInterrupt) -> int:
    return 128 + (signal.SIGTERM if isinstance(exc, Terminated) else signal.SIGINT)


def on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
