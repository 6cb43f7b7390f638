"""A chat answer's parts: what it says, what it thinks, the tools it calls."""

from __future__ import annotations

import json
from typing import Any

from ..harmony import Kind, Part

_THINK = "<think>", "</think>"
_TOOL = "<tool_call>", "</tool_call>"


class Channels:
    """Splits a stream of text at <think> and <tool_call> tags, as Hermes, Qwen and others write it.

    `thinking` is whether the prompt has opened a <think> already.
    """

    def __init__(self, *, reasoning: bool, tools: bool, thinking: bool = False) -> None:
        self._openers: dict[str, Kind] = {}
        if reasoning:
            self._openers[_THINK[0]] = "reasoning"
        if tools:
            self._openers[_TOOL[0]] = "tool"
        self._kind: Kind = "reasoning" if reasoning and thinking else "content"
        self._text = ""
        self._started = False

    def feed(self, text: str) -> list[Part]:
        """Return the parts that are certain now."""
        self._text += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return [part for part in map(self._trimmed, parts) if part.text]

    def finish(self) -> list[Part]:
        """Return what is left; a tool call that was never closed is content."""
        kind: Kind = "content" if self._kind == "tool" else self._kind
        text = (_TOOL[0] if self._kind == "tool" else "") + self._text
        self._text = ""
        last = self._trimmed(Part(kind, text))
        return [last] if last.text else []

    def _step(self, parts: list[Part]) -> bool:
        """Take one piece from the text; False when more text is needed."""
        tags = self._openers if self._kind == "content" else {self._closer(): "content"}
        at, tag = min(
            ((at, tag) for tag in tags if (at := self._text.find(tag)) >= 0), default=(-1, "")
        )
        if at >= 0:
            parts.append(Part(self._kind, self._text[:at]))
            self._text = self._text[at + len(tag) :]
            self._kind = "content" if self._kind != "content" else self._openers[tag]
            return True
        if self._kind != "tool":
            keep = max((_beginning(self._text, tag) for tag in tags), default=0)
            parts.append(Part(self._kind, self._text[: len(self._text) - keep]))
            self._text = self._text[len(self._text) - keep :]
        return False

    def _closer(self) -> str:
        return _THINK[1] if self._kind == "reasoning" else _TOOL[1]

    def _trimmed(self, part: Part) -> Part:
        """Drop the blank lines that templates put before the answer's first words."""
        if part.kind != "content" or self._started:
            return part
        text = part.text.lstrip("\n") if self._openers else part.text
        self._started = bool(text)
        return Part(part.kind, text)


def _beginning(text: str, tag: str) -> int:
    """Return how much of a tag the text ends with."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)


def parsed_call(text: str) -> dict[str, Any] | None:
    """Return the name and the arguments (JSON text) of a tool call; None if it is none."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(name, str):
        return None
    plain = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"name": name, "arguments": plain}
