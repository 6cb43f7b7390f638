"""The header of a model that is not here, made from what models.toml says of it.

It is the object that `open_gguf` returns, with the tensors and the metadata that a plan asks for;
nothing can be read through it. Where its vocabulary and data would be is an estimate.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..gguf_file import DEFAULT_ALIGNMENT, GGML_TYPES, GGUF, Entry, Part, Tensor, padded
from .mixtures import Model, file_type, tensor_types
from .shape import Shape, tensor_shapes

_ESTIMATE = "hobbit.estimate"
# A token and its merge, with their lengths and types, in the usual vocabularies.
_BYTES_A_TOKEN = 48


def skeleton(name: str, arch: str, shape: Shape, mixture: str) -> GGUF:
    """Return the header that a file of this shape and quantisation would have."""
    shapes = tensor_shapes(arch, shape)
    model = Model(
        layers=shape.blocks,
        experts=shape.experts,
        heads_per_kv=shape.heads // max(shape.kv_heads, 1),
        tied=shape.tied,
    )
    types = tensor_types(mixture, model, shapes)
    at = data = padded(4096 + shape.vocab * _BYTES_A_TOKEN, DEFAULT_ALIGNMENT)
    tensors = {}
    for tensor, dims in shapes.items():
        kind = GGML_TYPES[types[tensor]]
        nbytes = math.prod(dims) // kind.block * kind.nbytes
        tensors[tensor] = Tensor(tensor, dims, types[tensor], 0, at, nbytes)
        at = padded(at + nbytes, DEFAULT_ALIGNMENT)
    values = _metadata(name, arch, shape)
    values |= {"general.file_type": file_type(mixture), _ESTIMATE: True}
    entries = {key: Entry(value, 0, 0) for key, value in values.items()}
    part = Part(Path(f"{name}-{mixture}.gguf"), at, data, DEFAULT_ALIGNMENT)
    return GGUF([part], entries, tensors)


def is_estimate(gguf: GGUF) -> bool:
    """Say whether a header was made here, from a shape, and not read from a file."""
    return bool(gguf.get(_ESTIMATE, False))


def _metadata(name: str, arch: str, s: Shape) -> dict[str, Any]:
    """Return what llama.cpp would read to know the shape, and the memory that a context takes."""
    kv_heads: int | list[int] = s.kv_heads
    if s.attention:
        kv_heads = [s.kv_heads if s.attends(layer) else 0 for layer in range(s.blocks)]
    own: dict[str, Any] = {
        "block_count": s.blocks,
        "context_length": s.context,
        "embedding_length": s.embd,
        "feed_forward_length": s.dense_ff or s.expert_ff,
        "attention.head_count": s.heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": s.head_dim + s.rope_dim,
        "attention.value_length": s.value_dim or s.head_dim,
        "expert_count": s.experts,
        "expert_used_count": s.used,
        "expert_feed_forward_length": s.expert_ff,
        "vocab_size": s.vocab,
    }
    optional = {
        "expert_shared_count": s.shared_experts,
        "expert_shared_feed_forward_length": s.shared_ff,
        "leading_dense_block_count": s.dense_layers,
        "nextn_predict_layers": s.nextn,
        "attention.sliding_window": s.window,
        "attention.kv_lora_rank": s.kv_rank,
        "attention.q_lora_rank": s.q_rank,
        "rope.dimension_count": s.rope_dim,
        "shortconv.l_cache": s.conv_kernel,
    }
    own |= {key: value for key, value in optional.items() if value}
    general = {"general.architecture": arch, "general.name": name}
    return general | {f"{arch}.{key}": value for key, value in own.items()}
