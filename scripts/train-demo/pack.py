"""Quantise what was learned into hobbit/data/demo.npz.

usage: python pack.py CHECKPOINT.pt OUT.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from model import Expert

Array = npt.NDArray


def int8_rows(rows: Array) -> tuple[Array, Array]:
    """Quantise each row to int8 with its own scale, as float16 holds it."""
    scale = (np.abs(rows).max(-1, keepdims=True) / 127).astype(np.float16)
    scale = np.maximum(scale, np.float16(6e-8))
    integers = np.rint(rows / scale.astype(np.float32)).clip(-127, 127)
    return integers.astype(np.int8), scale[..., 0]


def members(values: Array, member: Array) -> Array:
    """Keep only an expert's own neurons: [experts, ..., NEURONS] -> [experts, ..., width]."""
    return np.stack([v[..., m] for v, m in zip(values, member, strict=True)])


def pack(expert: Expert, chosen: slice) -> dict[str, Array]:
    """Return the arrays of one layer's chosen experts."""
    experts = expert.member.shape[0]
    member = expert.member.numpy().astype(bool)[chosen]
    inner = expert.inner_matrix().unflatten(0, (experts, -1)).numpy()[chosen]
    outer = expert.outer_matrix().unflatten(0, (experts, -1)).numpy()[chosen]
    # The factors' rows are balanced, so that float16 holds both scales.
    ratio = np.sqrt(np.abs(outer).max(-1, keepdims=True) / np.abs(inner).max(-1, keepdims=True))
    inner, inner_scale = int8_rows(members(inner * ratio, member))
    outer, outer_scale = int8_rows(outer / ratio)
    return {
        "member": np.packbits(member, axis=-1),
        "scale": members(expert.scale.numpy()[chosen], member).astype(np.float16),
        "inner": inner,
        "inner_scale": inner_scale,
        "outer": outer,
        "outer_scale": outer_scale,
    }


def main(checkpoint: Path, out: Path) -> None:
    layers = torch.load(checkpoint, weights_only=False)
    with torch.no_grad():
        routers = [layer.routing_matrix().numpy().astype(np.float16) for layer in layers]
        arrays = {"router": np.stack(routers)}
        for kind, chosen in (("routed", slice(0, -1)), ("shared", slice(-1, None))):
            packed = [pack(layer, chosen) for layer in layers]
            for name in packed[0]:
                arrays[f"{kind}.{name}"] = np.stack([p[name] for p in packed])
    np.savez_compressed(out, **arrays)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
