"""A model whose experts stream: the native side's owner, and how llama.cpp is made to load it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import llama_cpp
import numpy as np
import numpy.typing as npt

from . import _log, _native
from ._native import CancelFlag, check, error_buffer, failure, ffi, lib
from .arena import Arena
from .batches import Row
from .devices import Device, dispatch_number
from .disk import known_rate
from .errors import HobbitError, UnsupportedModelError
from .layout import Layout
from .memory import Pool, SlotBytes
from .offload import Offloaded
from .policy import Policy
from .prediction import KINDS, Prediction
from .rule import Rule
from .stats import LayerLookUps
from .structs import policy_struct, rule_struct

# How often reads in the background are gone on with while nothing is computed.
_SETTLE_INTERVAL_S = 0.005

Io = Literal["auto", "direct", "buffered"]

_IO: dict[str, int] = {
    "auto": lib.HOBBIT_IO_AUTO,
    "direct": lib.HOBBIT_IO_DIRECT,
    "buffered": lib.HOBBIT_IO_BUFFERED,
}
_SOURCE: dict[str, int] = {
    "file": lib.HOBBIT_SOURCE_FILE,
    "memory": lib.HOBBIT_SOURCE_MEMORY,
    "hole": lib.HOBBIT_SOURCE_HOLE,
}
# The names of the C enum hobbit_predict.
PREDICTORS = {getattr(lib, f"HOBBIT_PREDICT_{kind.upper()}"): kind for kind in KINDS}


@dataclass(frozen=True)
class ExpertInputs:
    """Of one expert tensor: sums of squared inputs [n_expert, ne0], and rows summed [n_expert]."""

    squares: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ContextMemory:
    """Bytes that llama.cpp allocates for a model and one context, experts not counted.

    In the machine's memory; `offloaded` is what devices have in their own.
    """

    dense: int = 0
    kv: int = 0
    compute: int = 0
    offloaded: tuple[Offloaded, ...] = ()


def made(call: Callable[[], Any], failure: str, verbose: bool = False) -> int:
    """Return the address of what llama.cpp makes, or raise with the reason that it logs."""
    with _log.captured(verbose) as errors:
        pointer = call()
    if not pointer:
        raise UnsupportedModelError(f"{failure}: {_log.reason(errors)}")
    return int(pointer)


def measure(load: Callable[[Any], int], model_params: Any, context_params: Any) -> ContextMemory:
    """What the model that `load` loads and a context would allocate, without allocating it."""
    params = type(model_params).from_buffer_copy(model_params)
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # a mapped file would not be counted
    model = load(params)
    try:
        context = made(
            lambda: llama_cpp.llama_init_from_model(model, context_params),
            "llama.cpp cannot make a context",
        )
        found = allocated(context)
        llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)
    return found


def allocated(context: int) -> ContextMemory:
    """Return what the model of a llama_context and the context itself have."""
    out = ffi.new("struct hobbit_context_memory *")
    lib.hobbit_context_memory(ffi.cast("struct llama_context *", context), out)
    offloaded = (
        Offloaded(ffi.string(d.name).decode(), d.model_bytes, d.kv_bytes, d.compute_bytes)
        for d in out.devices[0 : out.n_devices]
    )
    return ContextMemory(out.model_bytes, out.kv_bytes, out.compute_bytes, tuple(offloaded))


class StreamedModel:
    """Owns the native model of one layout. Close it after every llama_model loaded through it."""

    def __init__(
        self, layout: Layout, cancelled: CancelFlag, io: Io = "auto", io_threads: int = 0
    ) -> None:
        self.layout = layout
        self._cancelled = cancelled  # the native side reads it as long as it lives
        self._buffer_type = ffi.NULL
        self._warming: threading.Thread | None = None
        self._stop_warming = threading.Event()
        self._handle = self._open(io, io_threads)
        _native.register()

    def _open(self, io: Io, io_threads: int) -> Any:
        layout, keep = self.layout, []

        def text(value: str) -> Any:
            keep.append(ffi.new("char[]", value.encode()))
            return keep[-1]

        def data(value: bytes | None) -> Any:
            keep.append(ffi.from_buffer(value or b""))
            return keep[-1] if value else ffi.NULL

        high = [matrix for group in layout.groups for matrix in group.matrices]
        parts, matrices = [*layout.gguf.parts], [(m, lib.HOBBIT_HIGH, m.part) for m in high]
        if layout.low:
            low = [matrix for group in layout.low.groups for matrix in group.matrices]
            matrices += [(m, lib.HOBBIT_LOW, len(parts) + m.part) for m in low]
            parts += layout.low.gguf.parts  # again the same of a nested copy
        lists: dict[str, Sequence[dict[str, Any]]] = {
            "files": [{"path": text(str(p.path)), "size": p.size} for p in parts],
            "groups": [{"layer": g.layer, "n_expert": g.n_expert} for g in layout.groups],
            "matrices": [
                {
                    "name": text(m.name),
                    "group": m.group,
                    "precision": precision,
                    "file": file,
                    "type": m.type,
                    "ne0": m.ne0,
                    "ne1": m.ne1,
                    "offset": m.offset,
                    "expert_bytes": m.expert_bytes,
                    "plane_bytes": m.plane_bytes,
                }
                for m, precision, file in matrices
            ],
            "extents": [
                {
                    "offset": e.offset,
                    "length": e.length,
                    "source": _SOURCE[e.source],
                    "file": e.part,
                    "file_offset": e.file_offset,
                    "data": data(e.data),
                }
                for e in layout.extents
            ],
        }
        types = {"files": "file", "groups": "group", "matrices": "matrix", "extents": "extent"}
        options = ffi.new("struct hobbit_options *", {"io": _IO[io], "io_threads": io_threads})
        options.cancelled = self._cancelled.pointer
        for name, values in lists.items():
            keep.append(ffi.new(f"struct hobbit_{types[name]}[]", values))
            setattr(options, name, keep[-1])
            setattr(options, f"n_{name}", len(values))
        out, error = ffi.new("struct hobbit_model **"), error_buffer()
        check(lib.hobbit_model_open(options, out, error, len(error)), error)
        return out[0]

    def slot_bytes(self) -> list[SlotBytes]:
        """Bytes of one arena slot, for a high and for a low copy (0: none) of each group."""
        both = (lib.HOBBIT_HIGH, lib.HOBBIT_LOW)
        return [
            SlotBytes(*(lib.hobbit_model_slot_bytes(self._handle, g.index, p) for p in both))
            for g in self.layout.groups
        ]

    def allocate(self, pools: Sequence[Pool]) -> None:
        """Reserve the expert cache."""
        pool_of_group = [0] * len(self.layout.groups)
        for index, pool in enumerate(pools):
            for group in pool.groups:
                pool_of_group[group] = index
        sizes = [
            {
                "bytes": pool.bytes,
                "slot_bytes": [*pool.slot_bytes],
                "n_slots": [pool.slots, pool.low_slots],
            }
            for pool in pools
        ]
        error = error_buffer()
        status = lib.hobbit_model_allocate(
            self._handle,
            ffi.new("struct hobbit_pool[]", sizes),
            len(pools),
            ffi.new("int32_t[]", pool_of_group),
            error,
            len(error),
        )
        check(status, error)

    def use_device(self, device: Device, arena: Arena, dispatch: str, n_threads: int) -> None:
        """Give the experts memory on a device too, once, after `allocate`.

        What it and the CPU take for an expert is measured, which takes up to a second.
        """
        pool_of_group = [0] * len(self.layout.groups)
        for index, pool in enumerate(arena.pools):
            for group in pool.groups:
                pool_of_group[group] = index
        pools = [([*p.expert_bytes], [p.slots, p.low_slots]) for p in arena.pools]
        native_pools = ffi.new("struct hobbit_device_pool[]", pools)
        groups = ffi.new("int32_t[]", pool_of_group)
        plan = {
            "pools": native_pools,
            "pool_of_group": groups,
            "n_pools": len(pools),
            "batch_bytes": arena.batch_bytes,
            "token_bytes": arena.token_bytes,
            "dispatch": dispatch_number(dispatch),
            "n_threads": n_threads,
            "read_ns_per_mib": self._read_ns_per_mib(),
        }
        native, error = ffi.new("struct hobbit_device_plan *", plan), error_buffer()
        status = lib.hobbit_model_use_device(self._handle, device.handle, native, error, len(error))
        check(status, error)

    def set_dispatch(self, dispatch: str) -> None:
        """Change who computes an expert, from the next layer on."""
        lib.hobbit_model_set_dispatch(self._handle, dispatch_number(dispatch))

    def _read_ns_per_mib(self) -> int:
        """Return what the disk was measured to take for pieces of this size; 0: it was not."""
        group = self.layout.groups[0]
        path = self.layout.gguf.parts[group.matrices[0].part].path
        known = known_rate(path, [matrix.expert_bytes for matrix in group.matrices])
        return round((1 << 20) / known.bytes_per_s * 1e9) if known else 0

    def load(self, params: Any, verbose: bool = False) -> int:
        """Load a llama_model through the stream that skips expert data; returns its address.

        `params` is a llama_model_params; the fields that streaming decides are set in it.
        """
        if self._buffer_type == ffi.NULL:
            self._buffer_type = lib.hobbit_buffer_type_new(self._handle)
        where = [(pattern, self._buffer_type) for pattern in self.layout.overrides]
        host = lib.hobbit_host_buffer_type()
        where += [(pattern, host) for pattern in self.layout.companion_overrides]
        named = [(ffi.new("char[]", pattern.encode()), kind) for pattern, kind in where]
        overrides = ffi.new("struct hobbit_override[]", [*named, (ffi.NULL, ffi.NULL)])
        params.tensor_buft_overrides = _native.address(overrides)
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        params.lazy_mode = 0  # reading on demand needs mmap
        params.use_extra_bufts = False  # repacked weights cannot be read from the file as they are
        error = error_buffer()
        stream = lib.hobbit_model_stream(self._handle, error, len(error))
        if stream == ffi.NULL:
            raise HobbitError(ffi.string(error).decode(errors="replace"))
        try:
            model = made(
                lambda: llama_cpp.llama_model_load_from_file_ptr(_native.address(stream), params),
                f"{self.layout.gguf.parts[0].path}: llama.cpp cannot load it",
                verbose,
            )
        finally:
            lib.hobbit_stream_close(stream)
            params.tensor_buft_overrides = None
        lib.hobbit_buffer_type_loaded(self._buffer_type)
        return model

    def set_rule(self, rule: Rule) -> None:
        """Put a rule in force from the next layer on."""
        native, error = rule_struct(rule, len(self.layout.groups)), error_buffer()
        status = lib.hobbit_model_set_rule(self._handle, native.pointer, error, len(error))
        check(status, error)

    def set_policy(self, policy: Policy) -> None:
        """Evict by this policy from now on."""
        native, error = policy_struct(policy, self._low_cost()), error_buffer()
        check(lib.hobbit_model_set_policy(self._handle, native, error, len(error)), error)

    def _native_prediction(self, prediction: Prediction) -> Any:
        n_embd = self.layout.gguf.get(f"{self.layout.gguf.arch}.embedding_length", 0)
        native = {
            "kind": getattr(lib, f"HOBBIT_PREDICT_{prediction.kind.upper()}"),
            "depth": prediction.depth,
            "always": prediction.always,
            "n_embd": n_embd,
            "least_odds": prediction.odds,
            "map_capacity": prediction.map_capacity,
        }
        return ffi.new("struct hobbit_prediction *", native)

    def prediction_bytes(self, prediction: Prediction) -> int:
        """Bytes that predicting so takes."""
        experts = [group.n_expert for group in self.layout.groups]
        native = self._native_prediction(prediction)
        return int(lib.hobbit_prediction_bytes(native, len(experts), experts))

    def set_prediction(self, prediction: Prediction) -> None:
        """Predict so from now on."""
        native = self._native_prediction(prediction)
        error = error_buffer()
        check(lib.hobbit_model_set_prediction(self._handle, native, error, len(error)), error)

    def load_maps(self, path: str, fingerprint: str) -> None:
        """Take in the expert maps of an earlier run; raise ReadError or ModelError without any."""
        error, identity = error_buffer(), bytes.fromhex(fingerprint)
        status = lib.hobbit_model_load_maps(
            self._handle, os.fsencode(path), identity, error, len(error)
        )
        check(status, error)

    def save_maps(self, path: str, fingerprint: str) -> None:
        """Keep the expert maps for later runs, if there are new ones; raise ReadError."""
        error, identity = error_buffer(), bytes.fromhex(fingerprint)
        status = lib.hobbit_model_save_maps(
            self._handle, os.fsencode(path), identity, error, len(error)
        )
        check(status, error)

    def _low_cost(self) -> float:
        """Bytes of low copies over those of high ones."""
        layout = self.layout
        low, high = (
            sum(group.expert_bytes for group in groups)
            for groups in (layout.low.groups if layout.low else (), layout.groups)
        )
        return low / high

    def new_sequence(self) -> None:
        """What comes now is another sequence."""
        lib.hobbit_model_new_sequence(self._handle)

    def end_sequence(self, sequence: int) -> None:
        """One of several sequences is over, or its number is another's from now on."""
        lib.hobbit_model_end_sequence(self._handle, sequence)

    @contextmanager
    def decoding(self, rows: Sequence[Row], ubatches: Sequence[Sequence[int]]) -> Iterator[None]:
        """While it lasts, llama_decode computes these rows, by number, ubatch by ubatch."""
        order = [rows[i] for ubatch in ubatches for i in ubatch]
        columns = {
            "sequences": [row.sequence for row in order],
            "tokens": [row.position for row in order],
            "outputs": [row.output for row in order],
            "ubatches": [len(ubatch) for ubatch in ubatches],
        }
        lists = {name: ffi.new("int32_t[]", column) for name, column in columns.items()}
        sizes = {"n_rows": len(order), "n_ubatches": len(ubatches)}
        error = error_buffer()
        native = ffi.new("struct hobbit_rows *", lists | sizes)
        check(lib.hobbit_model_rows(self._handle, native, error, len(error)), error)
        try:
            yield
        finally:
            lib.hobbit_model_rows(self._handle, ffi.NULL, error, len(error))

    def forget(self) -> None:
        """Drop every cached copy."""
        lib.hobbit_model_forget(self._handle)

    def usage(self) -> list[int]:
        """How often each expert was looked up, of all groups in order."""
        counts = ffi.new("uint64_t[]", self._n_experts())
        lib.hobbit_model_usage(self._handle, counts)
        return list(counts)

    def look_ups(self) -> list[LayerLookUps]:
        """The look-ups of each layer, in order; waits for nothing."""
        groups = self.layout.groups
        hits, misses = (ffi.new("uint64_t[]", len(groups)) for _ in range(2))
        lib.hobbit_model_look_ups(self._handle, hits, misses)
        found: dict[int, LayerLookUps] = {}
        for group in groups:
            before = found.get(group.layer, LayerLookUps(group.layer))
            more = LayerLookUps(group.layer, hits[group.index], misses[group.index])
            found[group.layer] = before.plus(more)
        return [found[layer] for layer in sorted(found)]

    def warm(self, experts: Sequence[int]) -> None:
        """Read experts, by their numbers in `usage`, in the background while there is room."""
        places = [(g.index, e) for g in self.layout.groups for e in range(g.n_expert)]
        chosen = [places[expert] for expert in experts]
        groups, numbers = (ffi.new("int32_t[]", [place[i] for place in chosen]) for i in (0, 1))
        error = error_buffer()
        status = lib.hobbit_model_warm(
            self._handle, groups, numbers, len(chosen), error, len(error)
        )
        check(status, error)
        if self._warming is None or not self._warming.is_alive():
            # A daemon could be in the native code while the interpreter goes away under it.
            self._warming = threading.Thread(target=self._settle, name="hobbit-warm", daemon=False)
            self._warming.start()

    def _settle(self) -> None:
        """Go on with what is read in the background until it is done, also at the program's end."""
        main = threading.main_thread()
        while main.is_alive() and not self._stop_warming.wait(_SETTLE_INTERVAL_S):
            if lib.hobbit_model_settle(self._handle) == 0:
                break

    def _n_experts(self) -> int:
        return sum(group.n_expert for group in self.layout.groups)

    def keep_low(self) -> None:
        """Read every low copy and keep it: misses then need not be waited for."""
        error = error_buffer()
        check(lib.hobbit_model_keep_low(self._handle, error, len(error)), error)

    @contextmanager
    def schedule(self, path: str, note: str | None = None) -> Iterator[None]:
        """Record which precision each expert gets, with a note, or without one replay it."""
        error, name = error_buffer(), path.encode()
        if note is None:
            status = lib.hobbit_model_replay(self._handle, name, error, len(error))
        else:
            status = lib.hobbit_model_record(self._handle, name, note.encode(), error, len(error))
        check(status, error)
        try:
            yield
        finally:
            check(lib.hobbit_model_schedule_end(self._handle, error, len(error)), error)

    @contextmanager
    def trace(self, path: str, note: str, probs: bool) -> Iterator[None]:
        """Record which experts the router chooses, with a note, and perhaps its probabilities."""
        error, flags = error_buffer(), lib.HOBBIT_TRACE_PROBS if probs else 0
        status = lib.hobbit_model_trace(
            self._handle, path.encode(), note.encode(), flags, error, len(error)
        )
        check(status, error)
        try:
            yield
        finally:
            check(lib.hobbit_model_trace_end(self._handle, error, len(error)), error)

    @contextmanager
    def observe(self) -> Iterator[npt.NDArray[np.int64]]:
        """Count the scores of pairs, those above 0, into bins: [n_groups, bins over 0..1]."""
        counts = np.zeros((len(self.layout.groups), lib.HOBBIT_SCORE_BINS), dtype=np.int64)
        lib.hobbit_model_observe(self._handle, ffi.cast("int64_t *", ffi.from_buffer(counts)))
        try:
            yield counts
        finally:
            lib.hobbit_model_observe(self._handle, ffi.NULL)

    @contextmanager
    def collect(self) -> Iterator[dict[str, ExpertInputs]]:
        """Sum the squares of what enters each expert matrix, by tensor name."""
        high = [matrix for group in self.layout.groups for matrix in group.matrices]
        inputs = {
            m.name: ExpertInputs(
                np.zeros((m.n_expert, m.ne0), dtype=np.float32),
                np.zeros(m.n_expert, dtype=np.int64),
            )
            for m in high
        }
        sums, counts = (
            ffi.new(f"{kind} *[]", [ffi.cast(f"{kind} *", ffi.from_buffer(a)) for a in arrays])
            for kind, arrays in (
                ("float", [i.squares for i in inputs.values()]),
                ("int64_t", [i.rows for i in inputs.values()]),
            )
        )
        lib.hobbit_model_collect(self._handle, sums, counts)
        try:
            yield inputs
        finally:
            lib.hobbit_model_collect(self._handle, ffi.NULL, ffi.NULL)

    def take_error(self) -> HobbitError | None:
        """What failed last, a read or a device, once; None when nothing did."""
        error = error_buffer()
        status = lib.hobbit_model_take_error(self._handle, error, len(error))
        return None if status == lib.HOBBIT_OK else failure(status, error)

    def counters(self) -> Any:
        """A snapshot of the C struct hobbit_stats."""
        out = ffi.new("struct hobbit_stats *")
        lib.hobbit_model_stats(self._handle, out)
        return out

    def dense_bytes(self) -> int:
        """How much of what does not stream was read so far."""
        return int(self.counters().dense_bytes)

    def abandon(self) -> None:
        """Give the experts' memory back, as a lost thread may still use the rest: never `close`."""
        self._stop_warming.set()
        lib.hobbit_model_abandon(self._handle)

    def close(self) -> None:
        """Join the reader threads and free the cache."""
        self._stop_warming.set()
        if self._warming is not None:
            self._warming.join()
        handle, self._handle = self._handle, ffi.NULL
        lib.hobbit_model_close(handle)
        lib.hobbit_buffer_type_free(self._buffer_type)
        self._buffer_type = ffi.NULL
