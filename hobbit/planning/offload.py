"""What -ngl would put on a device, from a model's header alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ..layout import Layout
from ..memory import Line
from ..offload import Offloaded
from .parts import Context, compute_bytes, kv_bytes, router_bytes

_LAYER = re.compile(r"^blk\.(\d+)\.", re.ASCII)


def offloaded(layout: Layout, context: Context, n_gpu_layers: int, device: str) -> Offloaded:
    """Return what goes there: the last layers, of which llama.cpp counts the output as one.

    Below 0 are all. Of the buffers it is an upper bound: those of a ubatch computed there alone.
    """
    gguf = layout.gguf
    count = gguf.get(f"{gguf.arch}.block_count", 0)
    n_layers = count if isinstance(count, int) else 0
    asked = n_layers + 1 if n_gpu_layers < 0 else n_gpu_layers
    first = max(n_layers + 1 - asked, 0)
    if first > n_layers:
        return Offloaded(device, 0, 0, 0)
    stays = {*layout.streamed, *layout.companions}
    dense = _again(layout)
    for name, tensor in gguf.tensors.items():
        match = _LAYER.match(name)
        there = int(match[1]) >= first if match else name.startswith("output")
        dense += tensor.nbytes if there and name not in stays else 0
    return Offloaded(device, dense, kv_bytes(gguf, context, first), compute_bytes(gguf, context))


def left_here(parts: Sequence[Line], layout: Layout, there: Offloaded) -> list[Line]:
    """Return the fixed parts of a plan without what goes there; buffers are needed here too.

    And copies of the routers, by which is predicted.
    """
    again = _again(layout) if there.dense else 0
    copies = router_bytes(layout) if there.dense else 0
    gone = {"dense": there.dense - again, "kv": there.kv, "scratch": -copies}
    return [replace(part, bytes=part.bytes - gone.get(part.name, 0)) for part in parts]


def _again(layout: Layout) -> int:
    """Bytes of the embeddings, where they also make the logits: those lie here and there."""
    embedding = layout.gguf.tensors.get("token_embd.weight")
    tied = embedding is not None and "output.weight" not in layout.gguf.tensors
    return embedding.nbytes if embedding is not None and tied else 0
