"""Read the header of a GGUF model, in one file or in parts, from a disk or from elsewhere.

A model file is untrusted: every count and every size is checked against the file before it is used.
Long arrays (a vocabulary) are stepped over, not built: opening a model takes milliseconds.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import ModelError, UnsupportedModelError

VERSION = 3
DEFAULT_ALIGNMENT = 32

# Bytes read at once: few at first, for a later part's header is short.
_FIRST_WINDOW, _WINDOW = 1 << 18, 1 << 20
_MAX_KEY = 65535
_MAX_STRING = 64 << 20
_MAX_NAME = 63
_MAX_DIMS = 4
_MAX_PARTS = 65535
_INLINE_ITEMS = 4096

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}


@dataclass(frozen=True)
class GgmlType:
    """A tensor type: `block` elements are stored in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


# The types of the pinned llama.cpp; a test compares this table with the library.
GGML_TYPES = {
    0: GgmlType("f32", 1, 4),
    1: GgmlType("f16", 1, 2),
    2: GgmlType("q4_0", 32, 18),
    3: GgmlType("q4_1", 32, 20),
    6: GgmlType("q5_0", 32, 22),
    7: GgmlType("q5_1", 32, 24),
    8: GgmlType("q8_0", 32, 34),
    9: GgmlType("q8_1", 32, 36),
    10: GgmlType("q2_K", 256, 84),
    11: GgmlType("q3_K", 256, 110),
    12: GgmlType("q4_K", 256, 144),
    13: GgmlType("q5_K", 256, 176),
    14: GgmlType("q6_K", 256, 210),
    15: GgmlType("q8_K", 256, 292),
    16: GgmlType("iq2_xxs", 256, 66),
    17: GgmlType("iq2_xs", 256, 74),
    18: GgmlType("iq3_xxs", 256, 98),
    19: GgmlType("iq1_s", 256, 50),
    20: GgmlType("iq4_nl", 32, 18),
    21: GgmlType("iq3_s", 256, 110),
    22: GgmlType("iq2_s", 256, 82),
    23: GgmlType("iq4_xs", 256, 136),
    24: GgmlType("i8", 1, 1),
    25: GgmlType("i16", 1, 2),
    26: GgmlType("i32", 1, 4),
    27: GgmlType("i64", 1, 8),
    28: GgmlType("f64", 1, 8),
    29: GgmlType("iq1_m", 256, 56),
    30: GgmlType("bf16", 1, 2),
    34: GgmlType("tq1_0", 256, 54),
    35: GgmlType("tq2_0", 256, 66),
    39: GgmlType("mxfp4", 32, 17),
    40: GgmlType("nvfp4", 64, 36),
    41: GgmlType("q1_0", 128, 18),
    42: GgmlType("q2_0", 64, 18),
}


@dataclass(frozen=True)
class Part:
    """One file of the model; tensor data starts at `data_offset`."""

    path: Path
    size: int
    data_offset: int
    alignment: int


@dataclass(frozen=True)
class Tensor:
    """Where one tensor is: `offset` counts from the start of file `part`; `shape` is ne0 first."""

    name: str
    shape: tuple[int, ...]
    type: int
    part: int
    offset: int
    nbytes: int

    @property
    def type_name(self) -> str:
        return GGML_TYPES[self.type].name


@dataclass(frozen=True)
class ArrayRef:
    """An array too long to decode at open, or of strings: only its length is known."""

    count: int


@dataclass(frozen=True)
class Entry:
    """One metadata value and the bytes of the first part (key included) that hold it."""

    value: Any
    offset: int
    length: int


@dataclass(frozen=True)
class GGUF:
    """The header of a model: its files, its metadata (of the first part) and all its tensors."""

    parts: list[Part]
    entries: dict[str, Entry]
    tensors: dict[str, Tensor]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value: a scalar, a string, a list of numbers, or an ArrayRef."""
        return _value(self.entries, key, default)

    @property
    def arch(self) -> str:
        return str(self.get("general.architecture"))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


PartHeader = tuple[Part, dict[str, Entry], dict[str, Tensor]]
# Returns some of the bytes at an offset, at least one unless the file ends there: (length, offset).
Read = Callable[[int, int], bytes]


def open_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Read and check the header of a model; `path` is its only file or the first of its parts."""
    return join_parts(Path(path), read_part)


def join_parts(first: Path, read: Callable[[Path, int], PartHeader]) -> GGUF:
    """Make one header of a model's parts; `read` returns that of a path, told the part's number."""
    part, entries, tensors = read(first, 0)
    # Before the architecture, which only the first part names: a later part is told what it is.
    siblings = _siblings(first, entries)
    if not isinstance(_value(entries, "general.architecture"), str):
        raise ModelError(f"{first}: the header names no architecture: not a model")
    parts = [part]
    for index, sibling in enumerate(siblings, start=1):
        part, own, more = read(sibling, index)
        if _value(own, "split.no") != index:
            raise ModelError(f"{sibling}: the header does not say that it is part {index + 1}")
        double = next((name for name in more if name in tensors), None)
        if double is not None:
            raise ModelError(f"{sibling}: tensor {double!r} is in an earlier part too")
        parts.append(part)
        tensors.update(more)
    said = _value(entries, "split.tensors.count")
    if len(parts) > 1 and said != len(tensors):
        raise ModelError(f"{first}: the parts hold {len(tensors)} tensors, the header says {said}")
    return GGUF(parts, entries, tensors)


