"""The headers made from models.toml: llama.cpp loads such files and quantises to such types."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import tiny
from benchmodels import Shape as BenchShape
from benchmodels import synthesize
from gguf import GGMLQuantizationType as Q

from hobbit import demo
from hobbit.gguf_file import GGUF, open_gguf
from hobbit.layout import build_layout
from hobbit.models import is_estimate
from hobbit.models.catalogue import Known, known_models
from hobbit.models.mixtures import MIXTURES, file_type
from hobbit.models.shape import ARCHITECTURES, Shape, parameters
from hobbit.models.skeleton import skeleton

KNOWN = [known for known in known_models().values() if known.shape is not None]
GIB = 1 << 30
# What llama.cpp needs besides, where nothing of it depends on the shape.
EXTRAS = {
    "attention.layer_norm_rms_epsilon": 1e-5,
    "logit_scale": 1.0,
    "expert_gating_func": 2,
    "expert_weights_scale": 1.0,
    "interleave_moe_layer_step": 1,
}


def shape_of(known: Known) -> Shape:
    assert known.shape is not None
    return known.shape


def small(shape: Shape, layers: int = 3, width: int = 128, hidden: int = 64) -> Shape:
    """Return the same kind of shape with tiny figures."""
    return replace(
        shape,
        # llama.cpp knows DeepSeek-V2-Lite, which has no q_lora_rank, by its 27 layers.
        layers=27 if shape.kv_rank else layers,
        embd=width,
        heads=4,
        kv_heads=4 if shape.kv_heads == shape.heads else 2,
        head_dim=width // 4,
        vocab=tiny.N_VOCAB,
        experts=8 if shape.experts == 8 else 4,
        used=2,
        expert_ff=hidden,
        shared_ff=hidden * (shape.shared_experts or 1) if shape.shared_ff else 0,
        dense_ff=2 * hidden if shape.dense_ff else 0,
        context=512,
        kv_rank=width // 2 if shape.kv_rank else 0,
        rope_dim=16 if shape.rope_dim else 0,
        value_dim=width // 4 if shape.value_dim else 0,
        attention=(1,) if shape.attention else (),
    )


def write(path: Path, arch: str, shape: Shape, mixture: str = "F16") -> GGUF:
    """Write a file of zeros with the skeleton's header; return the skeleton."""
    made = skeleton("m", arch, shape, mixture)
    writer = gguf.GGUFWriter(path, arch)
    kv = {k: e.value for k, e in made.entries.items() if not k.startswith("hobbit.")}
    kv |= {f"{arch}.{key}": value for key, value in EXTRAS.items()}
    tiny._add_kv(writer, kv | tiny.vocabulary())
    for tensor in made.tensors.values():
        kind = Q(tensor.type)
        item = {Q.F32: np.float32, Q.F16: np.float16}[kind]
        writer.add_tensor(tensor.name, np.zeros(tensor.shape[::-1], item))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_parameters_are_the_published_ones(known: Known) -> None:
    assert parameters(known.arch, shape_of(known)) / 1e9 == pytest.approx(
        known.parameters, rel=0.02
    )


def test_there_are_enough() -> None:
    assert len(KNOWN) >= 15
    assert {known.arch for known in KNOWN} <= ARCHITECTURES


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_entries_make_sense(known: Known) -> None:
    shape = shape_of(known)
    assert shape.used <= shape.experts
    assert shape.heads % shape.kv_heads == 0
    assert known.quants and set(known.quants) <= MIXTURES
    assert known.source.count("/") == 1 or known.is_built_in
    if known.pair:
        high, low = known.pair
        assert {high, low} <= set(known.quants)
        assert known.skeleton(low).nbytes < known.skeleton(high).nbytes
    for quant in known.quants:
        layout = build_layout(known.skeleton(quant))
        assert layout.n_expert_used == shape.used
        assert len({group.layer for group in layout.groups}) == shape.blocks - shape.dense_layers
        assert not layout.resident


