"""The forms of an answer: text, one JSON object, or a stream of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

from ..chat.flow import Thoughts, WithoutThoughts
from ..generate import Result
from .destination import Destination


class Form(Protocol):
    """Takes an answer as it comes.

    `progress`, if there is one, is told how many tokens of the prompt are read, and of how many.
    """

    @property
    def progress(self) -> Callable[[int, int], None] | None: ...

    def text(self, piece: str) -> None:
        """Take the next piece of the answer."""

    def end(self, result: Result, report: dict[str, Any]) -> None:
        """Write what is still missing: an interrupt can come between a piece and its writing."""


class Text:
    """The answer and a newline; `whole`: not before its end. `inside`: it begins with thoughts."""

    progress = None

    def __init__(self, out: Destination, *, whole: bool, hide_thinking: bool, inside: bool) -> None:
        self._out = out
        self._whole = whole
        self._words = WithoutThoughts(out.say, inside) if hide_thinking else None
        self._shown = 0

    def text(self, piece: str) -> None:
        if not self._whole:
            self._show(piece)

    def end(self, result: Result, report: dict[str, Any]) -> None:
        if missing := result.text[self._shown :]:
            self._show(missing)
        if self._words is not None:
            self._words.end()
        self._out.write("\n")

    def _show(self, piece: str) -> None:
        self._shown += len(piece)
        (self._words or self._out.say)(piece)


class Object:
    """What came of it as one JSON object."""

    progress = None

    def __init__(self, out: Destination) -> None:
        self._out = out

    def text(self, piece: str) -> None:
        pass

    def end(self, result: Result, report: dict[str, Any]) -> None:
        put = self._out.say if result.text else self._out.write
        put(_line(report))


class Stream:
    """JSON objects, one a line: how far the prompt is, the pieces of the answer, what came of it.

    All its pieces together are the answer's text, tags of thoughts included.
    """

    def __init__(self, out: Destination, *, hide_thinking: bool, inside: bool) -> None:
        self._out = out
        self._thoughts = Thoughts(inside)
        self._words = WithoutThoughts(self._token, inside) if hide_thinking else None
        self._told = 0

    def progress(self, done: int, total: int) -> None:
        self._out.write(_line({"type": "progress", "processed": done, "total": total}))

    def text(self, piece: str) -> None:
        self._told += len(piece)
        if self._words is not None:
            self._words(piece)
            return
        for thought, text in self._thoughts.feed(piece):
            self._part(thought, text)

    def end(self, result: Result, report: dict[str, Any]) -> None:
        if missing := result.text[self._told :]:
            self.text(missing)
        if self._words is not None:
            self._words.end()
        for thought, text in self._thoughts.end():
            self._part(thought, text)
        self._out.write(_line({"type": "done"} | report))

    def _part(self, thought: bool, text: str) -> None:
        self._out.say(_line({"type": "thinking" if thought else "token", "text": text}))

    def _token(self, text: str) -> None:
        self._part(False, text)


def _line(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False) + "\n"
