"""The fleet: every pool and slot of one executor, and the id ranges of its tenants."""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec
import trio
import trio.testing

from agentrun import rootfs
from agentrun.burst.governor import Governor
from agentrun.burst.headroom import Budget
from agentrun.cgroup.limits import plan_budget
from agentrun.cgroup.tree import Tree
from agentrun.changes.mount import mount_changes
from agentrun.denials import Denials
from agentrun.egress.path import EgressPath
from agentrun.egress.rules import parse_rules
from agentrun.errors import HostError, SandboxError
from agentrun.executorconfig import FleetConfig
from agentrun.images import Images
from agentrun.latency import Latency
from agentrun.policy import DEFAULT, Limits, Policy
from agentrun.pool import Pool, PoolStats
from agentrun.session.mount import SessionRoots
from agentrun.shape import ID_RANGE, Shape, shape_of
from agentrun.slot import Slot, build_slot
from agentrun.workspace import Mode, clone_mount, owner_maps
from agentrun.zygote import IdMap, ZygoteDied
from agentrun.zygotes import Zygotes

_log = logging.getLogger("agentrun")
_NO_LIMITS = Limits(memory_max=None, memory_swap_max=None, pids_max=None)
_LIFTED = {"memory.max": "max", "memory.oom.group": "0", "memory.swap.max": "max", "pids.max": "max"}
"""What takes back a limit the pool's shape has and the call has not."""
_ID_END = 1 << 32
_CHORES_WAIT = 0.02
"""Seconds for which chores give way to tasks that always have something to do, such as busy relays."""


