"""How a chat looks, and an answer on its way to stdout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from . import view
from .bottom import Bottom
from .flow import Lines, Thoughts
from .view import Live


@dataclass
class Display:
    """What a person can change about it; `screen_codes` says that the terminal knows them."""

    live: Live
    write: Callable[[str], None]
    screen_codes: bool = True
    color: bool = True
    quiet: bool = False
    stats: str = "line"  # after an answer: one of options.STATS
    wordwrap: bool = True
    hide_thinking: bool = False
    panel: bool = False
    whole: bool = False  # an answer is written when it is complete

    def width(self) -> int | None:
        """Return the columns that text may use; the last one stays free, so that nothing wraps."""
        if not (self.wordwrap and self.screen_codes):
            return None
        return max(shutil.get_terminal_size().columns - 1, 10)

    def rows(self, width: int) -> list[str]:
        stats = self.live.look()
        if self.panel:
            return view.panel(self.live, stats, width)
        return [view.line(self.live, stats, width)]


class Answer(AbstractContextManager["Answer"]):
    """One answer, from its first piece to its last; meanwhile the live numbers stand below it.

    `begin` is for the inside of the block: a signal within what enters it would leave them there.
    """

    def __init__(self, display: Display, thinking: bool) -> None:
        self._display = display
        self._thoughts = Thoughts(thinking)
        self._lines = Lines(display.write, display.width)
        wanted = display.screen_codes and not display.quiet
        rows = (view.PANEL_ROWS if display.panel else 1) if wanted else 0
        self._bottom = Bottom(rows, display.write, display.color)
        self._blank = True
        self._shown = 0  # characters of the answer
        self._held: list[str] = []

    def __enter__(self) -> Answer:
        return self

    def begin(self) -> None:
        self._display.live.begin()
        self._bottom.open()
        self.tick()

    def __exit__(self, *_: object) -> None:
        try:
            for piece in self._held:
                self._show(piece)
            for thought, text in self._thoughts.end():
                self._put(thought, text)
            self._lines.end()
        finally:
            self._bottom.close()

    def text(self, piece: str) -> None:
        self._display.live.token()
        self._shown += len(piece)
        if self._display.whole:
            self._held.append(piece)
        else:
            self._show(piece)
        self.tick()

    def complete(self, answer: str) -> None:
        """Show what is kept of the answer and was not shown: an interrupt can come between."""
        if missing := answer[self._shown :]:
            self.text(missing)

    def tick(self) -> None:
        self._bottom.draw(self._display.rows)

    def _show(self, piece: str) -> None:
        for thought, text in self._thoughts.feed(piece):
            self._put(thought, text)

    def _put(self, thought: bool, text: str) -> None:
        display = self._display
        if thought and display.hide_thinking:
            return
        if self._blank:
            text = text.lstrip()
            self._blank = not text
        dim = thought and display.color
        if dim:
            display.write("\x1b[2m")
        self._lines.feed(text)
        if dim:
            display.write("\x1b[0m")


def knows_screen_codes() -> bool:
    return os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
