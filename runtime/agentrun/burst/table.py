"""The leaves that the daemon and the programs in the kernel both know, in memory that both see: the maps of ``bpf/judge.h``."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from time import monotonic_ns
from typing import NamedTuple

from agentrun.bpfmaps import Map, Memory, Ring
from agentrun.burst.layout import constants, layouts

_C = constants()
_LEAF, _EVENT, _SETTINGS = layouts()["leaf"], layouts()["event"], layouts()["settings"]
_STATE = _LEAF.part("pages", "kills")
_EVENT_STRUCT = _EVENT.part("ns", "comm")
ACTS = {"notify": _C["ACT_NOTIFY"], "stop": _C["ACT_STOP"], "throttle": _C["ACT_NOTIFY"], "kill": _C["ACT_KILL"]}
"""What the programs do by themselves when a burst is used up; the rest is the governor's."""
WHY = {_C[f"WHY_{name}"]: name.lower() for name in ("CROSSED", "BELOW", "EXHAUSTED", "CEILING", "UNSTOPPABLE")}
NO_LIMIT = _C["NO_LIMIT"]
_LEVELS = 4
"""As ``struct settings`` has room for."""
_QUADS = _LEAF.size // 8
_AT = {name: field.offset // struct.calcsize(field.code) for name, field in _LEAF.fields.items()}
"""Where a member is in a leaf, counted in members of its size."""


class Orders(NamedTuple):
    """What the programs hold a leaf to. Bytes and seconds; ``None`` is no limit."""

    steady: int | None
    ceiling: int | None
    burst: int
    burst_seconds: float
    slack: int
    on_exhausted: int
    on_ceiling: int


Stores = tuple[tuple[int, int], ...]
"""Quads of a leaf, by their place in it, and what is to be in them."""


def _allowance(orders: Orders) -> Stores:
    capacity = int(orders.burst * orders.burst_seconds * 1e6) >> 10
    return (
        (_AT["capacity"], capacity), (_AT["credit"], capacity),
        (_AT["burst"], orders.burst >> 10),  # below the steady budget the allowance is full again after burst_seconds
        (_AT["crossed_ns"], 0), (_AT["struck_ns"], 0), (_AT["struck_usage"], 0), _pair("state", 0, "stops", 0),
        _pair("kills", 0, "padding2", 0), (_AT["discount"], 0), (_AT["slack"], orders.slack),
    )  # fmt: skip


def _limits(orders: Orders) -> Stores:
    return (
        (_AT["steady"], NO_LIMIT if orders.steady is None else orders.steady),
        (_AT["ceiling"], NO_LIMIT if orders.ceiling is None else orders.ceiling),
        _pair("on_exhausted", orders.on_exhausted, "on_ceiling", orders.on_ceiling),
    )


def _pair(low: str, first: int, high: str, second: int) -> tuple[int, int]:
    """Two words that are one quad."""
    assert _AT[high] == _AT[low] + 1
    assert _AT[low] % 2 == 0
    return _AT[low] // 2, first | second << 32


class State(NamedTuple):
    """What the programs say of a leaf; see ``struct leaf``."""

    pages: int
    usage: int
    peak: int
    credit: int
    looked_us: int
    crossed_ns: int
    struck_ns: int
    struck_usage: int
    state: int
    stops: int
    kills: int


class Event(NamedTuple):
    """Something that came true for a leaf; see ``struct event``."""

    ns: int
    id: int
    usage: int
    limit: int
    credit: int
    slot: int
    pid: int
    why: str
    act: int
    comm: str


class Table:
    """The maps of one probes process. Numbers of leaves are handed out in turn, so that one is used again as late as can be.

    The programs read a leaf while we write it, on another processor or between two of our instructions: what an armed one is
    judged by goes through ``_put``, and in an order in which every state between is a sound one.
    """

    def __init__(self, maps: Mapping[str, int], level: int) -> None:
        """Take over the descriptors in ``maps``. Leaves are at ``level`` of the cgroup tree; the root's children are 1."""
        self._slots = Map(maps["slots"], 8, 4)
        self._leaves = Memory(maps["leaves"], _LEAF.size, _C["LEAVES"])
        self._settings = Memory(maps["settings"], _SETTINGS.size, 1)
        self._counters = Memory(maps["counters"], layouts()["counters"].size, 1)
        self.ring = Ring(maps["events"], _C["RING_SIZE"])
        self._level = level
        self._levels = [level]
        """As the programs were told them, in that order."""
        self._others: dict[int, int] = {}
        """Level by number, of what is elsewhere in the tree."""
        self._used: set[int] = set()
        self._last = self._generation = self._episode = 0
        self._orders: Orders | None = None
        self._stores: tuple[Stores, Stores] = ((), ())
        """What the orders that were given last come to."""
        struct.pack_into("@II4I", self._settings.view, 0, 0, 1, level, 0, 0, 0)

    def add(self, identity: int, level: int | None = None) -> int:
        """Watch the leaf with this cgroup id; returns its number, or 0 if there are as many as can be.

        ``level``: where it is in the cgroup tree, if it is not one of ours. At most four levels can be watched at once.

        Raises:
            OSError: the kernel refused.
        """
        elsewhere = level is not None and level != self._level
        if len(self._used) >= _C["LEAVES"] - 1 or (elsewhere and len({self._level, level, *self._others.values()}) > _LEVELS):
            return 0
        number = self._last
        while True:
            number = number % (_C["LEAVES"] - 1) + 1
            if number not in self._used:
                break
        at = number * _LEAF.size
        self._leaves.view[at : at + _LEAF.size] = bytes(_LEAF.size)
        self._put(number, "id", identity)
        self._new_episode(number)
        self._slots.update(identity.to_bytes(8, "little"), number.to_bytes(4, "little"))
        self._used.add(number)
        self._last = number
        if level is not None and elsewhere:
            self._others[number] = level
            self._tell_levels()
        self._changed()
        return number

    def remove(self, number: int, identity: int) -> None:
        """Forget a leaf."""
        self._put(number, "armed", 0)
        self._slots.delete(identity.to_bytes(8, "little"))
        self._used.discard(number)
        if self._others.pop(number, None) is not None:
            self._tell_levels()
        self._changed()

    def _tell_levels(self) -> None:
        # Each is somewhere in the list all the time, or what its leaves are given meanwhile is nobody's: new ones come to the
        # end, those behind a gap move forward in their order, and how many there are is said last.
        wanted = {self._level, *self._others.values()}
        self._levels = [level for level in self._levels if level in wanted]
        self._levels += sorted(wanted - {*self._levels})
        first = _SETTINGS.fields["level"].offset // 4
        for place, level in enumerate(self._levels):
            self._settings.words[first + place] = level
        self._settings.words[_SETTINGS.fields["levels"].offset // 4] = len(self._levels)

    def _changed(self) -> None:
        self._generation = (self._generation + 1) & 0xFFFFFFFF
        self._settings.words[_SETTINGS.fields["generation"].offset // 4] = self._generation

    def _put(self, number: int, name: str, value: int) -> None:
        """Write one member of a leaf, in one store."""
        offset, code = _LEAF.fields[name]
        at = number * _LEAF.size + offset
        if code == "I":
            self._leaves.words[at // 4] = value
        else:
            self._leaves.quads[at // 8] = value

    def _new_episode(self, number: int) -> None:
        """One that no leaf has had: the programs remember by thread id who was stopped in which, and ids are used again.

        Who gets the id of a stopped one, in a leaf of the same episode, would be killed as one that SIGSTOP does not stop.
        """
        self._episode = self._episode % 0xFFFFFFFF + 1
        self._put(number, "episode", self._episode)

    def arm(self, number: int, orders: Orders) -> None:
        """Hold a leaf to these from now on, with a full allowance; what it has used so far counts.

        On the way of every call with limits of its own: so the stores that orders come to are worked out once for them.
        """
        quads, at = self._leaves.quads, number * _QUADS
        self._put(number, "armed", 0)
        if orders is not self._orders:
            self._orders, self._stores = orders, (_allowance(orders), _limits(orders))
        pages = quads[at + _AT["pages"]]
        usage = 0 if pages >> 63 else pages * 4096
        # A program that found it armed before may be in the middle of judging it: no ceiling of 0 and no empty allowance for that
        # one, either. What there is to have comes first, then what it is held to.
        allowance, limits = self._stores
        for offset, value in allowance:
            quads[at + offset] = value
        quads[at + _AT["looked_us"]] = monotonic_ns() // 1000
        quads[at + _AT["usage"]] = quads[at + _AT["peak"]] = usage
        self._put(number, "level", self._others.get(number, self._level))
        self._put(number, "looked", 0)
        for offset, value in limits:
            quads[at + offset] = value
        self._put(number, "armed", 1)

    def disarm(self, number: int) -> tuple[int, int]:
        """Judge a leaf no more; it is still counted. Its peak since it was armed, bytes, and how often it was sent SIGKILL."""
        self._put(number, "armed", 0)
        at = number * _QUADS
        return self._leaves.quads[at + _AT["peak"]], self._leaves.words[at * 2 + _AT["kills"]]

    def state(self, number: int) -> State:
        """A leaf at this moment."""
        return State(*_STATE.unpack_from(self._leaves.view, number * _LEAF.size + _LEAF.fields["pages"].offset))

    def correct(self, number: int, usage: int, cache: int, credit: float) -> None:
        """Tell the programs what a leaf uses now and has left: they see charges, but not what is given back, nor what is cache.

        ``usage`` is without the ``cache``, bytes; ``credit`` is byte-seconds.
        """
        at = number * _LEAF.size + _LEAF.fields["peak"].offset
        self._put(number, "discount", cache)
        # First of all when it is: what is used is charged for from then on.
        self._put(number, "looked_us", monotonic_ns() // 1000)
        self._put(number, "usage", usage)
        self._put(number, "peak", max(usage, struct.unpack_from("@Q", self._leaves.view, at)[0]))
        self._put(number, "credit", int(credit * 1e6) >> 10)
        self._put(number, "looked", 1)

    def rearm(self, number: int) -> None:
        """A leaf is below its budget again, whether a charge has shown it or not: the next crossing is a new one."""
        self._put(number, "state", 0)

    def release(self, number: int) -> None:
        """Its stopped tasks are let go: the next time they are to be stopped is a new one."""
        self._new_episode(number)
        for name in ("struck_ns", "struck_usage", "state", "stops"):
            self._put(number, name, 0)

    def events(self) -> Iterator[Event]:
        """What came true since the last time."""
        for record in self.ring.read():
            ns, identity, usage, limit, credit, slot, pid, why, act, comm = _EVENT_STRUCT.unpack(record)
            name = comm.rstrip(b"\0").decode(errors="replace")
            yield Event(ns, identity, usage, limit, credit, slot, pid, WHY.get(why, "?"), act, name)

    @property
    def lost(self) -> int:
        """Events that found the ring buffer full; what they were for was done in the kernel all the same."""
        lost: int = struct.unpack_from("@Q", self._counters.view)[0]
        return lost

    def close(self) -> None:
        """Let go of the maps."""
        self._slots.close()
        self.ring.close()
        for memory in (self._leaves, self._settings, self._counters):
            memory.close()
