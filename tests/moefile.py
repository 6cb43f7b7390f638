"""Write a small llama-architecture MoE GGUF with random weights, whole or in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

WIDTH, HIDDEN, HEADS, VOCAB = 64, 96, 4, 128


def write_moe(
    path: Path,
    *,
    layers: int = 2,
    experts: int = 4,
    used: int = 2,
    kind: str = "F32",
    alignment: int = 32,
    tensors_per_part: int = 0,
    seed: int = 0,
    dense: bool = False,
) -> Path:
    """Write the model and return the path of its (first) file.

    With `tensors_per_part`, `path` names the prefix: parts end in -00001-of-0000N.gguf.
    """
    shapes = list(_shapes(layers, 0 if dense else experts).items())
    step = tensors_per_part or len(shapes)
    parts = [shapes[i : i + step] for i in range(0, len(shapes), step)]
    names = [path]
    if tensors_per_part:
        stem, n = path.stem, len(parts)
        names = [path.with_name(f"{stem}-{i + 1:05d}-of-{n:05d}.gguf") for i in range(n)]
    for index, (name, part) in enumerate(zip(names, parts, strict=True)):
        # GGUFWriter can split by itself, but gives only the first part an alignment.
        writer = GGUFWriter(name, "llama")
        if alignment != 32:
            writer.add_custom_alignment(alignment)
        if tensors_per_part:
            writer.add_uint16("split.no", index)
            writer.add_uint16("split.count", len(parts))
            writer.add_int32("split.tensors.count", len(shapes))
        if index == 0:
            _add_metadata(writer, layers, 0 if dense else experts, used)
        for tensor, shape in part:
            _add(writer, tensor, shape, kind if "exps" in tensor else "F32", seed)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names[0]


def _add_metadata(writer: GGUFWriter, layers: int, experts: int, used: int) -> None:
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(used)


def _shapes(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Name all tensors with their numpy shapes (row length last)."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (VOCAB, WIDTH),
    }
    stack, tail = ((experts,), "_exps") if experts else ((), "")
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_{t}.weight": (WIDTH, WIDTH) for t in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.{t}_norm.weight": (WIDTH,) for t in ("attn", "ffn")}
        if experts:
            shapes[f"blk.{i}.ffn_gate_inp.weight"] = (experts, WIDTH)
        shapes[f"blk.{i}.ffn_gate{tail}.weight"] = (*stack, HIDDEN, WIDTH)
        shapes[f"blk.{i}.ffn_up{tail}.weight"] = (*stack, HIDDEN, WIDTH)
        shapes[f"blk.{i}.ffn_down{tail}.weight"] = (*stack, WIDTH, HIDDEN)
    return shapes


def _add(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: str, seed: int) -> None:
    rng = np.random.default_rng([seed, *name.encode()])
    data = rng.standard_normal(shape, dtype=np.float32) / 8 + ("norm" in name)
    dtype = GGMLQuantizationType[kind]
    if dtype is GGMLQuantizationType.F32:
        writer.add_tensor(name, data)
    else:
        writer.add_tensor(name, quantize(data, dtype), raw_dtype=dtype)
