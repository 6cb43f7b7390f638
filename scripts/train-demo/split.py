"""Split every dense FFN into a shared expert and routed experts, one layer after the other.

usage: python split.py WORK SOURCE.gguf

Per layer: tokens are clustered by the neurons they use, a linear router is fitted to the clusters,
each expert takes the neurons that its tokens use most, and then router, scales and low-rank
corrections are fitted to the dense FFN's output. Layers see the errors of the layers before them.
Writes WORK/split.pt.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import NEURONS, Dense, Expert, Layer, balance_loss, rms_norm, rope_table, top_weights
from torch import Tensor

EXPERTS = 16
EXPERT_NEURONS = 384
SHARED_NEURONS = 512
RANK = 12
TOKENS, LENGTH = 24576, 256
STEPS, BATCH = 120, 2048
CHUNK = 8192  # tokens whose hidden units are computed at a time
# A higher sharpness gives the first expert more of the weight.
SHARPNESS = 14.0
BALANCE_SHARE = 1e-4


def windows(work: Path) -> Tensor:
    """Return evenly spaced training windows, the same number from each domain."""
    with np.load(work / "tokens.npz") as file:
        texts = [torch.from_numpy(file[n].astype(np.int64)) for n in file if n.endswith(".train")]
    per_text = TOKENS // LENGTH // len(texts)
    starts = [torch.linspace(0, len(t) - LENGTH, per_text).long() for t in texts]
    return torch.stack([t[s : s + LENGTH] for t, at in zip(texts, starts, strict=True) for s in at])


def cluster(features: Tensor) -> Tensor:
    """Spherical k-means; return each token's similarity to every centre."""
    centres = features[torch.randperm(len(features))[:EXPERTS]]
    for _ in range(20):
        nearest = (features @ centres.T).argmax(1)
        for e in range(EXPERTS):
            own = features[nearest == e]
            tiny = len(own) < len(features) // (8 * EXPERTS)
            centres[e] = features[torch.randint(len(features), ())] if tiny else own.mean(0)
        centres = F.normalize(centres, dim=1)
    return features @ centres.T


def fit_router(n: Tensor, similarity: Tensor) -> Tensor:
    """Logistic regression from normalised inputs to soft cluster membership."""
    target = (similarity * SHARPNESS).softmax(-1)
    router = torch.zeros(EXPERTS, n.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([router], lr=0.02)
    for _ in range(120):
        pick = torch.randint(len(n), (4096,))
        loss = -(target[pick] * F.log_softmax(n[pick] @ router.T, -1)).sum(-1).mean()
        (loss + 1e-4 * router.square().sum()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return router.detach()


def choose_neurons(importance: Tensor, weight: Tensor) -> Tensor:
    """Return who holds which neuron; the shared expert, the last row, is apart from the rest."""
    member = torch.zeros(EXPERTS + 1, NEURONS)
    shared = importance.mean(0).topk(SHARED_NEURONS).indices
    member[-1, shared] = 1
    wanted = weight.T @ importance
    wanted[:, shared] = -1
    member[:-1].scatter_(1, wanted.topk(EXPERT_NEURONS, 1).indices, 1.0)
    return member


def start(layer: Layer, n: Tensor, units: Tensor, target: Tensor) -> Expert:
    """Cluster the tokens and choose router and neurons accordingly."""
    strength = units.abs().float() * layer.ffn_down.float().norm(dim=0)
    features = strength.sqrt()
    features = (features - features.mean(0)) @ torch.randn(NEURONS, 64)
    similarity = cluster(F.normalize(features, dim=1))
    spread = {
        "input": n.float().std(0) + 1e-3,
        "unit": units.float().square().mean(0).sqrt() + 1e-4,
        "output": target.float().square().mean(0).sqrt(),
    }
    inputs = n.float() / spread["input"]
    router = fit_router(inputs, similarity)
    weight = top_weights((inputs @ router.T).softmax(-1))
    expert = Expert(choose_neurons(strength.square(), weight), RANK, spread)
    expert.router.data.copy_(router)
    return expert


def fit(
    expert: Expert, n: Tensor, units: Tensor, target: Tensor, down: Tensor, size: Tensor
) -> float:
    """Fit one layer to the dense output; an error counts in proportion to the residual's size."""
    rest = [expert.scale, expert.inner, expert.outer]
    groups = [{"params": [expert.router], "lr": 2e-3}, {"params": rest, "lr": 1e-2}]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    fall = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min(1, 2 - 2 * s / STEPS) + 0.01)
    losses = []
    for _ in range(STEPS):
        pick = torch.randint(len(n), (BATCH,))
        probability, weight = expert.route(n[pick])
        out = expert.combine(units[pick], weight, down)
        error = ((out.float() - target[pick].float()) / size[pick]).square()
        loss = error.sum(-1).clamp(max=1).mean()
        (loss + BALANCE_SHARE * balance_loss(probability, weight)).backward()
        optimiser.step()
        fall.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return float(np.mean(losses[-20:]))


def split_layer(layer: Layer, x: Tensor) -> tuple[Expert, Tensor]:
    """Learn a layer on residuals x [tokens, WIDTH]; return it and its output."""
    n = rms_norm(x, layer.ffn_norm).bfloat16()
    with torch.no_grad():
        units = torch.cat([layer.hidden_units(part) for part in n.split(CHUNK)])
        target = F.linear(units, layer.ffn_down)
    expert = start(layer, n, units, target)
    size = (x + target).norm(dim=1, keepdim=True)
    error = fit(expert, n, units, target, layer.ffn_down, size)
    with torch.no_grad():
        weight = expert.route(n)[1]
        parts = zip(units.split(CHUNK), weight.split(CHUNK), strict=True)
        out = torch.cat([expert.combine(u, w, layer.ffn_down) for u, w in parts])
    load = (weight > 0).float().mean(0) / 2
    print(f"error {error:.5f}, load {load.min():.3f} to {load.max():.3f}, ", end="")
    print(f"top-1 weight {weight.amax(1).mean():.2f}", end="")
    return expert, out


def main(work: Path, source: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = Dense.load(source)
    ids = windows(work)
    rope = rope_table(LENGTH)
    x = dense.embedding[ids].float()
    experts = []
    began = time.monotonic()
    for index, layer in enumerate(dense.layers):
        print(f"layer {index}: ", end="", flush=True)
        with torch.no_grad():
            x = x + torch.cat([layer.attention(part, rope) for part in x.split(16)])
        expert, out = split_layer(layer, x.flatten(0, 1))
        x = x + out.view_as(x)
        experts.append(expert)
        print(f", {time.monotonic() - began:.0f} s", flush=True)
    torch.save(experts, work / "split.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
