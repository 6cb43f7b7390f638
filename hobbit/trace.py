"""Read a routing trace: which experts the router chose, event by event. See docs/trace.md.

The file is untrusted: every count is checked against what it counts and against the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .errors import ModelError, UsageError

MAGIC = b"HBTRACE1"

END, LAYER, SEQUENCE, PREDICTED, FORGET = range(5)
_WEIGHTS, _PROBS, _LISTED = 0x10, 0x20, 0x40
_FLAGS = {LAYER: _WEIGHTS | _PROBS | _LISTED}

# Fixed point of the router's probabilities.
PROB_ONE = 65535
# What no sound file exceeds.
_MAX_EXPERTS, _MAX_GROUPS, _MAX_SIZE = 512, 1 << 16, 1 << 48
_MAX_COPY = 1 << 36
_MAX_INT, _MAX_TOKEN = (1 << 31) - 1, (1 << 62) - 1

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TracePool:
    """A pool of the recording run's cache; pairs are (high, low)."""

    bytes: int
    slot_bytes: tuple[int, int]
    slots: tuple[int, int]


@dataclass(frozen=True)
class TraceGroup:
    """The experts of a layer that are cached one by one; pairs are (high, low), 0: no copy."""

    layer: int
    n_expert: int
    pool: int
    expert_bytes: tuple[int, int]
    slot_bytes: tuple[int, int]


@dataclass(frozen=True)
class Event:
    """One event; what its kind does not have is empty, or None.

    A layer has rows: `experts` and `weights` are [n_rows, n_used], in the router's order, `probs`
    is [n_rows, n_expert] of 0 to PROB_ONE, `sequence` and `token` say whose each row is. A
    prediction has `experts` and `weights`, their probabilities, of shape [1, n]. A new sequence has
    `sequence` [1].
    """

    kind: int
    group: int
    sequence: Longs
    token: Longs
    experts: Ints
    weights: npt.NDArray[np.float32] | None
    probs: npt.NDArray[np.uint16] | None


@dataclass(frozen=True)
class Trace:
    """A whole trace in flat arrays: those of events, of rows, of (row, expert) pairs, of probs.

    `row_at`, `pair_at` and `prob_at` say where an event's begin in the flat ones; `prob_at` is -1
    where it has none. Weights that are not seen are NaN, and `has_weights` is False.
    """

    path: Path
    note: dict[str, Any]
    has_probs: bool
    pools: tuple[TracePool, ...]
    groups: tuple[TraceGroup, ...]
    kind: npt.NDArray[np.uint8]
    group: Ints
    n_rows: Ints
    n_used: Ints
    has_weights: npt.NDArray[np.bool_]
    row_at: Longs
    pair_at: Longs
    prob_at: Longs
    sequence: Longs
    token: Longs
    experts: Ints
    weights: npt.NDArray[np.float32]
    probs: npt.NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.kind)

    def __iter__(self) -> Iterator[Event]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Event:
        rows, used = int(self.n_rows[i]), int(self.n_used[i])
        row, pair, prob = int(self.row_at[i]), int(self.pair_at[i]), int(self.prob_at[i])
        pairs, group = slice(pair, pair + rows * used), int(self.group[i])
        probs = None
        if prob >= 0:
            n_expert = self.groups[group].n_expert
            probs = self.probs[prob : prob + rows * n_expert].reshape(rows, n_expert)
        return Event(
            kind=int(self.kind[i]),
            group=group,
            sequence=self.sequence[row : row + rows],
            token=self.token[row : row + rows],
            experts=self.experts[pairs].reshape(rows, used),
            weights=self.weights[pairs].reshape(rows, used) if self.has_weights[i] else None,
            probs=probs,
        )

    @property
    def n_distinct(self) -> Longs:
        """Distinct experts of each event that is a layer; 0 for others.

        With every expert high these are what the cache was asked for: hits and misses.
        """
        counts = np.zeros(len(self), dtype=np.int64)
        for i in np.flatnonzero(self.kind == LAYER):
            at, n = int(self.pair_at[i]), int(self.n_rows[i]) * int(self.n_used[i])
            counts[i] = len(np.unique(self.experts[at : at + n]))
        return counts


