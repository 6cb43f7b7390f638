"""The answers of gpt-oss: messages on channels, between tags that are tokens of their own.

    <|channel|>analysis<|message|>Thoughts.<|end|><|start|>assistant<|channel|>final<|message|>Words

A prompt ends with `<|start|>assistant`, so that an answer begins in a message's head. On the
channel `commentary` a message to a function is a call of it; any other is for the person to read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["content", "reasoning", "tool"]

# What makes an answer begin with words, or with the arguments of a call, where it must.
FINAL = "<|channel|>final<|message|>"
CALL = " to=functions.{name}<|channel|>commentary <|constrain|>json<|message|>"

_TEXT = "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTION = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")


@dataclass(frozen=True)
class Part:
    """A piece of one part of an answer; of a tool call always the whole, as JSON."""

    kind: Kind
    text: str


def is_format_of(template: str) -> bool:
    """Whether a chat template's model answers so."""
    return "<|channel|>" in template and _TEXT in template


class Harmony:
    """Splits an answer, which comes in pieces, at its tags; the tags are not told.

    `within` is whether the prompt ends within a message's text, as with FINAL.
    """

    def __init__(self, within: bool = False) -> None:
        self._text = ""
        self._in_head = not within
        self._is_first = True
        self._kind: Kind = "content"
        self._function = ""

    def feed(self, text: str) -> list[Part]:
        """Return the parts that are certain now."""
        self._text += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """Return what is left: an answer may end anywhere, and need not have any tags."""
        text, self._text = self._text, ""
        if not self._in_head:
            return self._parts(text, whole=True)
        untagged = self._is_first and "<|" not in text
        return [Part("content", text)] if text and untagged else []

    def _step(self, parts: list[Part]) -> bool:
        """Take a head or a text; False when more is needed."""
        tags = (_TEXT,) if self._in_head else _ENDS
        found = [(at, tag) for tag in tags if (at := self._text.find(tag)) >= 0]
        if found:
            at, tag = min(found)
            before, self._text = self._text[:at], self._text[at + len(tag) :]
            if self._in_head:
                self._begin(before)
            else:
                parts += self._parts(before, whole=True)
            self._in_head = not self._in_head
            return True
        if not self._in_head and self._kind != "tool":
            keep = max(_beginning(self._text, tag) for tag in tags)
            parts += self._parts(self._text[: len(self._text) - keep])
            self._text = self._text[len(self._text) - keep :]
        return False

    def _begin(self, head: str) -> None:
        channel, function = _CHANNEL.search(head), _FUNCTION.search(head)
        name = channel.group(1) if channel else "final"
        self._function = function.group(1) if function else ""
        thought: Kind = "reasoning" if name == "analysis" else "content"
        self._kind, self._is_first = "tool" if self._function else thought, False

    def _parts(self, text: str, whole: bool = False) -> list[Part]:
        if self._kind == "tool":
            call = {"name": self._function, "arguments": text.strip()}
            return [Part("tool", json.dumps(call, ensure_ascii=False))] if whole else []
        return [Part(self._kind, text)] if text else []


def _beginning(text: str, tag: str) -> int:
    """Return how much of a tag the text ends with."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)


class Tagged:
    """Tells an answer, which comes in pieces, as other models write it: with <think> tags around
    thoughts and <tool_call> tags around calls.
    """

    def __init__(self) -> None:
        self._split = Harmony()
        self._thinks = False

    def feed(self, text: str) -> str:
        """Return the text that is certain now."""
        return "".join(map(self._told, self._split.feed(text)))

    def finish(self) -> str:
        """Return what is left."""
        return "".join(map(self._told, self._split.finish()))

    def _told(self, part: Part) -> str:
        thinks, self._thinks = self._thinks, part.kind == "reasoning"
        turn = "" if thinks == self._thinks else "</think>\n\n" if thinks else "<think>"
        is_call = part.kind == "tool"
        return turn + (f"<tool_call>{part.text}</tool_call>" if is_call else part.text)
