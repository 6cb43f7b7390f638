"""One run of `hobbit bench`, in a process of its own: load a model, feed it tokens, tell the times.

Run as a script, by its path, with a JSON object of `Job`'s fields; it prints one JSON object. All
arms run the same loop on the context of a `llama_cpp.Llama`. Extra buffer types (weights repacked
at load, AMX) are off in stock's arms as in hobbit's, which streams weights and cannot repack them:
all multiply the same bytes with the same kernels. Nothing here imports hobbit before it is known to
be hobbit's arm: a stock arm is a process that never does.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

# Those of hobbit.Stats that a phase is told with.
COUNTERS = (
    "hits",
    "misses",
    "evictions",
    "read_bytes",
    "read_low_bytes",
    "predicted",
    "predicted_right",
    "ahead",
    "ahead_used",
    "ahead_bytes",
    "ahead_wasted_bytes",
    "moe_s",
    "stall_s",
    "manage_s",
    "predict_s",
    "device_hits",
    "device_pairs",
    "device_bytes",
    "device_s",
    "device_wait_s",
)


@dataclass(frozen=True)
class Job:
    """What one process does."""

    engine: str  # "hobbit", "stock-mmap" or "stock" (which reads the whole file into memory)
    model: str
    arguments: dict[str, Any]  # of this arm's Llama alone; a rule as its fields; n_cpu_moe
    context: dict[str, Any]  # of the Llama of every arm
    text: str  # a file, or "" for random tokens
    seed: int
    depth: int  # tokens in the context before anything is timed
    prompt: int
    decode: int
    warm_up: int  # before: a pass with so many tokens decoded after the prompt; -1: none


class UsageError(Exception):
    """What the parent raises as its own of this name."""


def run(job: Job) -> dict[str, Any]:
    """Return everything that was measured."""
    if job.engine == "hobbit":
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import_module("hobbit.llama")  # not part of loading a model
    start = time.perf_counter()
    with _opened(job) as llm:
        load_s = time.perf_counter() - start
        feeder = _Feeder(llm, job.context["n_batch"])
        tokens = _tokens(llm, job)
        head, text = tokens[: job.depth], tokens[job.depth :]
        if job.warm_up >= 0:
            feeder.prompt(head)
            feeder.prompt(text[: job.prompt])
            feeder.decode(text[job.prompt : job.prompt + job.warm_up])
            feeder.forget()
        feeder.prompt(head)
        return {
            "load_s": load_s,
            **_about(llm),
            "prompt": feeder.phase(feeder.prompt, text[: job.prompt]),
            "decode": feeder.phase(feeder.decode, text[job.prompt :]),
            "predictor": llm.stats.predictor if hasattr(llm, "stats") else None,
            "peak_rss_bytes": _peak_rss_bytes(),
            "imported_hobbit": any(name.split(".")[0] == "hobbit" for name in sys.modules),
        }


@contextmanager
def _opened(job: Job) -> Iterator[Any]:
    if job.engine == "hobbit":
        arguments = dict(job.arguments)
        if "rule" in arguments:
            fields = arguments["rule"].items()
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields}
            arguments["rule"] = import_module("hobbit.rule").Rule(**values)
        with import_module("hobbit.llama").Llama(job.model, **arguments, **job.context) as llm:
            yield llm
        return
    own = dict(job.arguments)
    off_gpu = own.pop("n_cpu_moe", 0)
    options = job.context | own | {"use_mmap": job.engine == "stock-mmap", "verbose": False}
    # By its path: `import hobbit.stock` would import the package.
    stock = runpy.run_path(str(Path(__file__).with_name("stock.py")))
    with stock["plain_llama"](job.model, options, n_cpu_moe=off_gpu) as llm:
        yield llm


def _about(llm: Any) -> dict[str, Any]:
    """Describe the model in llama-bench's words, and how hobbit runs it."""
    model = llm._model
    about = {
        "model_type": model.desc(),
        "model_size": model.size(),
        "model_n_params": model.n_params(),
    }
    if hasattr(llm, "plan"):
        about |= {
            "plan": llm.plan.mode,
            "cached_share": llm.plan.cached_share,
            "low_is_resident": llm.plan.low_is_resident,
            "quality": llm.quality.label,
            "cache_bytes": llm.stats.cache_bytes,
            "io": llm.stats.io,
            "device": llm.arena.to_dict() if llm.arena else None,
        }
    return about


