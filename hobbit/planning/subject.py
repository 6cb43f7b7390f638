"""The model that a plan is of: its header, and its file where it is here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import demo
from ..gguf_file import GGUF, open_gguf
from ..layout import Layout, build_layout


@dataclass(frozen=True)
class Subject:
    """`path` is None for a model that is not here; `estimated` if only its shape is known."""

    name: str
    layout: Layout
    path: Path | None
    estimated: bool = False


def subject(name: str | None) -> Subject:
    """Find a model by what a user calls it, and read nothing but its header."""
    gguf, path, estimated = _header(name)
    return Subject(name or "demo", build_layout(gguf), path, estimated)


def _header(name: str | None) -> tuple[GGUF, Path | None, bool]:
    path = demo.path() if name in (None, "demo") else Path(str(name)).expanduser()
    return open_gguf(path), path, False
