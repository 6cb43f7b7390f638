"""Several sequences in one batch: whose each row is, what they share, and what stays separate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gates import JOB, Bench, assert_same, opened
from llama_cpp import llama_cpp as api

import hobbit
from hobbit.batches import Row, consecutive, equal, read_rows
from hobbit.errors import Cancelled, HobbitError, ReadError, UsageError
from hobbit.stock import Job, Logits
from hobbit.trace import LAYER, SEQUENCE, Trace, read_trace

N_SEQ = 4
TOGETHER = replace(JOB, n_seq=N_SEQ, n_prompt=20, n_decode=12)
Piece = tuple[int, int, int]  # a sequence, and its first and last position


def rows(*pieces: tuple[int, int], outputs: int = 1) -> list[Row]:
    """Return so many rows of each sequence, one after the other; the last ones have outputs."""
    return [
        Row((sequence,), position, position >= n - outputs)
        for sequence, n in pieces
        for position in range(n)
    ]


class TestOrder:
    def test_consecutive(self) -> None:
        assert consecutive(5, 2) == [[0, 1], [2, 3], [4]]

    def test_equal_parts_of_consecutive_sequences(self) -> None:
        batch = rows((0, 3), (1, 2), (3, 1))
        assert equal(batch, 4, sequential=True) == [[0, 1, 3, 4], [2], [5]]
        assert equal(batch, 6, sequential=False) == [[0, 3, 5], [1, 4], [2]]

    def test_ids_that_go_down(self) -> None:
        batch = rows((2, 1), (1, 1), (0, 1))
        assert equal(batch, 8, sequential=True) == [[0], [1], [2]]
        assert equal(batch, 8, sequential=False) == [[0, 1, 2]]

    def test_an_id_that_follows_later(self) -> None:
        batch = [Row((s,), 0, True) for s in (1, 3, 2, 3)]
        assert equal(batch, 8, sequential=True) == [[0, 2, 1], [3]]

    def test_rows_of_several_sequences(self) -> None:
        batch = [Row((0, 1), 0, False), Row((0,), 1, True), Row((1,), 1, True), Row((2,), 0, True)]
        assert equal(batch, 8, sequential=False) == [[0, 3], [1, 2]]


@contextlib.contextmanager
def context_of(llm: hobbit.Llama, n_seq: int, unified: bool = False) -> Iterator[Any]:
    """Make a context of several sequences beside the model's own."""
    params = type(llm.context_params).from_buffer_copy(llm.context_params)
    params.n_seq_max, params.kv_unified = n_seq, unified
    context = api.llama_init_from_model(llm._model.model, params)
    assert context
    try:
        yield context
    finally:
        api.llama_free(context)


@contextlib.contextmanager
def batch_of(tokens: Sequence[tuple[int, int, int, bool]]) -> Iterator[Any]:
    """Make a llama_batch of (token, sequence, position, output)."""
    batch = api.llama_batch_init(max(len(tokens), 1), 0, 1)
    batch.n_tokens = len(tokens)
    for i, (token, sequence, position, output) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, output
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
    try:
        yield batch
    finally:
        api.llama_batch_free(batch)


@dataclass
class Texts:
    """Random tokens for each sequence."""

    n_vocab: int

    def token(self, sequence: int, position: int) -> int:
        rng = np.random.default_rng([sequence, position])
        return int(rng.integers(0, self.n_vocab))

    def decode(self, llm: hobbit.Llama, context: Any, pieces: Sequence[Piece]) -> None:
        """Decode these pieces in one batch; each one's last token has logits."""
        tokens = [
            (self.token(sequence, position), sequence, position, position == last)
            for sequence, first, last in pieces
            for position in range(first, last + 1)
        ]
        with batch_of(tokens) as batch:
            llm.decode(batch, context)


def routing(trace: Trace) -> dict[tuple[int, int, int], frozenset[int]]:
    """Return the experts by (group, sequence, token)."""
    found = {}
    for event in trace:
        for r, (sequence, token) in enumerate(zip(event.sequence, event.token, strict=True)):
            if event.kind == LAYER:
                experts = frozenset(event.experts[r].tolist())
                found[event.group, int(sequence), int(token)] = experts
    return found


# Prompts of different lengths together, then a further one while others decode, in odd orders.
STEPS: list[list[Piece]] = [
    [(0, 0, 8), (1, 0, 30), (3, 0, 20)],
    [(3, 21, 21), (0, 9, 9), (2, 0, 17), (1, 31, 31)],
    [(2, 18, 18), (3, 22, 22), (1, 32, 32), (0, 10, 10)],
    [(0, 11, 11), (1, 33, 33), (2, 19, 19), (3, 23, 23)],
]


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "granitehybrid", "deepseek4", "grovemoe"])
def test_rows_know_their_sequence(arch: str, unified: bool, bench: Bench, tmp_path: Path) -> None:
    """A token is routed together with others as it is alone, nearly always."""
    job = Job(n_prompt=100, n_ubatch=16, n_threads=1)
    with opened(bench.arch(arch), "floor", job) as llm:
        texts = Texts(llm.n_vocab())
        alone = {}
        for sequence in range(N_SEQ):
            with context_of(llm, N_SEQ) as context, llm.traced(tmp_path / f"{sequence}"):
                for step in STEPS:
                    for piece in step:
                        if piece[0] == sequence:
                            texts.decode(llm, context, [piece])
            alone |= routing(read_trace(tmp_path / f"{sequence}"))
        with context_of(llm, N_SEQ, unified) as context, llm.traced(tmp_path / "together"):
            for step in STEPS:
                texts.decode(llm, context, step)
    trace = read_trace(tmp_path / "together")
    together = routing(trace)
    assert together.keys() == alone.keys()
    same = np.mean([together[key] == alone[key] for key in alone])
    assert same > 0.97, f"{same} of the rows have the routing of their token"
    mixed = [len(set(e.sequence.tolist())) for e in trace if e.kind == LAYER]
    assert max(mixed) == N_SEQ
