"""Nested copies: the planes are what they are said to be, and give the source's bytes back."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from moefile import write_moe

from hobbit import _native, nested
from hobbit import layout as layout_module
from hobbit.errors import HobbitError, ModelError, ReadError
from hobbit.gguf_file import GGUF, open_gguf
from hobbit.layout import Layout, build_layout

Blocks = npt.NDArray[np.uint8]


def model(path: Path, **options: Any) -> Layout:
    return build_layout(open_gguf(write_moe(path, **({"kind": "Q8_0"} | options))))


def data_of(gguf: GGUF, name: str) -> bytes:
    tensor = gguf.tensors[name]
    with gguf.parts[tensor.part].path.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.nbytes)


def split(q8_0: Blocks) -> tuple[Blocks, Blocks]:
    n = len(q8_0)
    high, low = np.empty((n, 20), np.uint8), np.empty((n, 16), np.uint8)
    buffers = [_native.ffi.from_buffer(a) for a in (q8_0, high, low)]
    status = _native.lib.hobbit_nested_split(*buffers, n, _native.ffi.NULL, 1)
    assert status == _native.lib.HOBBIT_OK
    return high, low


def test_the_high_plane_is_what_ggml_calls_q4_1() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((512, 32), np.float32) * np.exp(rng.normal(-4, 2, (512, 1)))
    q8_0 = quantize(weights.astype(np.float32), GGMLQuantizationType.Q8_0)
    high, _ = split(q8_0)
    d = q8_0[:, :2].copy().view(np.float16).astype(np.float64)
    q = q8_0[:, 2:].view(np.int8).astype(np.int64)
    # The smallest of 16 equal steps that cover the block, up from -127 or down from 127.
    up, down = (q.max(1) + 127) // 16 + 1, (127 - q.min(1)) // 16 + 1
    step = np.maximum(np.minimum(up, down), 9)[:, None]
    base = np.where((down < up)[:, None], 128 - 16 * step, -127)
    high_part, rest = np.divmod(q - base, step)
    expected = d * (base + step * high_part + rest.mean(1, keepdims=True))
    got = dequantize(high, GGMLQuantizationType.Q4_1)
    # The scale is rounded to fp16, the minimum to an fp16 with 5 bits less.
    tolerance = np.abs(d) * (128 / 64 + 15 * 16 / 2048)
    assert (np.abs(got - expected) <= tolerance).all()


def test_importance_moves_the_minimum_only(tmp_path: Path) -> None:
    layout = model(tmp_path / "source.gguf")
    rng = np.random.default_rng(0)
    asked = []

    def importance(name: str, expert: int) -> npt.NDArray[np.float32]:
        asked.append((name, expert))
        columns = layout.gguf.tensors[name].shape[0]
        return rng.exponential(size=columns).astype(np.float32)

    plain = open_gguf(nested.make_nested(layout, tmp_path / "plain.gguf"))
    dest = nested.make_nested(layout, tmp_path / "weighted.gguf", importance=importance)
    weighted = open_gguf(dest)
    assert asked == [
        (name, e) for name in plain.tensors if name in layout.streamed for e in range(4)
    ]
    for name in layout.streamed:
        low = nested.low_plane_name(name)
        assert data_of(plain, low) == data_of(weighted, low)
        a, b = (
            np.frombuffer(data_of(file, name), np.uint8).reshape(-1, 20)
            for file in (plain, weighted)
        )
        changed = (a != b).any(0)
        assert changed[2:4].all() and not changed[:2].any() and not changed[4:].any()
        joined = [nested.join(weighted, name, expert) for expert in range(4)]
        assert b"".join(joined) == data_of(layout.gguf, name)


@pytest.mark.parametrize("options", [{}, {"tensors_per_part": 5}, {"alignment": 64, "layers": 3}])
def test_experts_come_back_and_the_rest_is_as_it_was(
    options: dict[str, Any], tmp_path: Path
) -> None:
    layout = model(tmp_path / "source.gguf", **options)
    dest = nested.make_nested(layout, tmp_path / "new" / "nested.gguf")
    source, copy = layout.gguf, open_gguf(dest)
    assert layout_module.is_nested(copy) and not layout_module.is_nested(source)
    for name in source.tensors:
        if name in layout.streamed:
            n_expert = source.tensors[name].shape[2]
            joined = b"".join(nested.join(copy, name, expert) for expert in range(n_expert))
            assert joined == data_of(source, name)
        else:
            assert data_of(copy, name) == data_of(source, name)
            assert copy.tensors[name].shape == source.tensors[name].shape
    assert len(copy.tensors) == len(source.tensors) + len(layout.streamed)


def test_the_file_is_a_gguf_on_pages(tmp_path: Path) -> None:
    layout = model(tmp_path / "source.gguf")
    copy = open_gguf(nested.make_nested(layout, tmp_path / "nested.gguf"))
    assert copy.parts[0].alignment == copy.get("general.alignment") == 4096
    assert all(tensor.offset % 4096 == 0 for tensor in copy.tensors.values())
    kept = {k: e.value for k, e in copy.entries.items() if k.startswith("llama.")}
    assert kept == {k: e.value for k, e in layout.gguf.entries.items() if k.startswith("llama.")}
    assert not [key for key in copy.entries if key.startswith("split.")]
    for name in layout.streamed:
        high, low = copy.tensors[name], copy.tensors[nested.low_plane_name(name)]
        ne0, *rest = layout.gguf.tensors[name].shape
        assert (high.type_name, high.shape) == ("q4_1", (ne0, *rest))
        assert (low.type_name, low.shape) == ("i8", (ne0 // 2, *rest))
        assert len(low.name) <= 63
    # gguf-py reads it too.
    reader = GGUFReader(tmp_path / "nested.gguf")
    assert {tensor.name for tensor in reader.tensors} == set(copy.tensors)


def test_chunks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = model(tmp_path / "source.gguf")
    whole = nested.make_nested(layout, tmp_path / "a.gguf").read_bytes()
    monkeypatch.setattr(nested, "_CHUNK", 100)
    assert nested.make_nested(layout, tmp_path / "b.gguf").read_bytes() == whole


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    layout = model(tmp_path / "source.gguf")
    nested.make_nested(layout, tmp_path / "nested.gguf", lambda *said: seen.append(said))
    shares = [share for _, share in seen]
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)


def test_what_cannot_be_nested_is_refused_by_name(tmp_path: Path) -> None:
    dest = tmp_path / "nested.gguf"
    with pytest.raises(ModelError, match=r"ffn_\w+_exps.weight is q4_0; .* q8_0 experts only"):
        nested.make_nested(model(tmp_path / "q4.gguf", kind="Q4_0"), dest)
    with pytest.raises(ModelError, match="has no experts to split"):
        nested.make_nested(model(tmp_path / "dense.gguf", kind="F32", dense=True), dest)
    layout = model(tmp_path / "source.gguf")
    nested.make_nested(layout, dest)
    with pytest.raises(ModelError, match="is a nested copy already"):
        nested.make_nested(build_layout(open_gguf(dest)), tmp_path / "again.gguf")
    assert not list(tmp_path.glob("*again*"))


def test_a_scale_out_of_range_is_refused(tmp_path: Path) -> None:
    layout = model(tmp_path / "source.gguf")
    name = sorted(layout.streamed)[0]
    with layout.gguf.parts[0].path.open("r+b") as file:
        file.seek(layout.gguf.tensors[name].offset + 34)
        file.write(np.float16(np.inf).tobytes())
    with pytest.raises(ModelError, match=f"{name} holds a scale that is too large"):
        nested.make_nested(layout, tmp_path / "nested.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_an_unknown_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = model(tmp_path / "source.gguf")
    monkeypatch.setattr(layout_module, "NESTED_VERSION", 2)
    copy = open_gguf(nested.make_nested(layout, tmp_path / "nested.gguf"))
    monkeypatch.undo()
    with pytest.raises(ModelError, match="a nested copy of version 2; this hobbit reads version 1"):
        layout_module.is_nested(copy)


def test_the_model_is_not_overwritten(tmp_path: Path) -> None:
    layout = model(tmp_path / "source.gguf")
    before = (tmp_path / "source.gguf").read_bytes()
    with pytest.raises(HobbitError, match="is the model itself"):
        nested.make_nested(layout, tmp_path / "source.gguf")
    assert (tmp_path / "source.gguf").read_bytes() == before


def test_no_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = model(tmp_path / "source.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(HobbitError, match=r"nested.gguf: \S+ KiB are needed, 1000 B are free"):
        nested.make_nested(layout, tmp_path / "nested.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = model(tmp_path / "source.gguf")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HobbitError, match=r"nested.gguf: No space left"):
        nested.make_nested(layout, tmp_path / "nested.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_a_source_that_shrank_is_named(tmp_path: Path) -> None:
    layout = model(tmp_path / "source.gguf")
    path = layout.gguf.parts[0].path
    os.truncate(path, path.stat().st_size - 5000)
    with pytest.raises(ReadError, match=r"source.gguf: ends at byte \d+"):
        nested.make_nested(layout, tmp_path / "nested.gguf")
    missing = replace(layout.gguf.parts[0], path=tmp_path / "gone.gguf")
    layout = replace(layout, gguf=replace(layout.gguf, parts=[missing]))
    with pytest.raises(ReadError, match=r"gone.gguf: cannot open it"):
        nested.make_nested(layout, tmp_path / "nested.gguf")
