"""Where an answer goes: to stdout, or to a file that appears when the answer is whole."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ..errors import HobbitError
from . import console


class Destination:
    """Takes what a run prints; `keep`: it is worth keeping, however the run ends."""

    def __init__(self, put: Callable[[str], None]) -> None:
        self._put = put
        self.keep = False

    def write(self, text: str) -> None:
        self._put(text)

    def say(self, text: str) -> None:
        """Write something of the answer itself, which from now on is worth keeping."""
        self.keep = True
        self._put(text)


@contextmanager
def destination(path: Path | None) -> Iterator[Destination]:
    """Give a place for an answer: the file, or stdout for None and "-".

    Raises HobbitError at once where the file cannot be written. A file that is there is replaced
    at the end, and stays as it was where nothing is to be kept or not all could be written. What
    is no file, as a pipe, is written as the answer comes.
    """
    if path is None or str(path) == "-":
        yield Destination(console.write)
        return
    file = _AnswerFile(path.expanduser())
    place = Destination(file.write)
    try:
        yield place
    finally:
        file.close(place.keep)


class _AnswerFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._target = Path(os.path.realpath(path))  # a link stays one
        self._part: Path | None = None  # its name until it is whole; None where it is no file
        self._failed = False
        try:
            self._file = self._opened()
        except OSError as exc:
            raise self._error(exc) from exc

    def _opened(self) -> TextIO:
        try:
            mode = self._path.stat().st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None and not stat.S_ISREG(mode):
            return open(self._path, "w", encoding="utf-8", errors="replace")
        if mode is not None and not os.access(self._path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        part = self._target.with_name(f".hobbit-{secrets.token_hex(8)}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        number = os.open(part, flags, 0o666)
        self._part = part
        if mode is not None:
            with suppress(OSError):  # some file systems have no modes
                os.fchmod(number, mode & 0o777)
        return open(number, "w", encoding="utf-8", errors="replace")

    def write(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except BrokenPipeError:
            self._failed = True
            raise
        except OSError as exc:
            self._failed = True
            raise self._error(exc) from exc

    def close(self, keep: bool) -> None:
        """Close the file and give it its name, or else leave no trace of it."""
        try:
            if keep and not self._failed:
                self._finish()
        except OSError as exc:
            raise self._error(exc) from exc
        finally:
            with suppress(OSError):  # what was not written before is not going to be
                self._file.close()
            if self._part is not None:
                self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._file.flush()
        if self._part is not None:
            os.fsync(self._file.fileno())
            os.replace(self._part, self._target)

    def _error(self, exc: OSError) -> HobbitError:
        reason = exc.strerror or str(exc)
        if exc.errno == errno.ENOENT:
            reason = f"there is no folder {self._target.parent}"
        elif exc.errno == errno.EISDIR:
            reason = "it is a folder"
        return HobbitError(f"cannot write {self._path}: {reason}")
