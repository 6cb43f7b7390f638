"""Log-probabilities of tokens, from the logits of llama.cpp's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as api

from .generation import Scored

if TYPE_CHECKING:
    from ..llama import Llama

# Logits of so many bytes are computed at once, at least; more where the plan has memory to spare.
_LOGIT_BYTES = 64 << 20
_MIN_PIECE = 32

_IMPOSSIBLE = -9999.0


def score_last(llm: Llama, token: int, n_top: int) -> Scored:
    """Return the log-probability of a token after what was evaluated last."""
    return _scored(llm, llm.logits_row(-1), token, n_top)


def score_prompt(
    llm: Llama, tokens: Sequence[int], n_top: int, on_progress: Callable[[int, int], None]
) -> list[Scored]:
    """Evaluate a prompt and return the log-probability of each of its tokens but the first.

    Nothing of an earlier prompt is reused: its logits are gone. The model can go on from there.
    `on_progress` is called before each piece; what it raises ends the evaluation.
    """
    llm.reset()
    memory = api.llama_get_memory(llm._ctx.ctx)
    llm.guarded(lambda: api.llama_memory_clear(memory, True))
    found = [Scored(llm.detokenize([tokens[0]]), None)]
    piece = piece_tokens(llm)
    for start in range(0, len(tokens), piece):
        on_progress(start, len(tokens))
        part = tokens[start : start + piece]
        _decode(llm, part, start)
        nexts = tokens[start + 1 : start + 1 + len(part)]
        found += [_scored(llm, llm.logits_row(i), token, n_top) for i, token in enumerate(nexts)]
    llm.input_ids[: len(tokens)] = tokens
    llm.n_tokens, llm._requires_eval = len(tokens), False
    on_progress(len(tokens), len(tokens))
    return found


def piece_tokens(llm: Llama) -> int:
    """Return how many tokens are evaluated at once: a ubatch, if its logits do not take too much.

    llama.cpp keeps the logits of every token of a batch that are asked for.
    """
    affordable = max(_LOGIT_BYTES, llm.plan.spare_bytes // 2) // (4 * llm.n_vocab())
    n_ubatch = int(llm.context_params.n_ubatch)
    return n_ubatch if affordable >= n_ubatch else max(affordable // _MIN_PIECE, 1) * _MIN_PIECE


def token_text(data: bytes) -> str:
    """Return a token as a word, in OpenAI's way where it is a part of a character only."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _decode(llm: Llama, tokens: Sequence[int], past: int) -> None:
    batch = api.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = past + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = True
        llm.decode(batch)
    finally:
        api.llama_batch_free(batch)


def _scored(llm: Llama, row: npt.NDArray[np.float32], token: int, n_top: int) -> Scored:
    logprobs = llm.logits_to_logprobs(row)
    best = np.argpartition(-logprobs, min(n_top, len(row) - 1))[:n_top]
    order = sorted(best.tolist(), key=lambda i: (-logprobs[i], i))
    top = tuple((llm.detokenize([i]), _finite(logprobs[i])) for i in order)
    return Scored(llm.detokenize([token]), _finite(logprobs[token]), top)


def _finite(logprob: np.float32) -> float:
    """JSON has no infinity: what cannot be has OpenAI's number for it."""
    return max(float(logprob), _IMPOSSIBLE)
