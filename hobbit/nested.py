"""The nested copy of a Q8_0 model: each expert matrix as two planes, so that its low-precision copy
is a part of it and takes no room of its own.

The file is a GGUF with everything that the source has. In place of an expert tensor it holds two:
under the same name a Q4_1 tensor of the same shape, which is the low-precision copy, and the low
plane, the 16 bytes a block that complete it to the source's bytes (`native/nested.h`). Tensors
begin on pages, so that planes can be read past the page cache. It is not for plain llama.cpp, which
refuses tensors that it does not know.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ._native import ffi, lib
from .errors import HobbitError, ModelError, ReadError
from .gguf_file import GGML_TYPES, GGUF, VERSION, Tensor, padded
from .layout import (
    NESTED_KEY,
    NESTED_VERSION,
    Layout,
    is_nested,
    low_plane_name,
    tensor_info,
)
from .sizes import format_size

ALIGNMENT = 4096

Progress = Callable[[str, float], None]
# A tensor's name and an expert's number in, a float32 buffer with a weight for each column out, or
# nothing where all columns count alike.
Importance = Callable[[str, int], Any]

_STAGE = "splitting experts"
_CHUNK = 4 << 20
_TYPES = {kind.name: number for number, kind in GGML_TYPES.items()}
_Q8_0, _HIGH, _PLANE = _TYPES["q8_0"], _TYPES["q4_1"], _TYPES["i8"]
_BLOCK, _BLOCK_BYTES, _HIGH_BYTES = 32, GGML_TYPES[_Q8_0].nbytes, GGML_TYPES[_HIGH].nbytes
_LOW_BYTES = _BLOCK // 2
_ALIGNMENT_KEY = "general.alignment"


def check(layout: Layout) -> None:
    """Raise ModelError for a model of which no nested copy can be made."""
    _Plan.of(layout)


def make_nested(
    layout: Layout,
    dest: Path,
    progress: Progress | None = None,
    importance: Importance | None = None,
) -> Path:
    """Write the nested copy of a model, all of whose streamed experts must be Q8_0.

    `progress` is called with the name of a stage and the share of it that is done. With
    `importance` the low-precision copy alone is better; both together give the source's bytes in
    any case. The file gets its name only when it is whole.
    """
    report = progress or _ignore
    plan = _Plan.of(layout)
    part = dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        _check_place(layout.gguf, dest, plan.size)
        with _opened(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as out:
            plan.write(out, importance or _all_alike, report)
            os.fsync(out)
        part.replace(dest)
    except OSError as exc:
        if isinstance(exc, HobbitError):
            raise
        raise HobbitError(f"cannot write {dest}: {exc.strerror or exc}") from exc
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return dest


def join(gguf: GGUF, name: str, expert: int) -> bytes:
    """Return the source's bytes of one expert of a tensor, from the planes of a nested copy."""
    high, low = gguf.tensors[name], gguf.tensors[low_plane_name(name)]
    planes = []
    for tensor in (high, low):
        size = tensor.nbytes // tensor.shape[2]
        path = gguf.parts[tensor.part].path
        with _source(path) as file:
            planes.append(_read(file, size, tensor.offset + expert * size, path))
    n_blocks = len(planes[0]) // _HIGH_BYTES
    whole = bytearray(n_blocks * _BLOCK_BYTES)
    lib.hobbit_nested_merge(
        ffi.from_buffer(planes[0]), ffi.from_buffer(planes[1]), ffi.from_buffer(whole), n_blocks
    )
    return bytes(whole)