class _Feeder:
    """Decodes known tokens and times each call."""

    def __init__(self, llm: Any, n_batch: int) -> None:
        self.llm = llm
        self.context = llm._ctx.ctx
        self.n_batch = n_batch
        # Of stock's there is neither.
        self._guarded: Callable[[Callable[[], Any]], Any]
        self._guarded = getattr(llm, "guarded", lambda call: call())
        self._decode_batch = getattr(llm, "decode_batch", api.llama_decode)

    def prompt(self, tokens: Tokens) -> list[float]:
        """Feed tokens in batches; return the seconds of each batch."""
        return self._feed(tokens, self.n_batch)

    def decode(self, tokens: Tokens) -> list[float]:
        """Feed tokens one at a time; return the seconds of each."""
        return self._feed(tokens, 1)

    def _feed(self, tokens: Tokens, n: int) -> list[float]:
        errors: Callable[[], AbstractContextManager[None]]
        errors = getattr(self.llm, "translated_errors", nullcontext)
        with errors():
            return [self._decode(tokens[i : i + n]) for i in range(0, len(tokens), n)]

    def _decode(self, tokens: Tokens) -> float:
        held = (api.llama_token * len(tokens))(*tokens.tolist())  # the batch only borrows it
        batch = api.llama_batch_get_one(held, len(tokens))

        def decode() -> int:
            status = int(self._decode_batch(self.context, batch))
            if status == 0:
                api.llama_get_logits_ith(self.context, -1)  # waits for the computation
            return status

        start = time.perf_counter()
        status = self._guarded(decode)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return time.perf_counter() - start

    def forget(self) -> None:
        """Begin another sequence, as Llama.eval does for an answer to another prompt."""
        memory = api.llama_get_memory(self.context)
        self._guarded(lambda: api.llama_memory_clear(memory, True))
        streamed = getattr(self.llm, "_streamed", None)
        if streamed is not None:
            streamed.new_sequence()

    def phase(self, feed: Callable[[Tokens], list[float]], tokens: Tokens) -> dict[str, Any]:
        """Feed tokens, and count what happens meanwhile."""
        before = self._counters()
        seconds = feed(tokens)
        after = self._counters()
        counted = {name: after[name] - before[name] for name in after}
        return {"seconds": seconds, "tokens": len(tokens), **counted}

    def _counters(self) -> dict[str, Any]:
        counted: dict[str, Any] = {"disk_bytes": _disk_bytes()}
        stats = getattr(self.llm, "stats", None)
        return counted | ({name: getattr(stats, name) for name in COUNTERS} if stats else {})


def _tokens(llm: Any, job: Job) -> Tokens:
    """Return the tokens that every arm is fed: of the text, or random ones.

    A model of random weights repeats one token if it may choose, and with it one routing.
    """
    count = job.depth + job.prompt + job.decode
    if not job.text:
        random = np.random.default_rng(job.seed)
        return random.integers(0, llm.n_vocab(), count, np.int32)
    tokens = llm.tokenize(Path(job.text).read_bytes())
    if len(tokens) < count:
        raise UsageError(
            f"{job.text} has {len(tokens)} tokens and {count} are needed: name a longer text with "
            "--text, or take --text random"
        )
    return np.array(tokens[:count], np.int32)


def _disk_bytes() -> int:
    """What this process made the disk deliver, mapped pages too; 0 where that is not told."""
    try:
        counters = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return int(counters.partition("\nread_bytes: ")[2].split()[0])


def _peak_rss_bytes() -> int:
    """Return this process's peak; getrusage counts the time before exec too."""
    try:
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        return 0


def main() -> int:
    # llama.cpp prints to stdout in places: keep the answer's pipe to ourselves.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        result = run(Job(**json.loads(sys.argv[-1])))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the parent decides what it means
        told = isinstance(error, UsageError) or type(error).__module__ == "hobbit.errors"
        message = str(error) if told else f"{type(error).__name__}: {error}"
        result = {"error": " ".join(message.split()), "kind": type(error).__name__}
    json.dump(result, answer)
    answer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
