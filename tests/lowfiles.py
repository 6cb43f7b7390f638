"""Models for the tests of the low-precision copy, and ggml's quantiser reached without hobbit."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import moefile
import numpy as np
import pytest

from hobbit.gguf_file import GGML_TYPES, open_gguf
from hobbit.layout import ExpertMatrix, Layout, build_layout


def wide_model(path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Path:
    """Write a model whose rows are whole blocks of 256."""
    monkeypatch.setattr(moefile, "WIDTH", 256)
    monkeypatch.setattr(moefile, "HIDDEN", 512)
    return moefile.write_moe(path, **({"kind": "Q8_0"} | more))


def layout_of(path: Path) -> Layout:
    return build_layout(open_gguf(path))


def floats(layout: Layout, matrix: ExpertMatrix, expert: int) -> np.ndarray:
    """Return one expert's weights [ne1, ne0], dequantised by gguf-py."""
    with open(layout.gguf.parts[matrix.part].path, "rb") as file:
        file.seek(matrix.offset + expert * matrix.expert_bytes)
        data = np.frombuffer(file.read(matrix.expert_bytes), np.uint8)
    kind = gguf.GGMLQuantizationType(matrix.type)
    return gguf.quants.dequantize(data.reshape(matrix.ne1, -1), kind).astype(np.float32)


def ggml() -> ctypes.CDLL:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / f"libggml-base.{suffix}"))


class _Context(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.POINTER(ctypes.c_void_p)))


def ggml_loads(path: Path) -> int:
    """Load a GGUF file, with its data, by ggml's own reader; return the number of its tensors."""
    library, context = ggml(), ctypes.c_void_p()
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Context]
    library.gguf_get_n_tensors.restype = ctypes.c_int64
    library.gguf_get_n_tensors.argtypes = [ctypes.c_void_p]
    file = library.gguf_init_from_file(bytes(path), _Context(False, ctypes.pointer(context)))
    assert file, "ggml does not take the file"
    return int(library.gguf_get_n_tensors(file))


def ggml_quantize(weights: np.ndarray, kind: int, importance: np.ndarray | None) -> bytes:
    """Quantise rows all at once with ggml_quantize_chunk."""
    chunk = ggml().ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rows, width = weights.shape
    weights = np.ascontiguousarray(weights, np.float32)
    out = np.empty(rows * width // GGML_TYPES[kind].block * GGML_TYPES[kind].nbytes, np.uint8)
    columns = None if importance is None else importance.ctypes.data
    chunk(kind, weights.ctypes.data, out.ctypes.data, 0, rows, width, columns)
    return out.tobytes()
