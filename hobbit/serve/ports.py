"""Who listens on a port of this machine, as far as Linux tells."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_LISTENS = "0A"
_MOST_WORDS = 80


def holder(port: int, proc: Path = _PROC) -> str:
    """Return the process in words, as `process 123 (hobbit serve ...)`; empty where unknown.

    Of other users' processes the kernel tells nothing to an ordinary one.
    """
    sockets = {f"socket:[{inode}]" for inode in _listening(port, proc)}
    for folder in proc.glob("[0-9]*"):
        if sockets and _holds(folder, sockets):
            return f"process {folder.name}{_command(folder)}"
    return ""


def _listening(port: int, proc: Path) -> Iterator[str]:
    """Yield the inodes of sockets that listen there."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError, ValueError, IndexError):
            for line in (proc / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                own = int(fields[1].rpartition(":")[2], 16)
                if (own, fields[3]) == (port, _LISTENS):
                    yield fields[9]


def _holds(folder: Path, sockets: set[str]) -> bool:
    with suppress(OSError):  # it ended meanwhile, or is another's
        for link in (folder / "fd").iterdir():
            with suppress(OSError):
                if os.readlink(link) in sockets:
                    return True
    return False


def _command(folder: Path) -> str:
    with suppress(OSError):
        words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        plain = "".join(c if c.isprintable() else "?" for c in words).strip()
        if plain:
            return f" ({plain[:_MOST_WORDS]}{'...' if len(plain) > _MOST_WORDS else ''})"
    return ""
