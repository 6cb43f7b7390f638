"""Routing traces made without a model, as docs/trace.md describes the format."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np


def pseudo_trace(
    path: Path,
    *,
    tokens: int,
    groups: int = 4,
    n_expert: int = 16,
    n_used: int = 2,
    rows: int = 1,
    weights: bool = True,
    low_bytes: int = 4,
    predicted: bool | str = False,
    seed: int = 3,
) -> Path:
    """Write a trace whose experts are unevenly popular, so many rows at a time; return its path.

    High copies have 9 bytes and slots of 10. `predicted` foretells each next layer: rightly, or
    "wrong".
    """
    rng = np.random.default_rng(seed)
    popular = rng.permutation(1 / (1 + np.arange(n_expert)))
    note = json.dumps({"name": "pseudo", "model": "m", "n_expert_used": n_used}).encode()
    data = [b"HBTRACE1", struct.pack("<II", 0, len(note)), note, struct.pack("<II", 1, groups)]
    data.append(struct.pack("<QQIQI", 100, 10, 10, low_bytes and 5, 20 if low_bytes else 0))
    for layer in range(groups):
        sizes = (9, 10, low_bytes, low_bytes and 5)
        data.append(struct.pack("<IIIQQQQ", layer, n_expert, 0, *sizes))
    events = [bytes([2, 0])]
    chosen = [
        [
            rng.choice(n_expert, n_used, replace=False, p=np.roll(popular, g) / popular.sum())
            for _ in range(rows)
        ]
        for _ in range(tokens // rows)
        for g in range(groups)
    ]
    for i, pairs in enumerate(chosen):
        token = i // groups * rows
        head = bytes([0x11 if weights else 1, i % groups, rows, n_used, 0])
        own = np.sort(rng.random((rows, n_used), dtype=np.float32))[:, ::-1]
        experts = np.array(pairs, dtype=np.uint8).tobytes()
        events.append(head + _varint(token) + experts + (own.tobytes() if weights else b""))
        if predicted and i % groups + 1 < groups:
            next_ones = np.array(chosen[i + 1][0])
            if predicted == "wrong":
                next_ones = (next_ones + n_expert // 2) % n_expert
            guess = bytes([3, i % groups + 1, n_used]) + next_ones.astype(np.uint8).tobytes()
            events.append(guess + own[0].tobytes())
    data += [*events, struct.pack("<BQ", 0, len(events))]
    path.write_bytes(b"".join(data))
    return path


def _varint(value: int) -> bytes:
    out = []
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
