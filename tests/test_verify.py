from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from gates import JOB, Bench, layout_of

import hobbit
from hobbit import verify as module
from hobbit.memory import Cap
from hobbit.stock import DecodeFailed, Job, Logits, StockProcess, collect, empty_logits
from hobbit.verify import CACHES, VerifyRow, cache_bytes, compare, verify

SHORT = replace(JOB, n_prompt=40, n_decode=8)


def test_rows(bench: Bench) -> None:
    said: list[str] = []
    rows = verify(bench.arch("qwen3moe"), job=SHORT, on_progress=said.append)
    assert [row.cache for row in rows] == [*CACHES]
    assert all(row.equal and row.prompt_equal and row.decode_equal for row in rows)
    assert all(row.max_abs_diff == 0.0 and not row.first_difference for row in rows)
    assert rows[0].bytes < rows[1].bytes < rows[3].bytes
    assert [row.evictions > 0 for row in rows] == [True, True, True, False]
    assert len(said) == 1 + len(CACHES)


def test_names_of_sizes(bench: Bench) -> None:
    layout = layout_of(bench.arch("qwen3moe"))
    assert cache_bytes(layout, "floor") == "floor"
    layer, half, everything = (cache_bytes(layout, name) for name in CACHES[1:])
    assert isinstance(layer, int) and isinstance(half, int) and isinstance(everything, int)
    assert layer < everything and half * 2 == layout.expert_bytes < everything


def test_different_model_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of one expert is enough."""
    original = bench.arch("qwen3moe")
    matrix = layout_of(original).groups[0].matrices[0]
    data = bytearray(original.read_bytes())
    for expert in range(matrix.n_expert):
        data[matrix.offset + expert * matrix.expert_bytes + 2] ^= 0x10
    other = original.with_name("other.gguf")
    other.write_bytes(data)
    expected = bench.stock(other, SHORT)
    monkeypatch.setattr(StockProcess, "logits", lambda *_, **__: [expected])
    rows = verify(original, job=SHORT, caches=("floor", "all"))
    assert not any(row.equal for row in rows)
    assert rows[0].first_difference.startswith("prompt token ")
    assert rows[0].max_abs_diff > 0
    assert rows[0].max_abs_diff == rows[1].max_abs_diff


def logits(value: float = 1.0) -> Logits:
    found = empty_logits(4, Job(n_prompt=3, n_decode=2, n_seq=2))
    found[:] = value
    return found


BLANK = VerifyRow("floor", 0)


def test_compare_equal() -> None:
    row = compare(BLANK, logits(np.nan), logits(np.nan), 3)
    assert row.equal and row.first_difference == "" and row.max_abs_diff == 0.0


@pytest.mark.parametrize(
    ("where", "value", "label"),
    [
        ((1, 0, 2), 1.5, "prompt token 1"),
        ((3, 1, 0), 1.25, "decoded token 0 of sequence 1"),
        ((4, 0, 3), np.nextafter(np.float32(1), np.float32(2)), "decoded token 1"),
    ],
)
def test_compare_different(where: tuple[int, int, int], value: float, label: str) -> None:
    found = logits()
    found[where] = value
    row = compare(BLANK, logits(), found, 3)
    assert not row.equal
    assert row.prompt_equal == (where[0] >= 3)
    assert row.first_difference == label
    assert row.max_abs_diff == pytest.approx(float(value) - 1.0)


def test_compare_bits() -> None:
    """Equal numbers are not enough: a zero of the other sign came from other arithmetic."""
    assert not compare(BLANK, logits(0.0), logits(-0.0), 3).equal
    assert not compare(BLANK, logits(1.0), logits(np.nan), 3).equal


def test_skips_what_does_not_fit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.arch("qwen3moe", expert_type="F32", n_embd=512, n_ff=512, n_layer=2)
    monkeypatch.setattr(module, "resolve_cap", lambda text: Cap(1 << 20, "of a test"))
    with pytest.raises(hobbit.PlanError) as info:
        verify(path, job=SHORT)
    enough = info.value.needed_bytes + (16 << 20)
    monkeypatch.setattr(module, "resolve_cap", lambda text: Cap(enough, "of a test"))
    floor, everything = verify(path, job=SHORT, caches=("floor", "all"))
    assert floor.equal and not floor.skipped
    assert everything.equal and "MiB" in everything.skipped


def test_failed_read(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bench.arch("qwen3moe").read_bytes())
    cut = layout_of(path).groups[0].matrices[0].offset

    def cut_short(llama: hobbit.Llama, job: Job) -> Logits:
        with path.open("r+b") as file:
            file.truncate(cut)
        return collect(llama, job)

    monkeypatch.setattr(module, "collect", cut_short)
    with pytest.raises(hobbit.ReadError, match=r"model\.gguf at offset"):
        verify(path, job=SHORT)


def test_dense_model(bench: Bench) -> None:
    rows = verify(bench.arch("llama", n_expert=0, n_used=0), job=SHORT)
    assert [(row.cache, row.equal, row.misses) for row in rows] == [("all", True, 0)]


def test_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUX" * 100)
    with pytest.raises(hobbit.ModelError, match="not a GGUF"):
        verify(path)


def test_stock_cannot_load(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tiny.make(path, "llama", file_kv={"general.architecture": "llama", "llama.block_count": 9})
    with pytest.raises(hobbit.ModelError, match=r"stock .* cannot run it here"):
        verify(path, job=SHORT)


def test_stock_process_survives_an_error(bench: Bench, tmp_path: Path) -> None:
    with StockProcess() as stock:
        with pytest.raises(DecodeFailed):
            stock.logits(tmp_path / "absent.gguf", [SHORT])
        (found,) = stock.logits(bench.arch("llama"), [SHORT])
        assert found.shape == (48, 1, tiny.N_VOCAB)


def test_stock_process_that_is_closed_while_it_works(bench: Bench) -> None:
    """As when a comparison is interrupted: another thread waits for the answer."""
    stock = StockProcess()
    job = replace(SHORT, n_decode=2000)
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            stock.logits(bench.arch("llama"), [job])
        except DecodeFailed as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    stock.close()
    thread.join(10)
    assert len(failed) == 1
    stock.close()


def test_stock_process_that_dies(bench: Bench) -> None:
    """Several sequences make this architecture abort inside llama.cpp."""
    with StockProcess() as stock, pytest.raises(DecodeFailed, match="ended with status -6"):
        stock.logits(bench.arch("kimi-linear"), [replace(SHORT, n_seq=3)])


def test_stock_never_loads_hobbit() -> None:
    source = Path(module.__file__).with_name("stock.py").read_text()
    assert "import hobbit" not in source and "from ." not in source
