"""One watch for the deadlines of all calls.

A cancel scope per call would do, and costs every call its set-up, though almost none ever reaches its deadline. Here a call
that ends in time costs two list operations.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

import trio

_PRUNE = 1024
"""Entries of ended calls that may lie about before they are swept."""


class Entry:
    """A deadline that is being watched; ``cancel`` when it does not matter any more."""

    __slots__ = ("_expire", "_watch")

    def __init__(self, watch: Deadlines, expire: Callable[[], None]) -> None:
        self._watch = watch
        self._expire: Callable[[], None] | None = expire

    @property
    def live(self) -> bool:
        """It can still expire."""
        return self._expire is not None

    def cancel(self) -> None:
        """Nothing happens at the deadline. Once it has expired, nothing happens at all."""
        if self._expire is not None:
            self._expire = None
            self._watch.ended()

    def expire(self) -> None:
        """The instant has come."""
        if self._expire is not None:
            expire, self._expire = self._expire, None
            expire()


class Deadlines:
    """Calls a function at each instant that was asked for; instants are ``trio.current_time()``."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Entry]] = []
        self._number = count()
        self._ended = 0
        self._sleep = trio.CancelScope()

    def add(self, deadline: float, expire: Callable[[], None]) -> Entry:
        """Call ``expire`` at ``deadline``, unless the entry is cancelled before."""
        entry = Entry(self, expire)
        heapq.heappush(self._heap, (deadline, next(self._number), entry))
        if deadline < self._sleep.deadline:
            self._sleep.deadline = deadline
        return entry

    def ended(self) -> None:
        """An entry was cancelled; its place in the heap is swept some time."""
        self._ended += 1
        if self._ended > _PRUNE and 2 * self._ended > len(self._heap):
            self._heap = [item for item in self._heap if item[2].live]
            heapq.heapify(self._heap)
            self._ended = 0

    async def watch(self) -> None:
        """Wait for deadlines; runs for as long as any may be added."""
        while True:
            now = trio.current_time()
            while self._heap and self._heap[0][0] <= now:
                heapq.heappop(self._heap)[2].expire()
            self._sleep = trio.CancelScope(deadline=self._heap[0][0] if self._heap else float("inf"))
            with self._sleep:
                await trio.sleep_forever()
