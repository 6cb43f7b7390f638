"""One arm of scripts/first-light: load a model, feed it tokens, print one line of JSON.

The argument is a JSON object with the fields of `Job`. Both arms run the same loop on the context
of a `llama_cpp.Llama`. Stock's extra buffer types (weights repacked at load, AMX) are off, because
a runtime that streams weights cannot repack them: both arms multiply the same bytes with the same
kernels.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from feeding import Feeder, choose_tokens, context_options, peak_rss_bytes

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    engine: str  # "stock-mmap", "stock-memory" or "hobbit"
    model: str
    memory: int  # bytes for hobbit; 0 = auto
    threads: int
    text: str  # a file, or "" for random tokens
    seed: int
    prompt: int  # tokens in one batch; 0 = feed every token alone
    warm_up: int  # with a prompt: passes over all tokens; without one: tokens
    decode: int
    hashed: int  # how many steps' logits the digest covers


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    if job.engine == "hobbit":
        import_module("hobbit.llama")  # not part of loading a model
    before = bytes_read()
    start = time.perf_counter()
    with open_model(job) as llm:
        load_s = time.perf_counter() - start
        read = {name: value - before[name] for name, value in bytes_read().items()}
        result = {"load_s": load_s} | {f"load_{name}_bytes": n for name, n in read.items()}
        if job.engine == "hobbit":
            result["dense_bytes"] = llm.layout.dense_bytes
        result |= measure(llm, job)
    result["peak_rss_bytes"] = peak_rss_bytes()
    print(json.dumps(result))


def bytes_read() -> dict[str, int]:
    """What this process made the disk deliver, and what its read calls returned."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counters = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return {"disk": counters["read_bytes"], "call": counters["rchar"]}


@contextmanager
def open_model(job: Job) -> Iterator[Any]:
    options = context_options(job.threads)
    if job.engine == "hobbit":
        with closing(
            import_module("hobbit").Llama(job.model, memory=job.memory or "auto", **options)
        ) as llm:
            yield llm
        return
    options["use_mmap"] = job.engine == "stock-mmap"
    # By its path: the stock arm must be a process that never imports hobbit.
    stock = runpy.run_path(str(ROOT / "hobbit" / "stock.py"))
    with stock["plain_llama"](job.model, options) as llm:
        yield llm


def measure(llm: Any, job: Job) -> dict[str, Any]:
    feeder = Feeder(llm, job.hashed)
    count = (job.prompt or job.warm_up) + job.decode
    tokens = choose_tokens(llm, job.text, job.seed, count)
    prompt_s = None
    if job.prompt:
        # The same passes as those timed: a token may be routed otherwise alone than in a batch.
        for _ in range(job.warm_up):
            feeder.feed_all(tokens, job.prompt)
            feeder.forget()
        warm = counters(llm)
        prompt_s, decode_s = feeder.feed_all(tokens, job.prompt)
    else:
        feeder.feed_all(tokens[: job.warm_up])
        warm = counters(llm)
        _, decode_s = feeder.feed_all(tokens[job.warm_up :])
    return {
        "prompt_tok_s": job.prompt / prompt_s if prompt_s else None,
        "decode_tok_s": len(decode_s) / sum(decode_s),
        "slowest_token_s": max(decode_s),
        "logits_sha256": feeder.digest.hexdigest(),
        **{name: value - warm[name] for name, value in counters(llm).items()},
    }


def counters(llm: Any) -> dict[str, int]:
    stats = getattr(llm, "stats", None)
    if stats is None:
        return {}
    return {"hits": stats.hits, "misses": stats.misses, "expert_bytes": stats.read_bytes}


if __name__ == "__main__":
    main()
