"""The models that hobbit knows by name: models.toml."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..gguf_file import GGUF
from .shape import Shape
from .skeleton import skeleton

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILT_IN = "built-in"

# In the package as it is installed; in a checkout, beside it.
_FOLDERS = Path(__file__).parents[1], Path(__file__).parents[2]


@dataclass(frozen=True)
class Known:
    """One entry. `parameters` are billions, as published; `shape` is None for the demo."""

    name: str
    summary: str
    arch: str
    licence: str
    source: str
    parameters: float = 0.0
    quants: tuple[str, ...] = ()
    pair: tuple[str, ...] = ()
    shape: Shape | None = None

    @property
    def is_built_in(self) -> bool:
        return self.source == BUILT_IN

    def skeleton(self, quant: str) -> GGUF:
        """Return the header that its file of a quantisation has, more or less."""
        assert self.shape is not None
        return skeleton(self.name, self.arch, self.shape, quant)


@cache
def known_models() -> dict[str, Known]:
    """Return all of them by name, in the file's order."""
    file = next(path for folder in _FOLDERS if (path := folder / "models.toml").is_file())
    text = file.read_text(encoding="utf-8")
    return {name: _entry(name, table) for name, table in tomllib.loads(text)["models"].items()}


def known_source(repo: str) -> Known | None:
    """Return the model whose files come from this repository."""
    found = (known for known in known_models().values() if known.source.lower() == repo.lower())
    return next(found, None)


def _entry(name: str, table: dict[str, Any]) -> Known:
    values = _frozen(table)
    shape = values.pop("shape", None)
    if shape is not None:
        values["shape"] = Shape(**_frozen(shape))
    return Known(name=name, **values)


def _frozen(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