def is_trace(path: Path) -> bool:
    """Say whether the file begins as a trace does; raise UsageError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}") from exc


def read_trace(path: Path) -> Trace:
    """Read all of a trace; raise ModelError for a file that is none, is damaged or ends early."""
    if not is_trace(path):
        raise ModelError(f"{path}: is not a routing trace, as hobbit trace writes it")
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}") from exc
    return _Reader(path, data).trace()


class _Reader:
    """A cursor over the bytes, and the lists that become the arrays."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._at = path, data, len(MAGIC)
        self._events: list[tuple[int, int, int, int, bool, int, int, int]] = []
        self._sequence: list[Longs] = []
        self._token: list[Longs] = []
        self._experts: list[Ints] = []
        self._weights: list[npt.NDArray[np.float32]] = []
        self._probs: list[npt.NDArray[np.uint16]] = []
        self._n_rows = self._n_pairs = self._n_probs = 0

    def trace(self) -> Trace:
        flags, note = self._int(4), self._note()
        n_pools, n_groups = self._int(4), self._int(4)
        if not 1 <= n_pools <= n_groups <= _MAX_GROUPS:
            self._damaged("its numbers of layers and pools make no sense")
        pools = tuple(self._pool() for _ in range(n_pools))
        self._groups = tuple(self._group(n_pools) for _ in range(n_groups))
        if {group.pool for group in self._groups} != {*range(n_pools)}:
            self._damaged("a part of its cache is of no layer")
        while self._event():
            pass
        if self._int(8) != len(self._events) or self._at != len(self._data):
            self._damaged("it does not end where it should")
        columns = [np.array(c) for c in zip(*self._events, strict=True)] or [np.zeros(0)] * 8
        kind, group, n_rows, n_used, has_weights, row_at, pair_at, prob_at = columns
        return Trace(
            path=self._path,
            note=note,
            has_probs=bool(flags & 1),
            pools=pools,
            groups=self._groups,
            kind=kind.astype(np.uint8),
            group=group.astype(np.int32),
            n_rows=n_rows.astype(np.int32),
            n_used=n_used.astype(np.int32),
            has_weights=has_weights.astype(np.bool_),
            row_at=row_at.astype(np.int64),
            pair_at=pair_at.astype(np.int64),
            prob_at=prob_at.astype(np.int64),
            sequence=_joined(self._sequence, np.int64),
            token=_joined(self._token, np.int64),
            experts=_joined(self._experts, np.int32),
            weights=_joined(self._weights, np.float32),
            probs=_joined(self._probs, np.uint16),
        )

    def _note(self) -> dict[str, Any]:
        raw = self._take(self._int(4))
        try:
            note = json.loads(raw)
        except (ValueError, RecursionError):
            note = None
        if not isinstance(note, dict):
            self._damaged("its note is no JSON object")
        return note

    def _pool(self) -> TracePool:
        size, (a, m), (b, n) = self._size(), *((self._size(), self._int(4)) for _ in "hl")
        if not 1 <= a <= _MAX_COPY or b > _MAX_COPY:
            self._damaged("a slot of its cache has a size that makes no sense")
        return TracePool(size, (a, b), (m, n))

    def _group(self, n_pools: int) -> TraceGroup:
        layer, n_expert, pool = self._int(4), self._int(4), self._int(4)
        if pool >= n_pools or not 1 <= n_expert <= _MAX_EXPERTS:
            self._damaged("a layer has a pool or a number of experts that makes no sense")
        (a, m), (b, n) = ((self._size(), self._size()) for _ in "hl")
        return TraceGroup(layer, n_expert, pool, (a, b), (m, n))

    def _event(self) -> bool:
        byte = self._int(1)
        kind, flags = byte & 0x0F, byte & 0xF0
        if kind > FORGET or flags & ~_FLAGS.get(kind, 0):
            self._damaged("an event of an unknown kind")
        if kind == LAYER:
            self._layer(flags)
        elif kind == SEQUENCE:
            self._rows(1, np.array([self._varint()]), np.zeros(1))
            self._add(kind, -1, 1, 0)
        elif kind == PREDICTED:
            self._predicted()
        elif kind == FORGET:
            self._add(kind, -1, 0, 0)
        return kind != END

    def _layer(self, flags: int) -> None:
        group, n_rows, n_used = self._varint(), self._varint(), self._varint()
        self._check_group(group)
        n_expert = self._groups[group].n_expert
        if not 1 <= n_used <= n_expert or n_rows * n_used > len(self._data):
            self._damaged("a number of experts or rows makes no sense")
        if flags & _LISTED:
            rows = [(self._varint(), self._varint(_MAX_TOKEN)) for _ in range(n_rows)]
            both = np.array(rows, dtype=np.int64).reshape(n_rows, 2)
            sequence, token = both[:, 0], both[:, 1]
        else:
            sequence = np.full(n_rows, self._varint())
            token = self._varint(_MAX_TOKEN) + np.arange(n_rows)
        experts = self._chosen(group, n_rows * n_used)
        weights = self._array(n_rows * n_used, "<f4") if flags & _WEIGHTS else None
        probs = self._array(n_rows * n_expert, "<u2") if flags & _PROBS else None
        self._rows(n_rows, sequence, token)
        self._add(LAYER, group, n_rows, n_used, experts, weights, probs)

    def _predicted(self) -> None:
        group, n = self._varint(), self._varint()
        self._check_group(group)
        if n > self._groups[group].n_expert:
            self._damaged("more experts are predicted than there are")
        experts = self._chosen(group, n)
        self._rows(1, np.zeros(1), np.zeros(1))
        self._add(PREDICTED, group, 1, n, experts, self._array(n, "<f4"))

    def _check_group(self, group: int) -> None:
        if group >= len(self._groups):
            self._damaged("a layer that does not exist")

    def _chosen(self, group: int, n: int) -> Ints:
        n_expert = self._groups[group].n_expert
        experts = self._array(n, "u1" if n_expert <= 256 else "<u2").astype(np.int32)
        if n and int(experts.max()) >= n_expert:
            self._damaged("an expert that does not exist")
        return experts

    def _rows(self, n: int, sequence: npt.NDArray[Any], token: npt.NDArray[Any]) -> None:
        self._sequence.append(sequence.astype(np.int64))
        self._token.append(token.astype(np.int64))

    def _add(
        self,
        kind: int,
        group: int,
        n_rows: int,
        n_used: int,
        experts: Ints | None = None,
        weights: npt.NDArray[np.float32] | None = None,
        probs: npt.NDArray[np.uint16] | None = None,
    ) -> None:
        prob_at = -1 if probs is None else self._n_probs
        at = (self._n_rows, self._n_pairs, prob_at)
        self._events.append((kind, group, n_rows, n_used, weights is not None, *at))
        self._n_rows += n_rows
        if experts is not None:
            self._experts.append(experts)
            unseen = np.full(len(experts), np.nan, dtype=np.float32)
            self._weights.append(unseen if weights is None else weights)
            self._n_pairs += len(experts)
        if probs is not None:
            self._probs.append(probs)
            self._n_probs += len(probs)

    def _array(self, n: int, kind: str) -> npt.NDArray[Any]:
        return np.frombuffer(self._take(n * np.dtype(kind).itemsize), dtype=kind)

    def _take(self, n: int) -> bytes:
        end = self._at + n
        if end > len(self._data):
            raise ModelError(f"{self._path}: the routing trace ends early: record it again")
        self._at, start = end, self._at
        return self._data[start:end]

    def _int(self, n: int) -> int:
        return int.from_bytes(self._take(n), "little")

    def _size(self) -> int:
        size = self._int(8)
        if size > _MAX_SIZE:
            self._damaged("a size makes no sense")
        return size

    def _varint(self, limit: int = _MAX_INT) -> int:
        value = shift = 0
        while True:
            byte = self._int(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if value > limit or shift > 63:
                self._damaged("a number is too large")
            if byte < 0x80:
                return value

    def _damaged(self, why: str) -> NoReturn:
        raise ModelError(f"{self._path}: the routing trace is damaged at byte {self._at}: {why}")


def _joined(arrays: list[npt.NDArray[Any]], kind: Any) -> npt.NDArray[Any]:
    return np.concatenate(arrays).astype(kind) if arrays else np.zeros(0, dtype=kind)
