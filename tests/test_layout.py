from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from moefile import write_moe

from hobbit.errors import UnsupportedModelError
from hobbit.gguf_file import GGUF, Entry, Part, Tensor, open_gguf
from hobbit.layout import EXPERT_TENSOR, Layout, build_layout

MANY_NAMES = [
    "blk.0.ffn_gate_exps.weight",
    "blk.11.ffn_down_chexps.weight",
    "blk.0.ffn_gate_up_exps.weight",
]
OTHER_NAMES = [
    "blk.0.ffn_gate_exps.bias",
    "blk.0.ffn_gate_exps.scale",
    "blk.0.ffn_gate_exps.input_scale",
    "blk.0.ffn_norm_exps.weight",
    "blk.0.ffn_gate_shexp.weight",
    "blk.0.ffn_gate_inp.weight",
    "blk.x.ffn_gate_exps.weight",
    "v.blk.0.ffn_gate_exps.weight",
    "blk.0.ffn_gate_exps.weight.lora_a",
]


def fake(tensors: dict[str, tuple[tuple[int, ...], int]], **metadata: Any) -> GGUF:
    """Make a header without a file: name -> (shape, type)."""
    values = {"general.architecture": "llama", "llama.expert_count": 4}
    values |= {"llama.expert_used_count": 2, **metadata}
    offset, placed = 4096, {}
    for name, (shape, kind) in tensors.items():
        nbytes = int(np.prod(shape)) * 4
        placed[name] = Tensor(name, shape, kind, 0, offset, nbytes)
        offset += nbytes
    part = Part(Path("fake.gguf"), offset, 4096, 32)
    return GGUF([part], {key: Entry(value, 0, 0) for key, value in values.items()}, placed)


def stack(layer: int, experts: int = 4, kind: str = "exps") -> dict[str, Any]:
    return {
        f"blk.{layer}.ffn_gate_{kind}.weight": ((8, 16, experts), 0),
        f"blk.{layer}.ffn_up_{kind}.weight": ((8, 16, experts), 0),
        f"blk.{layer}.ffn_down_{kind}.weight": ((16, 8, experts), 0),
    }


def materialise(layout: Layout, path: Path, with_experts: bool = True) -> Path:
    """Write the virtual file to disk."""
    files = [part.path.read_bytes() for part in layout.gguf.parts]
    with path.open("wb") as out:
        for extent in layout.extents:
            assert out.tell() == extent.offset
            assert extent.length > 0
            data = extent.data
            if extent.source == "file" or (extent.part >= 0 and with_experts):
                start = extent.file_offset
                data = files[extent.part][start : start + extent.length]
            out.write(bytes(extent.length) if data is None else data)
        assert out.tell() == layout.virtual_size
    return path


@pytest.mark.parametrize("name", MANY_NAMES)
def test_expert_names(name: str) -> None:
    assert EXPERT_TENSOR.match(name)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_names_that_stay(name: str) -> None:
    assert not EXPERT_TENSOR.match(name)


def test_groups_of_a_file(tmp_path: Path) -> None:
    gguf = open_gguf(write_moe(tmp_path / "m.gguf", kind="Q8_0"))
    layout = build_layout(gguf)
    assert [group.layer for group in layout.groups] == [0, 1]
    assert layout.n_expert_used == 2
    assert layout.resident == ()
    for group in layout.groups:
        assert [matrix.name.split("_")[1] for matrix in group.matrices] == ["gate", "up", "down"]
        assert group.expert_bytes == 3 * 64 * 96 // 32 * 34
        for matrix in group.matrices:
            tensor = gguf.tensors[matrix.name]
            assert matrix.offset == tensor.offset
            assert matrix.expert_bytes * matrix.n_expert == tensor.nbytes
    assert layout.expert_bytes + layout.dense_bytes == gguf.nbytes


def test_one_file_is_shown_as_it_is(tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf")
    layout = build_layout(open_gguf(path))
    assert materialise(layout, tmp_path / "copy").read_bytes() == path.read_bytes()
    holes = sum(extent.length for extent in layout.extents if extent.source == "hole")
    assert holes == layout.expert_bytes
    assert layout.virtual_size == path.stat().st_size


@pytest.mark.parametrize("alignment", [32, 64, 4096])
@pytest.mark.parametrize("per_part", [1, 5])
def test_parts_are_shown_as_one_file(tmp_path: Path, alignment: int, per_part: int) -> None:
    options: Any = {"kind": "Q4_0", "alignment": alignment}
    whole = write_moe(tmp_path / "whole.gguf", **options)
    first = write_moe(tmp_path / "parts.gguf", tensors_per_part=per_part, **options)
    gguf = open_gguf(first)
    assert len(gguf.parts) > 1
    layout = build_layout(gguf)
    merged = materialise(layout, tmp_path / "merged.gguf")
    want, got = GGUFReader(whole), GGUFReader(merged)
    assert not [key for key in got.fields if key.startswith("split.")]
    assert {tensor.name for tensor in got.tensors} == {tensor.name for tensor in want.tensors}
    data = {tensor.name: tensor.data for tensor in want.tensors}
    assert all(np.array_equal(tensor.data, data[tensor.name]) for tensor in got.tensors)
    assert got.alignment == alignment
    own = open_gguf(merged)
    assert {k: e.value for k, e in own.entries.items()} == {
        k: e.value for k, e in gguf.entries.items() if not k.startswith("split.")
    }
    assert len(own.entries) > 10
    for group in layout.groups:
        for matrix in group.matrices:
            raw = gguf.parts[matrix.part].path.read_bytes()[matrix.offset :]
            assert raw[: matrix.expert_bytes] == data[matrix.name][0].tobytes()


def test_llama_cpp_loads_the_merged_file(tmp_path: Path) -> None:
    from llama_cpp import llama_cpp

    first = write_moe(tmp_path / "parts.gguf", tensors_per_part=4)
    merged = materialise(build_layout(open_gguf(first)), tmp_path / "merged.gguf")
    logits = []
    llama_cpp.llama_backend_init()
    for path in (first, merged):
        logits.append(_logits(path))
    assert np.array_equal(logits[0], logits[1])
    assert np.isfinite(logits[0]).all()


def _logits(path: Path) -> np.ndarray[Any, Any]:
    from llama_cpp import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model
    context_params = llama_cpp.llama_context_default_params()
    context_params.n_ctx, context_params.n_threads = 32, 1
    context = llama_cpp.llama_init_from_model(model, context_params)
    tokens = (llama_cpp.llama_token * 5)(1, 2, 3, 4, 5)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 5)) == 0
    logits: np.ndarray[Any, Any] = np.ctypeslib.as_array(
        llama_cpp.llama_get_logits_ith(context, -1), (128,)
    ).copy()
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


