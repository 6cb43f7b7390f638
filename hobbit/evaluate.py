"""How far a lossy mode is from exact: the same text, token by token, under each rule.

For each predicted token, with p the distribution under the exact rule and q that under another
(softmax of the logits, over the vocabulary; natural logarithms):

    NLL = -log q(next token)        KL(p || q) = sum_v p(v) (log p(v) - log q(v))

Sums are float64. Exact's logits are kept in a file, as the float32 that the model gave, and not in
memory: a text of 10,000 tokens has gigabytes of them.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import HobbitError, UsageError
from .forced import Forced, Logits, Model
from .rule import EXACT, Rule
from .sizes import format_size
from .stats import Stats

if TYPE_CHECKING:
    from .llama import Llama

Doubles = npt.NDArray[np.float64]

# Exit code of `hobbit eval` when a mode is further from exact than --max-kld allows.
EXIT_TOO_FAR = 6
# Fewer counted tokens say nothing.
MIN_TOKENS = 64
# What is left of the disk when the logits are written.
_DISK_RESERVE = 64 << 20


@dataclass(frozen=True)
class Sample:
    """Which tokens of a text are decoded, and which of them count.

    window: tokens that are decoded with one context. limit: tokens in all windows together, which
    are spread evenly over the text. skip: the first predictions of a window, too little context to
    count. warmup: the first decode steps, while the expert cache fills: they count for nothing.
    width: tokens in one decode step; more than 1 shows what generating gives only under a rule that
    is deterministic and per token.
    """

    window: int = 256
    limit: int = 1536
    skip: int = 16
    warmup: int = 64
    width: int = 1


@dataclass(frozen=True)
class Row:
    """One mode on one text; KL in nats, against the exact rule.

    `n_tokens` predictions are counted; `kl_se` is the standard error of their mean KL, taking them
    for independent. Bytes, hits, pairs and speed are those of the decode steps after the warm-up.
    """

    mode: str
    rule: Rule
    n_tokens: int
    perplexity: float
    kl: float
    kl_se: float
    kl_p99: float
    kl_max: float
    top1: float
    bytes_per_token: float
    low_bytes_per_token: float
    high: float
    low: float
    skipped: float
    hit_rate: float
    tok_s: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


Progress = Callable[[str, float], None]


def evaluate(
    llm: Llama,
    tokens: Sequence[int],
    modes: Sequence[tuple[str, Rule]],
    sample: Sample | None = None,
    *,
    bos: int | None = None,
    folder: Path | None = None,
    on_progress: Progress | None = None,
) -> list[Row]:
    """Compare modes with exact on a text; the first row is exact's own.

    Every mode has the same memory: that of the one model they share, whose cache of experts is
    emptied before each. `bos` is put before every window. `folder` takes exact's logits, in a file
    without a name that ends with the process. Raises UsageError for too short a text or too small a
    context, HobbitError without room on the disk, Cancelled after `llm.cancel()`.
    """
    arms = [("exact", EXACT), *((name, rule) for name, rule in modes if name != "exact")]
    return compare(
        Forced(llm), tokens, arms, sample, bos=bos, folder=folder, on_progress=on_progress
    )


def compare(
    model: Model,
    tokens: Sequence[int],
    arms: Sequence[tuple[str, Rule]],
    sample: Sample | None = None,
    *,
    bos: int | None = None,
    folder: Path | None = None,
    on_progress: Progress | None = None,
) -> list[Row]:
    """Run `evaluate` on anything that is a `Model`; the others are held to the first arm."""
    with comparison(
        model, tokens, sample, bos=bos, folder=folder, on_progress=on_progress
    ) as measured:
        return [measured(name, rule) for name, rule in arms]


@contextmanager
def comparison(
    model: Model,
    tokens: Sequence[int],
    sample: Sample | None = None,
    *,
    bos: int | None = None,
    folder: Path | None = None,
    on_progress: Progress | None = None,
) -> Iterator[Callable[[str, Rule], Row]]:
    """Give a function that measures one arm after another; the first is what the rest is held to.

    For who decides by the last row what to measure next; otherwise, and in what is raised, as
    `evaluate`.
    """
    sample = sample or Sample()
    parts = windows(tokens, sample, bos)
    if max(map(len, parts)) > model.n_ctx:
        raise UsageError(f"windows of {sample.window} tokens need a context of as many")
    n_steps = sum(len(part) - 1 for part in parts)
    say = on_progress or (lambda mode, done: None)
    with _Reference.room(model.n_vocab, n_steps, folder) as reference:

        def measured(name: str, rule: Rule) -> Row:
            say(name, 0.0)
            reference.rewind()
            row = _run(model, name, rule, parts, sample, reference, say)
            reference.complete = True
            return row

        yield measured


def windows(tokens: Sequence[int], sample: Sample, bos: int | None = None) -> list[list[int]]:
    """Cut windows out of the text: as many whole ones as the limit allows, evenly spread.

    So few tokens cover a mixed text too. A window begins with `bos`, where the model has one.
    """
    if sample.window < 2 or sample.width < 1 or sample.skip < 0 or sample.warmup < 0:
        raise UsageError("a window has two tokens at least, a step one")
    size = min(sample.window - (bos is not None), len(tokens))
    count = max(min(sample.limit // sample.window, len(tokens) // size), 1) if size else 0
    size = min(size, sample.limit)
    gap = (len(tokens) - size) / (count - 1) if count > 1 else 0
    first = [] if bos is None else [bos]
    parts = [[*first, *tokens[(at := round(i * gap)) : at + size]] for i in range(count)]
    counted = sum(_counted(sample, step, at) for step, at in _steps(parts))
    if counted < MIN_TOKENS:
        what = f"a text of {len(tokens)} tokens is too short"
        if len(tokens) > sample.limit:
            what = f"a limit of {sample.limit} tokens is too low"
        raise UsageError(
            f"{what}: {counted} count, after a warm-up of {sample.warmup} and the first "
            f"{sample.skip} of each window; {MIN_TOKENS} are needed"
        )
    return parts


def _steps(parts: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Yield each prediction's number in the run and in its window."""
    step = 0
    for part in parts:
        for at in range(len(part) - 1):
            yield step, at
            step += 1


