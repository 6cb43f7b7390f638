"""In which order llama.cpp computes the rows of a batch of several sequences.

llama_decode divides a batch into ubatches. A context whose sequences share one KV buffer (that is
kv_unified, or a single sequence) takes consecutive rows. Others, and all recurrent and hybrid
models, take equally many rows of each sequence, one sequence after the other; without kv_unified
only of sequences with consecutive ids. The last layer computes the rows with outputs alone, in that
order.
So it is in llama-batch.cpp and the init_batch of each kind of memory (llama.cpp of llama-cpp-python
0.3.36). Not known is the order in contexts for embeddings, with recurrent states that can roll back
(n_rs_seq), and where memory is so short that llama.cpp takes the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UsageError

# A part of their memory is apart for each sequence, whatever kv_unified says.
NEVER_UNIFIED = {"deepseek4"}


@dataclass(frozen=True)
class Row:
    """One token of a batch; it may be of several sequences that share a prefix."""

    sequences: tuple[int, ...]
    position: int
    output: bool

    @property
    def sequence(self) -> int:
        """The sequence that the row counts for."""
        return self.sequences[0]


def read_rows(batch: Any, next_position: Callable[[int], int]) -> list[Row]:
    """Read a llama_batch; `next_position` of a sequence is for batches that name no positions."""
    counted: dict[int, int] = {}
    rows = []
    for i in range(batch.n_tokens):
        ids = (0,)
        if batch.seq_id and batch.n_seq_id:
            ids = tuple(batch.seq_id[i][k] for k in range(batch.n_seq_id[i]))
        if not ids:
            raise UsageError(f"token {i} of the batch is of no sequence: set n_seq_id and seq_id")
        if min(ids) < 0:
            raise UsageError(f"token {i} of the batch is of sequence {min(ids)}: ids begin at 0")
        sequence = ids[0]
        if batch.pos:
            position = batch.pos[i]
        else:
            position = counted.get(sequence, 0) or next_position(sequence)
            counted[sequence] = position + 1
        output = bool(batch.logits[i]) if batch.logits else i == batch.n_tokens - 1
        rows.append(Row(ids, position, output))
    return rows


def consecutive(n_rows: int, n_ubatch: int) -> list[list[int]]:
    """Return the rows of each ubatch where they are taken as they come."""
    return [list(range(i, min(i + n_ubatch, n_rows))) for i in range(0, n_rows, n_ubatch)]


def equal(rows: Sequence[Row], n_ubatch: int, *, sequential: bool) -> list[list[int]]:
    """Return the rows of each ubatch where every sequence in it has equally many."""
    sets = [frozenset(row.sequences) for row in rows]
    waiting: dict[frozenset[int], list[int]] = {}
    for i, ids in enumerate(sets):
        waiting.setdefault(ids, []).append(i)
    left = list(range(len(rows)))
    ubatches = []
    while left:
        chosen: list[frozenset[int]] = []
        last = -1
        for i in left:
            follows = not sequential or not chosen or rows[i].sequence == last + 1
            if follows and not any(ids & sets[i] for ids in chosen):
                chosen.append(sets[i])
                last = rows[i].sequence
                if len(chosen) > n_ubatch:
                    break
        n = max(n_ubatch // len(chosen), 1)
        n = min(n, *(len(waiting[ids]) for ids in chosen))
        ubatch = [i for ids in chosen for i in waiting[ids][:n]]
        for ids in chosen:
            del waiting[ids][:n]
        taken = set(ubatch)
        left = [i for i in left if i not in taken]
        ubatches.append(ubatch)
    return ubatches
