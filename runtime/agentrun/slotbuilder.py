"""Slots built whole, and taken down: sandbox, memory control, the listener of its filter, its network.

``build_slot`` makes the sandbox; here it gets what the executor has for it, and ``discard`` takes all of that back. Calls never
wait for either, unless their pool has nothing warm.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Sequence

import trio

from agentrun.burst.governor import Governor
from agentrun.cgroup.limits import Plan
from agentrun.cgroup.tree import Tree
from agentrun.denials import Denials
from agentrun.egress.path import EgressPath
from agentrun.egress.rules import parse_rules
from agentrun.errors import HostError, SandboxError
from agentrun.latency import Latency
from agentrun.shape import ID_RANGE, Shape
from agentrun.slot import Slot, build_slot
from agentrun.zygote import IdMap, ZygoteDied
from agentrun.zygotes import Zygotes

_log = logging.getLogger("agentrun")


class SlotBuilder:
    """Builds the slots of all pools of one executor, and takes them down."""

    def __init__(
        self,
        tree: Tree,
        nursery: trio.Nursery,
        zygotes: Zygotes,
        governor: Governor,
        latency: Latency,
        denials: Denials,
        renew: Callable[[], Awaitable[None]],
    ) -> None:
        """``renew`` has everybody's zygotes started anew."""
        self._tree, self._nursery, self._zygotes, self._renew = tree, nursery, zygotes, renew
        self._governor, self._latency, self._denials = governor, latency, denials
        self._built = 0
        self.stuck = 0
        """Sandboxes that could not be removed; each was logged."""

    async def build(self, shape: Shape, tenant: str, id_base: int, plan: Plan) -> Slot:
        """A warm slot, in a leaf of the tenant's with these limits, whose ids begin at ``id_base``.

        Raises:
            SandboxError: a step failed.
            HostError: something else of it could not be made. Either way nothing is left behind.
        """
        self._built += 1
        return await self._build(shape, tenant, f"{self._built:x}", id_base, plan)

    async def _build(self, shape: Shape, tenant: str, name: str, id_base: int, plan: Plan) -> Slot:
        notify, maps = self._zygotes.notify, ((False, 0, id_base, ID_RANGE), (True, 0, id_base, ID_RANGE))
        try:
            try:
                slot = await self._clone(shape, id_base, tenant, name, plan, maps)
            except ZygoteDied:  # the next one is started for it; if that dies as well, something is wrong with the host
                slot = await self._clone(shape, id_base, tenant, name, plan, maps)
        except SandboxError as error:
            if not (notify and error.step == "filter" and error.errno == errno.EBUSY):
                raise
            # Somebody around us listens to a filter already, and the kernel takes one listener: do without reports. Whoever of
            # several that are built at once finds out first says so.
            if self._zygotes.notify:
                self._zygotes.do_without_listener()
                await self._renew()
            return await self._build(shape, tenant, name, id_base, plan)
        self._governor.register(slot.leaf, tenant)
        self._latency.leaf(slot.leaf.id, self._latency.shape(shape.lasting, shape.label))
        if slot.listener >= 0:
            try:
                self._denials.watch(slot.listener, slot.id, self._zygotes.profile(shape.seccomp))
            except (OSError, ValueError) as error:
                self._forget(slot)
                await slot.dispose()
                raise HostError(f"watching a sandbox's refused calls: {error}") from error  # out of descriptors, or closing
            slot.listener = -1
        if shape.net == "egress":
            try:
                slot.network = await self._open_network(slot, shape)
            except BaseException:
                self._forget(slot)
                await slot.dispose()
                raise
        return slot

    async def _clone(self, shape: Shape, id_base: int, tenant: str, name: str, plan: Plan, maps: Sequence[IdMap]) -> Slot:
        alone = shape.fs.root == "scratch" and not shape.fs.session
        zygote = await (self._zygotes.single if alone else self._zygotes.find)(shape, id_base)
        lease = zygote.lease and zygote.lease.share()
        try:
            slot = await build_slot(zygote, self._tree, tenant, name, plan, maps)
        except BaseException:
            if lease is not None:
                lease.close()
            raise
        finally:
            if alone:
                zygote.close()
        if lease is not None:
            slot.held.append(lease.close)
        return slot

    async def _open_network(self, slot: Slot, shape: Shape) -> EgressPath:
        rules = parse_rules(shape.egress.allow, shape.egress.hosts)
        try:
            netns = os.open(f"/proc/{slot.init}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"opening a sandbox's network namespace: {error.strerror}") from error
        try:
            return await EgressPath.open(netns, rules, self._nursery)
        finally:
            os.close(netns)

    def discard(self, slot: Slot) -> None:
        """End a slot in the background."""
        self._nursery.start_soon(self._dispose, slot)

    async def _dispose(self, slot: Slot) -> None:
        self._forget(slot)
        try:
            await slot.dispose()
        except HostError as error:
            # Nobody waits for this; the calls go on, and the count in the statistics says that something is left.
            self.stuck += 1
            _log.error("%s", error)

    def _forget(self, slot: Slot) -> None:
        self._denials.forget(slot.id)
        self._governor.forget(slot.leaf)
        self._latency.forget(slot.leaf.id)
