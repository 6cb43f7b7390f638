"""A session's file: a conversation that is kept under a name, from one run to the next."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import HobbitError, UsageError
from ..folders import state_folder
from ..options import is_session_name
from . import transcript
from .transcript import Message

# In the state folder. A session's file there is one that /save could have written.
_FOLDER = "sessions"
_SUFFIX = ".jsonl"

# For the one who uses a session and nobody else.
_MODE = 0o600

# What the system says of a file that was never written.
_ABSENT = (FileNotFoundError, NotADirectoryError)


class SessionFile:
    """One session, with the `messages` that its file has; a new one has none.

    It is this process's own until it is closed: another is refused, so that no turn is lost and
    none is answered without those before it. Where the folder cannot be written, what is there can
    be read all the same: it is `write` that fails then.

    Raises HobbitError while another process has it, and for a file that is damaged or cannot be
    read.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = _folder() / f"{name}{_SUFFIX}"
        self._lock: int | None = None
        with suppress(OSError):
            self._own()
        try:
            self._seen = self._look()
            self.messages = transcript.load(self.path) if self._seen else []
        except OSError as exc:
            self.close()
            raise HobbitError(f"cannot read {self.path}: {exc.strerror}") from exc
        except UsageError as exc:
            self.close()
            raise HobbitError(f"session {name}: {exc}; mend or remove that file") from exc

    def write(self, messages: Sequence[Message]) -> None:
        """Have the file say this, or what it said before; without messages there is none.

        Raises HobbitError where that cannot be, or someone else has changed the file meanwhile.
        """
        try:
            self._own()
            seen = self._look()
            if seen not in (None, self._seen):
                raise HobbitError(f"{self.path} was changed meanwhile, and is left as it is")
            if messages:
                transcript.save(self.path, messages, _MODE)
            else:
                self.path.unlink(missing_ok=True)
            self._seen = self._look()
        except OSError as exc:
            message = f"cannot write {self.path}: {exc.strerror}"
            raise HobbitError(f"session {self.name} is not kept: {message}") from exc
        except HobbitError as exc:
            # The cause, as a full disk, says how the command ends.
            raise HobbitError(f"session {self.name} is not kept: {exc}") from exc.__cause__

    def close(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            with suppress(OSError):
                self._lock_path.unlink()
            os.close(self._lock)
            self._lock = None

    @property
    def _lock_path(self) -> Path:
        return self.path.with_name(f".{self.name}.lock")

    def _own(self) -> None:
        """Lock the session unless that is done; OSError where no lock can be had."""
        while self._lock is None:
            self.path.parent.mkdir(0o700, parents=True, exist_ok=True)
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one before removes it, perhaps after we have opened it.
                if os.path.samestat(os.fstat(lock), os.stat(self._lock_path)):
                    self._lock = lock
            except BlockingIOError as exc:
                raise HobbitError(
                    f"session {self.name} is in use by another hobbit: wait for its end, or name "
                    "another session"
                ) from exc
            except FileNotFoundError:
                continue
            finally:
                if self._lock is None:
                    os.close(lock)

    def _look(self) -> tuple[int, int, int] | None:
        """Return what changes when the file does; None where there is none."""
        try:
            found = os.stat(self.path)
        except _ABSENT:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


def last_session() -> str:
    """Return the name of the session that was written last; UsageError where there is none."""
    written: list[tuple[int, str]] = []
    folder = _folder()
    for path in folder.glob(f"*{_SUFFIX}"):
        if is_session_name(path.stem):
            with suppress(OSError):  # removed meanwhile
                written.append((path.stat().st_mtime_ns, path.stem))
    if not written:
        raise UsageError(f"--continue: there is no session yet in {folder}: begin with --session")
    return max(written)[1]


def _folder() -> Path:
    try:
        return state_folder() / _FOLDER
    except RuntimeError as exc:
        raise UsageError("there is no home folder for sessions: set HOBBIT_STATE") from exc
