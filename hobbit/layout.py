"""What of a model streams, what stays resident, and the file that llama.cpp is shown.

Pure: a GGUF header in, a Layout out; no file is opened here.
"""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .errors import ModelError, UnsupportedModelError, UsageError
from .gguf_file import GGML_TYPES, GGUF, VERSION, Tensor, padded

# The exact names: `.bias` and `.scale` tensors of experts are small and stay with the CPU, and
# `ffn_norm_exps` (arctic) is a dense tensor in spite of its name.
EXPERT_TENSOR = re.compile(
    r"^blk\.(\d+)\.ffn_(gate|up|down|gate_up)_(exps|chexps)\.weight$", re.ASCII
)

_OTHER_EXPERTS = re.compile(r"^blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight$", re.ASCII)
_NOT_MULTIPLIED = {"q8_1", "q8_K", "i8", "i16", "i32", "i64", "f64"}
_MATRIX_ORDER = ("gate_up", "gate", "up", "down")
# A nested copy: see hobbit/nested.py.
NESTED_KEY, NESTED_VERSION = "hobbit.nested.version", 1
LOW_PLANE = ".low_plane"
Q8_0 = next(number for number, kind in GGML_TYPES.items() if kind.name == "q8_0")
# llama.cpp aborts the process above this.
_MAX_EXPERTS = 512

Kind = Literal["exps", "chexps"]


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of a layer's experts: number `i` is at `offset + i * file_bytes` of `part`."""

    name: str
    layer: int
    group: int
    type: int
    ne0: int
    ne1: int
    n_expert: int
    part: int
    offset: int
    expert_bytes: int
    plane_bytes: int = 0

    @property
    def file_bytes(self) -> int:
        """Bytes of an expert in the file: a nested one is completed by its low copy."""
        return self.plane_bytes or self.expert_bytes


@dataclass(frozen=True)
class ExpertGroup:
    """The matrices that are read and cached together, one expert at a time."""

    index: int
    layer: int
    kind: Kind
    n_expert: int
    matrices: tuple[ExpertMatrix, ...]

    @property
    def expert_bytes(self) -> int:
        return sum(matrix.expert_bytes for matrix in self.matrices)


@dataclass(frozen=True)
class LowCopies:
    """The same experts in fewer bits: the same groups with the same matrices, in other files."""

    gguf: GGUF
    groups: tuple[ExpertGroup, ...]


@dataclass(frozen=True)
class Extent:
    """A run of the virtual file.

    Its bytes are `data` (source `memory`), or at `file_offset` of file `part` (source `file`), or
    never needed (source `hole`: expert data, with its place in `part`, or padding, with part -1).
    """

    offset: int
    length: int
    source: Literal["memory", "file", "hole"]
    part: int
    file_offset: int
    data: bytes | None = None


