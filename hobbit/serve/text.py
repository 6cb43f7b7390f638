"""From a token's bytes to text that can be shown."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Joins the bytes of tokens to text, and holds back what may become a stop sequence."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """Return the text that is certain now; after a stop sequence `stopped` is set."""
        return self._release(self._held + self._decoder.decode(data))

    def finish(self) -> str:
        """Return what was held back: the answer ends here."""
        text = self._release(self._held + self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, text: str) -> str:
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found or self.stopped:
            self.stopped, self._held = True, ""
            return text[: min(found, default=0)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that a stop sequence begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
