"""What llama.cpp says while it loads: kept, so that a failure can be told in one line."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp
from llama_cpp._logger import llama_log_callback as upstream_callback

logger = logging.getLogger("hobbit")

_ERROR, _CONTINUED = 3, 5


@contextmanager
def captured(verbose: bool) -> Iterator[list[str]]:
    """Collect llama.cpp's error lines; everything goes to the logger, and on when `verbose`."""
    errors: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def callback(level: int, text: bytes, user_data: object) -> None:
        line = text.decode(errors="replace").rstrip()
        logger.debug("%s", line)
        if level == _ERROR and line:
            errors.append(line)
        if verbose:
            upstream_callback(level, text, user_data)

    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(upstream_callback, ctypes.c_void_p(0))


def reason(errors: list[str]) -> str:
    """The first error is the cause; what follows tells who passed it on."""
    if not errors:
        return "llama.cpp gives no reason"
    _, _, text = errors[0].rpartition("error loading model: ")
    return text.strip()
