from __future__ import annotations

import ctypes
import os
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from moefile import write_moe

from hobbit.errors import HobbitError, ModelError, UnsupportedModelError
from hobbit.gguf_file import GGML_TYPES, ArrayRef, open_gguf


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_moe(tmp_path / "m.gguf")


def patched(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    return path


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(*entries: bytes, tensors: bytes = b"", n_tensors: int = 0, version: int = 3) -> bytes:
    arch = string("general.architecture") + struct.pack("<I", 8) + string("llama")
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, len(entries) + 1)
    return head + arch + b"".join(entries) + tensors


def info(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dims + struct.pack("<IQ", kind, offset)


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def test_types_are_those_of_the_library() -> None:
    from llama_cpp import _ggml

    lib = _ggml.libggml
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_blck_size.restype = ctypes.c_int64
    for number, kind in GGML_TYPES.items():
        assert lib.ggml_type_name(number) == kind.name.encode()
        assert lib.ggml_blck_size(number) == kind.block
        assert lib.ggml_type_size(number) == kind.nbytes
    for number in set(range(max(GGML_TYPES))) - set(GGML_TYPES):
        # Types that were removed have a sentence for a name.
        assert (lib.ggml_type_name(number) or b"NONE")[:1].isupper()


def test_agrees_with_gguf_py(model: Path) -> None:
    gguf, reader = open_gguf(model), GGUFReader(model)
    assert list(gguf.tensors) == [tensor.name for tensor in reader.tensors]
    for want in reader.tensors:
        tensor = gguf.tensors[want.name]
        assert tensor.offset == want.data_offset
        assert tensor.nbytes == want.n_bytes
        assert tensor.shape == tuple(int(n) for n in want.shape)
        assert (tensor.type, tensor.type_name) == (0, "f32")
    assert gguf.arch == "llama"
    assert gguf.get("llama.expert_count") == 4
    assert gguf.get("nothing", 5) == 5
    assert gguf.nbytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)


