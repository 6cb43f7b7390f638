"""The text of an answer on its way to a terminal: thoughts told from words, lines broken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from wcwidth import wcwidth

_OPEN, _CLOSE = "<think>", "</think>"
_TAB = 8

# What could move the cursor or colour the screen is not shown.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Thoughts:
    """Tells the text between <think> and </think>, tags included, from the rest, piece by piece."""

    def __init__(self, inside: bool = False) -> None:
        self._inside = inside
        self._held = ""

    def feed(self, piece: str) -> Iterator[tuple[bool, str]]:
        """Yield parts of the text, each with whether it is a thought."""
        text = self._held + piece
        self._held = ""
        while text:
            tag = _CLOSE if self._inside else _OPEN
            before, found, after = text.partition(tag)
            if not found:
                keep = _held_back(text, tag)
                self._held = text[len(text) - keep :]
                if shown := text[: len(text) - keep]:
                    yield self._inside, shown
                return
            if self._inside:
                yield True, before + tag
            else:
                if before:
                    yield False, before
                yield True, tag
            self._inside = not self._inside
            text = after

    def end(self) -> Iterator[tuple[bool, str]]:
        """Yield what was held back as it might have become a tag."""
        if self._held:
            yield self._inside, self._held
        self._held = ""


class WithoutThoughts:
    """Writes a text without its thoughts, and without the space that follows them."""

    def __init__(self, write: Callable[[str], None], inside: bool) -> None:
        self._write = write
        self._thoughts = Thoughts(inside)
        self._begun = False

    def __call__(self, piece: str) -> None:
        for part in self._thoughts.feed(piece):
            self._put(*part)

    def end(self) -> None:
        for part in self._thoughts.end():
            self._put(*part)

    def _put(self, thought: bool, text: str) -> None:
        shown = "" if thought else text if self._begun else text.lstrip()
        if shown:
            self._begun = True
            self._write(shown)


def _held_back(text: str, tag: str) -> int:
    """Return how many characters at the end may be the beginning of the tag."""
    return max(n for n in range(len(tag)) if text.endswith(tag[:n]))


class Lines:
    """Writes text so that words stay whole on a terminal of `width()` columns.

    Everything is written at once: a word that turns out too long for its line is taken back and put
    on the next. A width of None leaves lines to the terminal.
    """

    def __init__(self, write: Callable[[str], None], width: Callable[[], int | None]) -> None:
        self._write = write
        self._width = width
        self._column = 0
        self._word = ""

    def feed(self, text: str) -> None:
        text = _CONTROL.sub("", text)
        width = self._width()
        self._write(text if width is None else "".join(self._placed(c, width) for c in text))
        if width is None and text:
            self._column = 0 if text.endswith("\n") else 1

    def end(self) -> None:
        """Begin a new line, unless at the start of one."""
        if self._column:
            self._write("\n")
        self._column, self._word = 0, ""

    def _placed(self, char: str, width: int) -> str:
        """Return what to write for the next character."""
        if char == "\n":
            self._column, self._word = 0, ""
            return char
        cells = _TAB - self._column % _TAB if char == "\t" else max(wcwidth(char), 0)
        if char.isspace():
            self._word = ""
            if self._column + cells > width:
                self._column = 0
                return "\n"
            self._column += cells
            return char
        out = "" if self._column + cells <= width else self._broken()
        self._column += cells
        # Between wide characters a line may be broken anywhere.
        self._word = "" if cells > 1 else self._word + char
        return out + char

    def _broken(self) -> str:
        """Return what takes the word to a new line; a word as long as a line is cut."""
        word, cells = self._word, sum(max(wcwidth(char), 0) for char in self._word)
        if not 0 < cells < self._column:
            self._column, self._word = 0, ""
            return "\n"
        self._column = cells
        return f"\x1b[{cells}D\x1b[K\n{word}"
