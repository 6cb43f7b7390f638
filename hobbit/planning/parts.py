"""What a model will take of memory besides its experts' cache, from its header alone.

Pure: a Layout and the context's settings in, bytes out. The formulas for llama.cpp's buffers were
fitted to what llama.cpp 0.3.36's allocator says of forty shapes (tests compare them): it keeps two
buffers, each as large as the largest set of tensors alive at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ..arena import Arena
from ..gguf_file import GGML_TYPES, GGUF, padded
from ..layout import ExpertMatrix, Layout
from ..memory import Line, SlotBytes

# native/replica.c, moe.c and reader.c: what they may allocate.
_BATCH_BYTES = 32 << 20
_ROW_TABLE_BYTES = 32 << 20
_BOUNCE_BYTES = (2 << 20) + 2 * 4096
_IO_THREADS = 4
# native/ahead.c: layers that `auto` looks ahead, and a pair of layers besides its matrix.
_DEPTH, _LINK_BYTES = 2, 40
# An interpreter with llama.cpp and numpy in it, and what the plan keeps for its growth.
PROCESS_RESIDENT = 80 << 20
PROCESS_GROWTH = 48 << 20
PAGE_TABLE_SHARE = 400
_PROCESS_STEP = 16 << 20

# What direct reads are usually aligned to.
_SECTOR, _PAGE = 512, 4096
_F16 = 1
# Architectures that llama.cpp gives a second mask, for the layers that see a window.
_WINDOWED = {
    "afmoe", "cohere2moe", "exaone-moe", "gemma4", "gpt-oss", "granite_swa", "laguna", "llama4",
    "maple", "mellum", "mimo2", "smallthinker", "step35",
}  # fmt: skip
_LAYER = re.compile(r"^blk\.(\d+)\.(\w+)", re.ASCII)
_KEYS = ("attn_k", "attn_qkv", "attn_kv_a_mqa", "attn_kv_a")


@dataclass(frozen=True)
class Context:
    """The settings that memory depends on: tokens of context, of a ubatch, ggml types of K and V.

    `flash` is flash attention; `io_threads` 0 is as many as are the default.
    """

    n_ctx: int = 4096
    n_ubatch: int = 512
    type_k: int = _F16
    type_v: int = _F16
    flash: bool = False
    io_threads: int = 0


def fixed_parts(
    layout: Layout, context: Context, cap_bytes: int, arena: Arena | None = None
) -> list[Line]:
    """Return the parts of the plan that do not depend on the cache, as a loaded model has them."""
    gguf = layout.gguf
    compute = compute_bytes(gguf, context) + output_bytes(gguf)
    lines = [
        Line("dense", layout.dense_bytes, "weights every token needs, in anonymous memory"),
        Line("kv", kv_bytes(gguf, context), f"context of {context.n_ctx} tokens"),
        Line("compute", compute, "buffers of llama.cpp (estimated)"),
    ]
    if layout.groups:
        predicting = _prediction_bytes(layout)
        scratch = scratch_bytes(layout, context.n_ubatch, context.io_threads) + predicting
        scratch += arena.staging(layout) if arena else 0
        lines.append(Line("scratch", scratch, "gathered rows, reads in flight"))
    if arena is not None and arena.device.shares_memory:
        lines.append(arena.line)
    return [*lines, process_line(PROCESS_RESIDENT + PROCESS_GROWTH, cap_bytes)]


def process_line(process_bytes: int, cap_bytes: int) -> Line:
    """Return what the process itself takes, in coarse steps, with the page tables of the cap.

    Coarse, so that the cap that an error names works when it is typed.
    """
    process = process_bytes + cap_bytes // PAGE_TABLE_SHARE
    return Line("process", padded(process, _PROCESS_STEP), "interpreter and libraries")


def output_bytes(gguf: GGUF, rows: int = 1) -> int:
    """Logits of so many tokens in llama.cpp, and their copies in Python."""
    return 4 * _vocabulary(gguf) * (rows + 8)


def scratch_bytes(layout: Layout, n_ubatch: int, io_threads: int = 0) -> int:
    """Upper bound of the plugin's work space for one ubatch, predicting left out."""
    used = layout.n_expert_used
    # ggml's table has an entry for each slot and pair: there are no more slots than experts.
    experts = sum(group.n_expert for group in layout.groups)
    tables = min(_ROW_TABLE_BYTES, 8 * n_ubatch * used * experts)
    return batch_bytes(layout, n_ubatch) + tables + (io_threads or _IO_THREADS) * _BOUNCE_BYTES


