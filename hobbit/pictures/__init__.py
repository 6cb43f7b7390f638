"""Pictures of what was recorded and measured: what each shows, however it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from ..plot import Mark


@dataclass(frozen=True)
class Heat:
    """Values [rows, columns] from 0 up, a row named each; NaN: there is no such place."""

    title: str
    rows: tuple[str, ...]
    values: npt.NDArray[Any]
    columns: str
    unit: str = "%"


@dataclass(frozen=True)
class Bars:
    """A value for each name, from 0 up. `full` is the value of a whole bar; 0: the largest one."""

    title: str
    names: tuple[str, ...]
    values: tuple[float, ...]
    unit: str = "%"
    full: float = 0.0


@dataclass(frozen=True)
class Points:
    """Mean KL against bytes read a token: named marks, and a curve through others."""

    title: str
    marks: tuple[Mark, ...]
    curve: tuple[Mark, ...] = ()


Picture = Heat | Bars | Points
Pictures = Sequence[Picture]
