"""The pool: warm slots of one tenant and one shape.

Demand is what it follows. ``target`` warm slots are kept: twice as many as calls were running at once in the last seconds,
between the configured bounds, and none once nobody has called for two minutes; after five the pool itself is let go of. A lease
takes a warm slot if there is one; else it waits for the next that is built, and the call says so (``warm: false``). Slots are
built a few at a time, always off the way of a warm call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import trio

from agentrun.cgroup.limits import Plan
from agentrun.errors import AgentrunError, HostError
from agentrun.slot import Slot

PARALLEL_BUILDS = 4
"""The zygote clones one at a time; this many sandboxes may be mounting while it does."""
DECAY = 10.0
"""Seconds after which a peak of demand is forgotten."""
UNUSED = 120.0
"""Seconds without a call after which a pool keeps nothing warm."""
RETIRED = 300.0
"""Seconds without a call after which a pool is let go of, with all that only it needs."""
RETRY_MOST = 5.0
"""Longest pause, seconds, between attempts to build for nobody in particular while building fails."""


class PoolStats(msgspec.Struct, frozen=True, kw_only=True):
    """A pool at one moment, and its history in counts."""

    idle: int
    building: int
    waiting: int
    leased: int
    target: int
    hits: int
    misses: int
    built: int
    failed: int


class Pool:
    """Warm slots; see the module. ``statistics()`` tells how it does."""

    def __init__(
        self,
        build: Callable[[], Awaitable[Slot]],
        discard: Callable[[Slot], None],
        later: Callable[[Callable[[], None]], None],
        nursery: trio.Nursery,
        *,
        least: int,
        most: int,
        plan: Plan,
        name: str = "",
    ) -> None:
        """``build`` makes one slot; ``discard`` ends one in the background; ``later`` runs something after the current task
        has gone on. ``least`` ≤ idle slots ≤ ``most``. ``name`` is for people.
        """
        self.name = name
        self.plan = plan
        """What slots are to be held to when they are built: the limits of the last call, as the next one's are likely to be."""
        self.closed = False
        self._build, self._discard, self._later, self._nursery = build, discard, later, nursery
        self._least, self._most = least, most
        self._idle: deque[Slot] = deque()
        self._waiting: deque[_Wait] = deque()
        self._building = self._leased = self._peak = 0
        self._peak_time = self._lease_time = self._use_time = trio.current_time()
        self._hits = self._misses = self._built = self._failed = 0
        self._pause = self._retry_time = 0.0
        self._unused = self._kept = False
        self._generation = self._outdated = 0

    @property
    def target(self) -> int:
        """Warm slots wanted now: room for the last peak to come again at once, while the ones it used are replaced."""
        return 0 if self._unused else min(self._most, max(self._least, 2 * self._peak))

    @property
    def deserted(self) -> bool:
        """Nobody uses it, nor has for ``RETIRED`` seconds, and nobody asked for slots to be kept (``fill``)."""
        used = self._kept or self._leased or self._building
        return not used and trio.current_time() - self._use_time > RETIRED

    async def lease(self) -> tuple[Slot, bool]:
        """A slot for exactly one call, and whether it was warm. End it with ``release``.

        Raises:
            HostError: none could be built.
        """
        self._count_lease()
        if self._idle:
            self._hits += 1
            return self._idle.pop(), True  # the youngest: its pages and kernel objects are still in the caches
        self._misses += 1
        wait = _Wait()
        self._waiting.append(wait)
        self._refill()
        try:
            await wait.event.wait()
        except trio.Cancelled:
            self._leased -= 1
            if wait.slot is not None:
                self._keep(wait.slot)
            elif not wait.event.is_set():
                self._waiting.remove(wait)
            raise
        if wait.slot is None:
            self._leased -= 1
            raise wait.error or HostError("the pool was closed")
        return wait.slot, False

    def release(self, slot: Slot) -> None:
        """End a leased slot in the background and make room for the next."""
        self._leased -= 1
        self._later(partial(self._replace, slot))

    def _replace(self, slot: Slot) -> None:
        self._discard(slot)
        self._use_time = trio.current_time()
        self._refill()

    def shrink(self) -> None:
        """Forget an old peak and end the slots that are more than wanted; called now and then."""
        now = trio.current_time()
        if now - self._peak_time > DECAY:
            self._peak, self._peak_time = self._leased, now
        self._unused = not self._leased and now - self._lease_time > UNUSED
        while len(self._idle) > self.target:
            self._discard(self._idle.popleft())
        self._refill()

    async def fill(self, count: int) -> None:
        """Have ``count`` warm slots now, and keep as many from here on, even above ``most``."""
        self._kept = True
        self._least, self._most = max(self._least, count), max(self._most, count)
        while len(self._idle) < count:
            self._idle.append(await self._build())
            self._built += 1

    def renew(self) -> None:
        """End the idle slots, and those that are being built when they are ready: something about all of them is out of date."""
        self._generation += 1
        self._outdated = self._building
        while self._idle:
            self._discard(self._idle.popleft())
        self._refill()

    def statistics(self) -> PoolStats:
        """The pool at this moment."""
        return PoolStats(
            idle=len(self._idle), building=self._building, waiting=len(self._waiting), leased=self._leased,
            target=self.target, hits=self._hits, misses=self._misses, built=self._built, failed=self._failed,
        )  # fmt: skip

    def close(self) -> None:
        """End every idle slot; whoever waits gets an error."""
        self.closed = True
        self._most = self._least = 0
        while self._idle:
            self._discard(self._idle.popleft())
        while self._waiting:
            self._waiting.popleft().event.set()

    def _count_lease(self) -> None:
        self._leased += 1
        self._lease_time = self._use_time = trio.current_time()
        self._unused = False
        if self._leased >= self._peak:
            self._peak, self._peak_time = self._leased, self._lease_time

    def _refill(self) -> None:
        wanted = len(self._waiting)
        if trio.current_time() >= self._retry_time:
            wanted += max(0, self.target - len(self._idle))
        while self._building - self._outdated < min(wanted, PARALLEL_BUILDS):
            self._building += 1
            self._nursery.start_soon(self._build_one)

    async def _build_one(self) -> None:
        generation = self._generation
        try:
            slot = await self._build()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this pool's trouble: other calls go on
            self._failed += 1
            self._pause = min(RETRY_MOST, self._pause * 2 or 0.05)
            self._retry_time = trio.current_time() + self._pause
            if self._waiting:
                wait = self._waiting.popleft()
                wait.error = error if isinstance(error, AgentrunError) else HostError(f"building a sandbox: {error}")
                wait.event.set()
        else:
            self._built += 1
            self._pause = self._retry_time = 0.0
            if generation != self._generation:
                self._discard(slot)
            else:
                self._keep(slot)
        finally:
            self._building -= 1
            self._outdated -= generation != self._generation
        self._refill()

    def _keep(self, slot: Slot) -> None:
        if self._waiting:
            wait = self._waiting.popleft()
            wait.slot = slot
            wait.event.set()
        elif len(self._idle) < self.target:
            self._idle.append(slot)
        else:
            self._discard(slot)


class _Wait:
    """A lease that waits: its slot or its error, and the event that says so."""

    __slots__ = ("error", "event", "slot")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.slot: Slot | None = None
        self.error: Exception | None = None
