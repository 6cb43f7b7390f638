"""Who is next: a bounded queue in which clients take turns."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class QueueFull(Exception):
    """So many wait already."""


class Turns(Generic[T]):
    """Items of several clients: first come first served within a client, round robin between them.

    `limit` items may wait while one is worked on. Any thread may call anything.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()  # whose turn is next comes first
        self._taken = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, client: str, item: T) -> None:
        """Add an item; raises QueueFull, also after `close`."""
        with self._changed:
            if self._closed or self._count() + self._taken > self.limit:
                raise QueueFull
            self._waiting.setdefault(client, deque()).append(item)
            self._changed.notify()

    def take(self, patience_s: float | None = None) -> T | None:
        """Wait for the next item; None when nothing is left of a closed queue.

        Raises TimeoutError when nothing came for so long.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting or self._closed, patience_s):
                raise TimeoutError
            if not self._waiting:
                return None
            client, items = self._waiting.popitem(last=False)
            item = items.popleft()
            if items:
                self._waiting[client] = items
            self._taken += 1
            return item

    def done(self) -> None:
        """What was taken is finished."""
        with self._changed:
            self._taken -= 1

    def remove(self, item: T) -> bool:
        """Take an item out of the queue; False if it is not in it any more."""
        with self._changed:
            for client, items in self._waiting.items():
                if item in items:
                    items.remove(item)
                    if not items:
                        del self._waiting[client]
                    return True
            return False

    def position(self, item: T) -> int:
        """Return how many are before an item and itself; 0 if it does not wait."""
        with self._changed:
            order = list(self._order())
        return order.index(item) + 1 if item in order else 0

    def clear(self) -> list[T]:
        """Empty the queue; return what waited."""
        with self._changed:
            left = list(self._order())
            self._waiting.clear()
            return left

    def close(self) -> None:
        """Take nothing more in; what waits is still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    def __len__(self) -> int:
        with self._changed:
            return self._count()

    def _count(self) -> int:
        return sum(len(items) for items in self._waiting.values())

    def _order(self) -> Iterator[T]:
        lanes = [[*items] for items in self._waiting.values()]
        for turn in range(max(map(len, lanes), default=0)):
            yield from (lane[turn] for lane in lanes if turn < len(lane))
