"""What hobbit.cgroup writes and executes, with a fake kernel and a fake systemd-run.

That a real limit holds is in test_first_light and test_quality_bench.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hobbit import cgroup
from hobbit.cgroup import Group, MemoryGroup, UserScope, limited
from hobbit.errors import CapUnavailable


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup file system of version 2 for root, of plain files."""
    folder = tmp_path / "cgroup"
    folder.mkdir()
    (folder / "cgroup.controllers").write_text("memory io\n")
    monkeypatch.setattr(cgroup, "ROOT", folder)
    monkeypatch.setattr(cgroup, "disk_of", lambda file: "254:0")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(cgroup.time, "sleep", lambda seconds: None)
    return folder


def test_version_2(root: Path, tmp_path: Path) -> None:
    with MemoryGroup(1 << 30, 500, tmp_path) as group:
        assert (root / "cgroup.subtree_control").read_text() == "+memory +io"
        assert (group.path / "memory.max").read_text() == str(1 << 30)
        assert (group.path / "io.max").read_text() == "254:0 rbps=500"
        assert group.peak_bytes is None
        (group.path / "memory.peak").write_text("12345\n")
        assert group.peak_bytes == 12345
        done = group.run(["sh", "-c", "echo $$"])
        assert (group.path / "cgroup.procs").read_text() == done.stdout
        assert done.args == ["sh", "-c", "echo $$"]


def test_version_1(root: Path, tmp_path: Path) -> None:
    for name in ("memory", "blkio"):
        (root / name).mkdir()
    with MemoryGroup(0, 500, tmp_path) as group:
        limit = root / "blkio" / group.path.name / "blkio.throttle.read_bps_device"
        assert limit.read_text() == "254:0 500"
        assert not (group.path / "memory.limit_in_bytes").exists()
        done = group.run(["sh", "-c", "echo $$; exit 3"])
        members = [(path / "cgroup.procs").read_text() for path in group.paths]
        assert members == [done.stdout] * 2
        assert done.returncode == 3
    with MemoryGroup(1 << 30) as group:
        assert (group.path / "memory.limit_in_bytes").read_text() == str(1 << 30)
        (group.path / "memory.force_empty").unlink()
        (group.path / "memory.force_empty").mkdir()  # as one that is refused: no error of its own


def test_what_cannot_be_made_is_told(root: Path) -> None:
    (root / "cgroup.subtree_control").mkdir()
    with pytest.raises(CapUnavailable, match=r"no memory cgroup can be made under .*leave out"):
        MemoryGroup(1 << 30).__enter__()


def test_who_gets_which_group(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(limited(0)) is Group
    assert isinstance(limited(1 << 30), MemoryGroup)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(cgroup.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert isinstance(limited(1 << 30), UserScope)
    monkeypatch.setattr(cgroup.shutil, "which", lambda name: None)
    with pytest.raises(CapUnavailable, match="needs root, or for other users systemd-run"):
        limited(1 << 30)
    monkeypatch.setattr(cgroup.shutil, "which", lambda name: f"/usr/bin/{name}")
    (root / "cgroup.controllers").unlink()  # version 1: users' scopes have no limits
    with pytest.raises(CapUnavailable, match="run this as root"):
        limited(1 << 30)


def test_a_users_scope() -> None:
    scope = ["systemd-run", "--user", "--scope", "--quiet", "--collect"]
    assert UserScope(1 << 30).command(["a", "b"]) == [
        *scope, "-p", "MemoryMax=1073741824", "-p", "MemorySwapMax=0", "--", "a", "b",
    ]  # fmt: skip
    assert UserScope(0, 500, Path("/models/m.gguf")).command(["a"]) == [
        *scope, "-p", "IOReadBandwidthMax=/models/m.gguf 500", "--", "a",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="disk"):
        UserScope(0, 500)


def test_a_scope_that_systemd_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "systemd-run"
    fake.write_text("#!/bin/sh\necho 'Failed to connect to bus: No medium found' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with UserScope(1 << 30) as group, pytest.raises(CapUnavailable, match="No medium found"):
        group.run(["true"], stderr=subprocess.PIPE)
    # What runs in a scope gets its output and its exit code through.
    fake.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    done = UserScope(1 << 30).run(["sh", "-c", "echo out; exit 3"])
    assert (done.returncode, done.stdout) == (3, "out\n")
