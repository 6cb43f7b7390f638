"""What a check comes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, and, unless it is well, what to do about it."""

    name: str
    state: State
    found: str
    advice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        advice = f": {self.advice}" if self.advice else ""
        return f"{self.state:<4}  {self.name:<12} {self.found}{advice}"
