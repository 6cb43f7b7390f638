"""The model that a plan is of: its header, and its file where it is here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..layout import Layout, build_layout
from ..models import is_estimate, locate
from ..models.catalogue import Known


@dataclass(frozen=True)
class Subject:
    """`path` is None for a model that is not here; `estimated` if only its shape is known.

    `known` is what models.toml has of it, and `quant` which quantisation it is, if that is known.
    """

    name: str
    layout: Layout
    path: Path | None
    estimated: bool = False
    known: Known | None = None
    quant: str = ""


def subject(name: str | None, n_expert_used: int | None = None) -> Subject:
    """Find a model by what a user calls it, and read nothing but its header.

    `n_expert_used` is as in build_layout.
    """
    located = locate(name)
    gguf = located.header()
    return Subject(
        name or located.name,
        build_layout(gguf, n_expert_used),
        located.path,
        is_estimate(gguf),
        located.known,
        located.quant,
    )
