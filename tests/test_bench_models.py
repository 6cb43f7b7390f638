"""The models of scripts/make-bench-model, small: inflating changes no logit, random shapes load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import benchmodels
import gguf
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from benchmodels import SHAPES
from gguf import GGMLQuantizationType as Type

import hobbit
from hobbit.errors import HobbitError, ModelError, UsageError
from hobbit.stock import plain_llama


def small(name: str) -> benchmodels.Shape:
    """Return a shape of the same architecture that is written in a moment."""
    return replace(
        SHAPES[name],
        n_layer=2,
        n_embd=256,
        n_head=4,
        n_head_kv=4,
        head_dim=64,
        n_ff=256,
        n_expert=8,
        n_expert_used=2,
        n_vocab=512,
    )


def logits(path: Path) -> npt.NDArray[np.float32]:
    """Return stock's logits for every position of a fixed prompt."""
    options = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "verbose": False}
    with plain_llama(str(path), options) as llm:
        llm.eval(list(range(20, 60)))
        return np.array(llm.scores[:40], np.float32)


@pytest.mark.parametrize("name", SHAPES)
def test_synthetic_model_loads_and_is_finite(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shape = small(name)
    written = benchmodels.synthesize(name, shape, Type.Q4_0, path)
    assert written == path.stat().st_size
    rows = logits(path)
    assert np.isfinite(rows).all()
    assert rows.std() > 0.1


def test_synthetic_experts_differ(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    benchmodels.synthesize("m", small("mixtral-8x7b"), Type.Q8_0, path)
    tensors = [t for t in gguf.GGUFReader(path).tensors if "_exps" in t.name]
    experts = {expert.tobytes() for tensor in tensors for expert in tensor.data}
    assert len(experts) == 2 * 3 * 8


@pytest.mark.parametrize(
    ("arch", "expert_type"),
    [
        ("llama", "Q8_0"),
        ("llama", "Q4_0"),
        ("llama", "F16"),
        ("granitemoe", "Q8_0"),
        ("olmoe", "Q8_0"),
        ("qwen3moe", "Q4_0"),
    ],
)
def test_inflated_model_has_the_same_logits(arch: str, expert_type: str, tmp_path: Path) -> None:
    source, dest = tmp_path / "source.gguf", tmp_path / "inflated.gguf"
    tiny.make(source, arch, expert_type)
    size = source.stat().st_size * 6
    written = benchmodels.inflate(source, dest, size)
    assert size * 0.5 < written <= size
    before, after = logits(source), logits(dest)
    assert before.tobytes() == after.tobytes()


def test_inflated_model_keeps_its_metadata(tmp_path: Path) -> None:
    source, dest = tmp_path / "source.gguf", tmp_path / "inflated.gguf"
    tiny.make(source, "granitemoe", "Q8_0")
    benchmodels.inflate(source, dest, 20 << 20)
    before, after = (
        {f.name: f.contents() for f in gguf.GGUFReader(p).fields.values()} for p in (source, dest)
    )
    changed = {k for k in before if before[k] != after[k]}
    assert changed == {f"granitemoe.{key}feed_forward_length" for key in ("", "expert_")}
    assert after["granitemoe.feed_forward_length"] % benchmodels.WIDTH_STEP == 0


def test_a_model_whose_shared_experts_would_grow_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    tiny.make(source, "deepseek", "Q8_0")
    with pytest.raises(ModelError, match="shared experts"):
        benchmodels.inflate(source, tmp_path / "out.gguf", 20 << 20)


def test_a_size_below_the_source_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    tiny.make(source, "llama", "Q8_0")
    with pytest.raises(UsageError, match="--size"):
        benchmodels.inflate(source, tmp_path / "out.gguf", 1000)


def test_a_full_disk_is_told_before_writing(tmp_path: Path) -> None:
    shape = replace(SHAPES["mixtral-8x7b"], n_layer=64, n_ff=1 << 30)
    with pytest.raises(HobbitError, match="are free"):
        benchmodels.synthesize("huge", shape, Type.Q4_0, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(done: int, total: int) -> None:
        raise OSError("no space left")

    shape = small("mixtral-8x7b")
    with pytest.raises(OSError, match="no space"):
        benchmodels.synthesize("m", shape, Type.Q4_0, tmp_path / "out.gguf", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [*benchmodels.SCALE_BYTES, Type.F16, Type.MXFP4, Type.IQ2_XXS])
def test_zero_blocks_decode_to_zero(kind: Type) -> None:
    blocks = benchmodels.zero_blocks(kind, 64)
    assert not gguf.quants.dequantize(blocks, kind).any()
    if kind in benchmodels.SCALE_BYTES:
        assert blocks.any()


def test_bad_source_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"not a model at all")
    assert benchmodels.main(["inflated", "--from", str(bad), str(tmp_path / "out.gguf")]) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_synthetic_routing_depends_on_the_token(tmp_path: Path) -> None:
    """A random token must not meet the experts of the one before."""
    path = tmp_path / "model.gguf"
    shape = replace(small("olmoe-1b-7b"), n_expert=64, n_ff=32)
    benchmodels.synthesize("m", shape, Type.Q8_0, path)
    with hobbit.Llama(str(path), cache_bytes="floor", n_ctx=64, n_threads=1) as llm:
        for token in np.random.default_rng(0).integers(10, 500, 40):
            llm.eval([int(token)])
        assert llm.stats.hit_rate < 0.5
