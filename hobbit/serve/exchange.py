"""A request's way through the engine, as the event loop sees it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from .engine import Engine, Job
from .errors import HttpError
from .generation import Event, Failed, Finished, Generation, Progress, Token


@dataclass(frozen=True)
class Waiting:
    """Nothing happened for a while; place 0 is being worked on."""

    place: int
    total: int
    progress: Progress | None

    def words(self) -> str:
        """Say it in a comment of the stream."""
        if self.place:
            return f"queue {self.place}/{self.total}"
        p = self.progress
        return f"keepalive {p.done}/{p.total}" if p and p.done < p.total else "keepalive"


class Exchange:
    """Submits a generation at once; `leave` must be called in the end.

    Raises HttpError 503 where the queue is full. `events` ends with Finished, or raises what went
    wrong: HttpError 504 when `timeout_s` (0: never) have passed since the request came.
    """

    def __init__(
        self, engine: Engine, wanted: Generation, client: str, ping_s: float, timeout_s: float
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._engine, self._ping_s, self._timeout_s = engine, ping_s, timeout_s
        self._deadline = self._loop.time() + timeout_s if timeout_s else float("inf")
        self._job = Job(wanted, client, self._from_model)
        engine.submit(self._job)

    def _from_model(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    @property
    def waiting(self) -> Waiting:
        """Where the request is now."""
        place = self._engine.position(self._job)
        return Waiting(place, self._engine.waiting, self._job.progress)

    async def events(self) -> AsyncIterator[Event | Waiting]:
        """Yield what happens, and Waiting when nothing does."""
        while True:
            left = self._deadline - self._loop.time()
            try:
                event = await asyncio.wait_for(self._queue.get(), max(min(self._ping_s, left), 0))
            except asyncio.TimeoutError:
                if self._loop.time() >= self._deadline:
                    raise HttpError(504, f"no answer within {self._timeout_s:g} s") from None
                yield self.waiting
                continue
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, Finished):
                return

    def leave(self) -> None:
        """Whoever asked has got the answer, or has gone."""
        self._engine.abandon(self._job)


async def whole(
    exchange: Exchange, receive: Callable[[], Awaitable[Any]]
) -> list[Token | Finished]:
    """Return the tokens and the end; raises HttpError 499 when the client goes before."""
    gone = asyncio.ensure_future(_disconnected(receive))
    answer = asyncio.ensure_future(_collected(exchange))
    try:
        await asyncio.wait({gone, answer}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise HttpError(499, "the client has gone")
    finally:
        gone.cancel()
        answer.cancel()
        exchange.leave()


async def _collected(exchange: Exchange) -> list[Token | Finished]:
    return [event async for event in exchange.events() if isinstance(event, Token | Finished)]


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
