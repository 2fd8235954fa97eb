"""Short calls before long ones, on kernels with sched_ext: the daemon's side of ``bpf/sched.c``.

A sandbox is given the policy SCHED_EXT when it is built, and its leaf an entry in the scheduler's map when a call begins in it:
that is one system call on its way. When the scheduler goes, the policy means SCHED_NORMAL: calls go on under cpu.weight.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import msgspec
import trio

from agentrun.bpfmaps import Map, Memory, Ring
from agentrun.burst.layout import constants, layouts
from agentrun.cgroup.leaf import Leaf
from agentrun.policy import Limits

HEADER = "sched.h"
_C = constants(HEADER)
_TURN, _TALLY, _TERMS, _PARTING = (layouts(HEADER)[name] for name in ("turn", "tally", "terms", "parting"))
_TURN_STRUCT, _TALLY_STRUCT = _TURN.part("used_ns", "left"), _TALLY.part("young", "foreign")
_PARTING_STRUCT, _NOTICE_STRUCT = _PARTING.part("code", "message"), layouts(HEADER)["notice"].part("id", "pid")
_SCHED_EXT = 7
"""The policy's number: include/uapi/linux/sched.h."""
_LOOKED_FOR = 5.0
"""Seconds for which it is remembered what the cgroups above a leaf say."""
_ENDED = "it ended"


class SchedStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler at one moment. The counts are of the one that runs, or of the last."""

    on: bool
    reason: str
    """Why it is off, with the kernel's words."""
    young: int
    """Times a task was queued ahead of the long ones."""
    old: int
    guarded: int
    """Slices that went to a long call because it had waited long enough."""
    kicks: int
    """Long calls interrupted for a short one."""
    left: int
    """Times a tool gave itself another policy."""


class _Above(NamedTuple):
    """What holds for all leaves in one place."""

    capped: bool
    """Some cgroup above them has a cpu.max, which the kernel keeps for normal tasks only."""
    weight: int
    read: float


class _Maps(NamedTuple):
    turns: Map
    terms: Memory
    tally: Memory
    parting: Memory
    notices: Ring


