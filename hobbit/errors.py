"""Every error that hobbit raises on purpose.

HobbitError
 +- ModelError (ValueError)        the file is absent, not a GGUF, truncated, corrupt or unknown
 |   +- UnsupportedModelError      the file is sound, but llama.cpp or hobbit cannot run it
 +- PlanError (MemoryError)        the memory cap is below what the model needs
 +- ReadError (OSError)            an expert could not be read while generating
 +- DeviceError (RuntimeError)     a device or an RPC server cannot be used, or was lost
 +- Cancelled                      the generation was cancelled
 +- CapUnavailable                 this system or user cannot limit a process as a benchmark asks
 +- NoSpace                        the disk has no room for what is to be written
 +- UsageError (ValueError)        an option has a value that means nothing

The message is one line that a person can act on. Each class also inherits the built-in that a user
of llama-cpp-python already catches for the same failure.
"""

from __future__ import annotations


class HobbitError(Exception):
    """Root of all errors; `exit_code` is what the command line returns for it."""

    exit_code = 1


class ModelError(HobbitError, ValueError):
    """The model file is absent, not a GGUF, truncated, corrupt or has no known name."""

    exit_code = 3


class UnsupportedModelError(ModelError):
    """The model is sound, but llama.cpp or hobbit cannot run it."""


class PlanError(HobbitError, MemoryError):
    """The memory cap is too small; `needed_bytes` is the smallest that works."""

    exit_code = 4

    def __init__(self, message: str, needed_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class ReadError(HobbitError, OSError):
    """An expert could not be read; the message names the file and the offset."""


class DeviceError(HobbitError, RuntimeError):
    """A device or an RPC server cannot be used, or was lost while it computed.

    A model goes on without a device that was lost: what is evaluated next is computed by the CPU.
    """


class Cancelled(HobbitError):
    """The generation was cancelled by `Llama.cancel()`."""

    exit_code = 130


class CapUnavailable(HobbitError):
    """This process may not make the cgroup that a benchmark's cap or read limit needs."""


class NoSpace(HobbitError):
    """The disk has no room for what is to be written."""

    exit_code = 5


class UsageError(HobbitError, ValueError):
    """An option has a value that means nothing."""

    exit_code = 2
