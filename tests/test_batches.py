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


def test_batches_without_ids_and_positions() -> None:
    """As llama_batch_get_one makes them: one sequence, with logits of the last token."""
    tokens = (api.llama_token * 3)(5, 6, 7)
    found = read_rows(api.llama_batch_get_one(tokens, 3), lambda sequence: 40 + sequence)
    assert found == [Row((0,), 40, False), Row((0,), 41, False), Row((0,), 42, True)]


def decoded(llm: hobbit.Llama, job: Job, context: Any) -> Logits:
    """Decode the job as `stock.collect` does, with `Llama.decode`."""
    tokens = job.tokens(llm.n_vocab())
    logits = np.zeros((job.n_prompt + job.n_decode, job.n_seq, llm.n_vocab()), dtype=np.float32)
    steps = [range(job.n_prompt)] + [
        range(p, p + 1) for p in range(job.n_prompt, job.n_prompt + job.n_decode)
    ]
    for positions in steps:
        order = [(seq, pos) for seq in range(job.n_seq) for pos in positions]
        with batch_of([(int(tokens[seq, pos]), seq, pos, True) for seq, pos in order]) as batch:
            llm.decode(batch, context)
        for i, (seq, pos) in enumerate(order):
            row = api.llama_get_logits_ith(context, i)
            logits[pos, seq] = np.ctypeslib.as_array(row, shape=(llm.n_vocab(),))
    return logits


@pytest.mark.parametrize("policy", ["lru", "lfu", "decay:half_life=8"])
@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "qwen3next"])
def test_logits_are_those_of_stock(arch: str, policy: str, bench: Bench) -> None:
    path = bench.arch(arch)
    expected = bench.stock(path, TOGETHER)
    with opened(path, "half", TOGETHER, policy=policy) as llm, context_of(llm, N_SEQ) as context:
        assert_same(expected, decoded(llm, TOGETHER, context), f"{arch}, {policy}")
        stats = llm.stats
        assert stats.evictions > 0
        assert stats.tokens_prompt == N_SEQ * TOGETHER.n_prompt
        assert stats.tokens_generated == N_SEQ * TOGETHER.n_decode


def read_by(path: Path, sequences: Sequence[int], predict: str = "none") -> int:
    """Return the bytes that these sequences read while they decode together."""
    with opened(path, "floor", TOGETHER, predict=predict) as llm:
        texts = Texts(llm.n_vocab())
        with context_of(llm, N_SEQ) as context:
            for position in range(24):
                texts.decode(llm, context, [(s, position, position) for s in sequences])
        return llm.stats.read_bytes


def test_reads_are_shared(bench: Bench) -> None:
    """Half of the experts of a layer are used by four sequences, at two of eight each."""
    path = bench.arch("qwen3moe")
    one_by_one = sum(read_by(path, [s]) for s in range(N_SEQ))
    assert 0 < read_by(path, range(N_SEQ)) < 0.8 * one_by_one


def test_sequences_begin_and_end_in_the_trace(bench: Bench, tmp_path: Path) -> None:
    with opened(bench.arch("qwen3moe"), "floor", TOGETHER) as llm:
        texts = Texts(llm.n_vocab())
        with context_of(llm, N_SEQ) as context, llm.traced(tmp_path / "t"):
            texts.decode(llm, context, [(0, 0, 2), (1, 0, 1)])
            texts.decode(llm, context, [(0, 3, 3), (1, 2, 2)])
            llm.end_sequence(1)
            texts.decode(llm, context, [(0, 4, 4)])
            api.llama_memory_seq_rm(api.llama_get_memory(context), 0, -1, -1)
            texts.decode(llm, context, [(0, 0, 0)])
    events = [(e.kind, e.sequence.tolist(), e.token.tolist()) for e in read_trace(tmp_path / "t")]
    begins = [sequence for kind, sequence, _ in events if kind == SEQUENCE]
    assert begins == [[0], [1], [1], [0]]
    assert [[0, 1], [3, 2]] in [list(rows) for kind, *rows in events if kind == LAYER]