def test_metadata_of_all_kinds(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint8("a", 200)
    writer.add_int8("b", -3)
    writer.add_uint16("c", 60000)
    writer.add_int16("d", -300)
    writer.add_int32("e", -70000)
    writer.add_uint64("f", 1 << 60)
    writer.add_int64("g", -(1 << 60))
    writer.add_float64("h", 0.1)
    writer.add_bool("i", True)
    writer.add_string("j", "né")
    writer.add_array("k", [1, 2, 3])
    writer.add_array("l", ["x", "yz", ""])
    writer.add_array("m", [0.5] * 5000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    gguf = open_gguf(tmp_path / "m.gguf")
    values = [gguf.get(key) for key in "abcdefghij"]
    assert values == [200, -3, 60000, -300, -70000, 1 << 60, -(1 << 60), 0.1, True, "né"]
    assert gguf.get("k") == [1, 2, 3]
    assert gguf.get("l") == ArrayRef(3)
    assert gguf.get("m") == ArrayRef(5000)
    assert gguf.tensors == {}


def test_a_large_vocabulary_is_fast(tmp_path: Path) -> None:
    words = b"".join(string(f"token{i}" + "x" * (i % 7)) for i in range(450_000))
    path = tmp_path / "m.gguf"
    array = struct.pack("<IQ", 8, 450_000) + words
    path.write_bytes(header(entry("tokenizer.ggml.tokens", 9, array), entry("z", 4, b"\1\0\0\0")))
    start = time.perf_counter()
    gguf = open_gguf(path)
    # Three times the largest vocabulary in use; the bound leaves room for a busy machine.
    assert time.perf_counter() - start < 2
    assert gguf.get("tokenizer.ggml.tokens") == ArrayRef(450_000)
    assert gguf.get("z") == 1


def test_parts(tmp_path: Path) -> None:
    whole = open_gguf(write_moe(tmp_path / "m.gguf"))
    gguf = open_gguf(write_moe(tmp_path / "m.gguf", tensors_per_part=4))
    assert [part.path.name[-20:] for part in gguf.parts][:2] == [
        "m-00001-of-00006.gguf"[-20:],
        "m-00002-of-00006.gguf"[-20:],
    ]
    assert {t.name: t.nbytes for t in gguf.tensors.values()} == {
        t.name: t.nbytes for t in whole.tensors.values()
    }
    assert {tensor.part for tensor in gguf.tensors.values()} == set(range(6))


def test_a_lone_file_with_split_keys_opens(tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf", tensors_per_part=100)
    assert len(open_gguf(path).parts) == 1


def test_a_link_to_the_first_part_finds_its_neighbours(tmp_path: Path) -> None:
    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    write_moe(tmp_path / "blobs" / "m.gguf", tensors_per_part=10)
    for number, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        blob = path.rename(path.with_name(f"sha{number}"))
        (tmp_path / "snapshot" / path.name).symlink_to(blob)
    first = tmp_path / "snapshot" / "m-00001-of-00003.gguf"
    assert len(open_gguf(first).parts) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "m-00002-of-00003.gguf").unlink(), "part 2 .* is missing"),
        (
            lambda folder: (folder / "m-00003-of-00003.gguf").write_bytes(
                (folder / "m-00002-of-00003.gguf").read_bytes()
            ),
            "does not say that it is part 3",
        ),
        (
            lambda folder: patched(
                folder / "m-00002-of-00003.gguf", struct.pack("<H", 1), struct.pack("<H", 2)
            ),
            "does not say that it is part 2",
        ),
        (
            lambda folder: os.truncate(folder / "m-00003-of-00003.gguf", 100),
            "00003-of-00003.gguf: is truncated",
        ),
        (
            lambda folder: patched(
                folder / "m-00003-of-00003.gguf", b"blk.1.ffn_up_", b"blk.0.ffn_up_"
            ),
            "is in an earlier part too",
        ),
        (
            lambda folder: patched(
                folder / "m-00001-of-00003.gguf",
                entry("split.tensors.count", 5, struct.pack("<i", 23)),
                entry("split.tensors.count", 5, struct.pack("<i", 24)),
            ),
            "hold 23 tensors, the header says 24",
        ),
    ],
)
def test_damaged_parts(tmp_path: Path, damage: object, message: str) -> None:
    first = write_moe(tmp_path / "m.gguf", tensors_per_part=10)
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises(ModelError, match=message):
        open_gguf(first)


def test_a_later_part_names_the_first(tmp_path: Path) -> None:
    write_moe(tmp_path / "m.gguf", tensors_per_part=10)
    with pytest.raises(ModelError, match=r"part 2 of 3: name the first, m-00001-of-00003\.gguf"):
        open_gguf(tmp_path / "m-00002-of-00003.gguf")


def test_a_later_part_as_gguf_split_writes_it(tmp_path: Path) -> None:
    """Only the first part has the model's metadata, the architecture with it."""
    path = tmp_path / "m-00002-of-00003.gguf"
    keys = entry("split.count", 2, struct.pack("<H", 3)) + entry("split.no", 2, b"\1\0")
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + keys + bytes(64))
    with pytest.raises(ModelError, match=r"part 2 of 3: name the first, m-00001-of-00003\.gguf"):
        open_gguf(path)


