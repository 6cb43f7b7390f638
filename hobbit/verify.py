"""Prove on a model that hobbit's logits are stock llama.cpp's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .attempt import check_graph
from .cpus import has_amx
from .errors import HobbitError, ModelError, PlanError
from .gguf_file import open_gguf
from .layout import ExpertGroup, Layout, build_layout
from .llama import Llama
from .memory import resolve_cap
from .stock import DecodeFailed, Job, Logits, StockProcess, collect

CACHES = ("floor", "layer", "half", "all")
# Exit code of `hobbit verify` when a logit differs.
EXIT_DIFFERENT = 6
# What a slot may take beyond the expert: room to align each of its matrices for direct reads.
_SLOT_PADDING = 4 * 2 * 4096


@dataclass(frozen=True)
class VerifyRow:
    """One cache size against stock; `skipped` says why it could not run here.

    `nmse` is the sum of squared differences over that of stock's squared logits. `number` says that
    in both a token used another number of experts than the model's own.
    """

    cache: str
    bytes: int
    prompt_equal: bool = False
    decode_equal: bool = False
    max_abs_diff: float = 0.0
    misses: int = 0
    evictions: int = 0
    device_hits: int = 0
    nmse: float = 0.0
    first_difference: str = ""
    skipped: str = ""
    number: str = ""

    @property
    def equal(self) -> bool:
        """Return whether nothing differed; a skipped row proves nothing and hides nothing."""
        return bool(self.skipped) or (self.prompt_equal and self.decode_equal)

    def within(self, tolerance: float) -> bool:
        """Return whether nothing differed, or by no more than this `nmse`."""
        return self.equal or self.nmse <= tolerance


def verify(
    path: Path | str,
    caches: Sequence[str] = CACHES,
    *,
    job: Job | None = None,
    stock: StockProcess | None = None,
    device: Mapping[str, Any] | None = None,
    n_expert_used: int | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> list[VerifyRow]:
    """Compare every logit of a prompt and of decoded tokens at each cache size.

    Stock llama.cpp runs first, memory-mapped, in a child process that has ended before hobbit
    loads the model: the two never need memory at the same time. A caller that may have to end the
    child early gives its own as `stock`. The first cache size has to fit the memory that is free; a
    later one that does not is skipped. `device` has the arguments of Llama that name one. With
    `n_expert_used`, as in Llama, stock llama.cpp is told the same number of experts.
    """
    job = job or Job()
    say = on_progress or (lambda text: None)
    layout = build_layout(open_gguf(path), n_expert_used)
    check_graph(layout, job.llama_arguments())
    if not layout.groups:
        caches = ("all",)
    number = f", {layout.other_number}" if layout.other_number else ""
    say(f"stock llama.cpp{number}")
    # A model without experts runs with llama.cpp's own buffer types where the CPU can.
    extra = not layout.groups and not has_amx()
    try:
        with stock or StockProcess() as child:
            (expected,) = child.logits(
                path, [job], extra_buffers=extra, kv_overrides=layout.kv_overrides
            )
    except DecodeFailed as error:
        raise ModelError(f"{path}: stock llama.cpp cannot run it here: {error}") from error
    rows = []
    for cache in caches:
        say(f"hobbit, cache {cache}{number}")
        try:
            size = cache_bytes(layout, cache)
            own = {**(device or {}), "n_expert_used": n_expert_used}
            row = _run(path, cache, size, job, expected, own)
            rows.append(replace(row, number=layout.other_number))
        except PlanError as error:
            if not rows:
                raise
            rows.append(VerifyRow(cache, 0, skipped=str(error)))
    return rows


def cache_bytes(layout: Layout, cache: str) -> int | Literal["floor"]:
    """Return the arena size that a name stands for: what `Llama(cache_bytes=)` takes."""
    if cache == "floor":
        return "floor"
    sizes = [_with_padding(group) * group.n_expert for group in layout.groups]
    if cache == "layer":
        return max(sizes, default=0)
    return sum(sizes) if cache == "all" else layout.expert_bytes // 2


def _with_padding(group: ExpertGroup) -> int:
    return group.expert_bytes + _SLOT_PADDING


def _run(
    path: Path | str,
    cache: str,
    size: int | Literal["floor"],
    job: Job,
    expected: Logits,
    device: Mapping[str, Any],
) -> VerifyRow:
    # Llama takes a given cache size for a person's decision; here it has to fit what is free.
    free = resolve_cap("auto").bytes
    arguments = {**device, **job.llama_arguments()}
    with Llama(str(path), cache_bytes=size, memory=free, **arguments) as llama:
        try:
            with llama.translated_errors():
                found = collect(llama, job)
        except DecodeFailed as error:
            raise HobbitError(f"{path}: {error}") from error
        stats = llama.stats
    row = VerifyRow(
        cache,
        stats.cache_bytes,
        misses=stats.misses,
        evictions=stats.evictions,
        device_hits=stats.device_hits,
    )
    return compare(row, expected, found, job.n_prompt)


def compare(row: VerifyRow, expected: Logits, found: Logits, n_prompt: int) -> VerifyRow:
    """Fill in a row from both arms' logits, compared as bits: -0.0 is not 0.0, NaN is NaN."""
    same = (expected.view(np.uint32) == found.view(np.uint32)).all(axis=2)
    different = np.argwhere(~same)
    first = ""
    if len(different):
        position, sequence = (int(i) for i in different[0])
        part = "prompt" if position < n_prompt else "decoded"
        number = position if position < n_prompt else position - n_prompt
        first = f"{part} token {number}" + (f" of sequence {sequence}" if sequence else "")
    with np.errstate(invalid="ignore"):
        gap = np.abs(expected.astype(np.float64) - found)
        squared = float(np.sum(gap**2) / max(np.sum(expected.astype(np.float64) ** 2), 1e-300))
    return replace(
        row,
        prompt_equal=bool(same[:n_prompt].all()),
        decode_equal=bool(same[n_prompt:].all()),
        max_abs_diff=float(np.nanmax(gap, initial=0.0)),
        first_difference=first,
        nmse=squared if np.isfinite(squared) else float("inf"),
    )
