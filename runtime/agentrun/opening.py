"""Opening an executor: what it is made of, in the order in which each part needs the one before; and closing it, backwards."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator

import trio

from agentrun.burst.control import Control
from agentrun.cgroup.tree import Tree, find_base, remove_stale
from agentrun.errors import HostError
from agentrun.executor import Executor
from agentrun.executorconfig import ExecutorConfig
from agentrun.fleet import Fleet
from agentrun.latency import Latency
from agentrun.nursery import open_plain_nursery


@contextlib.asynccontextmanager
async def open_executor(config: ExecutorConfig | None = None) -> AsyncIterator[Executor]:
    """An executor for the time of the block: ``async with open_executor() as executor``.

    Must be entered as root, on Linux 5.14 or newer with a cgroup2 mount. Leaving the block ends every call and removes every
    process, mount and cgroup the executor made; so does the death of this process, but for empty cgroups, which the next
    executor removes.

    Raises:
        HostError: the host cannot do it; ``agentrun doctor`` says what is missing.
    """
    chosen = config or ExecutorConfig()
    if os.geteuid() != 0:
        raise HostError("agentrun needs root to make sandboxes (rootless operation is not supported yet)")
    base = find_base()
    remove_stale(base.path)
    tree = Tree(base, chosen.name or f"{os.getpid()}-{time.monotonic_ns():x}")
    try:
        life_read, life_write = os.pipe2(os.O_CLOEXEC)
        try:
            latency = Latency(tree.level + 2)
            memory = Control(
                tree, latency if chosen.phases else None, probes=chosen.probes, sched=chosen.sched,
                budget=chosen.memory_budget, priorities=chosen.tenant_priorities,
            )  # fmt: skip
            try:
                async with open_plain_nursery() as nursery:
                    fleet = Fleet(chosen, tree, nursery, life_read, memory.governor, latency)
                    executor = Executor(chosen, tree, fleet, memory, latency)
                    nursery.start_soon(memory.run, name="agentrun memory")
                    nursery.start_soon(fleet.keep_house, name="agentrun housekeeping")
                    nursery.start_soon(fleet.denials.run, name="agentrun denials")
                    nursery.start_soon(fleet.chores.run, name="agentrun chores")
                    nursery.start_soon(executor.performer.deadlines.watch, name="agentrun deadlines")
                    try:
                        yield executor
                    finally:
                        with trio.CancelScope(shield=True):
                            await executor.aclose()
                        nursery.cancel_scope.cancel()
            finally:
                memory.close()
                latency.detach()
        finally:
            os.close(life_write)
            os.close(life_read)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(tree.close)
