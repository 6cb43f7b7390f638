"""Run a command under a hard memory cap that covers its page cache too, as on a small machine.

Needs root and Linux's memory cgroup controller, version 1 or 2.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path("/sys/fs/cgroup")


class CapUnavailable(Exception):
    """This process may not make memory cgroups here."""


class MemoryGroup:
    """A cgroup with a memory limit and no swap, removed on exit."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.v1 = (ROOT / "memory").is_dir()
        self.path = (ROOT / "memory" if self.v1 else ROOT) / f"hobbit-bench-{os.getpid()}"

    def __enter__(self) -> MemoryGroup:
        if os.geteuid() != 0:
            raise CapUnavailable("a memory cap needs root")
        try:
            if not self.v1:
                (ROOT / "cgroup.subtree_control").write_text("+memory")
            self.path.mkdir(exist_ok=True)
            self._limit()
        except OSError as exc:
            raise CapUnavailable(f"no memory cgroup can be made under {ROOT}: {exc}") from exc
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

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        procs = self.path / "cgroup.procs"

        def join() -> None:
            procs.write_text(str(os.getpid()))

        return subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=join
        )

    @property
    def peak_bytes(self) -> int | None:
        """The most that was ever charged to the group; None where the kernel does not tell."""
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
            (self.path / "memory.force_empty").write_text("0")
        for _ in range(10):
            try:
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.2)
