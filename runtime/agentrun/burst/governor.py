"""The governor: hears what the kernel saw, looks at the calls that are above their budgets, and carries the ladder out.

It works in every mode (``ladder.Mode``). With programs in the kernel it is told of a crossing within a fraction of a
millisecond, and what must not wait has been done by then; without them the memory controller's own notices wake it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Mapping
from time import monotonic_ns
from typing import Any

import trio

from agentrun.burst.headroom import Funds, available, reclaimable, usage_of, worth_it
from agentrun.burst.ladder import Mode, Rung, Situation, Step, climb
from agentrun.burst.notices import Notices
from agentrun.burst.table import ACTS, Event, Orders, Table
from agentrun.burst.watch import NO_RECORD, Record, Watch
from agentrun.cgroup.foreign import Foreign
from agentrun.cgroup.leaf import Leaf
from agentrun.errors import HostError
from agentrun.policy import DEFAULT, Limits
from agentrun.scheduling import Scheduling

TICK = 0.05
"""Seconds between two looks at the calls that are above their budgets; what cannot wait so long wakes us."""
SLACK = max(4 << 20, (os.cpu_count() or 1) * 64 * 4096)
"""Bytes above memory.high in which the programs leave it to the kernel to brake until we have looked, for it may be page cache
that it drops: large folios of files, and the batch of 64 pages (MEMCG_CHARGE_BATCH) that each CPU takes."""
_KILL = ACTS["kill"]

Listener = Callable[[dict[str, Any]], None]


class _Entry:
    """A leaf that exists."""

    __slots__ = ("killed", "leaf", "level", "limits", "lost", "number", "tenant", "watch")

    def __init__(self, leaf: Leaf, tenant: str, level: int | None = None) -> None:
        self.leaf, self.tenant, self.level = leaf, tenant, level
        self.number = 0
        self.limits: Limits = DEFAULT.limits
        self.watch: Watch | None = None
        self.killed = ""
        self.lost = False


class Governor:
    """Memory control of one executor."""

    def __init__(self, controller: bool, level: int, priorities: Mapping[str, int]) -> None:
        """``controller``: leaves have memory.max. ``level`` is theirs in the cgroup tree. ``priorities`` by tenant, 0 else."""
        self._controller, self._level, self._priorities = controller, level, priorities
        self.funds = Funds(self._used)
        self._table: Table | None = None
        self._entries: dict[int, _Entry] = {}
        self._active: set[Watch] = set()
        self._wake = trio.Event()
        self._notices = Notices()
        self.listeners: set[Listener] = set()
        """Get every step and event as it happens; for ``agentrun bursts``."""
        self.scheduling: Scheduling | None = None
        """Puts short calls before long ones, where it was asked for; it wants to know of leaves and calls as well."""
        self.on_mode: Callable[[], None] = lambda: None
        self.lost_before = 0

    @property
    def mode(self) -> Mode:
        """What holds calls to their memory now."""
        if self._controller:
            return Mode.CONTROLLER if self._table is None else Mode.CONTROLLER_BPF
        return Mode.NONE if self._table is None else Mode.BPF

    @property
    def lost(self) -> int:
        """Events of the kernel's programs that nobody heard; what they were for was done in the kernel all the same."""
        return self.lost_before + (self._table.lost if self._table else 0)

    # ------------------------------------------------------------------ the probes process

    def attach(self, maps: Mapping[str, int]) -> None:
        """Programs run: ``maps`` are theirs. Leaves that exist are watched from now on."""
        self.detach()
        self._table = Table(maps, self._level)
        for entry in self._entries.values():
            entry.lost = True
            self._enter(entry)
        self._wake.set()
        self._wake = trio.Event()
        self.on_mode()

    def detach(self) -> None:
        """The programs are gone; the controller alone holds what it can."""
        table, self._table = self._table, None
        if table is None:
            return
        for entry in self._entries.values():
            self._continue(entry, table)  # nobody would
        self.lost_before += table.lost
        trio.lowlevel.notify_closing(table.ring.fd)
        table.close()
        for entry in self._entries.values():
            entry.number, entry.lost = 0, True
            if entry.watch is not None and entry.watch.notice < 0 and self._controller:
                self._heed(entry.watch)
        self.on_mode()

    # ------------------------------------------------------------------ leaves and calls

    def register(self, leaf: Leaf, tenant: str) -> None:
        """A leaf was made."""
        entry = self._entries[leaf.id] = _Entry(leaf, tenant)
        self._enter(entry)
        if self.scheduling is not None:
            self.scheduling.prepare(leaf)

    def adopt(self, leaf: Foreign, tenant: str, limits: Limits) -> bool:
        """Hold a container of another runtime to ``limits`` until ``forget``; its control files are written already.

        Returns whether the programs in the kernel watch it, as far as there are any: they can watch four levels of the tree.
        """
        entry = self._entries[leaf.id] = _Entry(leaf, tenant, leaf.level)
        entry.limits = limits
        self._enter(entry)
        if limits.memory_high is not None:
            entry.watch = Watch(leaf, tenant, limits, self._priorities.get(tenant, 0), trio.current_time())
            if self._controller:
                # Programs or not: they see the charges of this very cgroup, the controller's notices are of those below it too.
                self._heed(entry.watch)
        return self._table is None or entry.number != 0

    def release(self, leaf: Foreign) -> None:
        """Control of a container ends before the container does: it is let go on, with its steady budget as its limit."""
        entry = self._entries.get(leaf.id)
        if entry is not None and entry.watch is not None and not entry.killed:
            if self._controller and entry.watch.high:
                self._write_high(entry.watch, str(entry.limits.memory_high))
            if entry.watch.rung is Rung.FROZEN:
                leaf.thaw()
            self._continue(entry, self._table)
        self.forget(leaf)

    def killed(self, leaf: Leaf) -> str:
        """Why memory control killed a leaf; empty if it did not."""
        entry = self._entries.get(leaf.id)
        return entry.killed if entry is not None else ""

    def _enter(self, entry: _Entry) -> None:
        if self._table is None:
            return
        with contextlib.suppress(OSError):
            entry.number = self._table.add(entry.leaf.id, entry.level)
            self._arm(entry)

    def _arm(self, entry: _Entry) -> None:
        limits = entry.limits
        judged = limits.memory_high is not None or not self._controller
        if self._table is None or not entry.number or not judged:
            return
        self._table.arm(entry.number, Orders(
            steady=limits.memory_high,
            # Where there is a controller its memory.max is exact; a second guard would only be in its way.
            ceiling=None if self._controller else limits.memory_max,
            slack=SLACK if self._controller else 0,
            burst=limits.memory_burst or 0, burst_seconds=limits.burst_seconds or 0.0,
            # Nothing but a signal brakes where there is no controller.
            on_exhausted=ACTS["stop" if limits.on_exhausted == "throttle" and not self._controller else limits.on_exhausted],
            on_ceiling=_KILL,
        ))  # fmt: skip

    def begin(self, leaf: Leaf, limits: Limits) -> None:
        """A call is about to be dispatched into a leaf."""
        entry = self._entries.get(leaf.id)
        if entry is None:
            return
        if self.scheduling is not None:
            self.scheduling.begin(leaf, limits)
        entry.lost = False
        if limits is not entry.limits and limits != entry.limits:
            entry.limits = limits
            self._arm(entry)
        if limits.memory_high is not None and self.mode is not Mode.NONE:
            entry.watch = Watch(leaf, entry.tenant, limits, self._priorities.get(entry.tenant, 0), trio.current_time())
            if self._table is None:
                self._heed(entry.watch)
            elif self._controller and limits.memory_burst:
                more = self._available(entry.watch)
                if worth_it(entry.watch.claim(), more, granted=False):
                    # The programs will tell when it crosses its budget; until somebody says no, nothing has to brake it there.
                    self._open(entry.watch, more)

    def end(self, leaf: Leaf) -> Record:
        """A call has ended: its record. Nothing is done to its leaf from here on."""
        entry = self._entries.get(leaf.id)
        if entry is None:
            return NO_RECORD
        if self.scheduling is not None:
            self.scheduling.end(leaf)
        peak, killed, mode, watch = None, entry.killed, self.mode, entry.watch
        if self._table is not None and entry.number:
            state = self._table.state(entry.number)
            self._table.disarm(entry.number)
            if not self._controller:
                peak = state.peak
            if state.kills and not killed:  # the event is on its way
                killed = self._sentence(entry, state.struck_usage)
        if entry.lost and not self._controller:
            mode = Mode.NONE
        elif entry.lost:
            mode = Mode.CONTROLLER
        steps = tuple(watch.steps) if watch is not None else ()
        if watch is not None:
            self._active.discard(watch)
            self._notices.ignore(watch.notice)
            entry.watch = None  # nothing is set aside for it any more
        return Record(mode, peak, killed, steps, entry.lost)

    def forget(self, leaf: Leaf) -> None:
        """A leaf is about to be removed."""
        entry = self._entries.pop(leaf.id, None)
        if entry is None:
            return
        if self.scheduling is not None and entry.level is None:
            self.scheduling.forget(leaf)
        if entry.watch is not None:
            self._active.discard(entry.watch)
            self._notices.ignore(entry.watch.notice)
        if self._table is not None and entry.number:
            self._table.remove(entry.number, leaf.id)

    # ------------------------------------------------------------------ what wakes it

    async def run(self) -> None:
        """Listen and look until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear_kernel)
            nursery.start_soon(self._notices.run)
            nursery.start_soon(self._tick)

    async def _hear_kernel(self) -> None:
        while True:
            table = self._table
            if table is None:
                await self._wake.wait()
                continue
            try:
                await trio.lowlevel.wait_readable(table.ring.fd)
            except trio.ClosedResourceError:
                continue
            if table is self._table:
                for event in table.events():
                    self._heard(event)

    def _heard(self, event: Event) -> None:
        entry = self._entries.get(event.id)
        if entry is None or entry.number != event.slot:
            return
        self._tell({"event": event.why, "usage": event.usage, "limit": event.limit, "pid": event.pid, "comm": event.comm,
                    "overshoot": max(0, event.usage - event.limit)}, entry)  # fmt: skip
        if event.act == _KILL and event.why in ("exhausted", "ceiling", "unstoppable"):
            self._kill(entry, self._sentence(entry, event.usage), event.usage, event.ns)
        watch = entry.watch
        if watch is not None and not entry.killed:
            if event.why == "exhausted":
                watch.bucket.empty()
            watch.hit = watch.hit or event.why != "below"
            self._look(watch, trio.current_time(), event.ns)

    def _heed(self, watch: Watch) -> None:
        def reached() -> None:
            watch.hit = True
            self._look(watch, trio.current_time(), None)

        watch.notice = self._notices.heed(watch.leaf.fd, reached)

    async def _tick(self) -> None:
        while True:
            await trio.sleep(TICK)
            for watch in sorted(self._active, key=lambda watch: -watch.priority):
                self._look(watch, trio.current_time(), None)

    # ------------------------------------------------------------------ what it does

    def _look(self, watch: Watch, now: float, seen_ns: int | None) -> None:
        entry = self._entries.get(watch.leaf.id)
        if entry is None or entry.watch is not watch or entry.killed:
            return
        whole = self._usage(entry)
        cache = reclaimable(watch.leaf.fd) if self._controller else 0
        watch.usage = max(0, whole - cache)
        credit = watch.bucket.look(watch.usage, now)
        if self._controller and self._table is not None and entry.number:
            self._table.correct(entry.number, watch.usage, cache, credit)
        more = self._available(watch)
        headroom = worth_it(watch.claim(), more, granted=watch.rung is Rung.GRANTED)
        # Held at its memory.high a call seldom shows a page more than that, and crawls: who is at the line is above it.
        watch.hit = watch.hit and whole > watch.near
        usage = max(watch.usage, (watch.limits.memory_high or 0) + 1) if watch.hit and watch.usage > watch.near else watch.usage
        step = climb(Situation(
            rung=watch.rung, usage=usage, credit=credit, headroom=headroom, can_throttle=self._controller, now=now,
            until=watch.until,
        ), watch.limits)  # fmt: skip
        stands_still = step is not None and step.rung in (Rung.FROZEN, Rung.KILLED) and credit > 0 and not headroom
        if step is not None and not (stands_still and self._make_room(watch)):
            self._take(entry, watch, step, seen_ns)
        if self._controller and watch.rung is Rung.GRANTED:
            self._open(watch, whole + more)
        if watch.rung is not Rung.WITHIN or watch.hit:
            self._active.add(watch)
        elif watch in self._active:
            self._active.discard(watch)
            if self._table is not None and entry.number:
                self._table.rearm(entry.number)
        if watch.rung not in (Rung.FROZEN, Rung.KILLED):
            self._continue(entry, self._table)

    def _usage(self, entry: _Entry) -> int:
        usage = usage_of(entry.leaf.fd) if self._controller else None
        if usage is None and self._table is not None and entry.number:
            return max(0, self._table.state(entry.number).pages) * 4096
        return usage or 0

    def _others(self, watch: Watch) -> list[_Entry]:
        entries = self._entries.values()
        return [entry for entry in entries if entry.watch is not None and entry.watch is not watch and not entry.killed]

    def _available(self, watch: Watch) -> int:
        others = [entry.watch.claim() for entry in self._others(watch) if entry.watch is not None]
        return available(watch.claim(), others, self.funds.free(watch.tenant, trio.current_time()))

    def _make_room(self, watch: Watch) -> bool:
        """The call stands still for want of memory. If others wait as well, and it is ahead of them, the last in line goes."""
        mine, last, lasts = watch.claim(), None, None
        for entry in self._others(watch):
            if entry.watch is not None and entry.watch.rung in (Rung.THROTTLED, Rung.FROZEN):
                claim = entry.watch.claim()
                if claim.is_behind(lasts or mine):
                    last, lasts = entry, claim
        if last is None:
            return False
        self._kill(last, "its memory was needed by a call that comes before it", self._usage(last), None)
        watch.until = trio.current_time() + max(watch.limits.throttle_seconds, TICK)
        return True

    def _open(self, watch: Watch, high: int) -> None:
        """Let a call have what it was granted, and no more than there is."""
        high = max(min(high, watch.limit), watch.limits.memory_high or 0)
        if abs(high - watch.high) >= 1 << 20 or (high == watch.limit and high != watch.high):
            self._write_high(watch, "max" if high == watch.limits.memory_max else str(high))
            watch.high = high

    def _write_high(self, watch: Watch, text: str) -> None:
        with contextlib.suppress(HostError):  # it has ended meanwhile
            watch.leaf.write({"memory.high": text})

    def _used(self, tenant: str) -> int:
        """Of calls: containers of other runtimes are in nobody's budget, with a controller or without."""
        ours = (entry for entry in self._entries.values() if entry.level is None)
        return sum(self._usage(entry) for entry in ours if tenant in ("", entry.tenant))

    def _take(self, entry: _Entry, watch: Watch, step: Step, seen_ns: int | None) -> None:
        before = watch.rung
        watch.until = step.until
        try:
            if step.rung is Rung.KILLED:
                self._kill(entry, step.reason, watch.usage, seen_ns)
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

    def _continue(self, entry: _Entry, table: Table | None) -> None:
        """Take back the SIGSTOP by which the programs held tasks until the governor had looked."""
        if table is not None and entry.number and table.state(entry.number).stops:
            table.release(entry.number)
            for pid in entry.leaf.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _kill(self, entry: _Entry, reason: str, usage: int, seen_ns: int | None) -> None:
        if entry.killed:
            return
        entry.killed = reason
        entry.leaf.kill()
        self._record(entry, entry.watch, Rung.KILLED, usage, reason, seen_ns)

    def _record(self, entry: _Entry, watch: Watch | None, rung: Rung, usage: int, reason: str, seen_ns: int | None) -> None:
        reaction = None if seen_ns is None else round((monotonic_ns() - seen_ns) / 1e9, 6)
        if watch is not None:
            watch.note(rung, usage, reason, reaction)
        self._tell({"event": "step", "rung": rung.value, "usage": usage, "reason": reason, "reaction": reaction}, entry)

    def _sentence(self, entry: _Entry, usage: int) -> str:
        """Why the programs killed it, in the ladder's words."""
        limits = entry.limits
        if limits.memory_max is not None and usage > limits.memory_max:
            return "above its memory limit"
        if limits.on_exhausted in ("stop", "throttle"):
            return "it was to be stopped above its budget, and sat in a system call that only death ends"
        return "its burst allowance is used up" if limits.memory_burst else "above its memory budget"

    def _tell(self, news: dict[str, Any], entry: _Entry) -> None:
        for listener in tuple(self.listeners):
            listener({"call": entry.leaf.name.removeprefix("call-"), "tenant": entry.tenant, **news})

    def close(self) -> None:
        """Let go of everything; no leaf is left."""
        self.detach()
        self._notices.close()

    def row(self, leaf: Leaf) -> dict[str, Any] | None:
        """A call's memory now, for ``agentrun top``. ``credit``: seconds its allowance lasts if it uses all of it."""
        entry = self._entries.get(leaf.id)
        if entry is None:
            return None
        watch, limits, credit = entry.watch, entry.limits, None
        if watch is not None and limits.memory_burst:
            credit = round(watch.bucket.credit / limits.memory_burst, 3)
        return {
            "memory": self._usage(entry), "high": limits.memory_high, "max": limits.memory_max, "credit": credit,
            "rung": watch.rung.value if watch else None,
        }  # fmt: skip
