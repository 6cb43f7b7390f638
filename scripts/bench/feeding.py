"""Feeding known tokens to a `llama_cpp.Llama`, stock's or ours, with the time that each takes.

Nothing here imports hobbit: the stock arm must be a process that never does.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as low
import numpy as np
import numpy.typing as npt

N_CTX = 1024
N_BATCH = 512

Tokens = npt.NDArray[np.int32]


def context_options(threads: int) -> dict[str, Any]:
    """Return what every arm passes to its Llama."""
    return {
        "n_ctx": N_CTX,
        "n_batch": N_BATCH,
        "n_threads": threads,
        "n_threads_batch": threads,
        "verbose": False,
    }


class Feeder:
    """Decodes tokens and keeps the time of each call and a digest of the first logits."""

    def __init__(self, llm: Any, hashed: int = 0) -> None:
        self.context = llm._ctx.ctx
        self.n_vocab = llm.n_vocab()
        self.to_hash = hashed
        self.digest = hashlib.sha256()

    def feed(self, tokens: Tokens) -> float:
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

    def feed_all(self, tokens: Tokens, prompt: int = 0) -> tuple[float, list[float]]:
        """Feed the first tokens in a batch and each other one alone; return the seconds of each."""
        prompt_s = self.feed(tokens[:prompt]) if prompt else 0.0
        return prompt_s, [self.feed(tokens[i : i + 1]) for i in range(prompt, len(tokens))]

    def forget(self) -> None:
        low.llama_memory_clear(low.llama_get_memory(self.context), True)


def choose_tokens(llm: Any, text: str, seed: int, count: int) -> Tokens:
    """Return the first tokens of the file `text`, or without one random ones.

    A model of random weights repeats one token if it may choose, and with it one routing.
    """
    if not text:
        random = np.random.default_rng(seed)
        return random.integers(10, llm.n_vocab() - 10, count, np.int32)
    tokens = llm.tokenize(Path(text).read_bytes())
    if len(tokens) < count:
        sys.exit(f"{text} has {len(tokens)} tokens, {count} are needed")
    return np.array(tokens[:count], np.int32)


def peak_rss_bytes() -> int:
    """Return this process's peak; getrusage counts the time before exec too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
