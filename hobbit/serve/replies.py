"""The JSON of answers, as OpenAI and llama-server write it, with a block of hobbit's own."""

from __future__ import annotations

import codecs
import secrets
from collections.abc import Sequence
from typing import Any

from .generation import Finished, Scored
from .scoring import token_text
from .service import rate


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def usage(done: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": done.n_prompt,
        "completion_tokens": done.n_generated,
        "total_tokens": done.n_prompt + done.n_generated,
        "prompt_tokens_details": {"cached_tokens": done.n_cached},
    }


def total_usage(ends: Sequence[Finished]) -> dict[str, Any]:
    """Return the sum over the prompts of one request."""
    each = [usage(done) for done in ends]
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    summed: dict[str, Any] = {name: sum(u[name] for u in each) for name in names}
    cached = sum(done.n_cached for done in ends)
    return summed | {"prompt_tokens_details": {"cached_tokens": cached}}


def timings(done: Finished) -> dict[str, Any]:
    """Return llama-server's timings; the first token comes with the prompt."""
    n_prompt, n_decoded = done.n_prompt - done.n_cached, len(done.token_seconds)
    return {
        "cache_n": done.n_cached,
        "prompt_n": n_prompt,
        "prompt_ms": 1e3 * done.prompt_s,
        "prompt_per_token_ms": 1e3 * rate(1, rate(n_prompt, done.prompt_s)),
        "prompt_per_second": rate(n_prompt, done.prompt_s),
        "predicted_n": done.n_generated,
        "predicted_ms": 1e3 * done.decode_s,
        "predicted_per_token_ms": 1e3 * rate(1, rate(n_decoded, done.decode_s)),
        "predicted_per_second": rate(n_decoded, done.decode_s),
    }


def hobbit_block(done: Finished) -> dict[str, Any]:
    """Return how the answer was computed and what it cost; counters are of the whole request."""
    stats, decode = done.stats, done.decode
    pairs = stats.pairs_high + stats.pairs_low + stats.pairs_skip
    return {
        "mode": stats.mode,
        "quality": done.mode,
        "hit": decode.hit_rate,
        "device": decode.device_share,
        "high": stats.pairs_high / pairs if pairs else 1.0,
        "low": stats.pairs_low / pairs if pairs else 0.0,
        "skip": stats.pairs_skip / pairs if pairs else 0.0,
        "bytes_read": stats.read_bytes,
        "mib_per_token": decode.mib_per_token,
        "stall": decode.stall_share,
        "ttft_s": done.ttft_s,
        "memory": {"cap": stats.cap_bytes, "peak": stats.peak_bytes},
    }


def completion_logprobs(scored: Sequence[Scored], offset: int = 0) -> dict[str, Any]:
    """Return the log-probabilities of a text completion that begins at this offset of the text."""
    found: dict[str, list[Any]] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
    }  # fmt: skip
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for entry in scored:
        found["tokens"].append(token_text(entry.data))
        found["token_logprobs"].append(entry.logprob)
        found["top_logprobs"].append(None if entry.logprob is None else _top(entry))
        found["text_offset"].append(offset)
        offset += len(decoder.decode(entry.data))  # a character may be of several tokens
    return found


def chat_logprobs(scored: Sequence[Scored]) -> dict[str, Any]:
    def told(data: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": token_text(data), "logprob": logprob, "bytes": [*data]}

    entries = [
        told(entry.data, entry.logprob) | {"top_logprobs": [told(*pair) for pair in entry.top]}
        for entry in scored
    ]
    return {"content": entries, "refusal": None}


def _top(entry: Scored) -> dict[str, float]:
    """Return the alternatives by their text, and the token itself; of equal texts the likelier."""
    found: dict[str, float] = {}
    for data, logprob in entry.top:
        found.setdefault(token_text(data), logprob)
    if entry.logprob is not None:
        found.setdefault(token_text(entry.data), entry.logprob)
    return found