def batch_bytes(layout: Layout, n_ubatch: int) -> int:
    """Upper bound of the rows that are gathered and computed at a time."""
    row = 0
    for group in layout.groups:
        widths = [matrix.ne1 for matrix in group.matrices]
        row = max(row, 4 * (sum(widths) + 3 * max(widths) + 2 * group.matrices[0].ne0))
    rows = max(min(_BATCH_BYTES // row, n_ubatch * layout.n_expert_used), n_ubatch)
    return rows * row * 4 // 3


def slot_bytes(layout: Layout) -> list[SlotBytes]:
    """Return the bytes of a slot of each group, with room to read each matrix where it lies."""
    low = layout.low.groups if layout.low else ()
    sizes = []
    for group in layout.groups:
        copy = low[group.index].matrices if low else ()
        sizes.append(SlotBytes(_slot(group.matrices), _slot(copy)))
    return sizes


def _slot(matrices: tuple[ExpertMatrix, ...]) -> int:
    """As native/catalog.c: where matrices are read in place, those and the sectors around them."""
    at = 0
    for matrix in matrices:
        in_place = matrix.file_bytes % _SECTOR == 0
        tail = matrix.expert_bytes - matrix.file_bytes
        lead = (matrix.offset - tail) % _SECTOR if in_place else 0
        at = padded(padded(at, _SECTOR) + lead + matrix.expert_bytes, _SECTOR)
    return padded(at, _PAGE)


def kv_bytes(gguf: GGUF, context: Context, first: int = 0) -> int:
    """Bytes of the context: keys and values of the layers that attend, states of the others.

    Of the layers from `first` on.
    """
    cells = padded(context.n_ctx, 256)
    key, value = GGML_TYPES[context.type_k], GGML_TYPES[context.type_v]
    total, names = 0, {layer: found for layer, found in _names(gguf).items() if layer >= first}
    for layer in range(first, _layers(gguf)):
        n_key, n_value = _widths(gguf, layer, names.get(layer, set()))
        total += cells * n_key // key.block * key.nbytes
        total += cells * n_value // value.block * value.nbytes
    return total + _state_bytes(gguf, names)


def compute_bytes(gguf: GGUF, context: Context) -> int:
    """About what llama.cpp allocates to compute one ubatch."""
    tokens = min(context.n_ubatch, context.n_ctx)
    cells = padded(context.n_ctx, 256)
    hidden = 4 * tokens * max(_number(gguf, "embedding_length"), 1)
    logits = 4 * tokens * _vocabulary(gguf)
    mask = 4 * tokens * cells
    scores = 0 if context.flash else mask * _heads(gguf)
    attention = 7 * hidden + (0 if context.flash else scores + mask)
    windows = 3 * mask if gguf.arch in _WINDOWED else 0
    used = _number(gguf, "expert_used_count")
    inner = 4 * tokens * used * _number(gguf, "expert_feed_forward_length", "feed_forward_length")
    experts = mask + max(3 * used * hidden, 6 * inner)
    return windows + max(logits, attention) + max(logits + 4 * hidden, attention, experts)


def _layers(gguf: GGUF) -> int:
    """Layers that are run: those that predict further tokens are not."""
    return _number(gguf, "block_count") - _number(gguf, "nextn_predict_layers")


def _widths(gguf: GGUF, layer: int, names: set[str]) -> tuple[int, int]:
    """Return how many numbers a token's key and value have in a layer with these tensors."""
    if not names & {*_KEYS} or any(name.startswith("ssm_") for name in names):
        return 0, 0
    rank = _number(gguf, "attention.kv_lora_rank")
    if rank and "attn_k_b" in names:
        return rank + _number(gguf, "rope.dimension_count"), 0
    heads = _at(gguf.get(f"{gguf.arch}.attention.head_count_kv"), layer) or _heads(gguf, layer)
    head = _number(gguf, "embedding_length") // max(_heads(gguf, layer), 1)
    key = _number(gguf, "attention.key_length") or head
    return heads * key, heads * (_number(gguf, "attention.value_length") or head)


def _state_bytes(gguf: GGUF, layers: dict[int, set[str]]) -> int:
    """Bytes of the states of recurrent and of convolving layers, of one sequence."""
    inner, state = _number(gguf, "ssm.inner_size"), _number(gguf, "ssm.state_size")
    kernel, groups = _number(gguf, "ssm.conv_kernel"), _number(gguf, "ssm.group_count")
    recurrent = 4 * (inner * state + max(kernel - 1, 0) * (inner + 2 * groups * state))
    short = 4 * max(_number(gguf, "shortconv.l_cache") - 1, 0) * _number(gguf, "embedding_length")
    total = 0
    for names in layers.values():
        total += recurrent if any(name.startswith("ssm_") for name in names) else 0
        total += short if any(name.startswith("shortconv") for name in names) else 0
    return total


def _names(gguf: GGUF) -> dict[int, set[str]]:
    """Return the names of each layer's tensors."""
    found: dict[int, set[str]] = {}
    for name in gguf.tensors:
        if match := _LAYER.match(name):
            found.setdefault(int(match[1]), set()).add(match[2])
    return found


def _prediction_bytes(layout: Layout) -> int:
    """Bytes of the gate predictor, which `auto` tries: a router of each pair of layers."""
    width = _number(layout.gguf, "embedding_length")
    experts = max(group.n_expert for group in layout.groups)
    link = 4 * (experts * width + 2 * experts + 1) + _LINK_BYTES
    return len(layout.groups) * (_DEPTH * link + 4 * width)


def router_bytes(layout: Layout) -> int:
    """Upper bound of the routers' numbers, which are copied here from the devices they are on."""
    width = _number(layout.gguf, "embedding_length")
    return sum(4 * (group.n_expert * (width + 2) + width) for group in layout.groups)


def _vocabulary(gguf: GGUF) -> int:
    embedding = gguf.tensors.get("token_embd.weight")
    return embedding.shape[1] if embedding is not None and len(embedding.shape) > 1 else 0


def _heads(gguf: GGUF, layer: int | None = None) -> int:
    """Return the attention heads of a layer, or the most that any has."""
    value = gguf.get(f"{gguf.arch}.attention.head_count")
    if isinstance(value, list) and layer is None:
        return max((n for n in value if isinstance(n, int)), default=0)
    return _at(value, layer or 0)


def _number(gguf: GGUF, *names: str) -> int:
    """Return the first of these figures that is given: the largest where it is one a layer."""
    for name in names:
        value = gguf.get(f"{gguf.arch}.{name}")
        values = value if isinstance(value, list) else [value]
        numbers = [int(n) for n in values if isinstance(n, int | float) and math.isfinite(n)]
        if numbers and max(numbers) > 0:
            return max(numbers)
    return 0


def _at(value: Any, layer: int) -> int:
    """Return a figure that is the same in all layers or listed by layer."""
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else 0
    return int(value) if isinstance(value, int) else 0
