"""What llama.cpp's own layers (-ngl) take of a device's memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .memory import Line
from .sizes import format_size


@dataclass(frozen=True)
class Offloaded:
    """Bytes of weights, context and buffers in a device's own memory."""

    device: str
    dense: int
    kv: int
    compute: int

    @property
    def bytes(self) -> int:
        return self.dense + self.kv + self.compute

    @property
    def line(self) -> Line:
        """It as a line of the memory plan."""
        parts = (("dense", self.dense), ("kv", self.kv), ("compute", self.compute))
        sizes = " + ".join(f"{name} {format_size(size)}" for name, size in parts if size)
        return Line("layers", self.bytes, f"{self.device}: {sizes} (-ngl): not part of the cap")


def bytes_on(device: str, offloaded: Iterable[Offloaded]) -> int:
    """Return what of it is on this device."""
    return sum(part.bytes for part in offloaded if part.device == device)
