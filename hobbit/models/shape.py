"""The tensors of a MoE model, from the figures that decide their sizes.

Which tensors an architecture has is what llama.cpp asks of its files; the names are theirs too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """The figures. Zero means that the model has no such thing; heads are counted a layer.

    `attention` lists the layers that attend, if not all do (the others convolve, `conv_kernel`
    wide). `nextn` layers, after the last one, predict further tokens: they are in the file, but
    llama.cpp does not run them. With `kv_rank` keys and values are made from so many numbers (MLA);
    `head_dim` is then that of a key without its rotated part, `rope_dim`.
    """

    layers: int
    embd: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int
    used: int
    expert_ff: int
    context: int
    shared_ff: int = 0
    shared_experts: int = 0
    dense_layers: int = 0
    dense_ff: int = 0
    tied: bool = False
    nextn: int = 0
    window: int = 0
    kv_rank: int = 0
    q_rank: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    attention: tuple[int, ...] = ()
    conv_kernel: int = 0

    @property
    def blocks(self) -> int:
        """Layers of the file."""
        return self.layers + self.nextn

    def attends(self, layer: int) -> bool:
        return not self.attention or layer in self.attention


@dataclass(frozen=True)
class _Kind:
    """What an architecture has besides the plain tensors of a layer."""

    q_norm: str = ""  # of the "whole" vector, or of each "head"
    qkv: str = "split"  # or "fused"
    qkv_bias: bool = False
    output_bias: bool = False
    norm_bias: bool = False
    ffn_norm: str = "ffn_norm"
    output_norm: str = "output_norm"
    router_bias: bool = False
    expert_bias: bool = False
    selection_bias: bool = False
    shared_gate: bool = False
    sinks: bool = False
    logit_bias: bool = False
    rope_factors: bool = False


_KINDS = {
    "bailingmoe": _Kind(),
    "bailingmoe2": _Kind(qkv="fused", q_norm="head", selection_bias=True),
    "deepseek": _Kind(),
    "deepseek2": _Kind(),
    "dots1": _Kind(q_norm="head", selection_bias=True),
    "ernie4_5-moe": _Kind(selection_bias=True),
    "glm4moe": _Kind(qkv_bias=True, ffn_norm="post_attention_norm", selection_bias=True),
    "gpt-oss": _Kind(
        qkv_bias=True,
        output_bias=True,
        ffn_norm="post_attention_norm",
        router_bias=True,
        expert_bias=True,
        sinks=True,
    ),
    "granitemoe": _Kind(),
    "hunyuan-moe": _Kind(q_norm="head"),
    "lfm2moe": _Kind(q_norm="head", output_norm="token_embd_norm", selection_bias=True),
    "llama": _Kind(),
    "olmoe": _Kind(q_norm="whole"),
    "phimoe": _Kind(
        qkv_bias=True, output_bias=True, norm_bias=True, logit_bias=True, rope_factors=True
    ),
    "qwen2moe": _Kind(qkv_bias=True, shared_gate=True),
    "qwen3moe": _Kind(q_norm="head"),
}

ARCHITECTURES = frozenset(_KINDS)


def tensor_shapes(arch: str, shape: Shape) -> dict[str, Dims]:
    """Return every tensor's name and shape, the row's length first, as in a GGUF file."""
    kind, s = _KINDS[arch], shape
    found: dict[str, Dims] = {"token_embd.weight": (s.embd, s.vocab)}
    if kind.rope_factors:
        factors = (s.head_dim // 2,)
        found |= {"rope_factors_long.weight": factors, "rope_factors_short.weight": factors}
    for layer in range(s.blocks):
        for name, dims in _layer(kind, s, layer):
            found[f"blk.{layer}.{name}"] = dims
    found[f"{kind.output_norm}.weight"] = (s.embd,)
    if kind.norm_bias:
        found[f"{kind.output_norm}.bias"] = (s.embd,)
    if not s.tied:
        found["output.weight"] = (s.embd, s.vocab)
    if kind.logit_bias:
        found["output.bias"] = (s.vocab,)
    return found


def parameters(arch: str, shape: Shape, trunk: bool = True) -> int:
    """Count the parameters; `trunk`: without the layers that predict further tokens."""
    found = tensor_shapes(arch, shape)
    first = shape.layers if trunk else shape.blocks
    beyond = tuple(f"blk.{layer}." for layer in range(first, shape.blocks))
    return sum(math.prod(dims) for name, dims in found.items() if not name.startswith(beyond))


def _layer(kind: _Kind, s: Shape, layer: int) -> Iterator[tuple[str, Dims]]:
    yield from _norm(kind, "attn_norm", s.embd)
    if not s.attends(layer):
        yield "shortconv.conv.weight", (s.conv_kernel, s.embd)
        yield "shortconv.in_proj.weight", (s.embd, 3 * s.embd)
        yield "shortconv.out_proj.weight", (s.embd, s.embd)
    elif s.kv_rank:
        yield from _latent_attention(s)
    else:
        yield from _attention(kind, s)
    yield from _norm(kind, kind.ffn_norm, s.embd)
    if layer < s.dense_layers:
        yield from _feed_forward("", s.embd, s.dense_ff)
    else:
        yield from _experts(kind, s)
    if layer >= s.layers:
        yield from _next_token(s)


def _norm(kind: _Kind, name: str, length: int) -> Iterator[tuple[str, Dims]]:
    yield f"{name}.weight", (length,)
    if kind.norm_bias:
        yield f"{name}.bias", (length,)


def _attention(kind: _Kind, s: Shape) -> Iterator[tuple[str, Dims]]:
    widths = {"q": s.heads * s.head_dim, "k": s.kv_heads * s.head_dim, "v": s.kv_heads * s.head_dim}
    projected = {"qkv": sum(widths.values())} if kind.qkv == "fused" else widths
    for name, width in projected.items():
        yield f"attn_{name}.weight", (s.embd, width)
        if kind.qkv_bias:
            yield f"attn_{name}.bias", (width,)
    yield "attn_output.weight", (widths["q"], s.embd)
    if kind.output_bias:
        yield "attn_output.bias", (s.embd,)
    if kind.q_norm:
        for name in ("q", "k"):
            yield (
                f"attn_{name}_norm.weight",
                (widths[name] if kind.q_norm == "whole" else s.head_dim,),
            )
    if kind.sinks:
        yield "attn_sinks.weight", (s.heads,)


def _latent_attention(s: Shape) -> Iterator[tuple[str, Dims]]:
    key = s.head_dim + s.rope_dim
    if s.q_rank:
        yield "attn_q_a.weight", (s.embd, s.q_rank)
        yield "attn_q_a_norm.weight", (s.q_rank,)
        yield "attn_q_b.weight", (s.q_rank, s.heads * key)
    else:
        yield "attn_q.weight", (s.embd, s.heads * key)
    yield "attn_kv_a_mqa.weight", (s.embd, s.kv_rank + s.rope_dim)
    yield "attn_kv_a_norm.weight", (s.kv_rank,)
    yield "attn_kv_b.weight", (s.kv_rank, s.heads * (s.head_dim + s.value_dim))
    yield "attn_output.weight", (s.heads * s.value_dim, s.embd)


def _feed_forward(suffix: str, width: int, hidden: int) -> Iterator[tuple[str, Dims]]:
    yield f"ffn_gate{suffix}.weight", (width, hidden)
    yield f"ffn_up{suffix}.weight", (width, hidden)
    yield f"ffn_down{suffix}.weight", (hidden, width)


def _experts(kind: _Kind, s: Shape) -> Iterator[tuple[str, Dims]]:
    yield "ffn_gate_inp.weight", (s.embd, s.experts)
    if kind.router_bias:
        yield "ffn_gate_inp.bias", (s.experts,)
    if kind.selection_bias:
        yield "exp_probs_b.bias", (s.experts,)
    for name, dims in _feed_forward("_exps", s.embd, s.expert_ff):
        yield name, (*dims, s.experts)
        if kind.expert_bias:
            yield name.replace(".weight", ".bias"), (dims[1], s.experts)
    if s.shared_ff:
        yield from _feed_forward("_shexp", s.embd, s.shared_ff)
    if kind.shared_gate:
        yield "ffn_gate_inp_shexp.weight", (s.embd,)


def _next_token(s: Shape) -> Iterator[tuple[str, Dims]]:
    yield "nextn.eh_proj.weight", (2 * s.embd, s.embd)
    yield "nextn.embed_tokens.weight", (s.embd, s.vocab)
    yield "nextn.enorm.weight", (s.embd,)
    yield "nextn.hnorm.weight", (s.embd,)
    yield "nextn.shared_head_head.weight", (s.embd, s.vocab)
    yield "nextn.shared_head_norm.weight", (s.embd,)
