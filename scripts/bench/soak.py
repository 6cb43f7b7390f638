"""Run hobbit for long under a tight cap: memory must stay flat and every logit stock's.

Plain llama.cpp computes the logits of some jobs first (a prompt in ubatches, then single tokens),
in a process of its own. Then hobbit repeats them in random order for as long as asked, with the
smallest cache or the size given. After each job its logits are compared bit by bit and the
process's resident memory is noted. Exits with 1 when a logit differs or memory grows.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from measuring import MIB, about, machine, say

import hobbit
from hobbit import demo
from hobbit.errors import HobbitError
from hobbit.gguf_file import open_gguf
from hobbit.layout import build_layout
from hobbit.stock import Job, StockProcess, collect
from hobbit.verify import cache_bytes

# What resident memory may grow by from the first half of the jobs to the second.
MOST_GROWTH = 2 * MIB
LONGEST = 160  # tokens of a prompt
DECODED = 60
UBATCH = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--model", type=Path, help="a .gguf file (default: the built-in demo)")
    parser.add_argument("--cache", default="layer", help="floor, layer or half (default: layer)")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--predictor", default="auto")
    parser.add_argument("--policy", default="decay")
    options = parser.parse_args(arguments)
    try:
        return soak(options)
    except HobbitError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1


def make_jobs(count: int, threads: int) -> list[Job]:
    """Jobs of which each has its own tokens and length of the prompt."""
    rng = random.Random(0)
    lengths = [rng.randrange(1, LONGEST + 1) for _ in range(count - 1)] + [LONGEST]
    return [
        Job(n_prompt=n, n_decode=DECODED, n_ubatch=UBATCH, n_threads=threads, seed=seed)
        for seed, n in enumerate(lengths)
    ]


def soak(options: argparse.Namespace) -> int:
    """Repeat the jobs until the time is over."""
    path = options.model or demo.ensure()
    jobs = make_jobs(options.jobs, options.threads)
    say("stock llama.cpp")
    with StockProcess() as child:
        expected = child.logits(path, jobs)
    size = cache_bytes(build_layout(open_gguf(path)), options.cache)
    arguments = jobs[-1].llama_arguments()  # of the longest prompt
    llm = hobbit.Llama(
        str(path),
        cache_bytes=size,
        policy=options.policy,
        predict=options.predictor,
        **arguments,
    )
    rng, resident, wrong, done = random.Random(1), [], 0, 0
    end = time.monotonic() + 60 * options.minutes
    with closing(llm):
        order = list(range(len(jobs)))
        while time.monotonic() < end or done < 3 * len(jobs):
            if done % len(jobs) == 0:
                rng.shuffle(order)
            number = order[done % len(jobs)]
            wrong += not np.array_equal(collect(llm, jobs[number]), expected[number])
            done += 1
            resident.append(resident_bytes())
            if done % (10 * len(jobs)) == 0:
                say(f"{done} jobs, {wrong} wrong, {resident[-1] / MIB:.1f} MiB")
        stats = llm.stats
    # Fragments of the heap and what is made on first use come early; a leak goes on.
    early, late = max(resident[: done // 2]), max(resident[done // 2 :])
    growth = late - early
    print("\n".join(about(machine())))
    print(
        f"{path.name}, cache {options.cache} ({llm.plan.cache_bytes / MIB:.1f} MiB), "
        f"policy {options.policy}, "
        f"predictor {options.predictor}, {options.threads} threads, {options.minutes:g} minutes"
    )
    print(
        f"{done} jobs, {wrong} with another logit than stock's; {stats.hits} hits, "
        f"{stats.misses} misses, {stats.evictions} evictions, {stats.read_bytes / MIB:.0f} MiB read"
    )
    print(
        f"resident memory at most {early / MIB:.1f} MiB in the first half of the jobs, "
        f"{growth / MIB:+.1f} MiB in the second"
    )
    good = wrong == 0 and growth <= MOST_GROWTH
    print("good" if good else "FAILED")
    return 0 if good else 1


def resident_bytes() -> int:
    """Return this process's resident memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
