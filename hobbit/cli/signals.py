"""Ctrl-C, SIGTERM and SIGHUP on their way to an exit code."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, its argument; handled like Ctrl-C, with an exit code of its own."""


class Interrupted(Exception):
    """A KeyboardInterrupt on its way through typer, which would make its own of it."""


def signal_code(exc: KeyboardInterrupt) -> int:
    number = exc.args[0] if isinstance(exc, Terminated) and exc.args else signal.SIGINT
    return 128 + int(number)


def on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(number)


class Farewell:
    """Hears the signals that end a program which has a terminal to leave as it was.

    The first raises Terminated; a second does not disturb what that has set off, and a third ends
    the process at once, should it hang. SIGHUP stays ignored where the one who started us wants so.
    """

    def __init__(self) -> None:
        self._heard = 0
        signal.signal(signal.SIGTERM, self._hear)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard += 1
        if self._heard == 1:
            raise Terminated(number)
        if self._heard > 2:
            os._exit(128 + number)
