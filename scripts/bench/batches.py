"""What several sequences gain that decode together: bytes and tokens a second, for 1, 2, 4, 8.

    python scripts/bench/batches.py MODEL.gguf TEXT [TEXT ...]

The texts are cut into 8 parts, which are fed as they are: one after the other, then two at a time,
a token of each in a batch, and so on. Every line of the table is of the same tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from llama_cpp import llama_cpp as api

import hobbit
from hobbit.stock import Job, further_context

MOST = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--share", type=float, default=0.5, help="of the experts are cached")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--warm", type=int, default=32, help="steps before, not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--policy", default="decay")
    parser.add_argument("--predict", default="none")
    return parser.parse_args()


def measure(llm: hobbit.Llama, parts: list[list[int]], a: argparse.Namespace) -> list[float]:
    """Return the seconds, bytes, hits and misses of decoding these texts together."""
    length, n_seq = a.warm + a.steps, len(parts)
    job = Job(n_seq=n_seq, n_prompt=length, n_decode=0)
    batch = api.llama_batch_init(n_seq, 0, 1)
    batch.n_tokens = n_seq
    llm.forget()
    with further_context(llm, job) as context:
        for position in range(length):
            if position == a.warm:
                before, start = llm.stats, time.perf_counter()
            for s, part in enumerate(parts):
                batch.token[s] = part[position]
                batch.pos[s], batch.logits[s] = position, 1
                batch.n_seq_id[s], batch.seq_id[s][0] = 1, s
            llm.decode(batch, context)
        seconds, after = time.perf_counter() - start, llm.stats
    api.llama_batch_free(batch)
    for s in range(n_seq):
        llm.end_sequence(s)
    counted = ("read_bytes", "hits", "misses")
    return [seconds, *(getattr(after, name) - getattr(before, name) for name in counted)]


def main() -> None:
    a = parse()
    text = b"".join(path.read_bytes() for path in a.texts)
    with hobbit.Llama(str(a.model), cache_bytes="floor", n_ctx=256) as llm:
        tokens = llm.tokenize(text)
        experts = llm.layout.expert_bytes
    length = len(tokens) // MOST
    if length < a.warm + a.steps:
        raise SystemExit(f"the texts have {len(tokens)} tokens: too few for {MOST} sequences")
    parts = [tokens[i * length : (i + 1) * length] for i in range(MOST)]
    options = {"n_threads": a.threads, "n_threads_batch": a.threads, "policy": a.policy}
    with hobbit.Llama(
        str(a.model), cache_bytes=int(a.share * experts), n_ctx=2048, predict=a.predict, **options
    ) as llm:
        print("together  tokens/s  MiB/token  hits")
        for n_seq in (1, 2, 4, 8):
            runs = [measure(llm, parts[i : i + n_seq], a) for i in range(0, MOST, n_seq)]
            seconds, read, hits, misses = (sum(column) for column in zip(*runs, strict=True))
            n, share = MOST * a.steps, hits / (hits + misses)
            print(f"{n_seq:8}  {n / seconds:8.1f}  {read / n / 2**20:9.2f}  {share:4.0%}")


if __name__ == "__main__":
    main()