class Fleet:
    """Pools by tenant and shape."""

    def __init__(
        self, config: FleetConfig, tree: Tree, nursery: trio.Nursery, life_read: int, governor: Governor, latency: Latency
    ) -> None:
        """Everything is built below ``tree`` and in ``nursery``; slots end when ``life_read`` sees its end of file."""
        self.governor, self._latency = governor, latency
        self._config, self._tree, self._nursery = config, tree, nursery
        self.images, self.sessions = Images(), SessionRoots(config.id_base)
        self._zygotes = Zygotes(nursery, life_read, config.id_base, latency, self.images, self.sessions)
        self._pools: dict[tuple[str, Shape], Pool] = {}
        self._tenants: dict[str, int] = {}
        self._built = 0
        self._chores: deque[Callable[[], None]] = deque()
        self._bell = trio.Event()
        self.denials = Denials()
        self.on_retired: Callable[[], None] = lambda: None
        """Called when pools have been closed for want of use: nobody may be sent to them any more."""
        self.stuck = 0
        """Sandboxes that could not be removed; each was logged."""

    def pool(self, tenant: str, policy: Policy) -> Pool:
        """The pool that serves calls of this tenant and policy.

        A call's own limits do not make another pool: its leaf is adjusted instead, before the tool exists (``adjust``).

        Raises:
            HostError: the tenant's cgroup could not be made.
        """
        if policy.limits is not DEFAULT.limits:
            policy = msgspec.structs.replace(policy, limits=DEFAULT.limits)
        shape = shape_of(policy)
        pool = self._pools.get((tenant, shape))
        return pool if pool is not None else self._make_pool(tenant, shape)

    def _make_pool(self, tenant: str, shape: Shape) -> Pool:
        base = self.id_base(tenant)
        maps = ((False, 0, base, ID_RANGE), (True, 0, base, ID_RANGE))
        budget = self.budget(tenant)
        fd = self._tree.tenant(tenant, plan_budget(budget))
        if budget.memory_max is not None:
            self.governor.funds.budgets[tenant] = Budget(fd, budget.memory_max)
        files, _ = self._tree.plan(shape.limits)

        async def build() -> Slot:
            self._built += 1
            return await self._build(shape, tenant, f"{self._built:x}", files, maps)

        config, name = self._config, self._name(tenant, shape)
        pool = Pool(build, self._discard, self.later, self._nursery, least=config.pool_least, most=config.pool_most, name=name)
        self._pools[tenant, shape] = pool
        return pool

    async def lease_session(self, key: str, tenant: str, policy: Policy) -> tuple[Pool, Slot, bool]:
        """A slot for a call in a session, its pool, and whether it was warm. Last of what it holds is the session as it is now.

        Raises:
            UsageError: it is not as the key says any more, or calls of another pool run in it.
            HostError: none could be built.
        """
        while True:
            pool = self.pool(tenant, policy)
            release, outdated = await self.sessions.hold(key, pool)
            if not pool.closed:
                break
            release()  # it was closed while this waited
        try:
            if outdated:
                await self._mount_anew(pool)
            slot, warm = await pool.lease()
        except BaseException:
            release()
            raise
        slot.held.append(release)
        return pool, slot, warm

    async def _mount_anew(self, pool: Pool) -> None:
        """Have a session's pool build sandboxes that see what others have written, and let go of the session's other pools."""
        tenant, shape = next(key for key, known in self._pools.items() if known is pool)
        old = self._zygotes.forget_one(shape, self.id_base(tenant))
        pool.renew()  # at once: whoever comes next finds the session his
        with trio.CancelScope(shield=True):
            for zygote in old:
                await zygote.aclose()
            # Nobody waits for a slot of these: he would hold the session.
            await self._retire([key for key, known in self._pools.items() if known is not pool and _same(shape, key[1])])

    def _name(self, tenant: str, shape: Shape) -> str:
        """What people know a pool by. The plain name is the default policy's, whoever comes first; others are numbered."""
        plain = f"{tenant}/{shape.net}" if shape.seccomp == "default" else f"{tenant}/{shape.net}/{shape.seccomp}"
        taken = {pool.name for pool in self._pools.values()}
        if shape != shape_of(DEFAULT):
            taken.add(f"{tenant}/{DEFAULT.net}")
        return next(name for name in (plain, *(f"{plain}#{number}" for number in range(2, len(taken) + 3))) if name not in taken)

    async def _build(self, shape: Shape, tenant: str, name: str, files: Mapping[str, str], maps: Sequence[IdMap]) -> Slot:
        base, notify = self.id_base(tenant), self._zygotes.notify
        try:
            try:
                slot = await self._clone(shape, base, tenant, name, files, maps)
            except ZygoteDied:  # the next one is started for it; if that dies as well, something is wrong with the host
                slot = await self._clone(shape, base, tenant, name, files, maps)
        except SandboxError as error:
            if not (notify and error.step == "filter" and error.errno == errno.EBUSY):
                raise
            # Somebody around us listens to a filter already, and the kernel takes one listener: do without reports. Whoever of
            # several that are built at once finds out first says so.
            if self._zygotes.notify:
                self._zygotes.do_without_listener()
                await self._renew()
            return await self._build(shape, tenant, name, files, maps)
        self.governor.register(slot.leaf, tenant)
        self._latency.leaf(slot.leaf.id, self._latency.shape(shape.lasting, shape.label))
        if slot.listener >= 0:
            try:
                self.denials.watch(slot.listener, slot.id, self._zygotes.profile(shape.seccomp))
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

    async def _clone(
        self, shape: Shape, base: int, tenant: str, name: str, files: Mapping[str, str], maps: Sequence[IdMap]
    ) -> Slot:
        alone = shape.fs.root == "scratch" and not shape.fs.session
        zygote = await (self._zygotes.single if alone else self._zygotes.find)(shape, base)
        lease = zygote.lease and zygote.lease.share()
        try:
            slot = await build_slot(zygote, self._tree, tenant, name, files, maps)
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

    def adjust(self, slot: Slot, files: Mapping[str, str]) -> None:
        """Give a slot's leaf a call's own limits: ``files`` instead of those it was made with.

        Raises:
            HostError: one could not be written.
        """
        default, _ = self._tree.plan(DEFAULT.limits)
        lifted = {name: _LIFTED[name] for name in default if name not in files and name in _LIFTED}
        slot.leaf.write(lifted | {name: text for name, text in files.items() if default.get(name) != text})

    async def mount_workspace(
        self, fd: int, path: str, mode: Mode, *, owner: tuple[int, int], caller: tuple[int, int], kept: int = -1
    ) -> int:
        """The detached mount of a workspace, where the caller's files are the owner's. ``kept`` is where a copy's changes go.

        Raises:
            HostError: its file system cannot be mounted that way.
        """
        top = path.split("/")[1]
        if top not in rootfs.HIDDEN and not self._zygotes.show(top):
            # A directory of the host's root that is newer than our images of it.
            await self._renew()
        zygote = await self._zygotes.plain()
        userns = await zygote.userns(owner_maps(caller, owner, self._config.id_base))
        if mode != "cow":
            return clone_mount(fd, path, mode, userns)
        upper = await zygote.userns(owner_maps(caller, owner, self._config.id_base, mounter=True))
        return mount_changes(fd, path, kept, lower=userns, upper=upper)

    def owner(self, tenant: str, policy: Policy) -> tuple[int, int]:
        """The tool's uid and gid as the host sees them."""
        base = self.id_base(tenant)
        return base + policy.process.uid, base + policy.process.gid

    def budget(self, tenant: str) -> Limits:
        """What all calls of a tenant may use together."""
        return self._config.tenant_limits.get(tenant, _NO_LIMITS)

    def owns(self, uid: int) -> bool:
        """Whether a host uid is one of those that tools have, or strangers in their workspaces."""
        return 0 <= uid - self._config.id_base < (len(self._tenants) + 1) * ID_RANGE

    def id_base(self, tenant: str) -> int:
        """The first host id of a tenant's range.

        Raises:
            HostError: there are more tenants than ranges.
        """
        base = self._config.id_base + self._tenants.setdefault(tenant, len(self._tenants) + 1) * ID_RANGE
        if base + ID_RANGE > _ID_END:
            raise HostError(f"no range of user ids is left for tenant {tenant!r} ({len(self._tenants)} have one)")
        return base

    async def _renew(self) -> None:
        """Look at the host's root anew: sandboxes that are built from now on have it as it is now."""
        self.sessions.remount()
        old = self._zygotes.forget()  # before the pools ask for new slots
        for pool in self._pools.values():
            pool.renew()
        for zygote in old:
            await zygote.aclose()

    def later(self, chore: Callable[[], None]) -> None:
        """Do something after the call that asks for it has returned: nothing it needs may wait for this."""
        self._chores.append(chore)
        if len(self._chores) == 1:
            self._bell.set()

    async def do_chores(self) -> None:
        """Take down used slots and build new ones, when no task has anything better to do; runs as long as the fleet does."""
        while True:
            await self._bell.wait()
            with trio.move_on_after(_CHORES_WAIT):
                await trio.testing.wait_all_tasks_blocked()
            self._bell = trio.Event()
            self._do_chores()

    def _do_chores(self) -> None:
        while self._chores:
            self._chores.popleft()()

    def _discard(self, slot: Slot) -> None:
        self._nursery.start_soon(self._dispose, slot)

    def _forget(self, slot: Slot) -> None:
        self.denials.forget(slot.id)
        self.governor.forget(slot.leaf)
        self._latency.forget(slot.leaf.id)

    async def _dispose(self, slot: Slot) -> None:
        self._forget(slot)
        try:
            await slot.dispose()
        except HostError as error:
            # Nobody waits for this; the calls go on, and the count in the statistics says that something is left.
            self.stuck += 1
            _log.error("%s", error)

    async def keep_house(self) -> None:
        """Let pools forget old peaks of demand, and forget old pools; runs as long as the fleet does."""
        while True:
            await trio.sleep(1)
            if self._zygotes.outdated():
                await self._renew()
            for pool in self._pools.values():
                pool.shrink()
            await self._retire([key for key, pool in self._pools.items() if pool.deserted or self._is_gone(key[1])])

    def _is_gone(self, shape: Shape) -> bool:
        """A pool of this shape is for a session that was removed: nobody can use it any more, and agents make many."""
        return bool(shape.fs.session) and not self.sessions.exists(shape.fs.session)

    async def _retire(self, deserted: Sequence[tuple[str, Shape]]) -> None:
        """Let go of pools that nobody uses, and of what only they needed: zygotes, and the cgroups of their tenants."""
        for key in deserted:
            if key in self._pools:
                self._pools.pop(key).close()
        if deserted:
            self.on_retired()
            for zygote in self._zygotes.drop((shape, self.id_base(tenant)) for tenant, shape in self._pools):
                await zygote.aclose()
        # A tenant keeps its range of ids for good, and its cgroup if it has a budget: those are as many as were configured.
        for tenant in self._tree.drop_tenants({tenant for tenant, _ in self._pools} | self._config.tenant_limits.keys()):
            self._zygotes.forget_ids(self.id_base(tenant))

    def statistics(self, tenant: str | None = None) -> dict[str, PoolStats]:
        """The pools, or a tenant's, by their names (``_name``)."""
        return {pool.name: pool.statistics() for (owner, _), pool in self._pools.items() if tenant in (None, owner)}

    async def aclose(self) -> None:
        """End the idle slots and the zygotes."""
        self._do_chores()
        for pool in self._pools.values():
            pool.close()
        for zygote in self._zygotes.close():
            await zygote.aclose()


def _same(shape: Shape, other: Shape) -> bool:
    """Whether two shapes have the same session, in whatever state."""
    return shape.fs.session.partition(".")[0] == other.fs.session.partition(".")[0]
