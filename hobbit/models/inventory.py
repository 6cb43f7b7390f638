"""What is known of the models on this machine, and of one by name: rows for ls and show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import calibration
from ..errors import HobbitError, ModelError
from ..gguf_file import GGUF, open_gguf
from ..layout import Layout, build_layout
from ..low_file import find_low
from .location import Located
from .names import quant_of
from .skeleton import is_estimate
from .stores import Stored


@dataclass(frozen=True)
class LowCopy:
    """A low-precision copy, and whether what its use costs was measured."""

    path: str
    size: int
    type: str
    calibrated: bool


@dataclass(frozen=True)
class Row:
    """One model that is here. `experts` is as `64 x 8`: of how many how many are used."""

    name: str
    path: str
    size: int
    quant: str
    arch: str
    experts: str
    low: LowCopy | None
    modified: float
    source: str


def row(stored: Stored) -> Row:
    """Read a model's header; ModelError if it is none."""
    gguf = open_gguf(stored.path)
    return Row(
        name=stored.name,
        path=str(stored.path),
        size=stored.size,
        quant=quant_of(stored.path.name) or _main_type(gguf),
        arch=gguf.arch,
        experts=experts_of(gguf),
        low=low_copy(gguf),
        modified=stored.modified,
        source=stored.store,
    )


def experts_of(gguf: GGUF) -> str:
    """Return `128 x 8`, or nothing for a dense model."""
    count = gguf.get(f"{gguf.arch}.expert_count", 0)
    used = gguf.get(f"{gguf.arch}.expert_used_count", 0)
    return f"{count} x {max(used) if isinstance(used, list) else used}" if count else ""


def low_copy(gguf: GGUF) -> LowCopy | None:
    """Return the low copy that `hobbit prepare` made of a model that is here."""
    path = find_low(gguf)
    if path is None:
        return None
    try:
        kind = _main_type(open_gguf(path))
    except ModelError:
        kind = "damaged"
    calibrated = calibration.path_of(path).is_file()
    return LowCopy(str(path), path.stat().st_size, kind, calibrated)


def facts(located: Located) -> dict[str, Any]:
    """Return all that `hobbit show` tells, as plain data; None is what is not known."""
    gguf = located.header()
    layout = build_layout(gguf)
    known = located.known
    own = gguf.get("general.license")
    return {
        "name": located.name,
        "kind": located.kind,
        "source": located.store or (known.source if known else None),
        "path": str(located.path) if located.path else None,
        "title": gguf.get("general.name"),
        "summary": known.summary if known else None,
        "licence": own if isinstance(own, str) else known.licence if known else None,
        "quant": located.quant or _main_type(gguf),
        "size": sum(part.size for part in gguf.parts),
        "parts": len(gguf.parts),
        "chat_template": _has_template(gguf),
        "shape": _shape(layout),
        "tensor_types": _types(gguf),
        "expert_bytes": layout.expert_bytes,
        "dense_bytes": layout.dense_bytes,
        "low": _low_facts(located, gguf),
        "calibration": _calibrated(located, gguf),
        "pair": list(known.pair) if known else [],
        "estimate": is_estimate(gguf),
    }


def _shape(layout: Layout) -> dict[str, Any]:
    gguf = layout.gguf
    keys = {
        "layers": "block_count",
        "embedding": "embedding_length",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "context": "context_length",
        "experts": "expert_count",
        "experts_used": "expert_used_count",
        "dense_layers": "leading_dense_block_count",
    }
    found = {name: gguf.get(f"{gguf.arch}.{key}") for name, key in keys.items()}
    plain = {name: v for name, v in found.items() if isinstance(v, int | list)}
    groups = layout.groups
    return {
        "arch": gguf.arch,
        "parameters": sum(_elements(tensor.shape) for tensor in gguf.tensors.values()),
        **plain,
        "expert_layers": len({group.layer for group in groups}),
        "expert_bytes": max((group.expert_bytes for group in groups), default=0),
    }


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _types(gguf: GGUF) -> dict[str, int]:
    """Return the bytes of each tensor type, the largest first."""
    total: dict[str, int] = {}
    for tensor in gguf.tensors.values():
        total[tensor.type_name] = total.get(tensor.type_name, 0) + tensor.nbytes
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _main_type(gguf: GGUF) -> str:
    return next(iter(_types(gguf)), "").upper()


def _has_template(gguf: GGUF) -> bool | None:
    """Say whether the file has a chat template; None for a header made from a shape."""
    return None if is_estimate(gguf) else "tokenizer.chat_template" in gguf.entries


def _low_facts(located: Located, gguf: GGUF) -> dict[str, Any] | None:
    low = low_copy(gguf) if located.kind == "local" else None
    return asdict(low) if low else None


def _calibrated(located: Located, gguf: GGUF) -> dict[str, Any] | None:
    """Return what the named modes cost, as it was measured."""
    low = find_low(gguf) if located.kind == "local" else None
    if low is None:
        return None
    try:
        known = calibration.load(calibration.path_of(Path(low)))
    except HobbitError:
        return None
    if known is None:
        return None
    modes = {name: point.kl if point else None for name, point in known.modes().items()}
    return {"text": known.text, "tokens": known.tokens, "kl": modes}
