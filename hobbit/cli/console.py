"""stdin and stdout of a command: what is read before the prompt, and the answer."""

from __future__ import annotations

import os
import select
import sys
from typing import TextIO

from ..errors import HobbitError
from ..render import Screen

_STDIN_PATIENCE_S = 2.0


def read_stdin(screen: Screen) -> TextIO | None:
    """Return stdin unless it is a terminal; say so when nothing comes from it for a while."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    try:
        ready = select.select([sys.stdin], [], [], _STDIN_PATIENCE_S)[0]
    except (OSError, ValueError):
        return sys.stdin
    if not ready:
        screen.say("waiting for the end of stdin, which is put before the prompt (or: </dev/null)")
    return sys.stdin


def is_terminal() -> bool:
    """Whether a person can be asked: both stdin and stdout are terminals."""
    return all(s is not None and not s.closed and s.isatty() for s in (sys.stdin, sys.stdout))


def write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as exc:
        forget_stdout()
        raise HobbitError(f"cannot write to stdout: {exc.strerror}") from exc


def forget_stdout() -> None:
    """Keep the interpreter from flushing into a closed pipe or a full disk when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