class Scheduling:
    """Which calls the scheduler has."""

    def __init__(self, reason: str = "not asked for") -> None:
        self._maps: _Maps | None = None
        self._reason = reason
        self._calls: dict[int, tuple[Leaf, Limits]] = {}
        """Those that run, by the id of their leaf, whether the scheduler has them or not."""
        self._prepared: set[int] = set()
        """Leaves whose tasks have the policy."""
        self._above: dict[str, _Above] = {}
        self._tally = (0,) * 5
        self._left = 0
        self._wake = trio.Event()

    @property
    def on(self) -> bool:
        """The scheduler runs."""
        return self._maps is not None

    # ------------------------------------------------------------------ the probes process

    def attach(self, maps: Mapping[str, int]) -> None:
        """The scheduler runs; takes over the descriptors. Calls that run already are young to it."""
        self.detach("replaced")
        self._maps = _Maps(
            Map(maps["turns"], 8, _TURN.size), Memory(maps["terms"], _TERMS.size, 1), Memory(maps["tally"], _TALLY.size, 1),
            Memory(maps["parting"], _PARTING.size, 1), Ring(maps["notices"], _C["SCHED_RING_SIZE"]),
        )  # fmt: skip
        self._reason = ""
        for leaf, limits in self._calls.values():
            self._enter(leaf, limits)
        self._wake.set()
        self._wake = trio.Event()

    def detach(self, reason: str) -> None:
        """It is gone, or as good as gone: calls begin as they do without it. The kernel's own words are added to the reason."""
        maps, self._maps = self._maps, None
        if maps is None:
            if reason != "replaced":
                self._reason = self._reason or reason
            return
        self._tally = _TALLY_STRUCT.unpack_from(maps.tally.view)
        said = _parting(maps.parting)
        self._reason = f"{reason}: {said}" if said else reason
        trio.lowlevel.notify_closing(maps.notices.fd)
        for each in maps:
            each.close()

    def refused(self, reason: str) -> None:
        """It could not be attached."""
        self._reason = reason

    async def run(self) -> None:
        """Hear what the scheduler has to say, until cancelled."""
        while True:
            maps = self._maps
            if maps is None:
                await self._wake.wait()
                continue
            try:
                await trio.lowlevel.wait_readable(maps.notices.fd)
            except trio.ClosedResourceError:
                continue
            if maps is self._maps:
                self._hear(maps)

    def _hear(self, maps: _Maps) -> None:
        left: set[int] = set()
        for record in maps.notices.read():
            identity, why, _ = _NOTICE_STRUCT.unpack(record)
            if why == _C["NOTICE_LEFT"]:
                left.add(identity)
        if _parting(maps.parting):
            self.detach(_ENDED)
            return
        for identity in left & self._calls.keys():
            if _give_policy(self._calls[identity][0]):
                self._left += 1

    # ------------------------------------------------------------------ leaves and calls

    def prepare(self, leaf: Leaf) -> None:
        """A sandbox waits in a leaf: give it the policy here, off the way of the call that it is for."""
        if self._maps is not None and not self._look_above(leaf).capped:
            self._prepared.add(leaf.id)
            _give_policy(leaf)

    def begin(self, leaf: Leaf, limits: Limits) -> None:
        """A call is about to be dispatched into a leaf.

        A call that has a cpu.max, or whose tenant or executor has, keeps the normal policy: this one would rid it of that.
        """
        self._calls[leaf.id] = leaf, limits
        if self._maps is not None:
            self._enter(leaf, limits)

    def _enter(self, leaf: Leaf, limits: Limits) -> None:
        assert self._maps is not None
        above = self._look_above(leaf)
        if limits.cpus is not None or above.capped:
            if leaf.id in self._prepared:
                self._prepared.discard(leaf.id)
                _give_policy(leaf, os.SCHED_OTHER)
            return
        own = _C["WEIGHT_DEFAULT"] if limits.cpu_weight is None else limits.cpu_weight
        weight = min(10000, max(1, own * above.weight // 100))
        with contextlib.suppress(OSError):  # full: it waits among the long ones
            self._maps.turns.update(leaf.id.to_bytes(8, "little"), _TURN_STRUCT.pack(0, 0, weight, 0))
        if leaf.id not in self._prepared:
            self._prepared.add(leaf.id)
            _give_policy(leaf)

    def end(self, leaf: Leaf) -> None:
        """A call has ended."""
        if self._calls.pop(leaf.id, None) is not None and self._maps is not None:
            self._maps.turns.delete(leaf.id.to_bytes(8, "little"))

    def forget(self, leaf: Leaf) -> None:
        """A leaf is about to be removed, whether a call used it or not."""
        self.end(leaf)
        self._prepared.discard(leaf.id)

    def used(self, leaf: Leaf) -> float | None:
        """Processor seconds of a call as the scheduler counts them; ``None`` if it does not have it."""
        if self._maps is None or (found := self._maps.turns.lookup(leaf.id.to_bytes(8, "little"))) is None:
            return None
        return float(_TURN_STRUCT.unpack(found)[0] / 1e9)

    def _look_above(self, leaf: Leaf) -> _Above:
        directory = os.path.dirname(leaf.where)
        found = self._above.get(directory)
        if found is None or monotonic() - found.read > _LOOKED_FOR:
            found = self._above[directory] = _read_above(Path(directory))
        return found

    # ------------------------------------------------------------------

    def set_terms(self, young: float, max_wait: float, slice_: float) -> None:
        """Seconds of processor time below which a call goes first, seconds that long ones wait at most, seconds of a slice."""
        if self._maps is not None:
            # One store each: with all of them 0 for a moment every call would be a long one, and have slices of nothing.
            for name, value in (("young_ns", young), ("max_wait_ns", max_wait), ("slice_ns", slice_)):
                self._maps.terms.quads[_TERMS.fields[name].offset // 8] = round(value * 1e9)

    def status(self) -> SchedStatus:
        """The scheduler now."""
        if self._maps is not None and _parting(self._maps.parting):
            self.detach(_ENDED)
        if self._maps is not None:
            self._tally = _TALLY_STRUCT.unpack_from(self._maps.tally.view)
        young, old, guarded, kicks, _ = self._tally
        return SchedStatus(on=self.on, reason=self._reason, young=young, old=old, guarded=guarded, kicks=kicks, left=self._left)

    def close(self) -> None:
        """Let go of it, once nothing runs any more."""
        self.detach("closed")


def _give_policy(leaf: Leaf, policy: int = _SCHED_EXT) -> int:
    """To every thread that is in a leaf now; what they start inherits it. How many did not have it."""
    done: set[int] = set()
    given = 0
    for _ in range(4):  # until there is none that was started meanwhile
        new = _threads(leaf) - done
        for tid in new:
            with contextlib.suppress(OSError):  # it has ended, or is not ours to change
                if os.sched_getscheduler(tid) != policy:
                    os.sched_setscheduler(tid, policy, os.sched_param(0))
                    given += 1
        if not new:
            break
        done |= new
    return given


def _threads(leaf: Leaf) -> set[int]:
    try:
        with open(os.open("cgroup.threads", os.O_RDONLY | os.O_CLOEXEC, dir_fd=leaf.fd)) as file:
            return {int(line) for line in file}
    except OSError:
        return set()  # the leaf is going


def _read_above(directory: Path) -> _Above:
    """From the tenant's cgroup up: whether any has a cpu.max. The weight is the tenant's, as it is to its siblings."""
    weight, capped, place = 100, False, directory
    with contextlib.suppress(OSError, ValueError):
        weight = int((directory / "cpu.weight").read_text())
    while not capped and (place / "cgroup.procs").exists():
        with contextlib.suppress(OSError):
            capped = not (place / "cpu.max").read_text().startswith("max")
        place = place.parent
    return _Above(capped, weight, monotonic())


def _parting(memory: Memory) -> str:
    """How it ended, in the kernel's words; "" if it has not said."""
    code, kind, _, reason, message = _PARTING_STRUCT.unpack_from(memory.view)
    if not kind:
        return ""
    said = [text.split(b"\0")[0].decode(errors="replace") for text in (reason, message)]
    return ": ".join(text for text in said if text) or f"kind {kind}, code {code}"
