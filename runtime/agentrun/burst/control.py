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


class Control:
    """Starts with the executor and ends with it."""

    def __init__(self, tree: Tree, *, probes: bool, budget: int | None, priorities: Mapping[str, int]) -> None:
        """``probes``: start the probes process. ``budget``: bytes for all calls together.

        Raises:
            HostError: the budget could not be written.
        """
        self.governor = Governor("memory" in tree.controllers, tree.level + 2, priorities)
        if budget is not None:
            if "memory" in tree.controllers:
                write_file(tree.fd, "memory.max", str(budget), str(tree.path))
            self.governor.funds.budgets[""] = Budget(tree.fd, budget)
        self._said: dict[str, Any] = {}
        hooks = CONTROLLER_HOOKS if "memory" in tree.controllers else PAGE_HOOKS
        self.link = Link({"burst": hooks}, self._take, self._lost) if probes else None

    async def run(self) -> None:
        """Run until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.governor.run, name="agentrun governor")
            if self.link is not None:
                nursery.start_soon(self.link.run, name="agentrun probes")

    async def wait_ready(self, patience: float = 60.0) -> None:
        """Wait until programs are attached, or it is known that there will be none."""
        if self.link is not None:
            with trio.move_on_after(patience):
                await self.link.ready.wait()

    def _take(self, message: dict[str, Any], maps: Mapping[str, int]) -> None:
        if message["kind"] == "burst":
            self._said = message
            self.governor.attach(maps)
            return
        if message.get("what") == "burst":
            self._said = message
        for fd in maps.values():
            os.close(fd)

    def _lost(self, _reason: str) -> None:
        self.governor.detach()

    def status(self) -> ProbesStatus:
        """The probes process now."""
        refused = dict(self._said.get("refused", {}))
        if "error" in self._said:
            refused[str(self._said["what"])] = self._said["error"]
        link = self.link
        return ProbesStatus(
            mode=self.governor.mode.value, hook=self._said.get("hook") if link and link.pid else None,
            pid=link.pid if link else 0, starts=link.starts if link else 0, seconds=self._said.get("seconds"),
            memory=link.memory if link and link.pid else 0, lost=self.governor.lost, refused=refused,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of everything, once nothing runs any more; the probes process ends with its socket."""
        self.governor.close()