@dataclass(frozen=True)
class _Copy:
    """A tensor of the source, and what it becomes: itself, or its high plane and its low plane."""

    source: Tensor
    targets: tuple[Tensor, ...]

    @property
    def is_split(self) -> bool:
        return len(self.targets) > 1

    @property
    def expert_bytes(self) -> int:
        return self.source.nbytes // self.source.shape[2]

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield offset and size of pieces: any of a tensor that is copied, else whole rows."""
        span, unit = self.source.nbytes, 1
        if self.is_split:
            span, unit = self.expert_bytes, self.source.shape[0] // _BLOCK * _BLOCK_BYTES
        step = max(_CHUNK // unit, 1) * unit
        for start in range(0, self.source.nbytes, span or 1):
            for at in range(start, start + span, step):
                yield at, min(step, start + span - at)


@dataclass(frozen=True)
class _Plan:
    """The file to write: its header, and its tensors with their offsets."""

    gguf: GGUF
    header: bytes
    copies: tuple[_Copy, ...]
    size: int

    @classmethod
    def of(cls, layout: Layout) -> _Plan:
        gguf, streamed = layout.gguf, layout.streamed
        if is_nested(gguf):
            raise ModelError(f"{gguf.parts[0].path}: is a nested copy already")
        if not streamed:
            raise ModelError(f"{gguf.parts[0].path}: has no experts to split")
        infos, copies, position = [], [], 0
        for tensor in gguf.tensors.values():
            targets = []
            for target in _planes(gguf, tensor) if tensor.name in streamed else (tensor,):
                infos.append(tensor_info(target, position))
                targets.append(replace(target, offset=position))
                position = padded(position + target.nbytes, ALIGNMENT)
            copies.append(_Copy(tensor, tuple(targets)))
        header = _header(gguf, infos)
        start = padded(len(header), ALIGNMENT)
        placed = tuple(
            replace(copy, targets=tuple(replace(t, offset=start + t.offset) for t in copy.targets))
            for copy in copies
        )
        return cls(gguf, header, placed, start + position)

    def write(self, out: int, importance: Importance, report: Progress) -> None:
        os.ftruncate(out, self.size)
        _write(out, self.header, 0)
        total, done = max(self.gguf.nbytes, 1), 0
        report(_STAGE, 0.0)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(_source(part.path)) for part in self.gguf.parts]
            for copy in self.copies:
                part = copy.source.part
                for at, size in copy.chunks():
                    data = _read(files[part], size, copy.source.offset + at, self._path(copy))
                    for target, offset, piece in self._pieces(copy, at, data, importance):
                        _write(out, piece, target.offset + offset)
                    done += size
                    report(_STAGE, done / total)

    def _path(self, copy: _Copy) -> Path:
        return self.gguf.parts[copy.source.part].path

    def _pieces(
        self, copy: _Copy, at: int, data: bytes, importance: Importance
    ) -> Iterator[tuple[Tensor, int, bytes | bytearray]]:
        """Yield what a chunk of the source becomes, and where in which tensor it belongs."""
        source = copy.source
        if not copy.is_split:
            yield copy.targets[0], at, data
            return
        first, n_blocks = at // _BLOCK_BYTES, len(data) // _BLOCK_BYTES
        high, low = bytearray(n_blocks * _HIGH_BYTES), bytearray(n_blocks * _LOW_BYTES)
        weights = importance(source.name, at // copy.expert_bytes)
        status = lib.hobbit_nested_split(
            ffi.from_buffer(data),
            ffi.from_buffer(high),
            ffi.from_buffer(low),
            n_blocks,
            ffi.NULL if weights is None else ffi.from_buffer("float[]", weights),
            source.shape[0] // _BLOCK,
        )
        if status != lib.HOBBIT_OK:
            raise ModelError(
                f"{self._path(copy)}: {source.name} holds a scale that is too large for a nested "
                "copy or no number"
            )
        yield copy.targets[0], first * _HIGH_BYTES, high
        yield copy.targets[1], first * _LOW_BYTES, low


def _planes(gguf: GGUF, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Describe the two tensors that take an expert tensor's place."""
    if tensor.type != _Q8_0:
        raise ModelError(
            f"{gguf.parts[tensor.part].path}: {tensor.name} is {tensor.type_name}; "
            "a nested copy can be made of q8_0 experts only"
        )
    name, n_blocks = low_plane_name(tensor.name), tensor.nbytes // _BLOCK_BYTES
    shape = (tensor.shape[0] // 2, *tensor.shape[1:])
    return (
        replace(tensor, type=_HIGH, nbytes=n_blocks * _HIGH_BYTES),
        replace(tensor, name=name, type=_PLANE, shape=shape, nbytes=n_blocks * _LOW_BYTES),
    )


def _header(gguf: GGUF, infos: list[bytes]) -> bytes:
    """Take the source's metadata as it is, but for what is of its files."""
    first = gguf.parts[0].path
    kept: list[bytes] = []
    with _source(first) as file:
        for key, entry in gguf.entries.items():
            if key != _ALIGNMENT_KEY and not key.startswith("split."):
                kept.append(_read(file, entry.length, entry.offset, first))
    kept += [_u32_entry(_ALIGNMENT_KEY, ALIGNMENT), _u32_entry(NESTED_KEY, NESTED_VERSION)]
    counts = struct.pack("<IQQ", VERSION, len(infos), len(kept))
    return b"".join([b"GGUF", counts, *kept, *infos])


def _u32_entry(key: str, value: int) -> bytes:
    return struct.pack(f"<Q{len(key)}sII", len(key), key.encode(), 4, value)


def _check_place(gguf: GGUF, dest: Path, size: int) -> None:
    if dest.exists() and any(dest.samefile(part.path) for part in gguf.parts):
        raise HobbitError(f"{dest}: is the model itself; name another file for its nested copy")
    free = shutil.disk_usage(dest.parent).free
    if size > free:
        raise HobbitError(
            f"cannot write {dest}: {format_size(size)} are needed, "
            f"{format_size(free)} are free there"
        )


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _source(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise ReadError(f"{path}: cannot open it: {exc.strerror}") from exc
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read(file: int, length: int, offset: int, path: Path) -> bytes:
    data = bytearray()
    while len(data) < length:
        try:
            piece = os.pread(file, length - len(data), offset + len(data))
        except OSError as exc:
            raise ReadError(f"{path}: cannot read it: {exc.strerror}") from exc
        if not piece:
            raise ReadError(f"{path}: ends at byte {offset + len(data)}; it was longer before")
        data += piece
    return bytes(data)


def _write(file: int, data: bytes | bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _ignore(stage: str, done: float) -> None:
    pass


def _all_alike(name: str, expert: int) -> None:
    return None
