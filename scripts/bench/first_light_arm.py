"""One arm of scripts/first-light: load a model, feed it tokens, print one line of JSON.

The argument is a JSON object with the fields of `Job`. Both arms run the same loop on the context
of a `llama_cpp.Llama`. Stock's extra buffer types (weights repacked at load, AMX) are off, because
a runtime that streams weights cannot repack them: both arms multiply the same bytes with the same
kernels.
"""

from __future__ import annotations

import hashlib
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

import llama_cpp.llama_cpp as low
import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
N_CTX = 1024
N_BATCH = 512


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
    status = Path("/proc/self/status").read_text()  # getrusage counts the time before exec too
    result["peak_rss_bytes"] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(json.dumps(result))


def bytes_read() -> dict[str, int]:
    """What this process made the disk deliver, and what its read calls returned."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counters = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return {"disk": counters["read_bytes"], "call": counters["rchar"]}


@contextmanager
def open_model(job: Job) -> Iterator[Any]:
    options = {
        "n_ctx": N_CTX,
        "n_batch": N_BATCH,
        "n_threads": job.threads,
        "n_threads_batch": job.threads,
        "verbose": False,
    }
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


class Feeder:
    """Decodes tokens and keeps the time of each call and a digest of the first logits."""

    def __init__(self, llm: Any, hashed: int) -> None:
        self.context = llm._ctx.ctx
        self.n_vocab = llm.n_vocab()
        self.to_hash = hashed
        self.digest = hashlib.sha256()

    def feed(self, tokens: npt.NDArray[np.int32]) -> float:
        held = (low.llama_token * len(tokens))(*tokens.tolist())  # the batch only borrows it
        start = time.perf_counter()
        if low.llama_decode(self.context, low.llama_batch_get_one(held, len(tokens))) != 0:
            sys.exit("llama_decode failed")
        logits = low.llama_get_logits_ith(self.context, -1)  # waits for the computation
        seconds = time.perf_counter() - start
        if self.to_hash > 0:
            self.to_hash -= 1
            self.digest.update(np.ctypeslib.as_array(logits, (self.n_vocab,)).tobytes())
        return seconds

    def forget(self) -> None:
        low.llama_memory_clear(low.llama_get_memory(self.context), True)


def measure(llm: Any, job: Job) -> dict[str, Any]:
    feeder = Feeder(llm, job.hashed)
    count = (job.prompt or job.warm_up) + job.decode
    tokens = choose_tokens(llm, job, count)
    prompt_s = None
    if job.prompt:
        # The same passes as those timed: a token may be routed otherwise alone than in a batch.
        for _ in range(job.warm_up):
            feed_all(feeder, tokens, job.prompt)
            feeder.forget()
        warm = counters(llm)
        prompt_s, decode_s = feed_all(feeder, tokens, job.prompt)
    else:
        feed_all(feeder, tokens[: job.warm_up], 0)
        warm = counters(llm)
        _, decode_s = feed_all(feeder, tokens[job.warm_up :], 0)
    return {
        "prompt_tok_s": job.prompt / prompt_s if prompt_s else None,
        "decode_tok_s": len(decode_s) / sum(decode_s),
        "slowest_token_s": max(decode_s),
        "logits_sha256": feeder.digest.hexdigest(),
        **{name: value - warm[name] for name, value in counters(llm).items()},
    }


def feed_all(
    feeder: Feeder, tokens: npt.NDArray[np.int32], prompt: int
) -> tuple[float, list[float]]:
    """Feed the first tokens in a batch and each other one alone; return the seconds of each."""
    prompt_s = feeder.feed(tokens[:prompt]) if prompt else 0.0
    return prompt_s, [feeder.feed(tokens[i : i + 1]) for i in range(prompt, len(tokens))]


def choose_tokens(llm: Any, job: Job, count: int) -> npt.NDArray[np.int32]:
    """Return a text's first tokens, or random ones.

    A model of random weights repeats one token if it may choose, and with it one routing.
    """
    if not job.text:
        random = np.random.default_rng(job.seed)
        return random.integers(10, llm.n_vocab() - 10, count, np.int32)
    tokens = llm.tokenize(Path(job.text).read_bytes())
    if len(tokens) < count:
        sys.exit(f"{job.text} has {len(tokens)} tokens, {count} are needed")
    return np.array(tokens[:count], np.int32)


def counters(llm: Any) -> dict[str, int]:
    stats = getattr(llm, "stats", None)
    if stats is None:
        return {}
    return {"hits": stats.hits, "misses": stats.misses, "expert_bytes": stats.read_bytes}


if __name__ == "__main__":
    main()
