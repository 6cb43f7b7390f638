"""One arm of `scripts/quality-bench speed`: feed tokens one at a time, print one line of JSON.

The argument is a JSON object with the fields of `Job`.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from feeding import Feeder, choose_tokens, context_options, peak_rss_bytes

from hobbit.evaluate import pair_shares
from hobbit.llama import Llama, ResidentLow
from hobbit.rule import EXACT, Rule


@dataclass(frozen=True)
class Job:
    model: str
    low: str  # the low copy's path, or ""
    memory: int  # bytes; 0 = auto
    threads: int
    text: str  # a file, or "" for random tokens
    seed: int
    warm_up: int
    decode: int
    rule: dict[str, Any]
    resident_low: ResidentLow = "off"
    observe: bool = False  # also count the scores of the tokens decoded


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    llm = Llama(
        job.model,
        memory=job.memory or "auto",
        low=job.low or None,
        rule=rule_of(job.rule),
        resident_low=job.resident_low,
        **context_options(job.threads),
    )
    with closing(llm):
        result = measure(llm, job)
    print(json.dumps(result | {"peak_rss_bytes": peak_rss_bytes()}))


def rule_of(data: dict[str, Any]) -> Rule:
    """Return a rule from its JSON."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return Rule(**fields)


def measure(llm: Llama, job: Job) -> dict[str, Any]:
    feeder = Feeder(llm)
    tokens = choose_tokens(llm, job.text, job.seed, job.warm_up + job.decode)
    feeder.feed_all(tokens[: job.warm_up])
    before = llm.stats
    with ExitStack() as stack:
        histogram = stack.enter_context(llm.observe()) if job.observe else None
        _, seconds = feeder.feed_all(tokens[job.warm_up :])
    since = llm.stats.minus(before)
    if llm.rule != EXACT and since.unscored:
        sys.exit(f"{job.model}: {since.unscored} pairs were not scored: their gates are not seen")
    high, low, skipped = pair_shares(since)
    return {
        "seconds": seconds,
        "tok_s": len(seconds) / sum(seconds),
        "bytes_per_token": since.read_bytes / len(seconds),
        "low_bytes_per_token": since.read_low_bytes / len(seconds),
        "high": high,
        "low": low,
        "skipped": skipped,
        "hit_rate": since.hit_rate,
        "promotions": since.promotions,
        "stand_ins": since.stand_ins,
        "stall_s": since.stall_s,
        "io": llm.stats.io,
        "cache_bytes": llm.stats.cache_bytes,
        "cached_share": llm.plan.cached_share,
        "low_is_resident": llm.plan.low_is_resident,
        "histogram": None if histogram is None else histogram.sum(axis=0).tolist(),
    }


if __name__ == "__main__":
    main()
