"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

import json
from typing import Any

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
MEDIA_TYPE = "text/event-stream"


def event(data: Any) -> bytes:
    """Return one event with JSON data, which has no line breaks."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def comment(text: str) -> bytes:
    """Return a line that every client ignores; it keeps the connection alive."""
    return f": {' '.join(text.split())}\n\n".encode()
