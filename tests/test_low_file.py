"""The low-precision file: its form, where it is found, and which pairs are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import pytest
from lowfiles import ggml_loads, layout_of
from moefile import write_moe

from hobbit.errors import ModelError
from hobbit.fingerprint import SAMPLES, fingerprint
from hobbit.gguf_file import open_gguf
from hobbit.low_file import check_pair, find_low, low_path, plan_low
from hobbit.low_types import choose
from hobbit.prepare import make_low


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_moe(tmp_path / "m.gguf", kind="Q8_0")


def make(model: Path, dest: Path | None = None, low: str = "q4_0") -> Path:
    layout = layout_of(model)
    return make_low(layout, dest or low_path(layout.gguf), low, threads=1).path


def test_it_is_a_gguf_of_the_experts_alone(model: Path) -> None:
    low = make(model)
    reader = gguf.GGUFReader(low)
    high = {t.name: t for t in gguf.GGUFReader(model).tensors if "exps" in t.name}
    assert [t.name for t in reader.tensors] == list(high)
    for tensor in reader.tensors:
        assert tensor.tensor_type is gguf.GGMLQuantizationType.Q4_0
        assert list(tensor.shape) == list(high[tensor.name].shape)
        assert tensor.data_offset % 4096 == 0
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.architecture"] == "llama"
    assert value["general.type"] == "experts"
    assert value["general.alignment"] == 4096
    assert value["hobbit.source.name"] == "m.gguf"
    assert value["hobbit.source.size"] == model.stat().st_size
    assert value["hobbit.source.fingerprint"] == fingerprint(open_gguf(model))
    assert value["hobbit.low.imatrix"] == "none"
    assert {"gate", "up", "down"} == {
        name.rpartition(".")[2]: 0 for name in value if name.startswith("hobbit.low.error.")
    }.keys()
    assert 0.001 < value["hobbit.low.error.down"] < 0.02
    assert low.stat().st_size % 4096 == 0
    assert ggml_loads(low) == 6


def test_the_header_takes_the_errors_without_growing(model: Path) -> None:
    layout = layout_of(model)
    matrices = [matrix for group in layout.groups for matrix in group.matrices]
    plan = plan_low(layout, choose("q4_0", matrices), "none")
    full = plan.header({"gate": 1 / 3, "up": 2 / 3, "down": 1e-300})
    assert len(full) == len(plan.header()) == plan.tensors[0].offset
    assert full != plan.header()


def test_where_it_is_made_and_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path / "cache"))
    source = open_gguf(model)
    assert find_low(source) is None
    beside = tmp_path / "m.hobbit-low.gguf"
    assert low_path(source) == beside
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        cached = low_path(source)
    assert cached == tmp_path / "cache" / f"m-{fingerprint(source)[:8]}.hobbit-low.gguf"
    make(model, cached)
    assert find_low(source) == cached
    make(model, beside)
    assert find_low(source) == beside


def test_models_of_one_name_do_not_share_a_cached_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    places = set()
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        model = write_moe(tmp_path / str(seed) / "m.gguf", seed=seed)
        places.add(low_path(open_gguf(model)))
    assert len(places) == 2


def test_the_name_is_without_the_number_of_the_part(tmp_path: Path) -> None:
    first = write_moe(tmp_path / "big.gguf", kind="Q8_0", tensors_per_part=5)
    assert low_path(open_gguf(first)).name == "big.hobbit-low.gguf"


def test_the_fingerprint_is_of_the_content(model: Path, tmp_path: Path) -> None:
    before = fingerprint(open_gguf(model))
    os.utime(model, (0, 0))
    moved = model.rename(tmp_path / "other.gguf")
    assert fingerprint(open_gguf(moved)) == before
    data = bytearray(moved.read_bytes())
    seen = {before}
    # A byte in the header (the end of a tensor's name), in a sample, and one more at the end.
    places = [data.index(b"attn_q.weight") + 5, 40 * len(data) // SAMPLES + 7, None]
    for place in places:
        changed = bytearray(data)
        if place is None:
            changed.append(0)
        else:
            changed[place] ^= 1
        (tmp_path / "c.gguf").write_bytes(changed)
        seen.add(fingerprint(open_gguf(tmp_path / "c.gguf")))
    assert len(seen) == 4


def test_the_fingerprint_looks_into_every_part(tmp_path: Path) -> None:
    first = write_moe(tmp_path / "m.gguf", kind="Q8_0", tensors_per_part=5)
    source = open_gguf(first)
    before, seen = fingerprint(source), set()
    assert len(source.parts) > 2
    for part in source.parts:
        data = part.path.read_bytes()
        part.path.write_bytes(data[: part.data_offset] + bytes(part.size - part.data_offset))
        seen.add(fingerprint(open_gguf(first)))
        part.path.write_bytes(data)
    assert len(seen | {before}) == len(source.parts) + 1


def test_the_samples_are_spread_over_all_parts_together(tmp_path: Path) -> None:
    first = write_moe(tmp_path / "m.gguf", kind="Q8_0", tensors_per_part=5)
    source = open_gguf(first)
    before, last = fingerprint(source), source.parts[-1]
    total = sum(part.size for part in source.parts)
    places = [i * total // SAMPLES - (total - last.size) for i in range(SAMPLES)]
    places = [place for place in places if place > last.data_offset]
    assert len(places) > 5
    for place in places:
        data = last.path.read_bytes()
        # The first byte of a sample counts; the one before it is between two samples.
        for at, counts in ((place, True), (place - 1, False)):
            last.path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert (fingerprint(source) != before) == counts, at
        last.path.write_bytes(data)


def test_a_pair_is_given_in_the_models_order(model: Path) -> None:
    high = layout_of(model)
    low = open_gguf(make(model))
    groups = check_pair(high, low)
    assert [g.index for g in groups] == [g.index for g in high.groups]
    for own, group in zip(groups, high.groups, strict=True):
        assert [m.name for m in own.matrices] == [m.name for m in group.matrices]
        assert own.expert_bytes < group.expert_bytes
        for matrix in own.matrices:
            assert matrix.offset == low.tensors[matrix.name].offset
            assert matrix.expert_bytes * matrix.n_expert == low.tensors[matrix.name].nbytes


def test_a_smaller_model_of_the_users_own_serves_too(model: Path, tmp_path: Path) -> None:
    whole = write_moe(tmp_path / "q4.gguf", kind="Q4_0")
    parts = write_moe(tmp_path / "p.gguf", kind="Q4_0", tensors_per_part=4)
    high = layout_of(model)
    sizes = {
        sum(group.expert_bytes for group in check_pair(high, open_gguf(path)))
        for path in (whole, parts)
    }
    assert len(sizes) == 1


PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"layers": 1}, "has no tensor blk.1.ffn_gate_exps.weight"),
    ({"experts": 8}, "tensor blk.0.ffn_gate_exps.weight is 64 x 96 x 8, not 64 x 96 x 4"),
    ({"kind": "Q8_0"}, "the experts of layer 0 are q8_0: not smaller"),
    ({"kind": "F16"}, "tensor blk.0.ffn_gate_exps.weight is f16, larger than q8_0"),
    ({"dense": True}, "has no tensor blk.0.ffn_gate_exps.weight"),
]


@pytest.mark.parametrize(("options", "words"), PAIRS)
def test_wrong_pairs(model: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    other = write_moe(tmp_path / "low.gguf", **({"kind": "Q4_0"} | options))
    refused(model, other, f"{other}: {words}: ")


def refused(model: Path, low: Path, words: str) -> None:
    with pytest.raises(ModelError) as error:
        check_pair(layout_of(model), open_gguf(low))
    message = str(error.value)
    assert words in message
    assert message.endswith(f"make one with hobbit prepare {model}")
    assert "\n" not in message


def test_another_architecture(model: Path, tmp_path: Path) -> None:
    data = write_moe(tmp_path / "other.gguf", kind="Q4_0").read_bytes()
    (tmp_path / "other.gguf").write_bytes(data.replace(b"llama", b"qwenx"))
    refused(model, tmp_path / "other.gguf", "is of architecture qwenx, m.gguf is llama")


def test_the_copy_of_another_model_of_the_same_shape(model: Path, tmp_path: Path) -> None:
    low = make(write_moe(tmp_path / "twin.gguf", kind="Q8_0", seed=1))
    refused(model, low, "was made from another file (twin.gguf, ")


def test_a_truncated_copy(model: Path) -> None:
    low = make(model)
    low.write_bytes(low.read_bytes()[:-4097])
    with pytest.raises(ModelError, match=r"is truncated: tensor 'blk.1.ffn_down_exps.weight'"):
        check_pair(layout_of(model), open_gguf(low))
