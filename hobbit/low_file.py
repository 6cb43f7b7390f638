"""The low-precision copy of a model's experts: its format, where it is, and whether it fits.

A GGUF file with the expert tensors only, under their names and with their shapes, in a smaller
type. Its metadata say what it was made from. A smaller GGUF of the whole model serves as well.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from .errors import ModelError
from .fingerprint import fingerprint, source_size
from .folders import cache_folder
from .gguf_file import GGML_TYPES, GGUF, VERSION, Tensor, padded
from .layout import ExpertGroup, Layout, build_layout, tensor_info
from .low_types import low_bytes, role

SUFFIX = ".hobbit-low.gguf"
NESTED_SUFFIX = ".hobbit-nested.gguf"
GENERAL_TYPE = "experts"
# Experts begin at a page, so that direct reads take as little more than them as can be.
ALIGNMENT = 4096
FINGERPRINT = "hobbit.source.fingerprint"
IMATRIX = "hobbit.low.imatrix"
KEY = "hobbit.low.key"
ERROR = "hobbit.low.error."
# Changes when the same options come to mean other bytes.
FORMAT = 1

_PART = re.compile(r"-\d{5}-of-\d{5}$")
_U32, _STRING, _U64, _F64 = 4, 8, 10, 12
_32_BITS = {"general.alignment", "general.quantization_version"}


@dataclass(frozen=True)
class LowPlan:
    """A low file before its data; `tensors` say where that goes, `size` is the whole file's."""

    key: str
    metadata: dict[str, str | int | float]
    tensors: tuple[Tensor, ...]
    size: int

    def header(self, errors: Mapping[str, float] | None = None) -> bytes:
        """Return the bytes before the data; `errors` are each role's relative squared error."""
        values = {f"{ERROR}{name}": value for name, value in (errors or {}).items()}
        return _header(self.metadata | {KEY: self.key} | values, self.tensors)


def plan_low(layout: Layout, types: Mapping[str, int], imatrix: str) -> LowPlan:
    """Lay out the low copy of `layout` in these types.

    `imatrix` says what importance of the columns it is made with. It goes into the key, which two
    copies share when they have the same data.
    """
    gguf = layout.gguf
    matrices = [matrix for group in layout.groups for matrix in group.matrices]
    metadata: dict[str, str | int | float] = {
        "general.architecture": gguf.arch,
        "general.type": GENERAL_TYPE,
        "general.name": f"{gguf.get('general.name', source_stem(gguf))}: experts in low precision",
        "general.alignment": ALIGNMENT,
        "general.quantization_version": 2,
        "hobbit.version": version("hobbit-moe"),
        "hobbit.source.name": gguf.parts[0].path.name,
        "hobbit.source.size": source_size(gguf),
        FINGERPRINT: fingerprint(gguf),
        IMATRIX: imatrix,
    }
    metadata |= {f"{ERROR}{name}": 0.0 for name in sorted({role(matrix) for matrix in matrices})}
    tensors: list[Tensor] = []
    at = 0
    for matrix in sorted(matrices, key=lambda matrix: (matrix.part, matrix.offset)):
        kind = types[matrix.name]
        nbytes = low_bytes(matrix, kind) * matrix.n_expert
        shape = (matrix.ne0, matrix.ne1, matrix.n_expert)
        tensors.append(Tensor(matrix.name, shape, kind, 0, at, nbytes))
        at = padded(at + nbytes, ALIGNMENT)
    key = _key(metadata, tensors)
    data = len(_header(metadata | {KEY: key}, tensors))
    placed = tuple(
        Tensor(t.name, t.shape, t.type, t.part, data + t.offset, t.nbytes) for t in tensors
    )
    return LowPlan(key, metadata, placed, data + at)


def source_stem(gguf: GGUF) -> str:
    """Return the model's name without what says that it is a GGUF, or the first part of one."""
    return _PART.sub("", gguf.parts[0].path.name.removesuffix(".gguf"))


def low_path(gguf: GGUF) -> Path:
    """Say where the low copy is made: next to the model, or in hobbit's cache folder.

    The latter where the model's folder is not ours to write in. Any model may have its copy there,
    so the name has a part of the model's fingerprint.
    """
    beside = _beside(gguf)
    return beside if os.access(beside.parent, os.W_OK) else _cached(gguf)


def nested_path(gguf: GGUF) -> Path:
    """Say where the nested copy of a model is made: as low_path."""
    low = low_path(gguf)
    return low.with_name(low.name.removesuffix(SUFFIX) + NESTED_SUFFIX)


