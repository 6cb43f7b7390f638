"""How fast llama.cpp multiplies by weights of a type here: a model of nothing but holes, timed.

A data sheet's memory bandwidth is no guide to it: what a type costs to unpack, the threads, and
what else the machine does decide as much. The weights are zeros, which take as long as any.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api

from .. import _log
from ..errors import HobbitError
from ..gguf_file import GGML_TYPES
from ..memory import available_memory
from ..sizes import parse_size

# More than a processor's caches hold, as a real model's; and no more than this.
_LEAST_WEIGHTS, _MOST_WEIGHTS = 128 << 20, 768 << 20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_EMBD, _FF, _HEADS, _VOCAB = 2048, 5632, 16, 64
_PROMPT = 16
_SECONDS, _PATIENCE = 0.15, 0.6
_MIN_TOKENS = 3
# A time counts if the threads waited for a processor for less than this share of it.
_DISTURBED = 0.03
# What each of several threads keeps of its speed alone.
_SHARED = 0.9
_F32 = 0


@dataclass(frozen=True)
class Speed:
    """Bytes of weights a second: `decode` of one token, `prompt` for each of many at once.

    Not `quiet`: other programs took the processor, and it is worked out from one thread's own time.
    """

    decode: float
    prompt: float
    quiet: bool = True


def measure(kind: int, n_threads: int) -> Speed:
    """Time the multiplication by weights of ggml's type number `kind`, in less than a second."""
    with tempfile.TemporaryDirectory(prefix="hobbit-") as folder, _log.captured(False):
        path = Path(folder) / "probe.gguf"
        n_bytes = _write(path, kind)
        with _context(path) as context:
            _time(context, 1)  # the first touches every page
            api.llama_set_n_threads(context, n_threads, n_threads)
            decode = _best(context, 1, _MIN_TOKENS)
            prompt = _best(context, _PROMPT, 1) if decode is not None else None
            if decode is not None and prompt is not None:
                return Speed(n_bytes / decode, n_bytes * _PROMPT / prompt)
            api.llama_set_n_threads(context, 1, 1)
            alone = [_own_time(context, tokens) for tokens in (1, _PROMPT)]
    rate = n_bytes * n_threads * _SHARED
    return Speed(rate / alone[0], rate * _PROMPT / alone[1], quiet=False)


def _best(context: Any, n_tokens: int, times: int) -> float | None:
    """Return the least seconds of a batch; None if no time had the processor to itself."""
    found: list[float] = []
    start, done, passed = time.perf_counter(), 0, 0.0
    while passed < _SECONDS or (done < times and passed < _PATIENCE):
        waited = _waited()
        seconds = _time(context, n_tokens)
        if _waited() - waited < _DISTURBED * seconds:
            found.append(seconds)
        done, passed = done + 1, time.perf_counter() - start
    return min(found, default=None)


def _waited() -> float:
    """Return the seconds that our threads were ready to run and did not; 0 if unknown."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(file.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended
            continue
    return total * 1e-9


def _own_time(context: Any, n_tokens: int) -> float:
    """Return the seconds of processor time of a batch on the calling thread alone."""
    before = time.thread_time()
    _time(context, n_tokens)
    return time.thread_time() - before


def _write(path: Path, kind: int) -> int:
    """Write the header of a small llama and leave the rest a hole; return its weights' bytes."""
    import gguf

    type_of = GGML_TYPES[kind]
    square, wide = _EMBD * _EMBD, _EMBD * _FF
    layers = max(_weights() // ((4 * square + 3 * wide) // type_of.block * type_of.nbytes), 1)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2 * _PROMPT)
    writer.add_embedding_length(_EMBD)
    writer.add_feed_forward_length(_FF)
    writer.add_head_count(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_VOCAB)
    writer.add_tokenizer_model("no_vocab")
    total, weights = 0, 0
    for name, shape, number in _tensors(layers, kind):
        of = GGML_TYPES[number]
        n_bytes = math.prod(shape) // of.block * of.nbytes
        total += -(-n_bytes // 32) * 32
        weights += n_bytes if number == kind and len(shape) > 1 else 0
        _add(writer, name, shape, number, n_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + total + 32)
    return weights


def _weights() -> int:
    """Return the bytes to multiply with: what the last cache holds would be too fast."""
    try:
        cached = max(parse_size(file.read_text()) for file in _CACHES.glob("index*/size"))
    except (OSError, ValueError):
        cached = 0
    most = min(_MOST_WEIGHTS, available_memory()[0] // 4)
    return min(max(_LEAST_WEIGHTS, cached * 5 // 4), most)


def _tensors(layers: int, kind: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield name, shape (rows first) and type of each tensor."""
    yield "token_embd.weight", (_VOCAB, _EMBD), _F32
    yield "output_norm.weight", (_EMBD,), _F32
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", (_EMBD,), _F32
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{layer}.{name}.weight", (_EMBD, _EMBD), kind
        for name in ("ffn_gate", "ffn_up"):
            yield f"blk.{layer}.{name}.weight", (_FF, _EMBD), kind
        yield f"blk.{layer}.ffn_down.weight", (_EMBD, _FF), kind


def _add(writer: Any, name: str, shape: tuple[int, ...], number: int, n_bytes: int) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    kind = GGMLQuantizationType(number)
    if number == _F32:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes)
    else:
        stored = quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), n_bytes, raw_dtype=kind)


@contextmanager
def _context(path: Path) -> Iterator[Any]:
    """Load as hobbit's experts are computed: in anonymous memory, not repacked; one thread."""
    params = api.llama_model_default_params()
    params.load_mode = api.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = False
    model = api.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise HobbitError("llama.cpp does not load the model that measures its speed")
    try:
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 2 * _PROMPT
        settings.n_threads = settings.n_threads_batch = 1
        context = api.llama_init_from_model(model, settings)
        if not context:
            raise HobbitError("llama.cpp makes no context for the model that measures its speed")
        try:
            yield context
        finally:
            api.llama_free(context)
    finally:
        api.llama_model_free(model)


def _time(context: Any, n_tokens: int) -> float:
    """Return the seconds that so many tokens take as one batch."""
    memory = api.llama_get_memory(context)
    api.llama_memory_clear(memory, False)
    tokens = (api.llama_token * n_tokens)(*range(1, n_tokens + 1))
    start = time.perf_counter()
    status = api.llama_decode(context, api.llama_batch_get_one(tokens, n_tokens))
    seconds = time.perf_counter() - start
    if status != 0:
        raise HobbitError(f"llama_decode returned {status} while its speed was measured")
    return seconds
