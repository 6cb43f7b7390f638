"""The gates: on every architecture, at every cache size, hobbit's logits are stock's, bit for bit.

A gate also asserts that what it means to test happened: misses, evictions, and, when everything is
cached, no reads.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from gates import JOB, Bench, assert_same, layout_of, opened, run, skip_without_direct

from hobbit.stock import Job, Logits
from hobbit.verify import CACHES

LAST = replace(JOB, n_prompt=70, n_decode=4, all_logits=False)
SEVERAL = replace(JOB, n_seq=3, n_prompt=40, n_decode=16)


def check(path: Path, expected: Logits, cache: str, job: Job = JOB, **arguments: object) -> None:
    """Compare one cache size with stock, and check that the cache worked as its size says."""
    n_experts = sum(group.n_expert for group in layout_of(path).groups)
    assert n_experts, "nothing streams: the gate would prove nothing"
    with opened(path, cache, job, **arguments) as llama:
        assert llama.stats.read_bytes == 0, "loading read expert bytes"
        assert_same(expected, run(llama, job), f"{path.name}, cache {cache}")
        stats = llama.stats
        # Random tokens reach most experts; routing that does not would make the gate weak.
        assert stats.misses > n_experts // 3
        if cache == "all":
            assert stats.evictions == 0
            assert stats.misses <= n_experts
            assert_same(expected, run(llama, job), f"{path.name}, warm")
            assert llama.stats.read_bytes == stats.read_bytes, "a warm full cache read again"
            assert llama.stats.misses == stats.misses
        else:
            assert stats.evictions > 0


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_architecture(arch: str, bench: Bench) -> None:
    path = bench.arch(arch)
    expected = bench.stock(path)
    for cache in CACHES:
        check(path, expected, cache)


@pytest.mark.parametrize("arch", [a for a in tiny.ARCHS if a not in tiny.ONE_SEQUENCE])
def test_several_sequences(arch: str, bench: Bench) -> None:
    path = bench.arch(arch)
    check(path, bench.stock(path, SEVERAL), "floor", SEVERAL)


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_last_logits_only(arch: str, bench: Bench) -> None:
    """As when generating: no token of the first ubatches reaches the end of the last layer."""
    path = bench.arch(arch)
    check(path, bench.stock(path, LAST), "floor", LAST)


@pytest.mark.parametrize("arch", tiny.DIFFUSION)
def test_diffusion(arch: str, bench: Bench) -> None:
    """These attend in both directions: a prompt is one ubatch, and nothing is decoded after it."""
    job = replace(JOB, n_prompt=48, n_ubatch=48, n_decode=0)
    path = bench.arch(arch)
    for cache in ("floor", "all"):
        check(path, bench.stock(path, job), cache, job)


@pytest.mark.parametrize("kind", tiny.TYPES)
def test_expert_type(kind: str, bench: Bench) -> None:
    """256-wide rows, which the k- and i-quants need."""
    path = bench.arch("llama", expert_type=kind, n_embd=256, n_ff=256, n_layer=2, n_expert=4)
    expected = bench.stock(path)
    for cache in ("floor", "all"):
        check(path, expected, cache)


def mixed(name: str) -> str:
    """Choose types as the *_K_M mixes do: some layers' down projections get more bits."""
    layer = int(name.split(".")[1])
    if "down" in name:
        return ("Q6_K", "Q4_K", "Q5_K")[layer % 3]
    return "Q3_K" if layer == 1 else "Q4_K"


def with_nextn(shapes: tiny.Shapes) -> tiny.Shapes:
    """Make the last layer one that predicts a further token."""
    n_embd = shapes["output_norm.weight"][0]
    last = "blk.3.nextn"
    return shapes | {
        f"{last}.eh_proj.weight": (2 * n_embd, n_embd),
        f"{last}.enorm.weight": (n_embd,),
        f"{last}.hnorm.weight": (n_embd,),
    }


