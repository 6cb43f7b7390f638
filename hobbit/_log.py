"""What llama.cpp says: silent, but kept, so that a failure can be told in one line."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import llama_cpp
from llama_cpp._logger import llama_log_callback as upstream_callback

logger = logging.getLogger("hobbit")

T = TypeVar("T")

_ERROR = 4  # GGML_LOG_LEVEL_ERROR


class _Capture(threading.local):
    errors: list[str] | None = None
    verbose = False


_capture = _Capture()


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _callback(level: int, text: bytes, user_data: object) -> None:
    # A device's own threads say again what is raised as an error here.
    foreign = isinstance(threading.current_thread(), threading._DummyThread)
    if (_capture.errors is None and not foreign) or _capture.verbose:
        upstream_callback(level, text, user_data)
    line = text.decode(errors="replace").rstrip()
    logger.debug("%s", line)
    if _capture.errors is not None and level == _ERROR and line:
        _capture.errors.append(line)


llama_cpp.llama_log_set(_callback, None)


@contextmanager
def captured(verbose: bool) -> Iterator[list[str]]:
    """Collect the error lines of this thread's calls; print what llama.cpp says if `verbose`."""
    outer = _capture.errors, _capture.verbose
    _capture.errors, _capture.verbose = [], verbose
    try:
        yield _capture.errors
    finally:
        _capture.errors, _capture.verbose = outer


def carried(call: Callable[[], T]) -> Callable[[], T]:
    """Return the call such that on another thread it is captured as on this one."""
    errors, verbose = _capture.errors, _capture.verbose

    def called() -> T:
        outer = _capture.errors, _capture.verbose
        _capture.errors, _capture.verbose = errors, verbose
        try:
            return call()
        finally:
            _capture.errors, _capture.verbose = outer

    return called


def reason(errors: list[str]) -> str:
    """The first error is the cause; what follows tells who passed it on."""
    if not errors:
        return "it gives no reason"
    _, _, text = errors[0].rpartition("error loading model: ")
    return text.strip()
