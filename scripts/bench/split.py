"""Who computes an expert: the CPU, a device, or both at once.

The device is ggml's CPU with a thread of its own and, if asked, delays on top: a stand-in that
is as slow or as fast as wanted, whose arena is beside the cache in RAM. All experts are cached, so
that what differs is who computes them. The ways take turns in one process: medians of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import answered

from hobbit import Llama, demo

WAYS = ("cpu", "device", "split", "auto")
# Microseconds a batch, a pair, and a MiB copied; ",turns": it copies and computes by turns.
DELAYS = ("0,0,0", "200,0,0", "1000,0,0", "5000,0,0")
TEXT = "The quick brown fox jumps over the lazy dog while the hobbit reads a long book. "


def main() -> int:
    arguments = parsed()
    return answered("split-bench", lambda: measured(arguments))


def measured(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield a line for each of the delays."""
    arguments.model = arguments.model or demo.ensure()
    yield "delays (batch, pair, MiB) | way: ms a pass, device's share of the pairs | ..."
    for delays in arguments.delays:
        os.environ["HOBBIT_DEVICE_DELAYS"] = delays
        with opened(arguments) as llm:
            yield report(delays, llm, arguments)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/split-bench", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="a model; default: the demo model")
    parser.add_argument("--vram", default="50%", help="the device's memory; a share of the experts")
    parser.add_argument("--delays", action="append", help=f"in microseconds: {', '.join(DELAYS)}")
    parser.add_argument("--rows", type=int, default=1, help="tokens evaluated at a time")
    parser.add_argument("--tokens", type=int, default=32, help="evaluations of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    found = parser.parse_args()
    found.delays = found.delays or list(DELAYS)
    return found


def opened(arguments: argparse.Namespace) -> Llama:
    vram: Any = arguments.vram
    if vram.endswith("%"):
        size = arguments.model.stat().st_size
        vram = int(size * float(vram[:-1]) / 100)
    return Llama(
        str(arguments.model),
        n_ctx=4096,
        n_batch=512,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        memory="auto",
        predict="none",
        device="CPU",
        vram=vram,
        upload="1G",
    )


def report(delays: str, llm: Llama, arguments: argparse.Namespace) -> str:
    tokens = llm.tokenize(TEXT.encode() * 100)
    for way in ("split", "device", "auto"):  # what is used is there, and what it costs is known
        llm.set_dispatch(way)
        for _ in range(3):
            round_of(llm, tokens, arguments)
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    shares: dict[str, float] = {}
    ratio: list[float] = []
    for _ in range(arguments.rounds):
        for way in WAYS:
            llm.set_dispatch(way)
            before = llm.stats
            seconds = round_of(llm, tokens, arguments)
            now = llm.stats
            took[way].append(seconds * 1000 / arguments.tokens)
            pairs = now.pairs_high - before.pairs_high
            shares[way] = (now.device_pairs - before.device_pairs) / pairs
            longer = now.split_longer_s - before.split_longer_s
            if longer > 0:
                ratio.append((now.split_s - before.split_s) / longer)
    ms = {way: statistics.median(took[way]) for way in WAYS}
    shown = "  ".join(f"{way}: {ms[way]:.1f} {100 * shares[way]:.0f} %" for way in WAYS)
    best = min(ms["cpu"], ms["device"])
    return (
        f"{delays:>12} | {shown}"
        f" | divided layer / longer part {statistics.median(ratio) if ratio else 0:.2f}"
        f" | auto / better of cpu and device {ms['auto'] / best:.2f}"
        f" | a copy pays from {llm.stats.break_even_tokens or 'never'} tokens an expert"
    )


def round_of(llm: Llama, tokens: list[int], arguments: argparse.Namespace) -> float:
    llm.reset()
    start = time.perf_counter()
    for at in range(arguments.tokens):
        first = at * arguments.rows % (len(tokens) - arguments.rows)
        llm.eval(tokens[first : first + arguments.rows])
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
