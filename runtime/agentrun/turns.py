"""Turns: so many calls run at once, so many more may wait, in the order in which they came; the others are refused."""

from __future__ import annotations

import trio

from agentrun.errors import HostError, Overloaded


class Turns:
    """The places of an executor's calls, and the queue for them.

    A place is taken where the call is, for that is on the way of every one: ``running += 1`` if ``running < most``, else
    ``await wait()``. Whoever has one gives it back with ``leave``.
    """

    def __init__(self, most: int, most_waiting: int) -> None:
        self.running = 0
        """Calls that have a place."""
        self.most = most
        """Places there are. None any more once it is closed: then whoever comes is sent to ``wait``, and refused."""
        self.completed = 0
        self.refused = 0
        self.closed = False
        self._most_waiting = most_waiting
        self._queue = trio.lowlevel.ParkingLot()
        self._none_runs = trio.Event()

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return len(self._queue)

    async def wait(self) -> None:
        """Wait for a place, and have it.

        Raises:
            Overloaded: too many wait already.
            HostError: the executor is closing.
        """
        if self.closed:
            raise HostError("the executor is closing")
        if len(self._queue) >= self._most_waiting:
            self.refused += 1
            raise Overloaded(f"{self.running} calls run and {len(self._queue)} wait; try again later")
        # Whoever leaves hands its place on: running stays as it is.
        await self._queue.park()
        if self.closed:
            self.leave()
            raise HostError("the executor is closing")

    def leave(self) -> None:
        """Give a place back: to whoever has waited longest, if anybody has."""
        self.completed += 1
        if not self._queue.unpark():
            self.running -= 1
            if self.running == 0:
                self._none_runs.set()

    def close(self) -> None:
        """From this moment on nobody gets a place; those who wait are told when theirs would come."""
        self.closed = True
        self.most = 0
        self._none_runs = trio.Event()

    async def wait_none(self) -> None:
        """Once it is closed: wait until nobody has a place."""
        if self.running:
            await self._none_runs.wait()
