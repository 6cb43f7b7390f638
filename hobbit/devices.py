"""Devices that hold experts and compute them: ggml's, and those of llama.cpp's RPC servers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from . import _log
from ._native import check, error_buffer, ffi, lib
from .arena import DeviceInfo
from .errors import UsageError

# Where what is compiled is: an editable install has it elsewhere than this file.
_LIBRARY = Path(str(import_module("hobbit._hobbit").__file__)).parent / "lib" / "libggml-rpc.so"
_NAME_BYTES = 64


def connect(endpoint: str) -> str:
    """Reach the RPC server at HOST:PORT and return the name of its first device.

    Raises DeviceError where none answers.
    """
    name, error = ffi.new("char[]", _NAME_BYTES), error_buffer()
    with _log.captured(verbose=False):
        status = lib.hobbit_rpc_connect(
            str(_LIBRARY).encode(), endpoint.encode(), name, len(name), error, len(error)
        )
    check(status, error)
    return str(ffi.string(name).decode())


def serve(endpoint: str, n_threads: int = 1) -> None:
    """Be an RPC server with the CPU, at HOST:PORT; returns only by raising DeviceError."""
    error = error_buffer()
    status = lib.hobbit_rpc_serve(
        str(_LIBRARY).encode(), endpoint.encode(), n_threads, error, len(error)
    )
    check(status, error)


class Device:
    """A device that is ready to compute. Close it after the model that uses it."""

    def __init__(self, name: str, n_threads: int = 1) -> None:
        """Open a device by ggml's name; raise UsageError for one that does not exist."""
        out, error = ffi.new("struct hobbit_device **"), error_buffer()
        status = lib.hobbit_device_open(name.encode(), n_threads, out, error, len(error))
        if status == lib.HOBBIT_ARG:
            raise UsageError(ffi.string(error).decode(errors="replace"))
        check(status, error)
        self.handle: Any = out[0]
        found = ffi.new("struct hobbit_device_info *")
        lib.hobbit_device_describe(self.handle, found)
        name, description = (
            ffi.string(text).decode(errors="replace") for text in (found.name, found.description)
        )
        shares = bool(found.shares_memory)
        self.info = DeviceInfo(name, description, shares, found.free_bytes, found.total_bytes)

    def close(self) -> None:
        """Free its memory; harmless when done already."""
        handle, self.handle = self.handle, ffi.NULL
        lib.hobbit_device_close(handle)