def find_low(gguf: GGUF, known: str = "") -> Path | None:
    """Return the low copy that `hobbit prepare` made of this model, if there is one.

    `known` is the model's fingerprint, where somebody has worked it out already.
    """
    beside = _beside(gguf)
    if beside.is_file():
        return beside
    cached = _cached(gguf, known)
    return cached if cached.is_file() else None


def _beside(gguf: GGUF) -> Path:
    return gguf.parts[0].path.with_name(f"{source_stem(gguf)}{SUFFIX}")


def _cached(gguf: GGUF, known: str = "") -> Path:
    own = known or fingerprint(gguf)
    return cache_folder() / f"{source_stem(gguf)}-{own[:8]}{SUFFIX}"


def check_pair(high: Layout, low: GGUF) -> tuple[ExpertGroup, ...]:
    """Return the low copy's groups, in the order of `high.groups` and with its matrices in theirs.

    ModelError: `low` is no low-precision copy of this model; the message says by what it is known.
    Of two files of one model some matrices may have the same type, but a layer has to be smaller.
    """
    name, model = low.parts[0].path, high.gguf.parts[0].path
    if low.arch != high.gguf.arch:
        _refuse(name, f"is of architecture {low.arch}, {model.name} is {high.gguf.arch}", model)
    made_from = low.get(FINGERPRINT)
    if made_from is not None and made_from != fingerprint(high.gguf):
        source = f"{low.get('hobbit.source.name')}, {low.get('hobbit.source.size')} bytes"
        _refuse(name, f"was made from another file ({source}) than {model.name}", model)
    layout = build_layout(low)
    found = {matrix.name: matrix for group in layout.groups for matrix in group.matrices}
    reasons = dict(layout.resident)
    groups = []
    for group in high.groups:
        matrices = []
        for matrix in group.matrices:
            own = found.get(matrix.name)
            if own is None:
                why = reasons.get(matrix.name, "")
                what = f"tensor {matrix.name} cannot stream: {why}" if why else ""
                _refuse(name, what or f"has no tensor {matrix.name}", model)
            shape, wanted = (
                (own.ne0, own.ne1, own.n_expert),
                (matrix.ne0, matrix.ne1, matrix.n_expert),
            )
            if shape != wanted:
                _refuse(
                    name, f"tensor {matrix.name} is {_times(shape)}, not {_times(wanted)}", model
                )
            if own.expert_bytes > matrix.expert_bytes:
                kinds = GGML_TYPES[own.type].name, GGML_TYPES[matrix.type].name
                _refuse(name, f"tensor {matrix.name} is {kinds[0]}, larger than {kinds[1]}", model)
            matrices.append(replace(own, group=group.index))
        pair = ExpertGroup(group.index, group.layer, group.kind, group.n_expert, tuple(matrices))
        if pair.expert_bytes >= group.expert_bytes:
            kind = GGML_TYPES[matrices[0].type].name
            _refuse(name, f"the experts of layer {group.layer} are {kind}: not smaller", model)
        groups.append(pair)
    return tuple(groups)


def _refuse(name: Path, what: str, model: Path) -> NoReturn:
    raise ModelError(
        f"{name}: {what}: it is no low-precision copy of that model; "
        f"make one with hobbit prepare {model}"
    )


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _key(metadata: Mapping[str, str | int | float], tensors: Sequence[Tensor]) -> str:
    """Hash what decides the data: neither the source's name nor hobbit's version does."""
    names = ("general.architecture", FINGERPRINT, IMATRIX)
    told = [FORMAT, *(metadata[name] for name in names)]
    text = repr((told, [(tensor.name, tensor.shape, tensor.type) for tensor in tensors]))
    return hashlib.sha256(text.encode()).hexdigest()


def _header(metadata: Mapping[str, str | int | float], tensors: Sequence[Tensor]) -> bytes:
    """Return a header, padded to where the data begins. Its length depends on no number's value."""
    pieces = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        pieces += [_string(key), _value(value, key in _32_BITS)]
    start = tensors[0].offset if tensors else 0
    pieces += [tensor_info(tensor, tensor.offset - start) for tensor in tensors]
    header = b"".join(pieces)
    return header.ljust(padded(len(header), ALIGNMENT), b"\0")


def _value(value: str | int | float, short: bool) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, float):
        return struct.pack("<Id", _F64, value)
    return struct.pack("<II", _U32, value) if short else struct.pack("<IQ", _U64, value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
