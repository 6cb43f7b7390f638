"""Rows at the bottom of the terminal that stay where they are while text flows above them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

_LEAST_TEXT_ROWS = 6
_INTERVAL_S = 0.25
_SAVE, _RESTORE = "\x1b7", "\x1b8"


class Bottom:
    """From `open` to `close`, `rows` rows are set apart and the text scrolls above them.

    The terminal does it: text is written as ever, and needs not be drawn again. On a terminal that
    is too low, or cannot do it (`rows` 0), nothing is shown. Text must begin in the first column.
    """

    def __init__(self, rows: int, write: Callable[[str], None], dim: bool) -> None:
        self._rows = rows
        self._write = write
        self._dim = dim
        self._size = (0, 0)
        self._drawn_at = 0.0

    def open(self) -> None:
        if self._rows:
            self._set_apart()

    def close(self) -> None:
        """Give the rows back; harmless when that is done."""
        if not self._size[1]:
            return
        whole = f"{_SAVE}\x1b[r{self._placed([''] * self._rows)}{_RESTORE}"
        try:
            self._write(whole)
        except KeyboardInterrupt:  # of all times now
            self._write(whole)
            raise
        finally:
            self._size = (0, 0)

    def _set_apart(self) -> None:
        columns, lines = shutil.get_terminal_size()
        if lines < self._rows + _LEAST_TEXT_ROWS:
            self._size = (columns, 0)
            return
        self._size = (columns, lines)
        # New lines make the room; the region is set last, for that moves the cursor.
        room = "\n" * self._rows + f"\x1b[{self._rows}A"
        self._write(f"{room}{_SAVE}\x1b[1;{lines - self._rows}r{_RESTORE}")

    def draw(self, rows: Callable[[int], list[str]], *, now: bool = False) -> None:
        """Show what `rows` returns for a width in columns; not more than a few times a second."""
        due = time.monotonic() - self._drawn_at >= _INTERVAL_S
        if not self._rows or not (due or now):
            return
        self._drawn_at = time.monotonic()
        if self._size != (0, 0) and shutil.get_terminal_size() != self._size:
            self._resized()
        columns, lines = self._size
        if lines:
            self._write(f"{_SAVE}{self._placed(rows(columns))}{_RESTORE}")

    def _resized(self) -> None:
        columns, lines = shutil.get_terminal_size()
        if lines < self._rows + _LEAST_TEXT_ROWS:
            self._write(f"{_SAVE}\x1b[r{_RESTORE}")
            self._size = (columns, 0)
            return
        self._size = (columns, lines)
        self._write(f"{_SAVE}\x1b[1;{lines - self._rows}r{_RESTORE}")

    def _placed(self, rows: list[str]) -> str:
        first = self._size[1] - self._rows + 1
        on, off = ("\x1b[2m", "\x1b[0m") if self._dim else ("", "")
        return "\x1b[0m" + "".join(
            f"\x1b[{first + i};1H\x1b[2K{on}{row}{off}" for i, row in enumerate(rows)
        )
