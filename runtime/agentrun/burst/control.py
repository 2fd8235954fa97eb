"""Memory control of one executor: its governor, and the probes process where one is wanted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec
import trio

from agentrun.burst.governor import Governor
from agentrun.burst.headroom import Budget
from agentrun.burst.link import Link
from agentrun.cgroup.files import write_file
from agentrun.cgroup.tree import Tree
from agentrun.latency import Latency
from agentrun.scheduling import SchedStatus, Scheduling

CONTROLLER_HOOKS = ("charge_fentry", "charge_kprobe")
PAGE_HOOKS = ("pages",)


class ProbesStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The probes process at one moment."""

    mode: str
    """What holds calls to their memory; see ``ladder.Mode``."""
    hook: str | None
    """The program that sees charges."""
    pid: int
    """0 if there is none."""
    starts: int
    seconds: float | None
    """Compiling, loading and attaching took."""
    memory: int
    """Bytes the process takes."""
    lost: int
    """Events nobody heard."""
    refused: dict[str, str]
    """Hook → why this kernel does not take it."""
    sched: SchedStatus | None
    """The scheduler for short calls; null if it was not asked for."""


class Control:
    """Starts with the executor and ends with it."""

    def __init__(
        self,
        tree: Tree,
        latency: Latency | None,
        *,
        probes: bool,
        sched: bool = False,
        budget: int | None = None,
        priorities: Mapping[str, int] = {},
    ) -> None:
        """``probes``: start the probes process; it also records set-up for ``latency``, and with ``sched`` schedules short calls
        before long ones. ``budget``: bytes for all calls together.

        Raises:
            HostError: the budget could not be written.
        """
        self.governor = Governor("memory" in tree.controllers, tree.level + 2, priorities)
        if budget is not None:
            if "memory" in tree.controllers:
                write_file(tree.fd, "memory.max", str(budget), str(tree.path))
            self.governor.funds.budgets[""] = Budget(tree.fd, budget)
        self._said: dict[str, Any] = {}
        self._failed: dict[str, str] = {}
        hooks = CONTROLLER_HOOKS if "memory" in tree.controllers else PAGE_HOOKS
        self._latency = latency
        if sched:
            self.governor.scheduling = Scheduling()
        options = {"burst": hooks, "sched": sched, "phases": latency is not None}
        self.link = Link(options, self._take, self._lost) if probes else None

    async def run(self) -> None:
        """Run until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.governor.run, name="agentrun governor")
            if self.governor.scheduling is not None:
                nursery.start_soon(self.governor.scheduling.run, name="agentrun scheduling")
            if self.link is not None:
                nursery.start_soon(self.link.run, name="agentrun probes")

    async def wait_ready(self, patience: float = 60.0, *, everything: bool = False) -> None:
        """Wait until memory is held by programs in the kernel or will not be; or for ``everything`` that was asked for."""
        if self.link is not None:
            with trio.move_on_after(patience):
                await (self.link.done if everything else self.link.ready).wait()

    def _take(self, message: dict[str, Any], maps: Mapping[str, int]) -> None:
        if message["kind"] == "burst":
            self._said = message
            self.governor.attach(maps)
            return
        if message["kind"] == "phases" and self._latency is not None:
            self._latency.attach(maps)
            return
        scheduling = self.governor.scheduling
        if message["kind"] == "sched" and scheduling is not None:
            scheduling.attach(maps)
            return
        if message["kind"] == "failed":
            self._failed[message["what"]] = message["error"]
            if message["what"] == "sched" and scheduling is not None:
                scheduling.refused(message["error"])
        for fd in maps.values():
            os.close(fd)

    def _lost(self, _reason: str) -> None:
        self.governor.detach()
        if self._latency is not None:
            self._latency.detach()
        if self.governor.scheduling is not None:
            self.governor.scheduling.detach("the probes process ended")

    def status(self) -> ProbesStatus:
        """The probes process now."""
        refused = {**self._said.get("refused", {}), **self._failed}
        link = self.link
        return ProbesStatus(
            mode=self.governor.mode.value, hook=self._said.get("hook") if self.governor.attached else None,
            pid=link.pid if link else 0, starts=link.starts if link else 0, seconds=self._said.get("seconds"),
            memory=link.memory if link and link.pid else 0, lost=self.governor.lost, refused=refused,
            sched=self.governor.scheduling.status() if self.governor.scheduling else None,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of everything, once nothing runs any more; the probes process ends with its socket."""
        if self.governor.scheduling is not None:
            self.governor.scheduling.close()
        self.governor.close()