def test_a_renamed_first_part_says_its_name(tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf", tensors_per_part=10).rename(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=r"must end in -00001-of-00003\.gguf"):
        open_gguf(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        open_gguf(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="is a folder"):
        open_gguf(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ModelError, match="not a regular file"):
        open_gguf(tmp_path / "fifo")


@pytest.mark.parametrize("data", [b"", b"GG", b"PK\3\4 and more", b"version https://x"])
def test_not_a_gguf(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="is not a GGUF file"):
        open_gguf(path)


@pytest.mark.parametrize(("version", "message"), [(1, "version 1"), (4, "version 4")])
def test_versions(tmp_path: Path, version: int, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header(version=version))
    with pytest.raises(UnsupportedModelError, match=message):
        open_gguf(path)
    path.write_bytes(header(version=0x03000000))
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        open_gguf(path)
    path.write_bytes(header(version=2))
    assert open_gguf(path).arch == "llama"


def test_every_truncation_is_named(model: Path) -> None:
    data = model.read_bytes()
    end = open_gguf(model).parts[0].data_offset
    for size in [*range(4, end, 7), end, len(data) // 2, len(data) - 1]:
        model.write_bytes(data[:size])
        with pytest.raises(ModelError, match="truncated"):
            open_gguf(model)


def test_truncated_data_names_the_tensor(model: Path) -> None:
    tensor = list(open_gguf(model).tensors.values())[-1]
    size = model.stat().st_size
    end = tensor.offset + tensor.nbytes
    os.truncate(model, end - 1)
    with pytest.raises(ModelError) as error:
        open_gguf(model)
    assert str(error.value) == (
        f"{model}: is truncated: tensor {tensor.name!r} ends at byte {end}, the file has {end - 1}"
    )
    assert size >= end


HUGE = 2**64 - 1
HOSTILE = {
    "tensor count": header(n_tensors=HUGE),
    "entry count": b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE),
    "string array": header(entry("a", 9, struct.pack("<IQ", 8, HUGE))),
    "string in array": header(entry("a", 9, struct.pack("<IQQ", 8, 1, HUGE))),
    "number array": header(entry("a", 9, struct.pack("<IQ", 12, 2**61))),
    "nested array": header(entry("a", 9, struct.pack("<IQ", 9, 1))),
    "value type": header(entry("a", 13, b"")),
    "value length": header(entry("a", 8, struct.pack("<Q", HUGE))),
    "empty key": header(entry("", 4, b"1234")),
    "double key": header(entry("a", 4, b"1234"), entry("a", 4, b"1234")),
    "no text": header(struct.pack("<Q", 2) + b"\xff\xff" + struct.pack("<II", 4, 1)),
    "alignment 0": header(entry("general.alignment", 4, struct.pack("<I", 0))),
    "alignment 48": header(entry("general.alignment", 4, struct.pack("<I", 48))),
    "alignment text": header(entry("general.alignment", 8, string("32"))),
    "dimensions": header(tensors=info("t", [1, 1, 1, 1, 1]), n_tensors=1),
    "no dimension": header(tensors=info("t", []), n_tensors=1),
    "elements": header(tensors=info("t", [2**32, 2**32]), n_tensors=1),
    "negative": header(tensors=info("t", [2**63]), n_tensors=1),
    "rows": header(tensors=info("t", [33], kind=8), n_tensors=1),
    "old type": header(tensors=info("t", [32], kind=31), n_tensors=1),
    "new type": header(tensors=info("t", [32], kind=43), n_tensors=1),
    "offset": header(tensors=info("t", [32], offset=32), n_tensors=1) + bytes(1024),
    "huge offset": header(tensors=info("t", [32], offset=2**64 - 32), n_tensors=1) + bytes(1024),
    "name": header(tensors=info("t" * 64, [32]), n_tensors=1) + bytes(1024),
    "double tensor": header(tensors=info("t", [8]) + info("t", [8], 0, 32), n_tensors=2)
    + bytes(1024),
    "split": header(entry("split.count", 4, struct.pack("<I", 3))),
    "splits": header(
        entry("split.count", 4, struct.pack("<I", 2**32 - 1)), entry("split.no", 4, bytes(4))
    ),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data + bytes(64))
    with pytest.raises(ModelError) as error:
        open_gguf(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_no_architecture(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(ModelError, match="names no architecture"):
        open_gguf(path)


def test_random_damage_never_escapes(model: Path) -> None:
    data = model.read_bytes()
    end = open_gguf(model).parts[0].data_offset
    rng = random.Random(1)
    outcomes = {True: 0, False: 0}
    for _ in range(1500):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(end)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        model.write_bytes(damaged)
        try:
            gguf = open_gguf(model)
        except HobbitError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
            for tensor in gguf.tensors.values():
                assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(data)
    assert min(outcomes.values()) > 50


def test_sizes_of_quantised_tensors(tmp_path: Path) -> None:
    gguf = open_gguf(write_moe(tmp_path / "m.gguf", kind="Q4_0"))
    tensor = gguf.tensors["blk.0.ffn_up_exps.weight"]
    assert tensor.type_name == "q4_0"
    assert tensor.nbytes == np.prod(tensor.shape) // 32 * 18
