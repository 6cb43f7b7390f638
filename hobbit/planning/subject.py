"""The model that a plan is of: its header, and its file where it is here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..layout import Layout, build_layout
from ..models import is_estimate, locate


@dataclass(frozen=True)
class Subject:
    """`path` is None for a model that is not here; `estimated` if only its shape is known."""

    name: str
    layout: Layout
    path: Path | None
    estimated: bool = False


def subject(name: str | None) -> Subject:
    """Find a model by what a user calls it, and read nothing but its header."""
    located = locate(name)
    gguf = located.header()
    return Subject(name or located.name, build_layout(gguf), located.path, is_estimate(gguf))
