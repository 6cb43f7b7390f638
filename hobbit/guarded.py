"""Calls of llama.cpp that need a device, on a thread that may be lost with it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from . import _log
from ._native import CancelFlag, check, error_buffer, ffi, lib
from .devices import Device
from .errors import DeviceError

T = TypeVar("T")

# How soon Ctrl-C is noticed.
_SLICE_MS = 100
# After this time without any progress a call that reports it is given up. A load reports none while
# a tensor is on its way, which may have hundreds of MB, through a slow network.
_PATIENCE_S = 300.0
# What another thread is using; of a lost one for as long as the process lives.
_in_use: set[Any] = set()


class _Call:
    """A call on its way to another thread and back."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = _log.carried(function)
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:  # raised again by the one who waits
            self.error = error


@ffi.def_extern()  # type: ignore[untyped-decorator]
def hobbit_python(context: Any) -> None:
    """Run the call whose handle it gets."""
    ffi.from_handle(context).run()


class _Watch:
    """Whether something that reports progress makes none any more."""

    def __init__(self, progress: Callable[[], int] | None) -> None:
        self._progress = progress
        self._last, self._since = -1, time.monotonic()
        self.stopped = False

    def has_stopped(self) -> bool:
        if self._progress is None or self.stopped:
            return self.stopped
        now, at = time.monotonic(), self._progress()
        if at != self._last:
            self._last, self._since = at, now
        self.stopped = now - self._since > _PATIENCE_S
        return self.stopped


class Guarded:
    """A thread for what llama.cpp does with layers on a device. Close it last of all."""

    def __init__(self, device: Device | None, cancelled: CancelFlag) -> None:
        """`device` has the layers; without one they are on any of ggml's."""
        out = ffi.new("struct hobbit_caller **")
        handle = device.handle if device is not None else ffi.NULL
        check(lib.hobbit_caller_new(handle, cancelled.pointer, out), error_buffer())
        self._device, self._cancelled = device, cancelled
        self._handle = out[0]
        self._ident: int | None = None
        self._pid = os.getpid()
        self._why = ""

    @property
    def is_lost(self) -> bool:
        """Whether a device was lost, and whatever is called raises."""
        return bool(self._why)

    def check(self) -> None:
        """Raise DeviceError where a device was lost."""
        if self._why:
            raise DeviceError(self._why)

    def call(
        self,
        function: Callable[[], T],
        *,
        cancels: bool = False,
        progress: Callable[[], int] | None = None,
    ) -> T:
        """Return what the function returns, or raise what it raises.

        DeviceError, now and ever after, where a device was lost: it may be running still, with all
        that it uses. Ctrl-C is raised when the function has ended; one that `cancels` is told to,
        others when it comes again. Of one with a `progress` the device is lost when that has been
        the same number for five minutes.
        """
        if os.getpid() != self._pid:
            raise DeviceError("the process was forked after the model was loaded (-ngl)")
        if threading.get_ident() == self._ident:
            return function()
        if sys.is_finalizing():  # it has no other threads any more
            raise DeviceError("a model with layers on a device (-ngl) was not closed in time")

        def work() -> T:
            self._ident = threading.get_ident()
            return function()

        call, error = _Call(work), error_buffer()
        handle = ffi.new_handle(call)
        interrupted = self._wait(handle, error, cancels, progress, kept=(self, call, handle))
        if interrupted:
            raise KeyboardInterrupt from call.error
        if call.error is not None:
            raise call.error
        return call.result  # type: ignore[no-any-return]

    def _wait(
        self,
        handle: Any,
        error: Any,
        cancels: bool,
        progress: Callable[[], int] | None,
        kept: Any,
    ) -> bool:
        """Have it called and wait; return whether Ctrl-C came meanwhile, which may be anywhere."""
        out, done = ffi.new("struct hobbit_call **"), ffi.new("int32_t *")
        watch = _Watch(progress)
        status, interrupts = lib.HOBBIT_OK, 0
        _in_use.add(kept)
        while status == lib.HOBBIT_OK and not done[0]:
            try:
                if out[0] == ffi.NULL:
                    status = lib.hobbit_caller_start(
                        self._handle, lib.hobbit_python, handle, out, error, len(error)
                    )
                else:
                    status = lib.hobbit_call_wait(out[0], _SLICE_MS, done, error, len(error))
                    if watch.has_stopped():
                        self._cancelled.set(True)
            except KeyboardInterrupt:
                interrupts += 1
                if cancels or interrupts > 1:
                    self._cancelled.set(True)
        if interrupts or watch.stopped:
            self._cancelled.set(False)
        if done[0] or out[0] == ffi.NULL:
            _in_use.discard(kept)
        if done[0]:
            status = done[0] - 1
        if status == lib.HOBBIT_DEVICE:
            self._why = self._why or ffi.string(error).decode(errors="replace")
        check(status, error)
        return interrupts > 0

    def close(self) -> None:
        """End the thread; harmless when done already."""
        handle, self._handle = self._handle, ffi.NULL
        if os.getpid() == self._pid:
            lib.hobbit_caller_close(handle)
