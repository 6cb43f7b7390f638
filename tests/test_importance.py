"""Importance matrices: llama.cpp's files of both forms, ours, and what they do to a copy."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from lowfiles import floats, ggml_loads, ggml_quantize, layout_of, wide_model
from moefile import write_moe

from hobbit.errors import ModelError
from hobbit.importance import FLOOR, UNIFORM, Importance, read_importance, write_importance
from hobbit.layout import Layout
from hobbit.low_types import NUMBERS
from hobbit.prepare import make_low

UP = "blk.0.ffn_up_exps.weight"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return layout_of(write_moe(tmp_path / "m.gguf", kind="Q8_0"))


def measured(layout: Layout, seed: int = 0) -> Importance:
    """Make up what a run would have measured; expert 1 was never seen."""
    rng = np.random.default_rng(seed)
    sums, counts = {}, {}
    for group in layout.groups:
        for m in group.matrices:
            counts[m.name] = rng.integers(1, 50, m.n_expert).astype(np.float32)
            counts[m.name][1] = 0
            shape = (m.n_expert, m.ne0)
            sums[m.name] = rng.exponential(size=shape).astype(np.float32) ** 3
            sums[m.name] *= counts[m.name][:, None]
    return Importance("made up", sums, counts)


def test_ours_comes_back_and_is_what_llama_cpp_reads(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_importance(path, measured(layout), layout)
    back = read_importance(path, layout)
    assert back.digest() == measured(layout).digest() != measured(layout, 1).digest()
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["made up"]
    assert fields["imatrix.chunk_count"] == 1
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors[f"{UP}.in_sum2"].shape) == [64, 4]
    assert list(tensors[f"{UP}.counts"].shape) == [1, 4]
    assert np.array_equal(tensors[f"{UP}.in_sum2"].data, measured(layout).sums[UP])
    assert ggml_loads(path) == 2 * 6


def legacy(path: Path, entries: dict[str, tuple[int, np.ndarray]]) -> Path:
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack(f"<i{len(name)}sii", len(name), name.encode(), calls, values.size)
        data += values.astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii4s", 7, 4, b"text"))
    return path


def test_the_older_form(layout: Layout, tmp_path: Path) -> None:
    values = np.random.default_rng(0).exponential(size=(4, 64)).astype(np.float32)
    entries = {"blk.0.attn_q.weight": (3, values[0]), UP: (5, values * 5)}
    found = read_importance(legacy(tmp_path / "i.dat", entries), layout)
    assert list(found.sums) == [UP]
    row = found.row(UP, 2)
    assert row is not None
    assert np.allclose(row, values[2] / values[2].mean())


def test_rows_have_mean_1_and_no_zeros(layout: Layout) -> None:
    importance = measured(layout)
    importance.sums[UP][0, :10] = 0
    row = importance.row(UP, 0)
    assert row is not None
    assert (row.dtype, row.shape) == (np.float32, (64,))
    assert abs(float(row.mean()) - 1) < 0.01
    assert (row[:10] == np.float32(FLOOR)).all()
    huge = Importance("huge", {UP: np.full((4, 64), 3e38, np.float32)}, importance.counts)
    assert np.array_equal(huge.row(UP, 0), np.ones(64, np.float32))


def test_experts_never_seen_have_no_row(layout: Layout) -> None:
    importance = measured(layout)
    assert importance.row(UP, 1) is None
    assert importance.row("blk.9.ffn_up_exps.weight", 0) is None
    importance.sums[UP][2] = 0
    assert importance.row(UP, 2) is None
    assert UNIFORM.row(UP, 0) is None


def test_each_expert_is_made_with_its_own_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(wide_model(tmp_path / "w.gguf", monkeypatch))
    importance = measured(layout)
    made = make_low(layout, tmp_path / "low.gguf", "iq2_xs,q2_K", importance, threads=2)
    low = layout_of(made.path)
    matrices = {m.name: m for group in low.groups for m in group.matrices}
    for matrix in (m for group in layout.groups for m in group.matrices):
        own = matrices[matrix.name]
        assert own.type == NUMBERS["q2_K" if "down" in matrix.name else "iq2_xs"]
        data = made.path.read_bytes()
        for expert in range(matrix.n_expert):
            row = importance.row(matrix.name, expert)
            assert (row is None) == (expert == 1)
            # An expert that was never seen gets the same weight for every column.
            row = np.ones(matrix.ne0, np.float32) if row is None else row
            start = own.offset + expert * own.expert_bytes
            expected = ggml_quantize(floats(layout, matrix, expert), own.type, row)
            assert data[start : start + own.expert_bytes] == expected


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def imatrix(name: str, experts: int, width: int, value: float = 1) -> dict[str, np.ndarray]:
    sums = np.full((experts, width), value, np.float32)
    return {f"{name}.in_sum2": sums, f"{name}.counts": np.ones((experts, 1), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (imatrix(UP, 4, 32), f"has 128 values for {UP}, which has 4 experts with rows of 64"),
        (imatrix(UP, 2, 64), f"has 128 values for {UP}, which has 4 experts with rows of 64"),
        (imatrix("blk.7.x", 4, 64), "names none of the expert tensors of m.gguf"),
        (imatrix(UP, 4, 64, np.nan), f"the values for {UP} are not all numbers from 0 up"),
        (imatrix(UP, 4, 64, -1), f"the values for {UP} are not all numbers from 0 up"),
        ({"a.weight": np.ones(4, np.float32)}, "is a GGUF file, but not an imatrix"),
        (
            {k: v.astype(np.float16) for k, v in imatrix(UP, 4, 64).items()},
            f"tensor {UP}.in_sum2 is f16, not f32",
        ),
    ],
)
def test_unusable_files(
    layout: Layout, tmp_path: Path, tensors: dict[str, np.ndarray], words: str
) -> None:
    path = write_tensors(tmp_path / "i.gguf", tensors)
    with pytest.raises(ModelError) as refused:
        read_importance(path, layout)
    assert str(refused.value).startswith(f"{path}: {words}")


def test_files_that_are_no_imatrix(layout: Layout, tmp_path: Path) -> None:
    whole = legacy(tmp_path / "whole", {UP: (1, np.ones((4, 64)))}).read_bytes()
    # Behind the values only the text's name follows, which is not read.
    for data in (b"", b"a text of some length", whole[:20], whole[:-100], b"\xff" * 64):
        (tmp_path / "i.dat").write_bytes(data)
        with pytest.raises(ModelError, match="is no imatrix file, or it is truncated"):
            read_importance(tmp_path / "i.dat", layout)
    with pytest.raises(ModelError, match="cannot read it: No such file"):
        read_importance(tmp_path / "absent", layout)
    with pytest.raises(ModelError, match="cannot read it: Is a directory"):
        read_importance(tmp_path, layout)