@pytest.mark.parametrize("arch", sorted({known.arch for known in KNOWN}))
def test_llama_cpp_loads_a_file_of_that_header(arch: str, tmp_path: Path) -> None:
    """It refuses files that lack a tensor, have one too many, or one of another shape."""
    known = next(known for known in KNOWN if known.arch == arch)
    write(tmp_path / "m.gguf", arch, small(shape_of(known)))
    model = llama_cpp.llama_model_load_from_file(
        str(tmp_path / "m.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    assert model
    llama_cpp.llama_model_free(model)


@pytest.mark.parametrize(
    ("name", "mixtures", "hidden"),
    [
        ("qwen3-30b-a3b", sorted(MIXTURES - {"F32", "F16", "BF16", "MXFP4"}), 256),
        ("gpt-oss-20b", ["MXFP4"], 256),
        ("mixtral-8x7b", ["Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_XS"], 256),
        ("ernie-4.5-21b-a3b", ["Q4_K_M", "Q8_0"], 256),
        ("glm-4.5-air", ["Q4_K_M", "Q5_K_M"], 96),
        ("deepseek-coder-v2-lite", ["Q4_K_M", "Q4_K_S", "Q6_K"], 96),
        ("ling-mini-2.0", ["Q4_K_M", "Q5_K_M"], 256),
        ("lfm2-8b-a1b", ["Q4_K_M"], 256),
    ],
)
def test_types_are_what_the_quantiser_makes(
    name: str, mixtures: list[str], hidden: int, tmp_path: Path
) -> None:
    known = known_models()[name]
    shape = small(shape_of(known), layers=17, width=256, hidden=hidden)
    source, dest = tmp_path / "f16.gguf", tmp_path / "out.gguf"
    write(source, known.arch, shape)
    for mixture in mixtures:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = file_type(mixture), 1
        assert not llama_cpp.llama_model_quantize(str(source).encode(), str(dest).encode(), params)
        made, real = skeleton("m", known.arch, shape, mixture), open_gguf(dest)
        types = {tensor.name: tensor.type_name for tensor in made.tensors.values()}
        assert types == {t.name: t.type_name for t in real.tensors.values()}, mixture
        assert made.nbytes == real.nbytes


@pytest.mark.parametrize(
    ("name", "quant", "size"),
    [  # bytes, as told by others of the files of those repositories, or by llama-bench (GiB)
        ("qwen3-30b-a3b", "Q4_K_M", 17.28 * GIB),
        ("qwen3-30b-a3b", "Q5_K_M", 20.23 * GIB),
        ("gpt-oss-20b", "MXFP4", 11.27 * GIB),
        ("gpt-oss-120b", "MXFP4", 63387346208),
        ("ling-mini-2.0", "Q4_K_M", 9911575072),
        ("lfm2-8b-a1b", "Q4_0", 4.41 * GIB),
        ("granite-3.1-1b-a400m", "Q4_K_M", 821847360),
        ("granite-3.1-1b-a400m", "Q4_0", 734.07 * (1 << 20)),
        ("hunyuan-a13b", "Q4_K_M", 45.38 * GIB),
        ("deepseek-coder-v2-lite", "Q4_K_M", 9.65 * GIB),
        ("glm-4.5-air", "Q4_K_M", 67.96 * GIB),
        ("ernie-4.5-21b-a3b", "Q4_K_M", 13331015456),
    ],
)
def test_sizes_are_those_of_real_files(name: str, quant: str, size: float) -> None:
    made = known_models()[name].skeleton(quant)
    assert made.parts[0].size == pytest.approx(size, rel=0.015)


def test_the_demo_has_about_the_header_of_its_skeleton() -> None:
    """All but the attention matrices, which are Q4_1."""
    made = known_models()["demo"].skeleton("Q8_0")
    real = open_gguf(demo.ensure())
    assert {n: t.shape for n, t in made.tensors.items()} == {
        n: t.shape for n, t in real.tensors.items()
    }
    other = {n for n, t in made.tensors.items() if t.type != real.tensors[n].type}
    assert {name.split(".")[2] for name in other} == {"attn_q", "attn_k", "attn_v", "attn_output"}


def test_a_bench_model_has_the_header_of_its_skeleton(tmp_path: Path) -> None:
    bench = BenchShape("olmoe", 3, 128, 4, 4, 32, 64, 8, 2, 512, 1e4, "whole")
    synthesize("olmoe", bench, Q.Q8_0, tmp_path / "m.gguf")
    shape = Shape(3, 128, 4, 4, 32, 512, 8, 2, 64, 4096)
    real, made = open_gguf(tmp_path / "m.gguf"), skeleton("m", "olmoe", shape, "Q8_0")

    def told(header: GGUF) -> dict[str, tuple[tuple[int, ...], int, int]]:
        return {t.name: (t.shape, t.type, t.nbytes) for t in header.tensors.values()}

    assert told(made) == told(real)
    assert build_layout(made).expert_bytes == build_layout(real).expert_bytes
    assert is_estimate(made) and not is_estimate(real)
    same = ("block_count", "embedding_length", "expert_count", "expert_used_count")
    for key in same:
        assert made.get(f"olmoe.{key}") == real.get(f"olmoe.{key}")
