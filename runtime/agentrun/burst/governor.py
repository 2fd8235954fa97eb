"""The governor: hears what the kernel saw, looks at the calls that are above their budgets, and carries the ladder out.

It works in every mode (``ladder.Mode``). With programs in the kernel it is told of a crossing within a fraction of a
millisecond, and what must not wait has been done by then; without them the memory controller's own notices wake it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import trio

from agentrun.burst.enforcer import Enforcer
from agentrun.burst.entry import Entry
from agentrun.burst.headroom import Funds, available, worth_it
from agentrun.burst.ladder import Mode, Rung, Situation, Step, climb
from agentrun.burst.notices import Notices
from agentrun.burst.table import ACTS, Event, Table
from agentrun.burst.watch import NO_RECORD, Record, Watch
from agentrun.cgroup.foreign import Foreign
from agentrun.cgroup.leaf import Leaf
from agentrun.policy import Limits
from agentrun.scheduling import Scheduling

TICK = 0.05
"""Seconds between two looks at the calls that are above their budgets; what cannot wait so long wakes us."""


class Governor:
    """Memory control of one executor."""

    def __init__(self, controller: bool, level: int, priorities: Mapping[str, int]) -> None:
        """``controller``: leaves have memory.max. ``level`` is theirs in the cgroup tree. ``priorities`` by tenant, 0 else."""
        self._controller, self._level, self._priorities = controller, level, priorities
        self.funds = Funds(self._used)
        self._enforcer = Enforcer(controller)
        self._entries: dict[int, Entry] = {}
        self._active: set[Watch] = set()
        self._wake = trio.Event()
        self._notices = Notices()
        self.listeners = self._enforcer.listeners
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
    def attached(self) -> bool:
        """There are programs in the kernel now."""
        return self._table is not None

    @property
    def _table(self) -> Table | None:
        return self._enforcer.table

    @property
    def lost(self) -> int:
        """Events of the kernel's programs that nobody heard; what they were for was done in the kernel all the same."""
        return self.lost_before + (self._table.lost if self._table else 0)

    # ------------------------------------------------------------------ the probes process

    def attach(self, maps: Mapping[str, int]) -> None:
        """Programs run: ``maps`` are theirs. Leaves that exist are watched from now on."""
        self.detach()
        self._enforcer.table = Table(maps, self._level)
        for entry in self._entries.values():
            entry.lost = True
            self._enter(entry)
        self._wake.set()
        self._wake = trio.Event()
        self._mode_changed()

    def detach(self) -> None:
        """The programs are gone; the controller alone holds what it can."""
        if (table := self._table) is None:
            return
        for entry in self._entries.values():
            self._enforcer.go_on(entry)  # nobody would
        self._enforcer.table = None
        self.lost_before += table.lost
        trio.lowlevel.notify_closing(table.ring.fd)
        table.close()
        for entry in self._entries.values():
            entry.number, entry.lost = 0, True
            if entry.watch is not None and not entry.killed:
                self._without_programs(entry, entry.watch)
        self._mode_changed()

    def _mode_changed(self) -> None:
        self.on_mode()
        for listener in tuple(self.listeners):
            listener({"event": "mode", "mode": self.mode.value, "call": "", "tenant": ""})

    def _without_programs(self, entry: Entry, watch: Watch) -> None:
        if self._controller:
            if watch.notice < 0:
                self._heed(watch)
        elif watch.rung is not Rung.WITHIN:
            # Whoever stands still could wait for ever: nobody would see him get below his budget.
            self._enforcer.take(entry, watch, Step(Rung.WITHIN, None, "nobody counts its memory any more"), None)
            self._active.discard(watch)

    # ------------------------------------------------------------------ leaves and calls

    def register(self, leaf: Leaf, tenant: str) -> None:
        """A leaf was made."""
        entry = self._entries[leaf.id] = Entry(leaf, tenant)
        self._enter(entry)
        if self.scheduling is not None:
            self.scheduling.prepare(leaf)

    def adopt(self, leaf: Foreign, tenant: str, limits: Limits) -> bool:
        """Hold a container of another runtime to ``limits`` until ``forget``; its control files are written already.

        Returns whether the programs in the kernel watch it, as far as there are any: they can watch four levels of the tree.
        """
        entry = self._entries[leaf.id] = Entry(leaf, tenant, leaf.level)
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
            self._enforcer.release(entry, entry.watch, leaf)
        self.forget(leaf)

    def killed(self, leaf: Leaf) -> str:
        """Why memory control killed a leaf; empty if it did not."""
        entry = self._entries.get(leaf.id)
        return entry.killed if entry is not None else ""

    def _enter(self, entry: Entry) -> None:
        if self._table is None:
            return
        with contextlib.suppress(OSError):
            entry.number = self._table.add(entry.leaf.id, entry.level)
            self._enforcer.arm(entry)

    def hold(self, leaf: Leaf, limits: Limits) -> None:
        """Hold a leaf to these from now on, as those of the call it is built for most likely."""
        if (entry := self._entries.get(leaf.id)) is not None:
            self._hold(entry, limits)

    def _hold(self, entry: Entry, limits: Limits) -> None:
        if limits is not entry.limits and limits != entry.limits:
            entry.limits = limits
            self._enforcer.arm(entry)

    def begin(self, leaf: Leaf, limits: Limits) -> None:
        """A call is about to be dispatched into a leaf."""
        entry = self._entries.get(leaf.id)
        if entry is None:
            return
        if self.scheduling is not None:
            self.scheduling.begin(leaf, limits)
        entry.lost = False
        self._hold(entry, limits)
        if limits.memory_high is not None and self.mode is not Mode.NONE:
            entry.watch = Watch(leaf, entry.tenant, limits, self._priorities.get(entry.tenant, 0), trio.current_time())
            if self._table is None:
                self._heed(entry.watch)
            elif self._controller and limits.memory_burst:
                more = self._available(entry.watch)
                if worth_it(entry.watch.claim(), more, granted=False):
                    # The programs will tell when it crosses its budget; until somebody says no, nothing has to brake it there.
                    self._enforcer.open(entry.watch, more)

    def end(self, leaf: Leaf) -> Record:
        """A call has ended: its record. Nothing is done to its leaf from here on."""
        entry = self._entries.get(leaf.id)
        if entry is None:
            return NO_RECORD
        if self.scheduling is not None:
            self.scheduling.end(leaf)
        peak, killed, mode, watch = None, entry.killed, self.mode, entry.watch
        if self._table is not None and entry.number:
            most, kills = self._table.disarm(entry.number)
            if not self._controller and not entry.lost:  # else it is of a part of the call
                peak = most
            if kills and not killed:  # the event is on its way
                state = self._table.state(entry.number)
                killed = entry.sentence(state.struck_usage)
                self._enforcer.note_kill(entry, killed, state.struck_usage, state.struck_ns)
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
        self._enforcer.tell({
            "event": event.why, "usage": event.usage, "limit": event.limit, "pid": event.pid, "comm": event.comm,
            "overshoot": max(0, event.usage - event.limit),
        }, entry)  # fmt: skip
        if event.act == ACTS["kill"] and event.why in ("exhausted", "ceiling", "unstoppable"):
            self._enforcer.kill(entry, entry.sentence(event.usage), event.usage, event.ns)
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

    # ------------------------------------------------------------------ what it decides

    def _look(self, watch: Watch, now: float, seen_ns: int | None) -> None:
        entry = self._entries.get(watch.leaf.id)
        if entry is None or entry.watch is not watch or entry.killed:
            return
        whole, cache = (watch.account.look(now) if self._controller else None) or (self._enforcer.usage(entry), 0)
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
            self._enforcer.take(entry, watch, step, seen_ns)
        if self._controller and watch.rung is Rung.GRANTED:
            self._enforcer.open(watch, whole + more)
        if watch.rung is not Rung.WITHIN or watch.hit:
            self._active.add(watch)
        elif watch in self._active:
            self._active.discard(watch)
            if self._table is not None and entry.number:
                self._table.rearm(entry.number)
        if watch.rung not in (Rung.FROZEN, Rung.KILLED):
            self._enforcer.go_on(entry)

    def _others(self, watch: Watch) -> list[Entry]:
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
        reason = "its memory was needed by a call that comes before it"
        self._enforcer.kill(last, reason, self._enforcer.usage(last), None)
        watch.until = trio.current_time() + max(watch.limits.throttle_seconds, TICK)
        return True

    def _used(self, tenant: str) -> int:
        """Of calls: containers of other runtimes are in nobody's budget, with a controller or without."""
        ours = (entry for entry in self._entries.values() if entry.level is None)
        return sum(self._enforcer.usage(entry) for entry in ours if tenant in ("", entry.tenant))

    def close(self) -> None:
        """Let go of everything; no leaf is left."""
        self.detach()
        self._notices.close()

    def row(self, leaf: Leaf) -> dict[str, Any] | None:
        """A call's memory now, for ``agentrun top``; None: nobody counts it. ``credit``: seconds its allowance lasts."""
        entry = self._entries.get(leaf.id)
        if entry is None:
            return None
        watch, limits, credit = entry.watch, entry.limits, None
        if watch is not None and limits.memory_burst:
            credit = round(watch.bucket.credit / limits.memory_burst, 3)
        return {
            "memory": self._enforcer.usage(entry) if self._controller or entry.number else None,
            "high": limits.memory_high, "max": limits.memory_max,
            "credit": credit, "rung": watch.rung.value if watch else None,
        }  # fmt: skip
