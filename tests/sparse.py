"""Models of real sizes whose data are holes: a header to plan with, or for llama.cpp to measure."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import tiny
from gguf import GGMLQuantizationType as Q

from hobbit.gguf_file import GGML_TYPES


def vocabulary(n_vocab: int) -> dict[str, tiny.Value]:
    """Return a vocabulary of that many tokens."""
    words = tiny.vocabulary()
    more = n_vocab - tiny.N_VOCAB
    words["tokenizer.ggml.tokens"] += [f"\u2581more{i}" for i in range(more)]
    words["tokenizer.ggml.scores"] += [-1.0] * more
    words["tokenizer.ggml.token_type"] += [1] * more
    return words


def make(
    path: Path,
    arch: str,
    n_vocab: int = 32000,
    experts: Q = Q.Q4_0,
    dense: Q = Q.Q8_0,
    **shape: int,
) -> Path:
    """Write the header of a model of this shape, and let the rest of the file be a hole."""
    own = {f"{arch}.vocab_size": n_vocab, f"{arch}.context_length": 131072}
    kv = tiny.metadata(arch, **shape) | vocabulary(n_vocab) | own
    shapes = tiny._kept(
        tiny.tensor_list(kv), arch=arch, fused=False, scales=False, biases=arch == "gpt-oss"
    )
    writer, total = gguf.GGUFWriter(str(path), arch), 0
    tiny._add_kv(writer, kv)
    for name, dims in shapes.items():
        kind = experts if tiny._EXPERT.match(name) else dense if tiny._DENSE.match(name) else Q.F32
        of = GGML_TYPES[kind.value]
        nbytes = math.prod(dims) // of.block * of.nbytes
        total += -(-nbytes // 32) * 32
        rows = tuple(reversed(dims))
        if kind == Q.F32:
            writer.add_tensor_info(name, rows, np.dtype(np.float32), nbytes)
        else:
            stored = gguf.quant_shape_to_byte_shape(rows, kind)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + total + 32)
    return path
