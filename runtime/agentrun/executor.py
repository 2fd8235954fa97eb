"""The executor: what a program has that runs tool calls. Pools, zygotes and leaves are behind one ``run``.

A call is two steps, the same two for those that come through the daemon's socket: ``resolver`` makes a request of what the caller
says, and ``performer`` carries it out. Everything lives in one nursery: closing the executor ends every call and removes every
cgroup.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from time import monotonic
from typing import Any

import msgspec

from agentrun.burst.control import Control
from agentrun.call import Call
from agentrun.cgroup.tree import Tree
from agentrun.executorconfig import ExecutorConfig
from agentrun.fleet import Fleet
from agentrun.latency import Latency, Report
from agentrun.nursery import open_plain_nursery
from agentrun.performer import Performer
from agentrun.policy import Policy
from agentrun.policystore import PolicyStore
from agentrun.pool import PoolStats
from agentrun.request import Text, check_tenant
from agentrun.resolver import Resolver
from agentrun.running import Running
from agentrun.session.store import Sessions
from agentrun.stdio import PIPE, Input, Kits, Output, Stdio
from agentrun.terms import TermsBook
from agentrun.turns import Turns
from agentrun.types import Result
from agentrun.workspace import Workspace, as_path, open_directory


class ExecutorStats(msgspec.Struct, frozen=True, kw_only=True):
    """An executor at one moment."""

    running: int
    queued: int
    completed: int
    refused: int
    stuck: int
    """Sandboxes that could not be removed; each was logged."""
    pools: dict[str, PoolStats]
    latency: Report
    """How long the phases of sandboxes took."""


class Executor:
    """Runs tool calls. Made by ``open_executor``."""

    def __init__(self, config: ExecutorConfig, tree: Tree, fleet: Fleet, memory: Control, latency: Latency) -> None:
        self.config = config
        self.memory = memory
        self.latency = latency
        self.tree = tree
        self.policies = PolicyStore()
        self._fleet, self._later = fleet, fleet.chores.later
        self._terms = TermsBook(tree, fleet)
        self.resolver = Resolver(self.policies, self._terms, fleet)
        self.performer = Performer(Turns(config.max_running, config.max_queued), fleet, latency)
        self._kits = Kits()
        fleet.on_retired = self._forget

    async def run(
        self,
        argv: Sequence[Text],
        *,
        policy: Policy | str = "default",
        tenant: str = "default",
        workspace: Workspace | str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        timeout: float | None = None,
        hint: str | None = None,
        image: str | None = None,
        session: str | None = None,
        timings: bool = False,
    ) -> Result:
        """Run one command in a fresh sandbox and wait for it.

        Args:
            argv: the command; a name without a slash is looked up on the sandbox's PATH.
            policy: what it may do, or the name of one.
            workspace: a host directory to mount at its own path; also the default ``cwd``.
            env: variables laid over the minimal environment; the caller's own is not passed on.
            stdin: bytes to read, a descriptor, or nothing (/dev/null).
            stdout, stderr: a descriptor to write to; else captured, up to ``capture_limit`` bytes each.
            timeout: seconds, instead of the policy's.
            hint: the memory the call will need, such as ``memory:high`` or ``memory:4g``; see ``agentrun.hints``.
            image: the root, instead of the policy's: an image of the store by name or id, or ``host``.
            session: have the root and the workspace of a session (``agentrun.session``), instead of one's own.
            timings: have ``phases`` in the result, as far as the kernel's programs recorded them.

        Cancelling it kills the call's leaf, waits for it, and goes on cancelling.

        Raises:
            UsageError: the request is not one.
            Overloaded: too many calls run and wait.
            HostError: the host failed; also LimitError and SandboxError.
        """
        begun = monotonic()
        directory, mode = self._open(workspace)
        try:
            request = self.resolver.resolve(
                argv, policy=policy, tenant=tenant, workspace_fd=directory, workspace_mode=mode, cwd=cwd,
                env=env, timeout=timeout, hint=hint, image=image, session=session, timings=timings,
            )  # fmt: skip
            stdio = self._stdio(stdin, stdout, stderr, request.terms.owner)
            try:
                return await self.performer.perform(request, stdio, begun=begun)
            finally:
                self._later(stdio.close)
        finally:
            if directory >= 0:
                os.close(directory)

    @contextlib.asynccontextmanager
    async def start(
        self, argv: Sequence[Text], *, stdin: Input = None, stdout: Output = PIPE, stderr: Output = PIPE, **options: Any
    ) -> AsyncIterator[Running]:
        """Start a command and stream: ``async with executor.start([...]) as call``. Options are those of ``run``.

        Leaving the block kills what still runs; ``await call.wait()`` first for the result.
        """
        workspace: Workspace | str | None = options.pop("workspace", None)
        directory, mode = self._open(workspace)
        try:
            request = self.resolver.resolve(argv, workspace_fd=directory, workspace_mode=mode, **options)
            stdio = self._stdio(stdin, stdout, stderr, request.terms.owner)
            try:
                async with open_plain_nursery() as nursery:
                    running = Running()
                    await nursery.start(running.run, self.performer.perform, request, stdio)
                    try:
                        yield running
                    finally:
                        running.kill()
                        await running.aclose()
            finally:
                stdio.close()
        finally:
            if directory >= 0:
                os.close(directory)

    async def warm_up(
        self, policy: Policy | str = "default", tenant: str = "default", count: int = 1, *, image: str | None = None
    ) -> None:
        """Have ``count`` warm slots ready for calls of this policy and tenant, and keep as many from here on.

        Raises:
            HostError: they could not be built.
        """
        await self._fleet.pool(check_tenant(tenant), self.resolver.rules(policy, image)).fill(count)

    @property
    def sessions(self) -> Sessions:
        """The sessions that calls may be made in: create, snapshot, fork, roll back. Its methods take about a millisecond."""
        return self._fleet.sessions.store

    def calls(self) -> dict[str, Call]:
        """The calls that run now, by id."""
        return dict(self.performer.calls)

    def owns(self, uid: int) -> bool:
        """Whether a host uid is a tool's of ours: then it is no caller."""
        return self._fleet.tenants.owns(uid)

    def usage(self, name: str, call: Call) -> dict[str, Any] | None:
        """What a call uses now, for ``agentrun top``: bytes, seconds, and percent of the last ten seconds that it was stalled."""
        slot = call.slot
        memory = None if slot is None else self.memory.governor.row(slot.leaf)
        if slot is None or memory is None:
            return None
        return {"call": name, "tenant": call.request.tenant, **call.describe(), **memory, **slot.leaf.load()}

    def pools(self, tenant: str) -> dict[str, PoolStats]:
        """A tenant's pools at this moment."""
        return self._fleet.statistics(tenant)

    def statistics(self) -> ExecutorStats:
        """The executor at this moment."""
        turns = self.performer.turns
        return ExecutorStats(
            running=turns.running,
            queued=turns.waiting,
            completed=turns.completed,
            refused=turns.refused,
            stuck=self._fleet.stuck,
            pools=self._fleet.statistics(),
            latency=self.latency.report(),
        )

    async def aclose(self) -> None:
        """End every call, and refuse those that come; ``open_executor`` does it."""
        self.resolver.closed = True
        await self.performer.aclose()
        await self._fleet.aclose()
        self._kits.close()

    def _forget(self) -> None:
        """Pools are gone, and perhaps tenants."""
        self._terms.forget()
        self._kits.forget()

    def _stdio(self, stdin: Input, stdout: Output, stderr: Output, owner: tuple[int, int]) -> Stdio:
        bound = self.config.capture_limit
        return Stdio.for_run(stdin, stdout, stderr, owner, bound, self._kits)

    def _open(self, workspace: Workspace | str | None) -> tuple[int, str]:
        if workspace is None:
            return -1, "rw"
        chosen = workspace if isinstance(workspace, Workspace) else Workspace(as_path(workspace, "workspace"))
        return open_directory(chosen), chosen.mode
