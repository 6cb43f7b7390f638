"""Importance matrices: how strongly each column of an expert's matrix is used.

A quantiser that knows them spends its precision on the columns that matter. They are read from
llama.cpp's imatrix files, of both forms, and written in the newer one, which is a GGUF file.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from .errors import ModelError
from .gguf_file import Tensor, read_part
from .layout import ExpertMatrix, Layout

Array = npt.NDArray[np.float32]

# A column that was never used keeps this share of the mean: it may be used in another text.
FLOOR = 1e-4

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_NAME = 255


@dataclass(frozen=True)
class Importance:
    """Sums of squared activations of expert matrices, by the tensors' names.

    `sums` are [n_expert, ne0], `counts` [n_expert]: how many rows each sum is of. `origin` says in
    a few words what they were made from.
    """

    origin: str
    sums: Mapping[str, Array] = field(default_factory=dict)
    counts: Mapping[str, Array] = field(default_factory=dict)

    def row(self, name: str, expert: int) -> Array | None:
        """Return the weights [ne0] of one expert's columns, or None where it was never seen.

        They have mean 1 and none is 0, whatever was measured: on others ggml's quantisers
        overflow or abort.
        """
        if name not in self.sums or not self.counts[name][expert] > 0:
            return None
        row = self.sums[name][expert].astype(np.float64)
        mean = row.mean()
        if not mean > 0:
            return None
        return np.ascontiguousarray(np.maximum(row / mean, FLOOR), dtype=np.float32)

    def digest(self) -> str:
        """Return a SHA-256 in hex of all numbers."""
        digest = hashlib.sha256()
        for name in sorted(self.sums):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.sums[name]).data)
            digest.update(np.ascontiguousarray(self.counts[name]).data)
        return digest.hexdigest()


# No column matters more than another. ggml then searches for the best scales; without an importance
# it computes them from the largest weight, which is faster and, in most types, worse.
UNIFORM = Importance("uniform")

# Runs the model on text.
Gather = Callable[[], Importance]


def read_importance(path: Path, layout: Layout) -> Importance:
    """Open what an imatrix file of llama.cpp, or of ours, says of the experts of `layout`.

    The sums are mapped, not loaded: those of the largest models take a gigabyte.
    ModelError: it is unreadable, no imatrix file, or of another model.
    """
    matrices = {matrix.name: matrix for group in layout.groups for matrix in group.matrices}
    try:
        with open(path, "rb") as file:
            is_gguf = file.read(4) == b"GGUF"
            file.seek(0)
            found = _read_gguf(path, matrices) if is_gguf else _read_legacy(path, file, matrices)
            sums, counts = {}, {}
            for name, own_sums, own_counts in found:
                sums[name], counts[name] = _checked(path, matrices[name], own_sums, own_counts)
    except OSError as exc:
        raise ModelError(f"{path}: cannot read it: {exc.strerror}") from exc
    if not sums:
        model = layout.gguf.parts[0].path.name
        raise ModelError(f"{path}: names none of the expert tensors of {model}: of another model?")
    return Importance(path.name, sums, counts)


def write_importance(path: Path, importance: Importance, layout: Layout) -> None:
    """Write an imatrix file that llama.cpp reads too; OSError where it cannot be written."""
    writer = gguf.GGUFWriter(path, layout.gguf.arch)
    try:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [importance.origin])
        writer.add_uint32("imatrix.chunk_count", 1)
        most = max((int(counts.max()) for counts in importance.counts.values()), default=0)
        writer.add_uint32("imatrix.chunk_size", most)
        for name, sums in importance.sums.items():
            counts = importance.counts[name].astype(np.float32)[:, None]
            writer.add_tensor(f"{name}{_SUMS}", np.ascontiguousarray(sums, np.float32))
            writer.add_tensor(f"{name}{_COUNTS}", np.ascontiguousarray(counts))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


_Found = Iterator[tuple[str, Array, Array]]


def _read_gguf(path: Path, matrices: Mapping[str, ExpertMatrix]) -> _Found:
    _, _, tensors = read_part(path)
    if not any(name.endswith(_SUMS) for name in tensors):
        raise ModelError(f"{path}: is a GGUF file, but not an imatrix")
    for name in matrices:
        sums, counts = tensors.get(f"{name}{_SUMS}"), tensors.get(f"{name}{_COUNTS}")
        if sums is not None and counts is not None:
            yield name, _floats(path, sums), _floats(path, counts)


def _floats(path: Path, tensor: Tensor) -> Array:
    if tensor.type_name != "f32":
        raise ModelError(f"{path}: tensor {tensor.name} is {tensor.type_name}, not f32")
    return _mapped(path, tensor.offset, tensor.nbytes // 4)


def _mapped(path: Path, offset: int, count: int) -> Array:
    return np.memmap(path, np.dtype("<f4"), "r", offset, (count,)) if count else np.empty(0, "<f4")


def _read_legacy(path: Path, file: BinaryIO, matrices: Mapping[str, ExpertMatrix]) -> _Found:
    """Read the older form: entries of a name, a number of calls, and means times that number.

    It does not say how many rows an expert saw; of one that saw none it has ones.
    """
    size = path.stat().st_size
    for _ in range(_count(path, file, size)):
        name = _take(path, file, _count(path, file, _MAX_NAME)).decode(errors="replace")
        calls = _count(path, file, 2**31 - 1)
        count = _count(path, file, (size - file.tell()) // 4)
        if name in matrices and count:
            seen = np.full(matrices[name].n_expert, max(calls, 1), np.float32)
            yield name, _mapped(path, file.tell(), count), seen
        file.seek(4 * count, os.SEEK_CUR)


def _count(path: Path, file: BinaryIO, limit: int) -> int:
    (value,) = struct.unpack("<i", _take(path, file, 4))
    if not 0 <= value <= limit:
        raise ModelError(f"{path}: is no imatrix file, or it is truncated")
    return int(value)


def _take(path: Path, file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise ModelError(f"{path}: is no imatrix file, or it is truncated")
    return data


def _checked(path: Path, matrix: ExpertMatrix, sums: Array, counts: Array) -> tuple[Array, Array]:
    """Give the sums their shape, [n_expert, ne0]."""
    if sums.size != matrix.n_expert * matrix.ne0 or counts.size != matrix.n_expert:
        raise ModelError(
            f"{path}: has {sums.size} values for {matrix.name}, which has "
            f"{matrix.n_expert} experts with rows of {matrix.ne0}"
        )
    for values in (sums, counts):
        if not np.isfinite(values).all() or (values < 0).any():
            raise ModelError(f"{path}: the values for {matrix.name} are not all numbers from 0 up")
    return sums.reshape(matrix.n_expert, matrix.ne0), counts.reshape(-1)