FEATURES: dict[str, dict[str, Any]] = {
    # A layer has one matrix for gate and up.
    "fused": {"arch": "qwen3moe", "fused": True},
    "fused-deepseek": {"arch": "deepseek2", "fused": True},
    "fused-qwen35": {"arch": "qwen35moe", "fused": True, "expert_type": "Q4_0"},
    # A factor for each expert, as NVFP4 files have.
    "scales": {"arch": "qwen3moe", "scales": True},
    "scales-fused": {"arch": "qwen3moe", "scales": True, "fused": True},
    "scales-nvfp4": {"arch": "olmoe", "scales": True, "expert_type": "NVFP4"},
    "biases-mxfp4": {"arch": "gpt-oss", "expert_type": "MXFP4"},
    "biases-f16": {"arch": "gpt-oss", "expert_type": "F16", "n_expert": 32, "n_used": 4},
    "top-1": {"arch": "llama", "n_used": 1},
    "top-1-llama4": {"arch": "llama4", "n_expert": 16},
    "every-expert": {"arch": "olmoe", "n_expert": 4, "n_used": 4},
    "two-experts": {"arch": "llama", "n_expert": 2, "n_used": 1},
    "many-experts": {
        "arch": "qwen3moe", "n_expert": 128, "n_used": 8, "n_embd": 64, "n_ff": 64,
        "expert_type": "Q4_0",
    },
    "more-experts": {
        "arch": "deepseek2", "n_expert": 256, "n_used": 8, "n_embd": 64, "n_ff": 32,
        "expert_type": "Q4_0", "dense_type": "F32",
    },
    "k-mix": {"arch": "qwen3moe", "expert_type": mixed, "n_embd": 256, "n_ff": 256},
    # Experts that are no multiple of a sector: direct reads need a bounce buffer.
    "odd-size": {"arch": "qwen3moe", "n_embd": 96, "n_ff": 160, "n_head": 3},
    "odd-size-f16": {"arch": "olmoe", "n_embd": 96, "n_ff": 80, "n_head": 3, "expert_type": "F16"},
    # 32 of k rows do not fill a block of the matrix product.
    "narrow": {"arch": "qwen3moe", "n_ff": 32},
    "aligned-4096": {"arch": "qwen3moe", "alignment": 4096},
    "aligned-8": {"arch": "qwen3moe", "alignment": 8},
    # A multi-token-prediction layer is in the file; llama.cpp does not load it.
    "nextn": {
        "arch": "glm4moe", "n_layer": 4, "edit": with_nextn,
        "file_kv": {"glm4moe.nextn_predict_layers": 1},
    },
    "groups-of-experts": {
        "arch": "deepseek2", "n_expert": 16, "n_used": 4,
        "kv": {"deepseek2.expert_group_count": 4, "deepseek2.expert_group_used_count": 2},
    },
    "no-routing-norm": {"arch": "deepseek2", "kv": {"deepseek2.expert_weights_norm": False}},
    # Experts of several read blocks, of which one is no multiple of a sector.
    "large": {
        "arch": "qwen3moe", "expert_type": "F32", "n_embd": 1024, "n_ff": 768, "n_layer": 1,
        "n_expert": 3, "n_used": 1,
    },
    "large-odd": {
        "arch": "qwen3moe", "expert_type": "F32", "n_embd": 1000, "n_ff": 761, "n_layer": 1,
        "n_expert": 3, "n_used": 1,
    },
    # So many slots that ggml's table of rows limits the pairs of a batch.
    "many-slots": {
        "arch": "qwen3moe", "n_expert": 128, "n_used": 8, "n_embd": 32, "n_ff": 32, "n_layer": 12,
        "dense_type": "F32",
    },
    # Each layer has a size and a top-k of its own, so each is a pool of its own.
    "layers-differ": {
        "arch": "nemotron_h_moe", "n_layer": 5,
        "kv": {
            "nemotron_h_moe.expert_used_count": [0, 0, 3, 1, 2],
            "nemotron_h_moe.expert_feed_forward_length": [0, 0, 128, 64, 96],
        },
    },
    "tied-output": {
        "arch": "llama",
        "edit": lambda shapes: {k: v for k, v in shapes.items() if k != "output.weight"},
    },
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str, bench: Bench) -> None:
    path = bench.model(feature, lambda path: tiny.make(path, **FEATURES[feature]))
    expected = bench.stock(path)
    n_expert = max(group.n_expert for group in layout_of(path).groups)
    # With top-k of k experts the floor holds a whole layer, which evicts all the same.
    caches = ("floor", "half", "all") if n_expert > 2 else ("floor", "all")
    for cache in caches:
        check(path, expected, cache)


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("arch", ["qwen3moe", "grovemoe"])
def test_parts(arch: str, n: int, bench: Bench) -> None:
    """A model in several files is the model in one."""
    whole = bench.arch(arch)
    first = bench.model(f"{arch}-{n}", lambda path: tiny.split(_copy(whole, path), n))
    assert len(list(first.parent.glob(f"{arch}-{n}-split-*.gguf"))) == n
    expected = bench.stock(whole)
    assert_same(expected, bench.stock(first), "stock on parts")
    for cache in ("floor", "half", "all"):
        check(first, expected, cache)


def _copy(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes())
    return target


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("io_threads", [1, 3])
@pytest.mark.parametrize("feature", ["aligned-4096", "odd-size"])
def test_io(io: str, io_threads: int, feature: str, bench: Bench) -> None:
    path = bench.model(feature, lambda path: tiny.make(path, **FEATURES[feature]))
    if io == "direct":
        skip_without_direct(path)
    check(path, bench.stock(path), "floor", io=io, io_threads=io_threads)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])
def test_threads(arch: str, n_threads: int, bench: Bench) -> None:
    job = replace(JOB, n_threads=n_threads)
    path = bench.arch(arch)
    check(path, bench.stock(path, job), "half", job)


@pytest.mark.parametrize(("n_prompt", "n_ubatch"), [(1, 1), (33, 32), (200, 128), (129, 256)])
def test_batch_shapes(n_prompt: int, n_ubatch: int, bench: Bench) -> None:
    job = replace(JOB, n_prompt=n_prompt, n_ubatch=n_ubatch)
    path = bench.arch("olmoe")
    check(path, bench.stock(path, job), "floor", job)


def test_more_pairs_than_a_batch(bench: Bench) -> None:
    """A ubatch whose intermediate rows exceed the memory of one batch."""
    path = bench.arch("qwen3moe", expert_type="Q4_0", n_ff=1536, n_expert=16, n_used=8, n_layer=2)
    job = replace(JOB, n_prompt=512, n_ubatch=512, n_decode=2)
    expected = bench.stock(path, job)
    for cache in ("floor", "all"):
        check(path, expected, cache, job)


@pytest.mark.parametrize("share", [3, 5, 9, 13])
def test_odd_cache_sizes(share: int, bench: Bench) -> None:
    """Between the named sizes: slots that are no multiple of anything."""
    path = bench.arch("qwen3moe")
    group = layout_of(path).groups[0]
    with opened(path, share * (group.expert_bytes + 4096 * 6)) as llama:
        assert_same(bench.stock(path), run(llama), f"{share} slots")
        assert llama.stats.evictions > 0
