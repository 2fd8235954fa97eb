"""What memory control does to a leaf, and tells of it: orders for the kernel's programs, memory.high, the freezer, signals."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

from agentrun.burst.account import usage_of
from agentrun.burst.entry import Entry
from agentrun.burst.ladder import Rung, Step
from agentrun.burst.table import ACTS, Orders, Table
from agentrun.burst.watch import Watch
from agentrun.cgroup.foreign import Foreign
from agentrun.errors import HostError
from agentrun.policy import DEFAULT, Limits

SLACK = max(4 << 20, (os.cpu_count() or 1) * 64 * 4096)
"""Bytes above memory.high in which the programs leave it to the kernel to brake until we have looked, for it may be page cache
that it drops: large folios of files, and the batch of 64 pages (MEMCG_CHARGE_BATCH) that each CPU takes."""

Listener = Callable[[dict[str, Any]], None]


class Enforcer:
    """Decides nothing: ``ladder.climb`` says which step, the governor when."""

    def __init__(self, controller: bool) -> None:
        """``controller``: leaves have memory.max and memory.high."""
        self._controller = controller
        self._limits = DEFAULT.limits
        self._orders = self._orders_for(self._limits)
        """What the limits that were armed last come to: most calls have those of the one before."""
        self.table: Table | None = None
        """The kernel's programs, while there are any."""
        self.listeners: set[Listener] = set()

    def usage(self, entry: Entry) -> int:
        """Bytes a leaf has now: the controller's account, or where there is none, that of the programs."""
        usage = usage_of(entry.leaf.fd) if self._controller else None
        if usage is None and self.table is not None and entry.number:
            return max(0, self.table.state(entry.number).pages) * 4096
        return usage or 0

    def arm(self, entry: Entry) -> None:
        """Have the programs hold a leaf to its limits from now on, with a full allowance."""
        limits = entry.limits
        if self.table is None or not entry.number:
            return
        if limits.memory_high is None and self._controller:
            self.table.disarm(entry.number)  # it may have been built to fit a call that has a budget
            return
        if limits is not self._limits:
            self._limits, self._orders = limits, self._orders_for(limits)
        self.table.arm(entry.number, self._orders)

    def _orders_for(self, limits: Limits) -> Orders:
        return Orders(
            steady=limits.memory_high,
            # Where there is a controller its memory.max is exact; a second guard would only be in its way.
            ceiling=None if self._controller else limits.memory_max,
            slack=SLACK if self._controller else 0,
            burst=limits.memory_burst or 0, burst_seconds=limits.burst_seconds or 0.0,
            # Nothing but a signal brakes where there is no controller.
            on_exhausted=ACTS["stop" if limits.on_exhausted == "throttle" and not self._controller else limits.on_exhausted],
            on_ceiling=ACTS["kill"],
        )  # fmt: skip

    def take(self, entry: Entry, watch: Watch, step: Step, seen_ns: int | None) -> None:
        """Carry out a step of the ladder. ``seen_ns``: when the kernel saw what it is for.

        Raises:
            HostError: a control file of ours could not be written.
        """
        before = watch.rung
        watch.until = step.until
        try:
            if step.rung is Rung.KILLED:
                self.kill(entry, step.reason, watch.usage, seen_ns)
                return
            if self._controller and step.rung is Rung.NOTICED:
                self._write_high(watch, "max")
                watch.high = -1
            elif self._controller and step.rung is not Rung.GRANTED and watch.high:
                self._write_high(watch, str(watch.limits.memory_high))
                watch.high = 0
            if (step.rung is Rung.FROZEN) != (before is Rung.FROZEN):
                watch.leaf.freeze(step.rung is Rung.FROZEN)
        except HostError as error:
            # What becomes of somebody else's cgroup is not for us to say; it is looked at again.
            if entry.level is None and (
                not isinstance(error.__cause__, OSError) or error.__cause__.errno not in (errno.ENODEV, errno.ENOENT)
            ):
                raise
            return  # it has ended meanwhile
        self._record(entry, watch, step.rung, watch.usage, step.reason, seen_ns)

    def open(self, watch: Watch, high: int) -> None:
        """Let a call have what it was granted, and no more than there is: ``high`` bytes."""
        high = max(min(high, watch.limit), watch.limits.memory_high or 0)
        if abs(high - watch.high) >= 1 << 20 or (high == watch.limit and high != watch.high):
            self._write_high(watch, "max" if high == watch.limits.memory_max else str(high))
            watch.high = high

    def release(self, entry: Entry, watch: Watch, leaf: Foreign) -> None:
        """Let a container that lives on go on without us, its steady budget as its limit."""
        if self._controller and watch.high:
            self._write_high(watch, str(entry.limits.memory_high))
        if watch.rung is Rung.FROZEN:
            leaf.thaw()
        self.go_on(entry)

    def go_on(self, entry: Entry) -> None:
        """Take back the SIGSTOP by which the programs held tasks until the governor had looked."""
        if self.table is not None and entry.number and self.table.state(entry.number).stops:
            self.table.release(entry.number)
            for pid in entry.leaf.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def kill(self, entry: Entry, reason: str, usage: int, seen_ns: int | None) -> None:
        """Kill all of a leaf, once."""
        if not entry.killed:
            entry.leaf.kill()
            self.note_kill(entry, reason, usage, seen_ns)

    def note_kill(self, entry: Entry, reason: str, usage: int, seen_ns: int | None) -> None:
        """Put on record that a leaf was killed: by us, or by the programs alone, where its call is over before they are heard."""
        entry.killed = reason
        self._record(entry, entry.watch, Rung.KILLED, usage, reason, seen_ns)

    def tell(self, news: dict[str, Any], entry: Entry) -> None:
        """Say it to whoever listens."""
        for listener in tuple(self.listeners):
            listener({"call": entry.leaf.name.removeprefix("call-"), "tenant": entry.tenant, **news})

    def _record(self, entry: Entry, watch: Watch | None, rung: Rung, usage: int, reason: str, seen_ns: int | None) -> None:
        reaction = None if seen_ns is None else round((monotonic_ns() - seen_ns) / 1e9, 6)
        if watch is not None:
            watch.note(rung, usage, reason, reaction)
        self.tell({"event": "step", "rung": rung.value, "usage": usage, "reason": reason, "reaction": reaction}, entry)

    def _write_high(self, watch: Watch, text: str) -> None:
        with contextlib.suppress(HostError):  # it has ended meanwhile
            watch.leaf.write({"memory.high": text})
