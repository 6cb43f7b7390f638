"""Devices that hold experts and compute them: ggml's, and those of llama.cpp's RPC servers."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from . import _log
from ._native import address, check, error_buffer, ffi, lib
from .arena import DISPATCHES, DeviceInfo
from .errors import UsageError

# Where what is compiled is: an editable install has it elsewhere than this file.
_LIBRARY = Path(str(import_module("hobbit._hobbit").__file__)).parent / "lib" / "libggml-rpc.so"
_NAME_BYTES, _NAMES_BYTES = 64, 4096
# For experiments: a device takes at least so many microseconds for a batch, besides for each pair,
# and for a copy of a MiB to it; like 500,20,100. With ",turns" it copies and computes by turns.
_DELAYS = "HOBBIT_DEVICE_DELAYS"


def connect(endpoint: str, wanted: str | None = None) -> str:
    """Reach the RPC server at HOST:PORT and return the name of its first device, or the `wanted`.

    The devices of a server that was lost in this process, and is there again, have new names: if it
    is one of those, the new one is returned. Raises DeviceError where none answers.
    """
    room = (wanted or "").encode().ljust(_NAME_BYTES, b"\0")
    name, error = ffi.new("char[]", room), error_buffer()
    with _log.captured(verbose=False):
        status = lib.hobbit_rpc_connect(
            str(_LIBRARY).encode(), endpoint.encode(), name, len(name), error, len(error)
        )
    check(status, error)
    return str(ffi.string(name).decode())


def names() -> list[str]:
    """Return ggml's names of the devices that could hold experts, and those of known servers."""
    found = ffi.new("char[]", _NAMES_BYTES)
    lib.hobbit_device_names(found, len(found))
    return [name for name in ffi.string(found).decode(errors="replace").split(", ") if name]


def serve(endpoint: str, n_threads: int = 1) -> None:
    """Be an RPC server with the CPU, at HOST:PORT; returns only by raising DeviceError."""
    error = error_buffer()
    status = lib.hobbit_rpc_serve(
        str(_LIBRARY).encode(), endpoint.encode(), n_threads, error, len(error)
    )
    check(status, error)


def dispatch_number(name: str) -> int:
    """Return the engine's number for who computes an expert, or raise UsageError."""
    if name not in DISPATCHES:
        raise UsageError(f"dispatch {name}: use {', '.join(DISPATCHES)}")
    return int(getattr(lib, f"HOBBIT_DISPATCH_{name.upper()}"))


def _delays() -> list[int]:
    """Return the delays that the environment asks for, in ns, and whether it takes turns."""
    text = os.environ.get(_DELAYS, "0,0,0")
    numbers, turns = text.removesuffix(",turns"), text.endswith(",turns")
    try:
        batch, pair, copied = (round(float(part) * 1000) for part in numbers.split(","))
    except ValueError:
        raise UsageError(f"{_DELAYS} is {text!r}: give three numbers, like 500,20,100") from None
    return [batch, pair, copied, int(turns)]


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
        lib.hobbit_device_delay(self.handle, ffi.new("struct hobbit_device_delays *", _delays()))
        found = ffi.new("struct hobbit_device_info *")
        lib.hobbit_device_describe(self.handle, found)
        name, description = (
            ffi.string(text).decode(errors="replace") for text in (found.name, found.description)
        )
        shares = bool(found.shares_memory)
        self.info = DeviceInfo(name, description, shares, found.free_bytes, found.total_bytes)

    @property
    def for_layers(self) -> int:
        """The address of llama_model_params.devices that gives it layers, if it takes any."""
        return address(lib.hobbit_device_for_layers(self.handle))

    @property
    def is_remote(self) -> bool:
        """Whether it is an RPC server's."""
        return bool(lib.hobbit_device_is_remote(self.handle))

    @property
    def takes_layers(self) -> bool:
        """Whether llama.cpp would give it layers."""
        return bool(lib.hobbit_device_takes_layers(self.handle))

    def close(self) -> None:
        """Free its memory; harmless when done already."""
        handle, self.handle = self.handle, ffi.NULL
        lib.hobbit_device_close(handle)
