"""Distil the dense model into the split one.

usage: python distil.py WORK SOURCE.gguf MINUTES

Loss: KL divergence of the logits, plus the distance of the normalised residual streams, plus a
little load balancing. Reads WORK/split.pt, writes WORK/distilled.pt (also every 20 steps).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import Dense, Split, balance_loss, residuals, rms_norm
from torch import Tensor

LENGTH, BATCH = 256, 4
RATE = 2e-3
HIDDEN_SHARE = 1.0
BALANCE_SHARE = 0.01


def batches(work: Path) -> Iterator[Tensor]:
    """Yield random windows of BATCH domains at a time, the domains in turn."""
    with np.load(work / "tokens.npz") as file:
        texts = [torch.from_numpy(file[n].astype(np.int64)) for n in file if n.endswith(".train")]
    turn = cycle(texts)
    while True:
        batch = list(islice(turn, BATCH))
        starts = [int(torch.randint(len(t) - LENGTH, ())) for t in batch]
        yield torch.stack([t[s : s + LENGTH] for t, s in zip(batch, starts, strict=True)])


def logit_loss(dense: Dense, student: Tensor, teacher: Tensor) -> float:
    """Mean KL divergence per token; accumulates its gradient in `student`, window by window."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        with torch.no_grad():
            want = F.linear(theirs, dense.embedding).float().softmax(-1)
        have = F.linear(ours, dense.embedding).float().log_softmax(-1)
        loss = F.kl_div(have, want, reduction="sum") / student.shape[:-1].numel()
        loss.backward()
        total += loss.item()
    return total


def hidden_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    pairs = zip(student, teacher, strict=True)
    unit = torch.ones(())
    return sum(
        (rms_norm(s, unit) - rms_norm(t, unit)).square().clamp(max=4).mean() for s, t in pairs
    ) / len(student)


def step(split: Split, ids: Tensor) -> dict[str, float]:
    """Accumulate the gradients of one batch."""
    dense = split.dense
    with torch.no_grad():
        teacher = list(residuals(dense, ids))
        wanted = rms_norm(teacher[-1], dense.output_norm).bfloat16()
    split.routes.clear()
    student = list(residuals(split, ids))
    final = rms_norm(student[-1], dense.output_norm).bfloat16()
    leaf = final.detach().requires_grad_()
    divergence = logit_loss(dense, leaf, wanted)
    hidden = hidden_loss(student, teacher)
    balance = torch.stack([balance_loss(*route) for route in split.routes]).mean()
    extra = HIDDEN_SHARE * hidden + BALANCE_SHARE * balance
    torch.autograd.backward([final, extra], [leaf.grad, None])
    top = torch.stack([weight.amax(-1).mean() for _, weight in split.routes]).mean()
    return {"kl": divergence, "hidden": hidden.item(), "balance": balance.item(), "top": top.item()}


def train(split: Split, work: Path, out: Path, seconds: float) -> None:
    """Take steps for as long as there is time, the rate falling to nothing along a cosine."""
    parameters = list(split.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    began = time.monotonic()
    seen: list[dict[str, float]] = []
    for ids in batches(work):
        done = (time.monotonic() - began) / seconds
        if done >= 1:
            break
        warm = min(1, (len(seen) + 1) / 10)
        for group in optimiser.param_groups:
            group["lr"] = RATE * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        seen.append(step(split, ids))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if len(seen) % 5 == 0:
            means = (f"{k} {np.mean([s[k] for s in seen[-5:]]):.4f}" for k in seen[0])
            print(f"step {len(seen)}:", *means, f"{done * seconds:.0f} s", flush=True)
        if len(seen) % 20 == 0:
            torch.save(list(split.experts), out)


def main(work: Path, source: Path, minutes: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    experts = torch.load(work / "split.pt", weights_only=False)
    split = Split(Dense.load(source), experts)
    train(split, work, work / "distilled.pt", minutes * 60)
    torch.save(list(split.experts), work / "distilled.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
