"""Where the time of a sandbox goes, phase by phase, as the kernel saw it: the daemon's side of ``bpf/phases.c``.

Without the probes process everything here still works, and finds nothing. Nothing but ``phases`` and ``cold`` is on the way of a
call, each one system call, and only for calls that asked for it, or had to wait for their sandbox anyway.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Hashable, Mapping
from time import monotonic_ns
from typing import NamedTuple, Protocol

import msgspec

from agentrun.bpfmaps import Map, Memory
from agentrun.burst.layout import constants, layouts
from agentrun.histogram import Histogram, bounds, merge

HEADER = "phases.h"
_C = constants(HEADER)
_CALL, _HISTOGRAM, _DAEMON, _COUNTED = (layouts(HEADER)[name] for name in ("call", "histogram", "daemon", "counted"))
_RECORD = _CALL.part("began_ns", "ns")
_SLOTS, _KINDS_COUNT, _PHASES_COUNT = _C["SLOTS"], _C["KINDS"], _C["PHASES"]


def _named(prefix: str) -> dict[int, str]:
    return {value: name.removeprefix(prefix).lower() for name, value in _C.items() if name.startswith(prefix)}


PHASES = tuple(_named("PHASE_").values())
"""In the order of a sandbox's life."""
KINDS = _named("KIND_")
_OTHERS = "others"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What has been recorded since the daemon was started."""

    recording: bool
    """The programs are attached now."""
    calls: int
    """Sandboxes recorded, whether a call used them or not; each is when it is removed."""
    lost: int
    """What the programs noticed they missed: ends without a beginning, beginnings without an end, maps that were full."""
    histograms: list[Histogram]


class Worker(Protocol):
    """A zygote, as far as it matters here."""

    @property
    def pid(self) -> int:
        """Its pid, as this process sees it."""

    @property
    def alive(self) -> bool:
        """It has not ended."""


class _Maps(NamedTuple):
    calls: Map
    zygotes: Map
    cold: Map
    histograms: Memory
    daemon: Memory
    counted: Memory


class Latency:
    """Who is recorded, and what has been found."""

    def __init__(self, level: int) -> None:
        """``level`` is that of leaves in the cgroup tree; the root's children are 1."""
        self._level = level
        self._maps: _Maps | None = None
        self._shapes: dict[Hashable, int] = {}
        self._labels: list[str] = []
        self._zygotes: list[tuple[Worker, int]] = []
        self._leaves: dict[int, int] = {}
        self._missed = self._before_calls = 0
        self._before: dict[tuple[str, str, str], Histogram] = {}
        """What programs that are gone had counted."""

    # ---------------------------------------------------------------- the programs

    def attach(self, maps: Mapping[str, int]) -> None:
        """Take over the descriptors of the maps of ``bpf/phases.c``, and make known to it what there is already.

        Raises:
            OSError: the kernel refused one; all are closed then.
        """
        self.detach()
        taken = dict(maps)
        try:
            call, histogram, daemon, counted = _CALL.size, _HISTOGRAM.size, _DAEMON.size, _COUNTED.size
            self._maps = _Maps(
                Map(taken.pop("calls"), 8, call), Map(taken.pop("zygotes"), 4, call), Map(taken.pop("cold"), 8, 1),
                Memory(taken.pop("histograms"), histogram, _C["HISTOGRAMS"]), Memory(taken.pop("daemon"), daemon, 1),
                Memory(taken.pop("counted"), counted, 1),
            )  # fmt: skip
        finally:
            for fd in taken.values():
                os.close(fd)
        self._zygotes = [(zygote, number) for zygote, number in self._zygotes if zygote.alive]
        for zygote, number in self._zygotes:
            self._tell_zygote(zygote.pid, number, _C["DID_JOIN"])
        for leaf, number in self._leaves.items():
            self._tell_leaf(leaf, number, _C["KIND_WARM"])
        # Last: leaves that are made from here on make themselves known.
        struct.pack_into("<II", self._maps.daemon.view, 0, os.getpid(), self._level)

    def detach(self) -> None:
        """The programs are gone: keep what they had counted."""
        if self._maps is None:
            return
        self._before = {one.name: one for one in self.report().histograms}
        calls, lost = self._counted()
        self._before_calls, self._missed = self._before_calls + calls, self._missed + lost
        for one in self._maps:
            one.close()
        self._maps = None

    # ---------------------------------------------------------------- who is recorded

    def shape(self, key: Hashable, label: str) -> int:
        """The number of a shape; beyond so many they share the last."""
        number = self._shapes.get(key)
        if number is None:
            number = self._shapes[key] = min(len(self._labels), _C["SHAPES"] - 1)
            same = sum(known.partition("#")[0] == label for known in self._labels)
            if len(self._labels) < _C["SHAPES"]:
                self._labels.append(_OTHERS if number == _C["SHAPES"] - 1 else f"{label}#{same + 1}" if same else label)
        return number

    def zygote(self, zygote: Worker, shape: int) -> None:
        """What this one clones are sandboxes of a shape. It makes itself forgotten when it exits."""
        self._zygotes = [(known, number) for known, number in self._zygotes if known.alive]
        self._zygotes.append((zygote, shape))
        self._tell_zygote(zygote.pid, shape, 0)

    def leaf(self, leaf: int, shape: int) -> None:
        """A sandbox was built. The programs know; this is for those of a probes process that is started later."""
        self._leaves[leaf] = shape

    def used(self, leaf: int) -> None:
        """A tool is about to run in it: programs that come only now would take what that does for setting up."""
        self._leaves.pop(leaf, None)

    def forget(self, leaf: int) -> None:
        """A sandbox goes."""
        self._leaves.pop(leaf, None)

    def register(self, leaf: int, label: str) -> None:
        """Record a container of another runtime, by the id of its cgroup: from here to its first program, and on to its end.

        It is cold, as all of that runtime's are. ``forget`` it when it is gone.
        """
        # Programs that are attached later would take what it does then for its beginning: those are not told.
        self._tell_leaf(leaf, self.shape(("container", label), label), _C["KIND_COLD"])

    def cold(self, leaf: int) -> None:
        """A call waited for this sandbox."""
        if self._maps is not None:
            self._try(self._maps.cold, leaf.to_bytes(8, "little"), b"\1")

    def _tell_zygote(self, pid: int, number: int, progress: int) -> None:
        if self._maps is not None:
            self._try(self._maps.zygotes, pid.to_bytes(4, "little"), _record(number, _C["KIND_TEMPLATE"], progress))

    def _tell_leaf(self, leaf: int, number: int, kind: int) -> None:
        if self._maps is not None:
            self._try(self._maps.calls, leaf.to_bytes(8, "little"), _record(number, kind, _C["DID_JOIN"]))

    def _try(self, place: Map, key: bytes, value: bytes) -> None:
        try:
            place.update(key, value)
        except OSError:
            self._missed += 1  # full: what is not recorded is counted, and nobody's call fails for it

    # ---------------------------------------------------------------- what was found

    def phases(self, leaf: int) -> dict[str, float | None]:
        """A sandbox's own phases so far, seconds; None for what was not seen, or has not happened yet."""
        raw = self._maps.calls.lookup(leaf.to_bytes(8, "little")) if self._maps is not None else None
        if raw is None:
            return dict.fromkeys(PHASES)
        seen = int.from_bytes(raw[_CALL.fields["seen"].offset :][:4], "little")
        values = _RECORD.unpack_from(raw)[-_PHASES_COUNT:]
        return {name: values[number] / 1e9 if seen >> number & 1 else None for number, name in enumerate(PHASES)}

    def report(self) -> Report:
        """Everything so far. Some hundred microseconds for each shape, and no system call."""
        found = dict(self._before)
        for number, label in enumerate(self._labels):
            for histogram in self._read(number, label):
                earlier = self._before.get(histogram.name)
                found[histogram.name] = merge([earlier, histogram], *histogram.name[1:]) if earlier else histogram
        calls, lost = self._counted()
        order = {name: place for place, name in enumerate(PHASES)}
        return Report(
            recording=self._maps is not None, calls=self._before_calls + calls, lost=self._missed + lost,
            histograms=sorted(found.values(), key=lambda one: (one.shape, one.kind, order[one.phase])),
        )  # fmt: skip

    def _counted(self) -> tuple[int, int]:
        if self._maps is None:
            return 0, 0
        calls, lost = struct.unpack_from("<QQ", self._maps.counted.view)
        return calls, lost

    def _read(self, number: int, label: str) -> list[Histogram]:
        if self._maps is None:
            return []
        found, view = [], self._maps.histograms.view
        for row in range(_KINDS_COUNT * _PHASES_COUNT):
            at = (number * _KINDS_COUNT * _PHASES_COUNT + row) * _HISTOGRAM.size
            total = int.from_bytes(view[at : at + 8], "little")
            if total:
                counts = struct.unpack_from(f"<{_SLOTS}Q", view, at + _HISTOGRAM.fields["slots"].offset)
                buckets = [(*bounds(slot), count) for slot, count in enumerate(counts) if count]
                kind, phase = divmod(row, _PHASES_COUNT)
                found.append(Histogram.of(PHASES[phase], label, KINDS[kind], total / 1e9, buckets))
        return found


def _record(shape: int, kind: int, progress: int) -> bytes:
    """A ``struct call`` that begins now."""
    fields = dict.fromkeys(_CALL.fields, 0) | {"began_ns": monotonic_ns(), "shape": shape, "kind": kind, "progress": progress}
    del fields["ns"]
    return _RECORD.pack(*fields.values(), *[0] * _PHASES_COUNT)
