"""Run a command under a hard memory cap that covers its page cache too, as on a small machine.

And, where asked, with so many bytes a second from the disk that holds a file. As root by Linux's
memory cgroup controller, version 1 or 2, and for the disk by blkio (1) or io (2); for other users
by systemd, which makes them a scope (version 2).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from .errors import CapUnavailable

ROOT = Path("/sys/fs/cgroup")
# Joins the groups whose members are listed in the files before --, and becomes what is after it.
_JOIN = 'while [ "$1" != -- ]; do echo $$ >"$1" || exit 1; shift; done; shift; exec "$@"'
_NO_CAP = "or leave out the memory cap and the read limit"


class Group:
    """Where commands run; this one sets no limit."""

    def run(
        self, command: Sequence[str], *, stderr: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the group and return what it printed."""
        done = subprocess.run(
            self.command(command), stdout=subprocess.PIPE, stderr=stderr, text=True, check=False
        )
        return subprocess.CompletedProcess([*command], done.returncode, done.stdout, done.stderr)

    def command(self, command: Sequence[str]) -> list[str]:
        """Return what is executed to run the command in the group."""
        return [*command]

    @property
    def peak_bytes(self) -> int | None:
        """The most that was ever charged to the group; None where the kernel does not tell."""
        return None

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def limited(limit_bytes: int, read_bps: int = 0, file: Path | None = None) -> Group:
    """Return a group with these limits (0: none), made by the means that this user has.

    Raises CapUnavailable if there are none.
    """
    if not limit_bytes and not read_bps:
        return Group()
    if os.geteuid() == 0:
        return MemoryGroup(limit_bytes, read_bps, file)
    if (ROOT / "cgroup.controllers").exists() and shutil.which("systemd-run"):
        return UserScope(limit_bytes, read_bps, file)
    raise CapUnavailable(
        "a memory cap needs root, or for other users systemd-run and cgroups of version 2, which "
        f"are not here: run this as root, {_NO_CAP}"
    )


class MemoryGroup(Group):
    """A cgroup with a memory limit (0: none) and no swap, removed on exit.

    With `read_bps` reads from the disk that holds `file` are held to so many bytes a second.
    """

    def __init__(self, limit_bytes: int, read_bps: int = 0, file: Path | None = None) -> None:
        if read_bps and file is None:
            raise ValueError("a read limit is of the disk that holds a file")
        self.limit_bytes = limit_bytes
        self.read_bps = read_bps
        self.file = file
        self.v1 = (ROOT / "memory").is_dir()
        name = f"hobbit-bench-{os.getpid()}"
        self.path = (ROOT / "memory" if self.v1 else ROOT) / name
        # Version 1 has a tree for each controller.
        self.paths = [self.path]
        if self.v1 and read_bps:
            self.paths.append(ROOT / "blkio" / name)

    def __enter__(self) -> MemoryGroup:
        if os.geteuid() != 0:
            raise CapUnavailable("a memory cap needs root")
        try:
            if not self.v1:
                wanted = "+memory +io" if self.read_bps else "+memory"
                (ROOT / "cgroup.subtree_control").write_text(wanted)
            for path in self.paths:
                path.mkdir(exist_ok=True)
            if self.limit_bytes:
                self._limit()
            if self.read_bps and self.file is not None:
                self._limit_reads(disk_of(self.file))
        except OSError as exc:
            self._remove()
            what = "memory and disk" if self.read_bps else "memory"
            raise CapUnavailable(
                f"no {what} cgroup can be made under {ROOT} ({exc}): "
                f"give this system or container the controllers, {_NO_CAP}"
            ) from exc
        return self

    def _limit(self) -> None:
        limit, swap = "memory.max", ("memory.swap.max", "0")
        if self.v1:
            # memsw is memory plus swap, and may not be below the limit.
            limit, swap = (
                "memory.limit_in_bytes",
                ("memory.memsw.limit_in_bytes", str(self.limit_bytes)),
            )
        (self.path / limit).write_text(str(self.limit_bytes))
        if (self.path / swap[0]).exists():
            (self.path / swap[0]).write_text(swap[1])

    def _limit_reads(self, disk: str) -> None:
        if self.v1:
            limit = self.paths[-1] / "blkio.throttle.read_bps_device"
            limit.write_text(f"{disk} {self.read_bps}")
        else:
            (self.path / "io.max").write_text(f"{disk} rbps={self.read_bps}")

    def command(self, command: Sequence[str]) -> list[str]:
        # Not a preexec_fn: Python loses a Ctrl-C that comes while it forks for one.
        members = [str(path / "cgroup.procs") for path in self.paths]
        return ["sh", "-c", _JOIN, "sh", *members, "--", *command]

    @property
    def peak_bytes(self) -> int | None:
        file = self.path / ("memory.max_usage_in_bytes" if self.v1 else "memory.peak")
        return int(file.read_text()) if file.exists() else None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.v1:
            # Its page cache would otherwise move to the parent group and stay.
            with suppress(OSError):  # something may still run in it
                (self.path / "memory.force_empty").write_text("0")
        self._remove()

    def _remove(self) -> None:
        for path in self.paths:
            for _ in range(10):
                try:
                    path.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.2)


class UserScope(Group):
    """The same limits in a scope of the user's own systemd, which needs no root."""

    def __init__(self, limit_bytes: int, read_bps: int = 0, file: Path | None = None) -> None:
        if read_bps and file is None:
            raise ValueError("a read limit is of the disk that holds a file")
        self.properties: list[str] = []
        if limit_bytes:
            self.properties += [f"MemoryMax={limit_bytes}", "MemorySwapMax=0"]
        if read_bps:
            # systemd finds the disk behind a file.
            self.properties.append(f"IOReadBandwidthMax={file} {read_bps}")

    def command(self, command: Sequence[str]) -> list[str]:
        given = [word for text in self.properties for word in ("-p", text)]
        scope = ["systemd-run", "--user", "--scope", "--quiet", "--collect"]
        return [*scope, *given, "--", *command]

    def run(
        self, command: Sequence[str], *, stderr: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = super().run(command, stderr=stderr)
        told = (done.stderr or "").strip()
        # Of systemd-run itself: what it starts takes its place.
        if done.returncode and told.startswith("Failed to "):
            raise CapUnavailable(
                f"systemd-run --user makes no scope here ({told.splitlines()[0]}): "
                f"run this as root, {_NO_CAP}"
            )
        return done


def disk_of(file: Path) -> str:
    """Return the whole disk that holds a file as major:minor; limits are not for partitions."""
    device = file.stat().st_dev
    link = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not link.exists():
        raise FileNotFoundError(f"no block device behind {file}")
    place = link.resolve()
    if (place / "partition").exists():
        place = place.parent
    return (place / "dev").read_text().strip()
