"""A program on a terminal of its own: what is typed goes in, what a person would see comes out."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pyte

PATIENCE_S = 60


def _hangs_up() -> None:
    """In the new process: a hang-up counts, also where the tests were started with nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Terminal:
    """The screen of a running program; `scrolled` are the lines that have left it at the top."""

    def __init__(self, command: list[str], columns: int, rows: int, env: dict[str, str]) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.process = pexpect.spawn(
            command[0],
            command[1:],
            dimensions=(rows, columns),
            env=env,
            timeout=PATIENCE_S,
            preexec_fn=_hangs_up,
        )
        # A terminal answers when it is asked where the cursor is.
        self.screen.write_process_input = self.process.send

    @property
    def lines(self) -> list[str]:
        """What the program has written, line by line, without the blank end of the screen."""
        blank = self.screen.default_char
        above = [
            "".join(line[x].data if x in line else blank.data for x in range(self.screen.columns))
            for line in self.screen.history.top
        ]
        lines = [line.rstrip() for line in [*above, *self.screen.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def type(self, text: str) -> None:
        self.process.send(text)

    def enter(self, line: str) -> None:
        """Type a line and wait until it is answered: until the next prompt stands there."""
        before = self.prompts
        self.type(line + "\r")
        self.wait(lambda: self.prompts > before, f"the next prompt after {line!r}")

    @property
    def prompts(self) -> int:
        return sum(line.startswith(">>>") for line in self.lines)

    def wait_for(self, text: str) -> None:
        self.wait(lambda: text in self.text, repr(text))

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Read until something is so; fails with the screen after PATIENCE_S without any output."""
        end = time.monotonic() + PATIENCE_S
        while not done():
            self._read(max(end - time.monotonic(), 0), what)

    def _read(self, seconds: float, what: str) -> None:
        try:
            data = self.process.read_nonblocking(65536, seconds)
        except (pexpect.TIMEOUT, pexpect.EOF) as exc:
            how = type(exc).__name__
            raise AssertionError(f"{how} in waiting for {what}; the screen:\n{self.text}") from exc
        self.raw += data
        self._stream.feed(data)

    def exit_code(self) -> int:
        """Wait for the end of the program."""
        end = time.monotonic() + PATIENCE_S
        while True:
            if time.monotonic() > end:
                self.process.kill(signal.SIGKILL)
                raise AssertionError(f"it goes on and on; the screen:\n{self.text}")
            try:
                data = self.process.read_nonblocking(65536, PATIENCE_S)
            except pexpect.EOF:
                break
            self.raw += data
            self._stream.feed(data)
        self.process.wait()
        died = self.process.signalstatus
        return -died if died is not None else int(self.process.exitstatus)

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send("\x03")

    def terminate(self) -> None:
        self.process.kill(signal.SIGTERM)


@contextmanager
def started(
    *arguments: str | Path, columns: int = 80, rows: int = 24, **env: str
) -> Iterator[Terminal]:
    """Start hobbit on a terminal; `env` is set on top of the environment."""
    command = [sys.executable, "-m", "hobbit", *map(str, arguments)]
    with on_terminal(command, columns, rows, **env) as terminal:
        yield terminal


@contextmanager
def on_terminal(command: list[str], columns: int, rows: int, **env: str) -> Iterator[Terminal]:
    """Start a command on a terminal; it is killed in the end if it still runs."""
    wanted = {"TERM": "xterm-256color", "LANG": "C.UTF-8"}
    terminal = Terminal(command, columns, rows, os.environ | wanted | env)
    try:
        yield terminal
    finally:
        terminal.process.close(force=True)
