"""Split every dense FFN into a shared expert and routed experts, one layer after the other.

usage: python split.py WORK SOURCE.gguf

Per layer: tokens are clustered by which neurons they use, a linear router is fitted to the clusters,
each expert takes the neurons its tokens use most, and router, scales and low-rank corrections are
then fitted to the dense FFN's output. Layers see the errors of the layers before them. Writes
WORK/split.pt.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import NEURONS, Dense, Expert, balance_loss, rms_norm, rope_table

EXPERTS = int(os.environ.get("EXPERTS", 16))
SHARED_NEURONS = int(os.environ.get("SHARED", 512))
EXPERT_NEURONS = int(os.environ.get("WIDTH", 512))
RANK = int(os.environ.get("RANK", 8))
TOKENS = int(os.environ.get("TOKENS", 65536))
STEPS = int(os.environ.get("STEPS", 150))
LENGTH = 256
SHARPNESS = float(os.environ.get("SHARP", 6))
BALANCE_SHARE = 1e-4


def windows(work: Path) -> Tensor:
    """Return evenly spaced training windows, the same number from each domain."""
    with np.load(work / "tokens.npz") as file:
        texts = [torch.from_numpy(file[n].astype(np.int64)) for n in file if n.endswith(".train")]
    per_text = TOKENS // LENGTH // len(texts)
    starts = [torch.linspace(0, len(t) - LENGTH, per_text).long() for t in texts]
    return torch.stack([t[s : s + LENGTH] for t, at in zip(texts, starts, strict=True) for s in at])


def cluster(features: Tensor, count: int) -> Tensor:
    """Spherical k-means; return each token's similarity to every centre."""
    centres = features[torch.randperm(len(features))[:count]]
    for _ in range(20):
        nearest = (features @ centres.T).argmax(1)
        for e in range(count):
            own = features[nearest == e]
            small = len(own) < len(features) // (8 * count)
            centres[e] = features[torch.randint(len(features), ())] if small else own.mean(0)
        centres = F.normalize(centres, dim=1)
    return features @ centres.T


def fit_router(n: Tensor, similarity: Tensor) -> Tensor:
    """Logistic regression from normalised inputs to soft cluster membership."""
    target = (similarity * SHARPNESS).softmax(-1)
    router = torch.zeros(similarity.shape[1], n.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([router], lr=0.02)
    for _ in range(120):
        pick = torch.randint(len(n), (4096,))
        loss = -(target[pick] * F.log_softmax(n[pick] @ router.T, -1)).sum(-1).mean()
        (loss + 1e-4 * router.square().sum()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return router.detach()


def choose_neurons(importance: Tensor, weight: Tensor) -> Tensor:
    """Return membership [EXPERTS + 1, NEURONS]; the shared expert, last, is disjoint from the rest."""
    member = torch.zeros(weight.shape[1] + 1, NEURONS)
    shared = importance.mean(0).topk(SHARED_NEURONS).indices
    member[-1, shared] = 1
    wanted = weight.T @ importance
    wanted[:, shared] = -1
    member[:-1].scatter_(1, wanted.topk(EXPERT_NEURONS, 1).indices, 1.0)
    return member


def fit(
    expert: Expert, n: Tensor, units: Tensor, target: Tensor, down: Tensor, size: Tensor
) -> float:
    """Fit one layer to the dense output, errors measured against the residual stream's size."""
    parameters = [
        {"params": [expert.router], "lr": 2e-3},
        {"params": [expert.scale, expert.inner], "lr": 1e-2},
        {"params": [expert.outer], "lr": 1e-2},
    ]
    optimiser = torch.optim.Adam(parameters, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1, 2 - 2 * s / STEPS) + 0.01
    )
    recent = []
    for _ in range(STEPS):
        pick = torch.randint(len(n), (2048,))
        probability, weight = expert.route(n[pick])
        out = expert.combine(units[pick], weight, down)
        error = ((out.float() - target[pick].float()) / size[pick]).square()
        loss = error.sum(-1).clamp(max=1).mean()
        (loss + BALANCE_SHARE * balance_loss(probability, weight)).backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        recent.append(loss.item())
    print(f"  error {np.mean(recent[:5]):.5f} -> {np.mean(recent[-20:]):.5f}", end=" ")
    return float(np.mean(recent[-20:]))


def split_layer(dense: Dense, index: int, x: Tensor) -> tuple[Expert, Tensor]:
    """Learn layer `index` on residuals x [tokens, WIDTH]; return it and its output."""
    layer = dense.layers[index]
    n = rms_norm(x, layer.ffn_norm).bfloat16()
    with torch.no_grad():
        units = torch.cat([layer.hidden_units(part) for part in n.split(8192)])
        target = F.linear(units, layer.ffn_down)
        strength = units.abs().float() * layer.ffn_down.float().norm(dim=0)
        features = strength.sqrt()
        features = (features - features.mean(0)) @ torch.randn(NEURONS, 64)
        similarity = cluster(F.normalize(features, dim=1), EXPERTS)
    spread = {
        "input": n.float().std(0) + 1e-3,
        "unit": units.float().square().mean(0).sqrt() + 1e-4,
        "output": target.float().square().mean(0).sqrt(),
    }
    router = fit_router(n.float() / spread["input"], similarity)
    weight = F.linear(n.float() / spread["input"], router).softmax(-1)
    top, chosen = weight.topk(2, -1)
    weight = torch.zeros_like(weight).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
    expert = Expert(choose_neurons(strength.square(), weight), RANK, spread)
    expert.router.data.copy_(router)
    size = (x + target).norm(dim=1, keepdim=True)
    fit(expert, n, units, target, layer.ffn_down, size)
    with torch.no_grad():
        weight = expert.route(n)[1]
        load = (weight > 0).float().mean(0) / 2
        out = [
            expert.combine(u, w, layer.ffn_down)
            for u, w in zip(units.split(8192), weight.split(8192))
        ]
    print(
        f"covered {int(expert.member.amax(0).sum())} load {load.min():.3f}-{load.max():.3f}",
        end=" ",
    )
    print(f"top-1 {weight.amax(1).mean():.2f}", end=" ")
    return expert, torch.cat(out)


def main(work: Path, source: Path) -> None:
    torch.manual_seed(0)
    dense = Dense.load(source)
    ids = windows(work)
    rope = rope_table(LENGTH)
    x = dense.embedding[ids].float()
    experts = []
    start = time.monotonic()
    for index, layer in enumerate(dense.layers):
        with torch.no_grad():
            x = x + torch.cat([layer.attention(part, rope) for part in x.split(16)])
        expert, out = split_layer(dense, index, x.flatten(0, 1))
        x = x + out.view_as(x)
        experts.append(expert)
        print(f"layer {index}, {time.monotonic() - start:.0f} s", flush=True)
    torch.save(experts, work / os.environ.get("OUT", "split.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