def test_errors(bench: Bench) -> None:
    with opened(bench.arch("qwen3moe"), "floor", TOGETHER) as llm:
        texts = Texts(llm.n_vocab())
        with context_of(llm, 2) as context:
            for tokens, words in (
                ([(1, -1, 0, True)], "token 0 of the batch is of sequence -1: ids begin at 0"),
                ([(1, 2, 0, True)], "a token of sequence 2: this context has 2"),
                ([(1, 0, 5, True), (1, 0, 3, True)], "llama.cpp refuses the batch: .*sequence 0"),
                ([], "the batch has 0 tokens: this context takes 1 to 80"),
                ([(1, 0, p, False) for p in range(81)], "the batch has 81 tokens"),
            ):
                with batch_of(tokens) as batch, pytest.raises(UsageError, match=words):
                    llm.decode(batch, context)
            with batch_of([(1, 0, 0, True)]) as batch:
                batch.n_seq_id[0] = 0
                with pytest.raises(UsageError, match="of no sequence"):
                    llm.decode(batch, context)
            texts.decode(llm, context, [(1, 0, 3)])
            for sequence in (0, 2, -1, 1000):
                with pytest.raises(UsageError, match=f"sequence {sequence} cannot end"):
                    llm.end_sequence(sequence)
            llm.end_sequence(1)
            with pytest.raises(UsageError, match="sequence 1 cannot end"):
                llm.end_sequence(1)
        with context_of(llm, 1) as context, pytest.raises(UsageError, match="context has 1"):
            texts.decode(llm, context, [(0, 0, 3), (1, 0, 3)])
    with batch_of([(1, 0, 0, True)]) as batch, pytest.raises(HobbitError, match="is closed"):
        llm.decode(batch)


def test_more_sequences_than_records(bench: Bench, tmp_path: Path) -> None:
    job = replace(JOB, n_seq=70, n_prompt=2, n_decode=2, n_ubatch=80)
    path = bench.arch("qwen3moe")
    expected = bench.stock(path, job)
    with opened(path, "half", job, policy="lfu") as llm, context_of(llm, 70) as context:
        with llm.traced(tmp_path / "t"):
            assert_same(expected, decoded(llm, job, context))
        for sequence in (69, 63, 62, 0):
            llm.end_sequence(sequence)
    assert set(read_trace(tmp_path / "t").sequence.tolist()) == set(range(70))


def test_a_full_context(bench: Bench) -> None:
    job = replace(JOB, n_prompt=100)
    with opened(bench.arch("qwen3moe"), "floor", job) as llm:
        texts = Texts(llm.n_vocab())
        with pytest.raises(HobbitError, match="no room left"):
            for first in range(0, 10_000, 64):
                texts.decode(llm, llm._ctx.ctx, [(0, first, first + 63)])
        assert first > 0


def test_cancelling_and_failing_reads(bench: Bench, tmp_path: Path) -> None:
    """Afterwards it goes on where it was."""
    path = tmp_path / "model.gguf"
    path.write_bytes(bench.arch("qwen3moe").read_bytes())
    with opened(path, "floor", TOGETHER) as llm, context_of(llm, N_SEQ) as context:
        texts = Texts(llm.n_vocab())
        texts.decode(llm, context, [(0, 0, 5), (1, 0, 3)])
        llm.cancel()
        with pytest.raises(Cancelled):
            texts.decode(llm, context, [(0, 6, 6), (1, 4, 4)])
        texts.decode(llm, context, [(0, 6, 6), (1, 4, 4)])
        whole = path.read_bytes()
        llm.forget()
        with path.open("r+b") as file:
            file.truncate(llm.layout.groups[1].matrices[0].offset)
        with pytest.raises(ReadError, match="at offset"):
            texts.decode(llm, context, [(0, 7, 7), (1, 5, 5)])
        path.write_bytes(whole)
        texts.decode(llm, context, [(0, 7, 7), (1, 5, 5)])


def test_eval_goes_on_as_sequence_0(bench: Bench, tmp_path: Path) -> None:
    with opened(bench.arch("qwen3moe"), "all", replace(JOB, n_prompt=20)) as llm:
        with llm.traced(tmp_path / "t"):
            llm.eval([1, 2, 3])
            Texts(llm.n_vocab()).decode(llm, None, [(0, 3, 3)])
        assert llm.stats.tokens_generated == 1
        llm.end_sequence(0)
    trace = read_trace(tmp_path / "t")
    assert [(e.sequence.tolist(), e.token.tolist()) for e in trace][-1] == ([0], [3])


def test_a_model_without_experts(bench: Bench) -> None:
    with opened(bench.arch("llama", n_expert=0, n_used=0), 0) as llm:
        assert llm.plan.mode == "resident"
        with context_of(llm, 2) as context:
            Texts(llm.n_vocab()).decode(llm, context, [(0, 0, 3), (1, 0, 2)])
        llm.end_sequence(1)
        assert llm.stats.tokens_prompt == 7
