"""What warm sandboxes cost while nobody uses them: memory of an idle slot, and a dispatch beside many of them.

Dispatch is measured in three legs, each an executor of its own: one idle slot, many, one again. The two single legs are taken
together, so that a drift of the machine does not pass for an effect of the idle slots. Before each call the pool is full again
and ``REST`` seconds have passed, in which the used sandbox is removed; listing hundreds of leaves to be sure of it would leave
cold caches to the call. Beside each call goes one ``posix_spawn``: what it loses is the price of *our* descriptors, five for each
slot, which every spawn copies and closes; a dispatch does not spawn.

Memory is the difference of /proc/meminfo before and after the slots were built, divided by their number: MemAvailable, which
other users of the machine also move, and beside it the parts it should consist of: slab, per-CPU, kernel stacks, page tables, and
the proportional set size of each slot's two processes.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from statistics import mean
from time import perf_counter

import msgspec
import trio

from agentrun import ExecutorConfig, open_executor
from bench.contender import Contender, plain_spawn
from bench.machine import meminfo, more_descriptors
from bench.numbers import Report, Samples, Summary, cell, summarize
from bench.subjects import Library

_PARTS = ("MemAvailable", "Slab", "Percpu", "KernelStack", "PageTables")
REST = 0.015
_DESCRIPTORS = 8
"""Descriptors of ours per slot: five, and room for the one that is being built and the one that is going."""


class Memory(msgspec.Struct, kw_only=True):
    """kB per idle slot."""

    available: float
    slab: float
    percpu: float
    stacks_and_tables: float
    pss: float
    processes: float
    """How many processes a slot has."""

    @property
    def parts(self) -> float:
        """The sum of what can be attributed."""
        return self.slab + self.percpu + self.stacks_and_tables + self.pss

    @property
    def worst(self) -> float:
        """The larger of both views, so that neither a foreign process that ended nor an unseen part flatters."""
        return max(self.available, self.parts)


class Idle(msgspec.Struct, kw_only=True):
    """The result of all legs."""

    slots: int
    memory: Memory
    build_ms: float
    """Building one slot, one after the other."""
    close_ms: float
    """Ending all of them, per slot."""
    one: Summary | None
    many: Summary | None
    spawn_one: Summary | None
    spawn_many: Summary | None
    samples: dict[str, Samples] = {}

    @property
    def growth(self) -> float | None:
        """Dispatch p50 beside many idle slots over that beside one."""
        return self.many.p50 / self.one.p50 if self.one and self.many else None


async def measure_idle(slots: int, rounds: int) -> Idle:
    """All three legs, with the descriptors they need."""
    with more_descriptors(slots * _DESCRIPTORS + 256) as descriptors:
        slots = min(slots, (descriptors - 256) // _DESCRIPTORS)
        first = await _single_leg(rounds // 2)
        await trio.sleep(1)  # what the first leg left to the kernel
        async with open_executor(ExecutorConfig(pool_least=slots, pool_most=slots)) as executor:
            library = Library(executor)
            await executor.warm_up(count=1)
            before, started = meminfo(), perf_counter()
            await executor.warm_up(count=slots)
            build_ms = (perf_counter() - started) * 1e3 / slots
            await library.settle()
            memory = _memory(before, executor.tree.path, slots)
            many = await _leg(library, rounds)
            closing = perf_counter()
        close_ms = (perf_counter() - closing) * 1e3 / slots
        await trio.sleep(1)
        last = await _single_leg(rounds - rounds // 2)
    one = [first[0] + last[0], first[1] + last[1]]
    return Idle(
        slots=slots,
        memory=memory,
        build_ms=build_ms,
        close_ms=close_ms,
        one=summarize(one[0]),
        many=summarize(many[0]),
        spawn_one=summarize(one[1]),
        spawn_many=summarize(many[1]),
        samples={"dispatch 1 idle": one[0], "dispatch many idle": many[0], "spawn 1 idle": one[1], "spawn many idle": many[1]},
    )


async def _single_leg(rounds: int) -> tuple[Samples, Samples]:
    async with open_executor(ExecutorConfig(pool_least=1, pool_most=1)) as executor:
        await executor.warm_up(count=1)
        return await _leg(Library(executor), rounds)


async def _leg(library: Library, rounds: int) -> tuple[Samples, Samples]:
    """Milliseconds of dispatches, and of posix_spawns beside them."""
    pair: list[Contender] = [library, plain_spawn()]
    result: tuple[Samples, Samples] = ([], [])
    for number in range(-3, rounds):
        for contender, samples in zip(pair, result, strict=True):
            await library.wait_full(removed=False)
            await trio.sleep(REST)
            sample = round(await contender.call_alone() * 1e3, 4)
            if number >= 0:
                samples.append(sample)
    return result


def _memory(before: dict[str, int], tree: Path, slots: int) -> Memory:
    now = meminfo()
    grown = {name: (now.get(name, 0) - before.get(name, 0)) / (slots - 1) for name in _PARTS}
    sizes: list[int] = []
    leaves = list(tree.glob("tenant-*/call-*/cgroup.procs"))
    for file in leaves:
        sizes += [_pss(int(pid)) for pid in file.read_text().split()]
    per_leaf = len(sizes) / max(1, len(leaves))
    return Memory(
        available=-grown["MemAvailable"],
        slab=grown["Slab"],
        percpu=grown["Percpu"],
        stacks_and_tables=grown["KernelStack"] + grown["PageTables"],
        pss=mean(sizes) * per_leaf if sizes else 0.0,
        processes=per_leaf,
    )


def _pss(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def print_idle(idle: Idle, report: Report) -> None:
    """Both tables."""
    memory = idle.memory
    report.table(
        ["kB per idle slot", "MemAvailable", "sum of parts", "slab", "percpu", "stacks+tables", f"PSS of {memory.processes:.0f}"],
        [[f"{idle.slots} idle slots", *(
            cell(value, 0) for value in
            (memory.available, memory.parts, memory.slab, memory.percpu, memory.stacks_and_tables, memory.pss)
        )]],
    )  # fmt: skip
    report.say()
    rows = [("dispatch, 1 idle", idle.one), (f"dispatch, {idle.slots} idle", idle.many)]
    rows += [("posix_spawn, 1 idle", idle.spawn_one), (f"posix_spawn, {idle.slots} idle", idle.spawn_many)]
    table = [[name, *(cell(v) for v in (s.min, s.p50, s.p95, s.p99, s.max))] for name, s in rows if s is not None]
    report.table(["ms", "min", "p50", "p95", "p99", "max"], table)
    report.say(f"building a slot {idle.build_ms:.2f} ms, ending one {idle.close_ms:.2f} ms (all at once)")
