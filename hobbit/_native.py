"""The only door to the C library: `lib`, `ffi`, and `check` to turn a status into an exception."""

from __future__ import annotations

import errno
import os
from typing import Any

# llama.cpp's libraries must be in the process before ours, which is linked against them.
import llama_cpp

from ._hobbit import ffi, lib
from .errors import DeviceError, HobbitError, ModelError, ReadError, UnsupportedModelError

__all__ = [
    "LLAMA_VERSION",
    "CancelFlag",
    "address",
    "check",
    "error_buffer",
    "failure",
    "ffi",
    "lib",
    "register",
]

LLAMA_VERSION = "0.3.36"
ERROR_BYTES = 512

_CLASSES: dict[int, type[HobbitError]] = {
    lib.HOBBIT_IO: ReadError,
    lib.HOBBIT_DEVICE: DeviceError,
    lib.HOBBIT_FORMAT: ModelError,
    lib.HOBBIT_UNSUPPORTED: UnsupportedModelError,
}


def check(status: int, error: Any) -> None:
    """Raise the exception for a status other than HOBBIT_OK; `error` holds the text."""
    if status != lib.HOBBIT_OK:
        raise failure(status, error)


def failure(status: int, error: Any) -> HobbitError:
    """Return the exception for a status; `error` holds the text.

    That of a full disk has an OSError as its cause, by which the command tells it from others.
    """
    text = ffi.string(error).decode(errors="replace")
    found = _CLASSES.get(status, HobbitError)(text)
    reason = os.strerror(errno.ENOSPC)
    if text.endswith(f"written: {reason}"):
        found.__cause__ = OSError(errno.ENOSPC, reason)
    return found


class CancelFlag:
    """Makes computations stop within a layer while it is set; from any thread."""

    def __init__(self) -> None:
        self.pointer = ffi.new("int32_t *", 0)

    def set(self, on: bool) -> None:
        self.pointer[0] = on

    def abort_callback(self) -> tuple[int, int]:
        """Addresses of a ggml_abort_callback and its data."""
        return address(lib.hobbit_abort_callback()), address(self.pointer)


def error_buffer() -> Any:
    return ffi.new("char[]", ERROR_BYTES)


def address(pointer: Any) -> int:
    """The number behind a C pointer, as llama_cpp's bindings take it."""
    return int(ffi.cast("uintptr_t", pointer))


def register() -> None:
    """Make our device known to ggml; every context made from then on has it."""
    found = llama_cpp.__version__
    if found != LLAMA_VERSION:
        raise HobbitError(
            f"this hobbit is built for llama-cpp-python {LLAMA_VERSION} and found {found}: "
            f"pip install llama-cpp-python=={LLAMA_VERSION}, or reinstall hobbit-moe"
        )
    error = error_buffer()
    check(lib.hobbit_register(error, len(error)), error)
