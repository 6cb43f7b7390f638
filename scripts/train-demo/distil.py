"""Distil the dense model into the split one.

usage: python distil.py WORK SOURCE.gguf MINUTES

Loss: KL divergence of the logits, plus the distance of the normalised residual streams, plus a little
load balancing. Reads WORK/split.pt, writes WORK/distilled.pt (also every 50 steps).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Dense, Split, balance_loss, residuals, rms_norm

LENGTH, BATCH = 256, 4
RATE = float(os.environ.get("RATE", 1e-3))
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


def main(work: Path, source: Path, minutes: float) -> None:
    torch.manual_seed(1)
    split = Split(
        Dense.load(source), torch.load(work / os.environ.get("IN", "split.pt"), weights_only=False)
    )
    out = work / os.environ.get("OUT", "distilled.pt")
    parameters = list(split.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    start = time.monotonic()
    seen: list[dict[str, float]] = []
    for ids in batches(work):
        done = (time.monotonic() - start) / (60 * minutes)
        if done >= 1:
            break
        warm = min(1, (len(seen) + 1) / 10)
        for group in optimiser.param_groups:
            group["lr"] = RATE * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        seen.append(step(split, ids))
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if len(seen) % 5 == 0:
            mean = {k: round(float(np.mean([s[k] for s in seen[-5:]])), 4) for k in seen[0]}
            print(
                f"{len(seen)} {mean} norm {norm:.2f} {time.monotonic() - start:.0f} s", flush=True
            )
        if len(seen) % 20 == 0:
            torch.save(list(split.experts), out)
    torch.save(list(split.experts), out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
