"""A streamed answer, which leaves the queue whatever becomes of the connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from . import sse
from .errors import as_http
from .exchange import Exchange


class Stream(StreamingResponse):
    """Sends events; an error that comes after the first of them is sent as one."""

    def __init__(
        self,
        exchange: Exchange,
        events: AsyncIterator[bytes],
        failed: Callable[[BaseException], None],
    ) -> None:
        told = _with_errors(events, failed)
        super().__init__(told, headers=sse.HEADERS, media_type=sse.MEDIA_TYPE)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.leave()


async def _with_errors(
    events: AsyncIterator[bytes], failed: Callable[[BaseException], None]
) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield event
    except Exception as error:  # the status is sent already
        told = as_http(error)
        if told.status == 500:
            failed(error)
        yield sse.event(told.body())
