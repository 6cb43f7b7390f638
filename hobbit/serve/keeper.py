"""The model, which is in memory while it is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..arena import Arena
from ..memory import MemoryPlan
from ..quality import Quality
from ..stats import LayerLookUps, Stats
from ..template import ChatTemplate, ends_of

if TYPE_CHECKING:
    from ..llama import Llama

State = Literal["asleep", "loading", "loaded"]


@dataclass(frozen=True)
class Facts:
    """What is known of a model also while it is not loaded; `plan` and `ends` once it was."""

    n_ctx: int
    n_vocab: int
    n_embd: int
    quality: Quality
    template: ChatTemplate | None
    plan: MemoryPlan | None = None
    arena: Arena | None = None
    ends: tuple[str, str] = ("", "")


class Keeper:
    """Loads the model when it is borrowed, and gives its memory back `idle_s` after that; 0: never.

    `load` makes a model with this memory cap; what it raises, `borrowed` does. Any thread may call
    anything; `facts`, `state`, `stats` and `look_ups` wait for nothing.
    """

    def __init__(
        self,
        load: Callable[[str | int], Llama],
        facts: Facts,
        memory: str | int,
        idle_s: float = 0.0,
    ) -> None:
        self._load, self._facts, self._memory, self._idle_s = load, facts, memory, idle_s
        self._changing = threading.Lock()  # around loading and closing, which take long
        self._lock = threading.Lock()  # around all that follows
        self._llm: Llama | None = None
        self._is_loading = False
        self._borrowers = 0
        self._returned_at = time.monotonic()
        self._past = Stats()  # of models that are closed
        self._past_look_ups: list[LayerLookUps] = []

    @contextmanager
    def borrowed(self) -> Iterator[Llama]:
        """Have the model, loaded, until the end of the block; anew if it lost a device."""
        with self._changing:
            self._close_if_lost()
            llm = self._llm or self._loaded()
            with self._lock:
                self._borrowers += 1
        try:
            yield llm
        finally:
            with self._lock:
                self._borrowers -= 1
                self._returned_at = time.monotonic()
            if llm.is_lost:  # its memory is wanted back
                with self._changing:
                    self._close_if_lost()

    def set_memory(self, memory: str | int) -> None:
        """Change the cap, for the time after a sleep too; raises what `Llama.set_memory` does."""
        with self.borrowed() as llm:
            llm.set_memory(memory)
            self._memory = memory

    def rest_s(self) -> float | None:
        """Return after how many seconds to call `rest`; None for never."""
        if not self._idle_s:
            return None
        with self._lock:
            if self._borrowers or self._llm is None:
                return self._idle_s
            return max(self._returned_at + self._idle_s - time.monotonic(), 0.0)

    def rest(self) -> bool:
        """Close the model if nobody has it and nobody had it for long; whether it was closed."""
        with self._changing:
            with self._lock:
                idle_s = time.monotonic() - self._returned_at
                if self._llm is None or self._borrowers or idle_s < self._idle_s:
                    return False
            self._close()
            return True

    def close(self) -> None:
        """Close the model for good; nobody may have it."""
        with self._changing:
            self._close()

    @property
    def state(self) -> State:
        with self._lock:
            return "loading" if self._is_loading else "loaded" if self._llm else "asleep"

    @property
    def facts(self) -> Facts:
        with self._lock:
            return self._current_facts()

    @property
    def stats(self) -> Stats:
        """The counters since the start, of all models that were loaded since."""
        with self._lock:
            return self._counted(self._llm)[0]

    @property
    def look_ups(self) -> list[LayerLookUps]:
        """The same by layer."""
        with self._lock:
            return self._counted(self._llm)[1]

    @property
    def n_tokens(self) -> int:
        """How much of the context is in use."""
        with self._lock:
            return self._llm.n_tokens if self._llm is not None else 0

    def _loaded(self) -> Llama:
        with self._lock:
            self._is_loading = True
        try:
            llm = self._load(self._memory)
        finally:
            with self._lock:
                self._is_loading = False
        ends, old = ends_of(llm), self._facts.template
        facts = replace(
            self._facts,
            n_ctx=llm.n_ctx(),
            n_vocab=llm.n_vocab(),
            n_embd=llm.n_embd(),
            ends=ends,
            template=ChatTemplate(old.text, ends) if old is not None else None,
        )
        with self._lock:
            self._llm, self._facts = llm, facts
        return llm

    def _close_if_lost(self) -> None:
        if self._llm is not None and self._llm.is_lost and not self._borrowers:
            self._close()

    def _close(self) -> None:
        with self._lock:
            if self._llm is None:
                return
            self._past, self._past_look_ups = self._counted(self._llm)
            self._facts = self._current_facts()
            llm, self._llm = self._llm, None
        llm.close()

    def _current_facts(self) -> Facts:
        if self._llm is None:
            return self._facts
        return replace(
            self._facts, quality=self._llm.quality, plan=self._llm.plan, arena=self._llm.arena
        )

    def _counted(self, llm: Llama | None) -> tuple[Stats, list[LayerLookUps]]:
        """Return what was counted, now and in the past."""
        if llm is None:
            return self._past, self._past_look_ups
        layers, before = llm.look_ups, self._past_look_ups
        if before:
            layers = [now.plus(past) for now, past in zip(layers, before, strict=True)]
        return llm.stats.plus(self._past), layers