@dataclass(frozen=True)
class Layout:
    """The division of a model, and the virtual file whose extents cover it without gaps.

    A token uses `n_expert_used` experts of a layer; the model's own number is `own_expert_used`.
    """

    gguf: GGUF
    groups: tuple[ExpertGroup, ...]
    n_expert_used: int
    own_expert_used: int
    resident: tuple[tuple[str, str], ...]
    extents: tuple[Extent, ...]
    overrides: tuple[str, ...]
    low: LowCopies | None = None

    @property
    def other_number(self) -> str:
        """Say that a token uses another number of experts than is the model's own; "" if not."""
        if self.n_expert_used == self.own_expert_used:
            return ""
        return f"{_experts(self.n_expert_used)} instead of {self.own_expert_used}"

    @property
    def kv_overrides(self) -> dict[str, int]:
        """What llama.cpp has to be told for it, as the argument of llama_cpp.Llama."""
        return {used_key(self.gguf): self.n_expert_used} if self.other_number else {}

    @property
    def streamed(self) -> frozenset[str]:
        return frozenset(matrix.name for group in self.groups for matrix in group.matrices)

    @property
    def companions(self) -> tuple[str, ...]:
        """Names of what experts are computed with besides: the biases and scales of what streams.

        On another device than they are, these would tear a layer's experts apart.
        """
        stems = {name.removesuffix("weight") for name in self.streamed}
        names = (f"{stem}{kind}" for stem in sorted(stems) for kind in ("bias", "scale"))
        return tuple(name for name in names if name in self.gguf.tensors)

    @property
    def companion_overrides(self) -> tuple[str, ...]:
        """Patterns that match exactly the companions."""
        return _overrides(self.gguf, self.companions)

    @property
    def expert_bytes(self) -> int:
        """Bytes of everything that streams."""
        return sum(group.expert_bytes * group.n_expert for group in self.groups)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all other tensors."""
        return self.gguf.nbytes - self.expert_bytes

    @property
    def virtual_size(self) -> int:
        last = self.extents[-1]
        return last.offset + last.length


def low_plane_name(name: str) -> str:
    """Name the plane that completes a nested expert tensor of that name."""
    return name.removesuffix(".weight") + LOW_PLANE


def is_nested(gguf: GGUF) -> bool:
    """Say whether `hobbit prepare --nested` made the file; refuse one of a version unknown here."""
    version = gguf.get(NESTED_KEY)
    if version not in (None, NESTED_VERSION):
        raise ModelError(
            f"{gguf.parts[0].path}: is a nested copy of version {version!r}; "
            f"this hobbit reads version {NESTED_VERSION}: make it again"
        )
    return version is not None


def build_layout(gguf: GGUF, n_expert_used: int | None = None) -> Layout:
    """Divide a model into what streams and what stays.

    A token uses `n_expert_used` experts of a layer, or as many as the model says. Raises UsageError
    for a number that the model cannot have.
    """
    whole = len(gguf.parts) == 1
    layout = _nested_layout(gguf) if is_nested(gguf) else _layout(gguf, whole=whole)
    return layout if n_expert_used is None else _using(layout, n_expert_used)


def used_key(gguf: GGUF) -> str:
    """Name the metadata that says how many experts a token uses."""
    return f"{gguf.arch}.expert_used_count"


def _using(layout: Layout, count: int) -> Layout:
    """Return the layout of a model of which llama.cpp is told another number of experts."""
    gguf, key = layout.gguf, used_key(layout.gguf)
    path, asked = gguf.parts[0].path, f"{_experts(count)} a token"
    if not layout.groups:
        raise UsageError(f"{asked}: {path} has no experts that stream")
    entry = gguf.entries.get(key)
    if entry is None or not isinstance(entry.value, int):
        # llama.cpp does not override a list.
        raise UsageError(f"{asked}: {path} has a number of its own for each layer")
    most, why = _most_used(layout)
    if not 1 <= count <= most:
        raise UsageError(f"{asked}: must be from 1 to {most}, {why} of {path}")
    changed = gguf.entries | {key: replace(entry, value=count)}
    return replace(layout, gguf=replace(gguf, entries=changed), n_expert_used=count)


def _experts(count: int) -> str:
    return f"{count} {'expert' if count == 1 else 'experts'}"


def _most_used(layout: Layout) -> tuple[int, str]:
    """Return how many experts of a layer a token can use, and what that is."""
    gguf = layout.gguf
    most = min(group.n_expert for group in layout.groups)
    groups = gguf.get(f"{gguf.arch}.expert_group_count", 0)
    used = gguf.get(f"{gguf.arch}.expert_group_used_count", 0)
    if isinstance(groups, int) and isinstance(used, int) and 0 < used < groups:
        # From the others llama.cpp would take any, whatever the router thinks of them.
        within = gguf.get(f"{gguf.arch}.expert_count", 0) // groups * used
        if within < most:
            return within, f"the experts of the {used} groups that a token chooses"
    return most, "the experts of a layer"


def _nested_layout(gguf: GGUF) -> Layout:
    """Show llama.cpp the model that the planes are of; keep where the planes are."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in gguf.tensors.items():
        plane = gguf.tensors.get(low_plane_name(name))
        if plane is not None:
            elements = math.prod(tensor.shape)
            nbytes = elements // GGML_TYPES[Q8_0].block * GGML_TYPES[Q8_0].nbytes
            tensor = replace(tensor, type=Q8_0, nbytes=nbytes)
        if not name.endswith(LOW_PLANE):
            tensors[name] = tensor
    layout = _layout(replace(gguf, tensors=tensors), whole=False)
    high, low = [], []
    for group in layout.groups:
        own = [(m, gguf.tensors[m.name], _plane(gguf, m.name)) for m in group.matrices]
        planes = tuple(
            replace(m, part=p.part, offset=p.offset, plane_bytes=p.nbytes // m.n_expert)
            for m, _, p in own
        )
        copies = tuple(_matrix(t, m.layer, m.group) for m, t, _ in own)
        high.append(replace(group, matrices=planes))
        low.append(replace(group, matrices=copies))
    return replace(layout, groups=tuple(high), low=LowCopies(gguf, tuple(low)))


def _plane(gguf: GGUF, name: str) -> Tensor:
    plane = gguf.tensors.get(low_plane_name(name))
    if plane is None:
        raise ModelError(f"{gguf.parts[0].path}: has no {low_plane_name(name)}: make it again")
    return plane


def _layout(gguf: GGUF, whole: bool) -> Layout:
    _check_counts(gguf)
    groups, resident = _find_groups(gguf)
    streamed = {matrix.name for group in groups for matrix in group.matrices}
    extents = _one_file(gguf, streamed) if whole else _merged(gguf, streamed)
    used = _n_expert_used(gguf) if groups else 0
    return Layout(
        gguf=gguf,
        groups=groups,
        n_expert_used=used,
        own_expert_used=used,
        resident=resident,
        extents=tuple(extents),
        overrides=_overrides(gguf, streamed),
    )


def _n_expert_used(gguf: GGUF) -> int:
    used = gguf.get(used_key(gguf), 0)
    counts = used if isinstance(used, list) else [used]
    return max((count for count in counts if isinstance(count, int)), default=0)


def _check_counts(gguf: GGUF) -> None:
    """Refuse by name the expert counts at which llama.cpp would abort the process."""
    experts, used = gguf.get(f"{gguf.arch}.expert_count", 0), _n_expert_used(gguf)
    if not isinstance(experts, int) or experts > _MAX_EXPERTS:
        raise UnsupportedModelError(
            f"{gguf.parts[0].path}: has {experts} experts a layer; "
            f"llama.cpp runs at most {_MAX_EXPERTS}"
        )
    # llama.cpp turns a single expert into a dense model for some architectures.
    if (experts > 1 and used < 1) or used > max(experts, 1):
        raise UnsupportedModelError(
            f"{gguf.parts[0].path}: the header says that {used} of {experts} experts are used"
        )


def _find_groups(
    gguf: GGUF,
) -> tuple[tuple[ExpertGroup, ...], tuple[tuple[str, str], ...]]:
    stacks: dict[tuple[int, Kind], dict[str, Tensor]] = defaultdict(dict)
    resident: list[tuple[str, str]] = []
    for name, tensor in gguf.tensors.items():
        match = EXPERT_TENSOR.match(name)
        if match:
            kind: Kind = "exps" if match[3] == "exps" else "chexps"
            stacks[int(match[1]), kind][match[2]] = tensor
        elif _OTHER_EXPERTS.match(name):
            resident.append((name, "this old file has one tensor per expert"))
    groups: list[ExpertGroup] = []
    # In the order in which they are computed, which llama.cpp begins with "exps".
    for (layer, kind), stack in sorted(stacks.items(), key=lambda s: (s[0][0], s[0][1] != "exps")):
        reason = _why_resident(stack)
        if reason:
            resident += [(tensor.name, reason) for tensor in stack.values()]
            continue
        index = len(groups)
        matrices = tuple(
            _matrix(stack[role], layer, index) for role in _MATRIX_ORDER if role in stack
        )
        groups.append(ExpertGroup(index, layer, kind, matrices[0].n_expert, matrices))
    return tuple(groups), tuple(resident)


def _why_resident(stack: dict[str, Tensor]) -> str:
    """Return the reason why a layer's expert tensors cannot stream, or nothing."""
    if "down" not in stack or not ("up" in stack or "gate_up" in stack):
        return f"the layer has only {' and '.join(sorted(stack))} of its expert tensors"
    for tensor in stack.values():
        if len(tensor.shape) < 3 or any(n != 1 for n in tensor.shape[3:]):
            return f"its shape is {list(tensor.shape)}, not three-dimensional"
        if tensor.type_name in _NOT_MULTIPLIED:
            return f"ggml does not multiply matrices of type {tensor.type_name}"
        if tensor.shape[2] < 2:
            return f"the layer has {tensor.shape[2]} expert"
        if tensor.nbytes == 0:
            return "it is empty"
    counts = {tensor.shape[2] for tensor in stack.values()}
    if len(counts) > 1:
        return f"its layer mixes expert counts: {sorted(counts)}"
    return ""


def _matrix(tensor: Tensor, layer: int, group: int) -> ExpertMatrix:
    ne0, ne1, n_expert = tensor.shape[:3]
    return ExpertMatrix(
        name=tensor.name,
        layer=layer,
        group=group,
        type=tensor.type,
        ne0=ne0,
        ne1=ne1,
        n_expert=n_expert,
        part=tensor.part,
        offset=tensor.offset,
        expert_bytes=tensor.nbytes // n_expert,
    )


def _one_file(gguf: GGUF, streamed: set[str]) -> Iterator[Extent]:
    """Show the file itself, with expert data as holes."""
    at = 0
    for name, tensor in gguf.tensors.items():
        if name not in streamed:
            continue
        if tensor.offset > at:
            yield Extent(at, tensor.offset - at, "file", 0, at)
        yield Extent(tensor.offset, tensor.nbytes, "hole", 0, tensor.offset)
        at = tensor.offset + tensor.nbytes
    if gguf.parts[0].size > at:
        yield Extent(at, gguf.parts[0].size - at, "file", 0, at)


def _merged(gguf: GGUF, streamed: set[str]) -> Iterator[Extent]:
    """Show one GGUF made of all parts: a header of our own, then each tensor from its part."""
    alignment = gguf.parts[0].alignment
    at = 0
    for extent in _merged_header(gguf, alignment):
        yield extent
        at = extent.offset + extent.length
    for name, tensor in gguf.tensors.items():
        start = padded(at, alignment)
        if start > at:
            yield Extent(at, start - at, "hole", -1, 0)
        source: Literal["hole", "file"] = "hole" if name in streamed else "file"
        if tensor.nbytes:
            yield Extent(start, tensor.nbytes, source, tensor.part, tensor.offset)
        at = start + tensor.nbytes


def _merged_header(gguf: GGUF, alignment: int) -> Iterator[Extent]:
    """Build the header of the merged file; metadata is taken as it is from the first part."""
    kept = [entry for key, entry in gguf.entries.items() if not key.startswith("split.")]
    head = b"GGUF" + struct.pack("<IQQ", VERSION, len(gguf.tensors), len(kept))
    yield Extent(0, len(head), "memory", -1, 0, head)
    at = len(head)
    runs: list[list[int]] = []
    for entry in kept:
        if runs and sum(runs[-1]) == entry.offset:
            runs[-1][1] += entry.length
        else:
            runs.append([entry.offset, entry.length])
    for offset, length in runs:
        yield Extent(at, length, "file", 0, offset)
        at += length
    infos, position = [], 0
    for tensor in gguf.tensors.values():
        infos.append(tensor_info(tensor, position))
        position = padded(position + tensor.nbytes, alignment)
    tail = b"".join(infos)
    yield Extent(at, len(tail), "memory", -1, 0, tail)


def tensor_info(tensor: Tensor, position: int) -> bytes:
    """Return what a header says of a tensor whose data begins at `position` of the data section."""
    name, n_dims = tensor.name.encode(), len(tensor.shape)
    return struct.pack(
        f"<Q{len(name)}sI{n_dims}QIQ",
        len(name),
        name,
        n_dims,
        *tensor.shape,
        tensor.type,
        position,
    )


def _overrides(gguf: GGUF, names: Collection[str]) -> tuple[str, ...]:
    """Return patterns that match exactly these names of tensors of layers.

    llama.cpp searches for a pattern anywhere in a name, so it is anchored, and compiles it anew for
    every tensor, so it is short where the file allows.
    """
    if not names:
        return ()
    tails = {name.split(".", 2)[2] for name in names}
    short = rf"^blk\.[0-9]+\.({'|'.join(re.escape(tail) for tail in sorted(tails))})$"
    if {*names} == {name for name in gguf.tensors if re.search(short, name)}:
        return (short,)
    layers: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        _, layer, tail = name.split(".", 2)
        layers[tail].append(layer)
    return tuple(
        rf"^blk\.({'|'.join(numbers)})\.{re.escape(tail)}$" for tail, numbers in layers.items()
    )