def test_a_dense_model_has_no_groups(tmp_path: Path) -> None:
    layout = build_layout(open_gguf(write_moe(tmp_path / "m.gguf", dense=True)))
    assert layout.groups == ()
    assert layout.overrides == ()
    assert layout.n_expert_used == 0
    assert layout.expert_bytes == 0
    assert [extent.source for extent in layout.extents] == ["file"]


def test_two_groups_a_layer() -> None:
    layout = build_layout(fake(stack(0) | stack(0, kind="chexps", experts=2) | stack(1)))
    assert [(g.index, g.layer, g.kind) for g in layout.groups] == [
        (0, 0, "exps"),
        (1, 0, "chexps"),
        (2, 1, "exps"),
    ]


def test_fused_gate_and_up() -> None:
    tensors: dict[str, tuple[tuple[int, ...], int]] = {
        "blk.3.ffn_down_exps.weight": ((16, 8, 4), 0),
        "blk.3.ffn_gate_up_exps.weight": ((8, 32, 4), 0),
    }
    (group,) = build_layout(fake(tensors)).groups
    assert [matrix.name for matrix in group.matrices] == list(reversed(tensors))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"blk.0.ffn_down_exps.weight": None}, "only gate and up"),
        ({"blk.0.ffn_up_exps.weight": None}, "only down and gate"),
        ({"blk.0.ffn_up_exps.weight": ((8, 16, 3), 0)}, "mixes expert counts"),
        ({"blk.0.ffn_up_exps.weight": ((8, 16, 4, 2), 0)}, "not three-dimensional"),
        ({"blk.0.ffn_up_exps.weight": ((8, 16), 0)}, "not three-dimensional"),
        ({"blk.0.ffn_up_exps.weight": ((8, 16, 4), 26)}, "type i32"),
        ({"blk.0.ffn_up_exps.weight": ((8, 0, 4), 0)}, "empty"),
    ],
)
def test_what_stays_resident_has_a_reason(change: dict[str, Any], reason: str) -> None:
    tensors = {n: t for n, t in (stack(0) | change).items() if t is not None} | stack(1)
    layout = build_layout(fake(tensors))
    assert [group.layer for group in layout.groups] == [1]
    assert {name for name, _ in layout.resident} == {n for n in tensors if n.startswith("blk.0.")}
    assert all(reason in why for _, why in layout.resident)


def test_single_experts_and_old_files_stay() -> None:
    tensors = stack(0, experts=1) | {"blk.1.ffn_gate.0.weight": ((8, 16), 0)}
    layout = build_layout(fake(tensors))
    assert not layout.groups
    assert len(layout.resident) == 4


@pytest.mark.parametrize("odd", [False, True])
def test_overrides_match_exactly_the_streamed(odd: bool) -> None:
    tensors = stack(1) | stack(2) | stack(12) | {name: ((8,), 0) for name in OTHER_NAMES}
    if odd:
        del tensors["blk.1.ffn_down_exps.weight"]
    gguf = fake(tensors)
    layout = build_layout(gguf)
    matched = [n for n in tensors if any(re.search(p, n) for p in layout.overrides)]
    assert set(matched) == layout.streamed
    assert len(layout.streamed) == (6 if odd else 9)
    assert len(layout.overrides) == (3 if odd else 1)


def test_used_experts_may_differ_by_layer() -> None:
    layout = build_layout(fake(stack(0), **{"llama.expert_used_count": [1, 3, 2]}))
    assert layout.n_expert_used == 3


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.expert_used_count": 0},
        {"llama.expert_used_count": 5},
        {"llama.expert_count": 1024},
        {"llama.expert_count": "four"},
        {"llama.expert_count": 0},
    ],
)
def test_counts_that_abort_llama_cpp_are_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^fake\.gguf: "):
        build_layout(fake(stack(0), **metadata))


def test_expert_size_must_divide() -> None:
    gguf = fake(stack(0))
    name = "blk.0.ffn_up_exps.weight"
    gguf.tensors[name] = replace(gguf.tensors[name], type=0)
    assert build_layout(gguf).groups[0].matrices[1].expert_bytes == 8 * 16 * 4