def _counted(sample: Sample, step: int, at: int) -> bool:
    return at >= sample.skip and step >= sample.warmup


def log_normaliser(logits: Logits) -> float:
    """Return log sum_v exp(logits[v]) in float64, shifted by the largest: none overflows."""
    top = float(logits.max())
    if not math.isfinite(top):
        raise HobbitError("the model's logits are not numbers: its file or low copy is damaged")
    return top + math.log(float(np.exp(logits.astype(np.float64) - top).sum()))


def divergence(p: Logits, q: Logits) -> float:
    """Return KL(p || q) in nats of two rows of logits; what p holds impossible adds nothing."""
    log_p = p.astype(np.float64) - log_normaliser(p)
    log_q = q.astype(np.float64) - log_normaliser(q)
    possible = log_p > -np.inf
    share = np.exp(log_p[possible])
    # Rounding can leave the sum just below zero.
    # Not `share @ ...`: BLAS's threads would spin beside llama.cpp's.
    return max(float((share * (log_p[possible] - log_q[possible])).sum()), 0.0)


class _Reference:
    """Exact's logits in a file: written row by row in the first arm, read in the others.

    One row is in memory at a time. A file rather than a map: mapped pages would count as ours.
    """

    def __init__(self, file: IO[bytes], n_vocab: int) -> None:
        self._file = file
        self._row = np.empty(n_vocab, dtype=np.float32)
        self.complete = False

    @classmethod
    @contextmanager
    def room(cls, n_vocab: int, n_rows: int, folder: Path | None) -> Iterator[_Reference]:
        """Open a file for so many rows; raise HobbitError if the disk has no room for them."""
        place = folder or temporary_folder()
        needed = 4 * n_vocab * n_rows
        free = shutil.disk_usage(place).free
        if free < needed + _DISK_RESERVE:
            raise HobbitError(
                f"{place}: exact's logits take {format_size(needed)}, and {format_size(free)} are "
                "free: use fewer tokens, or another folder with TMPDIR"
            ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
        with tempfile.TemporaryFile(dir=place, prefix="hobbit-logits-", buffering=0) as file:
            yield cls(file, n_vocab)

    def rewind(self) -> None:
        """Go to the first row."""
        self._file.seek(0)

    def next(self, logits: Logits) -> Logits:
        """Return exact's row: the one given in the first arm, the one from the file later."""
        if not self.complete:
            view = np.ascontiguousarray(logits).data.cast("B")
            while view:
                view = view[self._file.write(view) :]
            return logits
        view = self._row.data.cast("B")
        while view:
            n = self._file.readinto(view)  # type: ignore[attr-defined]
            if not n:
                raise HobbitError("the file of exact's logits ended early")
            view = view[n:]
        return self._row


def temporary_folder() -> Path:
    """Return where large temporary files go: TMPDIR, else /var/tmp, which is never in memory."""
    if os.environ.get("TMPDIR") or not os.access("/var/tmp", os.W_OK):
        return Path(tempfile.gettempdir())
    return Path("/var/tmp")


@dataclass
class _Tally:
    """What the counted predictions of an arm said."""

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreed: int = 0

    def add(self, exact: Logits, logits: Logits, target: int) -> None:
        self.nll.append(log_normaliser(logits) - float(logits[target]))
        self.kl.append(0.0 if exact is logits else divergence(exact, logits))
        self.agreed += int(exact.argmax()) == int(logits.argmax())


def _run(
    model: Model,
    name: str,
    rule: Rule,
    parts: Sequence[Sequence[int]],
    sample: Sample,
    reference: _Reference,
    say: Progress,
) -> Row:
    began = time.monotonic()
    model.begin(rule)
    total = sum(len(part) - 1 for part in parts)
    tally, step, n_decoded, decode_s = _Tally(), 0, 0, 0.0
    before = model.counters()
    for part in parts:
        model.clear()
        at = 0
        while at < len(part) - 1:
            # No batch is half warm-up.
            size = min(sample.width, sample.warmup - step if step < sample.warmup else len(part))
            batch = part[at : min(at + size, len(part) - 1)]
            start = time.perf_counter()
            logits = model.decode(batch)
            if step >= sample.warmup:
                decode_s += time.perf_counter() - start
                n_decoded += len(batch)
            else:
                before = model.counters()
            for i in range(len(batch)):
                exact = reference.next(logits[i])
                if _counted(sample, step, at + i):
                    tally.add(exact, logits[i], part[at + i + 1])
                step += 1
            at += len(batch)
            say(name, step / total)
    since = model.counters().minus(before)
    return _row(name, rule, tally, since, n_decoded, decode_s, time.monotonic() - began)


def _row(
    name: str,
    rule: Rule,
    tally: _Tally,
    since: Stats,
    n_decoded: int,
    decode_s: float,
    seconds: float,
) -> Row:
    kl = np.array(tally.kl)
    n = len(kl)
    high, low, skipped = pair_shares(since)
    return Row(
        mode=name,
        rule=rule,
        n_tokens=n,
        perplexity=math.exp(math.fsum(tally.nll) / n),
        kl=float(kl.mean()),
        kl_se=float(kl.std(ddof=1)) / math.sqrt(n),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1=tally.agreed / n,
        bytes_per_token=since.read_bytes / n_decoded,
        low_bytes_per_token=since.read_low_bytes / n_decoded,
        high=high,
        low=low,
        skipped=skipped,
        hit_rate=since.hit_rate,
        tok_s=n_decoded / decode_s if decode_s > 0 else 0.0,
        seconds=seconds,
    )


def pair_shares(stats: Stats) -> tuple[float, float, float]:
    """Return the shares of (token, expert) pairs computed high, low and not at all."""
    counts = stats.pairs_high, stats.pairs_low, stats.pairs_skip
    total = sum(counts)
    if not total:  # a model that no rule looks at: dense, or without a low copy
        return 1.0, 0.0, 0.0
    return counts[0] / total, counts[1] / total, counts[2] / total
