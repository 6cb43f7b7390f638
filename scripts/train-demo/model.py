"""SmolLM2-135M in PyTorch: the dense model, and the same model with its FFNs split into experts.

The split model never gathers an expert's weights. An expert is a subset of the dense FFN's neurons,
so a token's experts amount to a mask over neurons: hidden units are computed once, weighted by the
mask, and every expert's low-rank correction is added. The shared expert is one more expert whose
weight is always 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS, WIDTH, NEURONS, HEADS, KV_HEADS, HEAD = 30, 576, 1536, 9, 3, 64
ROPE_BASE, EPSILON = 100_000.0, 1e-5
TOP = 2


@dataclass
class Layer:
    """One transformer block's frozen weights; matrices are bfloat16, norms float32."""

    attn_norm: Tensor
    attn_q: Tensor
    attn_k: Tensor
    attn_v: Tensor
    attn_output: Tensor
    ffn_norm: Tensor
    ffn_gate: Tensor
    ffn_up: Tensor
    ffn_down: Tensor

    def attention(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x.shape
        n = rms_norm(x, self.attn_norm).bfloat16()
        q = rotate(F.linear(n, self.attn_q).view(batch, length, HEADS, HEAD), rope)
        k = rotate(F.linear(n, self.attn_k).view(batch, length, KV_HEADS, HEAD), rope)
        v = F.linear(n, self.attn_v).view(batch, length, KV_HEADS, HEAD)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), self.attn_output)

    def hidden_units(self, n: Tensor) -> Tensor:
        return F.silu(F.linear(n, self.ffn_gate)) * F.linear(n, self.ffn_up)


@dataclass
class Dense:
    embedding: Tensor
    output_norm: Tensor
    layers: list[Layer]

    @classmethod
    def load(cls, path: Path) -> Dense:
        tensors = {}
        for t in gguf.GGUFReader(path).tensors:
            array = gguf.quants.dequantize(t.data, t.tensor_type)
            tensor = torch.from_numpy(np.array(array, dtype=np.float32))
            tensors[t.name.removesuffix(".weight")] = (
                tensor if array.ndim == 1 else tensor.bfloat16()
            )
        names = Layer.__dataclass_fields__
        layers = [Layer(**{n: tensors[f"blk.{i}.{n}"] for n in names}) for i in range(LAYERS)]
        return cls(tensors["token_embd"], tensors["output_norm"], layers)

    def ffn(self, index: int, n: Tensor) -> Tensor:
        layer = self.layers[index]
        return F.linear(layer.hidden_units(n), layer.ffn_down)


class Expert(torch.nn.Module):
    """What is learned for one layer: a router, and how each expert differs from its dense neurons.

    `member` says which neurons an expert holds (the last row is the shared expert), `scale`
    rescales their down columns, and `inner`, `outer` are the factors of a low-rank addition to the
    down matrix. Parameters are kept in units of the calibration statistics, so that one learning
    rate suits all.
    """

    def __init__(self, member: Tensor, rank: int, spread: dict[str, Tensor]) -> None:
        super().__init__()
        experts = member.shape[0]
        self.rank = rank
        self.register_buffer("member", member)
        self.register_buffer("input_spread", spread["input"])
        self.register_buffer("unit_spread", spread["unit"])
        self.register_buffer("output_spread", spread["output"])
        self.router = torch.nn.Parameter(torch.zeros(experts - 1, WIDTH))
        self.scale = torch.nn.Parameter(torch.ones(experts, NEURONS))
        width = member.sum(1).max()
        self.inner = torch.nn.Parameter(torch.randn(experts * rank, NEURONS) / width.sqrt())
        self.outer = torch.nn.Parameter(torch.zeros(experts * rank, WIDTH))

    def routing_matrix(self) -> Tensor:
        return self.router / self.input_spread

    def inner_matrix(self) -> Tensor:
        member = self.member.repeat_interleave(self.rank, 0)
        return self.inner * member / self.unit_spread

    def outer_matrix(self) -> Tensor:
        return self.outer * self.output_spread

    def route(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Return all experts' probabilities and the weights of the chosen ones, 0 elsewhere."""
        probability = F.linear(n.float(), self.routing_matrix()).softmax(-1)
        return probability, top_weights(probability)

    def combine(self, units: Tensor, weight: Tensor, down: Tensor) -> Tensor:
        weight = F.pad(weight, (0, 1), value=1.0).bfloat16()
        mask = weight @ (self.scale * self.member).bfloat16()
        low = F.linear(units, self.inner_matrix().bfloat16())
        low = (low.unflatten(-1, (-1, self.rank)) * weight[..., None]).flatten(-2)
        return F.linear(units * mask, down) + low @ self.outer_matrix().bfloat16()


class Split(torch.nn.Module):
    """The dense model with `experts` in place of its FFNs."""

    def __init__(self, dense: Dense, experts: list[Expert]) -> None:
        super().__init__()
        self.dense = dense
        self.experts = torch.nn.ModuleList(experts)
        self.routes: list[tuple[Tensor, Tensor]] = []

    def ffn(self, index: int, n: Tensor) -> Tensor:
        layer, expert = self.dense.layers[index], self.experts[index]
        self.routes.append(expert.route(n))
        return expert.combine(layer.hidden_units(n), self.routes[-1][1], layer.ffn_down)


def top_weights(probability: Tensor) -> Tensor:
    """Keep the TOP most probable experts, scaled to sum to 1."""
    top, chosen = probability.topk(TOP, -1)
    return torch.zeros_like(probability).scatter(-1, chosen, top / top.sum(-1, keepdim=True))


def balance_loss(probability: Tensor, weight: Tensor) -> Tensor:
    """A layer's load times its probability, summed over experts: least, 1, when both are even."""
    load = (weight > 0).float().flatten(0, -2).mean(0) / TOP
    return len(load) * (load * probability.flatten(0, -2).mean(0)).sum()


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


def rope_table(length: int) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(length), ROPE_BASE ** -(torch.arange(0, HEAD, 2) / HEAD))
    return angle.cos()[None, :, None], angle.sin()[None, :, None]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring pairs, ggml's NORM order."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = rope
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def residuals(model: Dense | Split, ids: Tensor) -> Iterator[Tensor]:
    """Yield the residual stream after each layer, float32 [batch, length, WIDTH]."""
    dense = model.dense if isinstance(model, Split) else model
    rope = rope_table(ids.shape[1])
    x = dense.embedding[ids].float()
    for index, layer in enumerate(dense.layers):
        x = x + layer.attention(x, rope)
        n = rms_norm(x, layer.ffn_norm).bfloat16()
        x = x + model.ffn(index, n)
        yield x
