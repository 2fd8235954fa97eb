"""Chores: what has to be done some time, such as taking down a used slot, and must not keep a call from its result.

They are done when no task has anything better to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio
import trio.testing

_WAIT = 0.02
"""Seconds for which chores give way to tasks that always have something to do, such as busy relays."""


class Chores:
    """The chores of one executor, first come, first done."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._bell = trio.Event()

    def later(self, chore: Callable[[], None]) -> None:
        """Do something after the call that asks for it has returned: nothing it needs may wait for this."""
        self._waiting.append(chore)
        if len(self._waiting) == 1:
            self._bell.set()

    async def run(self) -> None:
        """Do chores when no task has anything better to do; runs as long as there may be any."""
        while True:
            await self._bell.wait()
            with trio.move_on_after(_WAIT):
                await trio.testing.wait_all_tasks_blocked()
            self._bell = trio.Event()
            self.finish()

    def finish(self) -> None:
        """Do all there are, now."""
        while self._waiting:
            self._waiting.popleft()()
