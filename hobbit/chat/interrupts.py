"""Ctrl-C while the model answers."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Interrupts(AbstractContextManager["Interrupts"]):
    """While it lasts, only the first Ctrl-C is a KeyboardInterrupt: it takes effect within a layer.

    A second one would leave the model's thread behind, still using the model. Ctrl-Z does nothing:
    the shell would get a terminal without echo, a part of it set apart. For the main thread.
    """

    def __init__(self) -> None:
        self._seen = False
        self._busy = False
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def after(self, call: Callable[P, T]) -> Callable[P, T]:
        """Return the function such that an interrupt waits for its end: it is not half done."""

        def called(*arguments: P.args, **named: P.kwargs) -> T:
            self._busy = True
            try:
                done = call(*arguments, **named)
            finally:
                self._busy = False
            if self._waiting:
                self._waiting = False
                raise KeyboardInterrupt
            return done

        return called

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._seen:
            return
        self._seen = True
        if self._busy:
            self._waiting = True
        else:
            raise KeyboardInterrupt
