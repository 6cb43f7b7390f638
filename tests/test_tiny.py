"""The gates are only as good as their models: what the experts hold must reach the logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from gates import JOB, Bench, layout_of


def _swapped(source: Path, target: Path) -> Path:
    """Copy a model with experts 0 and 1 of every down projection exchanged."""
    data = bytearray(source.read_bytes())
    for group in layout_of(source).groups:
        for matrix in group.matrices:
            if "down" not in matrix.name:
                continue
            size = matrix.expert_bytes
            a, b = (slice(matrix.offset + i * size, matrix.offset + (i + 1) * size) for i in (0, 1))
            assert data[a] != data[b]
            data[a], data[b] = data[b], data[a]
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_experts_reach_the_logits(arch: str, bench: Bench) -> None:
    path = bench.arch(arch)
    logits = bench.stock(path)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1
    assert np.abs(np.diff(logits[:, 0], axis=0)).max(axis=1).min() > 1e-3, "rows repeat"
    other = bench.stock(bench.model(f"{arch}-swapped", lambda target: _swapped(path, target)))
    rows = (logits != other).any(axis=(1, 2))
    assert rows.mean() > 0.5, "exchanging two experts changed few logits"


def test_same_file_every_time(tmp_path: Path) -> None:
    one = tiny.make(tmp_path / "a.gguf", "gpt-oss").read_bytes()
    assert tiny.make(tmp_path / "b.gguf", "gpt-oss").read_bytes() == one


def test_stock_repeats_itself(bench: Bench) -> None:
    """The comparison needs an arm that is the same every time."""
    path = bench.arch("qwen3moe")
    again = Bench(bench.folder)
    assert again.stock(path, JOB).tobytes() == bench.stock(path, JOB).tobytes()
    again.close()
