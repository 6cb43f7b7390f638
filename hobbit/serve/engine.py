"""The one thread that runs the model, and what the rest of the server may ask meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import Cancelled
from .answer import answer
from .errors import HttpError
from .generation import Event, Failed, Finished, Generation, Progress, Started, Token
from .turns import QueueFull, Turns

if TYPE_CHECKING:
    from ..llama import Llama
    from .keeper import Keeper

# A cancellation that falls between two decodes has nothing to stop: it is repeated.
_CANCEL_INTERVAL_S = 0.05


class Job:
    """One generation on its way. `emit` is called in the model's thread."""

    def __init__(self, wanted: Generation, client: str, emit: Callable[[Event], None]) -> None:
        self.wanted, self.client = wanted, client
        self.abandoned = threading.Event()
        self.progress: Progress | None = None
        self.n_generated = 0
        self._emit = emit

    def emit(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.progress = event
        elif isinstance(event, Token):
            self.n_generated += 1
        self._emit(event)


@dataclass
class Totals:
    """What all requests came to since the start; `last` is the one that ended last."""

    requests: int = 0
    failed: int = 0
    abandoned: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    prompt_s: float = 0.0
    generated_tokens: int = 0
    generated_s: float = 0.0
    n_tokens_max: int = 0
    last: Finished | None = None
    started_at: float = field(default_factory=time.time)

    def add(self, done: Finished) -> None:
        self.requests += 1
        self.prompt_tokens += done.n_prompt - done.n_cached
        self.prompt_s += done.prompt_s
        self.generated_tokens += done.n_generated
        self.generated_s += done.decode_s
        self.n_tokens_max = max(self.n_tokens_max, done.n_prompt + done.n_generated)
        self.last = done


class Engine:
    """Runs jobs one after the other; clients take turns.

    `on_finished`, and `on_rest` when the model was closed because nobody used it, are called in the
    model's thread. All methods may be called from any thread and do not wait for the model, but for
    `close` and `set_memory`.
    """

    def __init__(
        self,
        model: Keeper,
        queue: int,
        on_finished: Callable[[Llama, Finished], None],
        on_rest: Callable[[], None],
    ) -> None:
        self.model = model
        self.totals = Totals()
        self._turns: Turns[Job] = Turns(queue)
        self._on_finished, self._on_rest = on_finished, on_rest
        self._llm: Llama | None = None  # that answers
        self._lock = threading.Lock()  # around what is current, and cancelling it
        self._quality = threading.Lock()  # held while a request has a quality of its own
        self.current: Job | None = None
        self._thread = threading.Thread(target=self._work, name="hobbit-model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn; raises HttpError 503 when too many wait, or at the end."""
        try:
            self._turns.put(job.client, job)
        except QueueFull:
            self.totals.refused += 1
            if self._turns.closed:
                raise HttpError(503, "the server is shutting down") from None
            raise HttpError(
                503,
                f"the queue is full: {self._turns.limit} requests wait already",
                {"Retry-After": str(self._patience_s())},
            ) from None

    def abandon(self, job: Job) -> None:
        """Nobody wants the answer any more: stop within a layer. Harmless when it has ended."""
        job.abandoned.set()
        if self._turns.remove(job):
            self.totals.abandoned += 1
            return
        with self._lock:
            if self.current is job and self._llm is not None:
                self._llm.cancel()

    def position(self, job: Job) -> int:
        """Return the job's place in the queue; 0 if it does not wait."""
        return self._turns.position(job)

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._turns)

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self.current is not None

    @property
    def draining(self) -> bool:
        """Whether no more requests are taken."""
        return self._turns.closed

    def set_memory(self, memory: str | int) -> None:
        """Change the cap; waits for a layer, or for a request with a quality of its own."""
        with self._quality:
            self.model.set_memory(memory)

    def drain(self) -> None:
        """Take no more requests; those that are here are answered."""
        self._turns.close()

    def stop(self) -> None:
        """Take no more requests, and end those that are here with an error."""
        self._turns.close()
        for job in self._turns.clear():
            job.emit(Failed(Cancelled("the server stopped")))
        current = self.current
        if current is not None:
            self.abandon(current)

    def close(self) -> None:
        """Stop, and wait until the model runs no more."""
        while self._thread.is_alive():
            self.stop()
            self._thread.join(_CANCEL_INTERVAL_S)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            with self._lock:
                self.current = job
            last = self._run(job)
            with self._lock:
                self.current = None
            self._turns.done()
            job.emit(last)

    def _next(self) -> Job | None:
        """Wait for a job; meanwhile the model may be closed."""
        while True:
            try:
                return self._turns.take(self.model.rest_s())
            except TimeoutError:
                if self.model.rest():
                    with contextlib.suppress(OSError, ValueError):
                        self._on_rest()

    def _run(self, job: Job) -> Event:
        """Answer a job; the end is returned, to be told when the model is free again."""
        job.emit(Started())
        try:
            with self.model.borrowed() as llm:
                done = self._answered(llm, job)
                self.totals.add(done)
                with contextlib.suppress(OSError, ValueError):  # it prints, and stderr may be gone
                    self._on_finished(llm, done)
        except BaseException as error:  # whatever it is, the next request is not to suffer
            stopped = isinstance(error, Cancelled)
            self.totals.abandoned += stopped
            self.totals.failed += not stopped
            return Failed(error)
        return done

    def _answered(self, llm: Llama, job: Job) -> Finished:
        own_quality = job.wanted.quality is not None
        with self._quality if own_quality else contextlib.nullcontext():
            with self._lock:
                self._llm = llm
            try:
                return answer(llm, job.wanted, job.emit, job.abandoned.is_set)
            finally:
                with self._lock:
                    self._llm = None
                    llm.cancel(False)  # it may have ended before it was told to

    def _patience_s(self) -> int:
        """Return in how many seconds, by the last request, it may be worth to ask again."""
        last = self.totals.last
        seconds = last.prompt_s + last.decode_s if last is not None else 1.0
        return max(1, min(round(seconds), 600))