def _value(entries: dict[str, Entry], key: str, default: Any = None) -> Any:
    entry = entries.get(key)
    return default if entry is None else entry.value


def _siblings(first: Path, entries: dict[str, Entry]) -> list[Path]:
    """Name the further parts by llama.cpp's rule."""
    count, number = _value(entries, "split.count", 0), _value(entries, "split.no")
    if count in (0, 1):
        return []
    if not isinstance(count, int) or not isinstance(number, int) or not 0 < count <= _MAX_PARTS:
        raise ModelError(f"{first}: the header says it is part of a set, but not which part")
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", first.name)
    if match is None or (int(match[2]), int(match[3])) != (number + 1, count):
        raise ModelError(
            f"{first}: is part {number + 1} of {count}; "
            f"its name must end in -{number + 1:05d}-of-{count:05d}.gguf"
        )
    names = [f"{match[1]}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    if number != 0:
        raise ModelError(f"{first}: is part {number + 1} of {count}: name the first, {names[0]}")
    return [first.with_name(name) for name in names[1:]]


def read_part(path: Path, index: int = 0) -> PartHeader:
    """Read and check one file's header; that it is of a model is not asked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        what = f"part {index + 1} of this model is missing" if index else "no such file"
        raise ModelError(f"{path}: {what}") from None
    except OSError as exc:
        raise ModelError(f"{path}: cannot open it: {exc.strerror}") from exc
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(f"{path}: is a folder; name the .gguf file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path}: is not a regular file")
        return parse_part(lambda length, at: os.pread(fd, length, at), path, status.st_size, index)
    except OSError as exc:
        raise ModelError(f"{path}: cannot read it: {exc.strerror}") from exc
    finally:
        os.close(fd)


def parse_part(read: Read, path: Path, size: int, index: int = 0) -> PartHeader:
    """Check the header of a file of `size` bytes; `path` is what messages call it."""
    header = _Header(read, path, size)
    magic = header.take(4, "the magic") if header.size >= 4 else b""
    if magic != b"GGUF":
        raise ModelError(f"{path}: is not a GGUF file ({_describe(magic)})")
    version = header.u32("the version")
    if version & 0xFFFF == 0:
        raise UnsupportedModelError(f"{path}: is a big-endian GGUF file")
    if version not in (2, VERSION):
        raise UnsupportedModelError(
            f"{path}: is GGUF version {version}; only versions 2 and {VERSION} can be read"
        )
    n_tensors = header.count(24, "tensors")
    entries = _parse_entries(header, header.count(13, "metadata entries"))
    alignment = _value(entries, "general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        header.corrupt(f"the alignment is {alignment!r}, not a power of 2")
    infos = [_parse_info(header, index) for _ in range(n_tensors)]
    data_offset = padded(header.pos, alignment)
    return (
        Part(path, header.size, data_offset, alignment),
        entries,
        _place(header, infos, data_offset, alignment),
    )


def _describe(magic: bytes) -> str:
    if not magic:
        return "it is empty or shorter than 4 bytes"
    return f"it begins with {magic!r}"


def _parse_entries(header: _Header, count: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for _ in range(count):
        start = header.pos
        key = header.string(_MAX_KEY, "a metadata key")
        if not key or key in entries:
            header.corrupt(f"metadata key {key!r} is empty or there twice")
        value = header.value(key)
        entries[key] = Entry(value, start, header.pos - start)
    return entries


def _parse_info(header: _Header, index: int) -> Tensor:
    """Read one tensor's description; `offset` is still relative to the data section."""
    name = header.string(_MAX_NAME, "a tensor name")
    n_dims = header.u32(name)
    if not 0 < n_dims <= _MAX_DIMS:
        header.corrupt(f"tensor {name!r} has {n_dims} dimensions")
    shape = tuple(header.u64(name) for _ in range(n_dims))
    number = header.u32(name)
    kind = GGML_TYPES.get(number)
    if kind is None:
        raise UnsupportedModelError(
            f"{header.path}: tensor {name!r} has type {number}, which this llama.cpp does not know"
        )
    elements = math.prod(shape)
    if max(shape) >= 2**63 or elements >= 2**63:
        header.corrupt(f"tensor {name!r} has the impossible shape {list(shape)}")
    if shape[0] % kind.block:
        header.corrupt(f"tensor {name!r} has rows of {shape[0]}, not a multiple of {kind.block}")
    nbytes = elements // kind.block * kind.nbytes
    return Tensor(name, shape, number, index, header.u64(name), nbytes)


def _place(
    header: _Header, infos: list[Tensor], data_offset: int, alignment: int
) -> dict[str, Tensor]:
    """Make offsets absolute; llama.cpp demands that tensors follow each other in the file."""
    tensors: dict[str, Tensor] = {}
    expected = 0
    for info in infos:
        if info.name in tensors:
            header.corrupt(f"tensor {info.name!r} is there twice")
        if info.offset != expected:
            header.corrupt(f"tensor {info.name!r} is at {info.offset}, it should be at {expected}")
        offset = data_offset + info.offset
        if offset + info.nbytes > header.size:
            raise ModelError(
                f"{header.path}: is truncated: tensor {info.name!r} ends at byte "
                f"{offset + info.nbytes}, the file has {header.size}"
            )
        tensors[info.name] = Tensor(
            info.name, info.shape, info.type, info.part, offset, info.nbytes
        )
        expected = padded(expected + info.nbytes, alignment)
    return tensors


def padded(size: int, alignment: int) -> int:
    """Round up to a multiple of `alignment`, a power of 2."""
    return (size + alignment - 1) & -alignment


class _Header:
    """A cursor over the header that holds one window of the file in memory."""

    def __init__(self, read: Read, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._read = read
        self._ahead = _FIRST_WINDOW
        self._window = b""
        self._start = 0
        self._at = 0

    @property
    def pos(self) -> int:
        return self._start + self._at

    def corrupt(self, what: str) -> NoReturn:
        raise ModelError(f"{self.path}: is corrupt: {what}")

    def _need(self, length: int, what: str) -> None:
        """Make the next `length` bytes part of the window."""
        if self._at + length <= len(self._window):
            return
        start = self.pos
        if length > self.size - start:
            raise ModelError(
                f"{self.path}: is truncated or corrupt: {what} ends at byte {start + length}, "
                f"the file has {self.size}"
            )
        wanted = min(max(length, self._ahead), self.size - start)
        self._ahead = min(2 * self._ahead, _WINDOW)
        window = bytearray()
        while len(window) < wanted:
            chunk = self._read(wanted - len(window), start + len(window))
            if not chunk:
                raise ModelError(f"{self.path}: shrank while it was being read")
            window += chunk
        self._window, self._start, self._at = bytes(window), start, 0

    def take(self, length: int, what: str) -> bytes:
        self._need(length, what)
        self._at += length
        return self._window[self._at - length : self._at]

    def skip(self, length: int, what: str) -> None:
        if length > self.size - self.pos:
            self._need(length, what)
        self._at += length

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])

    def count(self, least: int, what: str) -> int:
        """Read a count of things that take at least `least` bytes each."""
        count = self.u64(f"the number of {what}")
        if count * least > self.size - self.pos:
            raise ModelError(
                f"{self.path}: is truncated or corrupt: the header announces {count} {what}, "
                f"the file has {self.size} bytes"
            )
        return count

    def string(self, limit: int, what: str) -> str:
        length = self.u64(what)
        if length > limit:
            self.corrupt(f"{what} is {length} bytes long")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            self.corrupt(f"{what} is not UTF-8 text")

    def value(self, key: str) -> Any:
        kind = self.u32(key)
        if kind == _STRING:
            # Values in the wild hold stray bytes; llama.cpp does not mind.
            length = self.u64(key)
            if length > _MAX_STRING:
                self.corrupt(f"the value of {key!r} is {length} bytes long")
            return self.take(length, key).decode(errors="replace")
        if kind == _ARRAY:
            return self._array(key)
        scalar = _SCALARS.get(kind)
        if scalar is None:
            self.corrupt(f"metadata key {key!r} has the unknown type {kind}")
        return scalar.unpack(self.take(scalar.size, key))[0]

    def _array(self, key: str) -> list[Any] | ArrayRef:
        kind = self.u32(key)
        if kind == _STRING:
            count = self.count(8, f"strings in {key!r}")
            self._skip_strings(count, key)
            return ArrayRef(count)
        item = _SCALARS.get(kind)
        if item is None:
            self.corrupt(f"the array {key!r} has items of the unknown type {kind}")
        count = self.count(item.size, f"items in {key!r}")
        if count > _INLINE_ITEMS:
            self.skip(count * item.size, key)
            return ArrayRef(count)
        data = self.take(count * item.size, key)
        return [value for (value,) in item.iter_unpack(data)]

    def _skip_strings(self, count: int, key: str) -> None:
        """Step over strings; the inner loop runs once a token, so it uses locals only."""
        unpack = _U64.unpack_from
        while count:
            self._need(8, key)
            window, at = self._window, self._at
            last = len(window) - 8
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self._at = at
        if self.pos > self.size:
            raise ModelError(f"{self.path}: is truncated or corrupt: in the strings of {key!r}")
