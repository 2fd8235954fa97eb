"""The fleet: every pool of one executor, from the first call it is for until nobody uses it any more; pools of sessions, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import trio

from agentrun import rootfs
from agentrun.burst.governor import Governor
from agentrun.burst.headroom import Budget
from agentrun.cgroup.limits import Plan, changes, plan_budget
from agentrun.cgroup.tree import Tree
from agentrun.changes.mount import mount_changes
from agentrun.chores import Chores
from agentrun.denials import Denials
from agentrun.executorconfig import FleetConfig
from agentrun.images import Images
from agentrun.latency import Latency
from agentrun.policy import DEFAULT, Policy
from agentrun.pool import Pool, PoolStats
from agentrun.session.mount import SessionRoots
from agentrun.shape import Shape, shape_of
from agentrun.slot import Slot
from agentrun.slotbuilder import SlotBuilder
from agentrun.tenants import Tenants
from agentrun.workspace import Mode, clone_mount, owner_maps
from agentrun.zygotes import Zygotes


class Fleet:
    """Pools by tenant and shape."""

    def __init__(
        self, config: FleetConfig, tree: Tree, nursery: trio.Nursery, life_read: int, governor: Governor, latency: Latency
    ) -> None:
        """Everything is built below ``tree`` and in ``nursery``; slots end when ``life_read`` sees its end of file."""
        self.governor = governor
        self._config, self._tree, self._nursery = config, tree, nursery
        self.tenants, self.denials, self.chores = Tenants(config), Denials(), Chores()
        self.images, self.sessions = Images(), SessionRoots(config.id_base)
        self._zygotes = Zygotes(nursery, life_read, config.id_base, latency, self.images, self.sessions)
        self._builder = SlotBuilder(tree, nursery, self._zygotes, governor, latency, self.denials, self._renew)
        self._pools: dict[tuple[str, Shape], Pool] = {}
        self.on_retired: Callable[[], None] = lambda: None
        """Called when pools have been closed for want of use: nobody may be sent to them any more."""

    @property
    def stuck(self) -> int:
        """Sandboxes that could not be removed; each was logged."""
        return self._builder.stuck

    def pool(self, tenant: str, policy: Policy) -> Pool:
        """The pool that serves calls of this tenant and policy.

        A call's own limits do not make another pool: its leaf is adjusted instead, before the tool exists (``adjust``), or when
        it was built, if the call before had the same.

        Raises:
            HostError: the tenant's cgroup could not be made.
        """
        if policy.limits is not DEFAULT.limits:
            policy = msgspec.structs.replace(policy, limits=DEFAULT.limits)
        shape = shape_of(policy)
        pool = self._pools.get((tenant, shape))
        return pool if pool is not None else self._make_pool(tenant, shape)

    def _make_pool(self, tenant: str, shape: Shape) -> Pool:
        id_base, budget = self.tenants.id_base(tenant), self.tenants.budget(tenant)
        fd = self._tree.tenant(tenant, plan_budget(budget))
        if budget.memory_max is not None:
            self.governor.funds.budgets[tenant] = Budget(fd, budget.memory_max)
        plan = self._tree.plan(shape.limits)

        async def build() -> Slot:
            slot = await self._builder.build(shape, tenant, id_base, plan)
            if pool.plan is not plan:
                try:
                    self.adjust(slot, pool.plan)
                except BaseException:
                    self._builder.discard(slot)
                    raise
                self.governor.hold(slot.leaf, pool.plan.limits)
            return slot

        pool = Pool(
            build, self._builder.discard, self.chores.later, self._nursery, least=self._config.pool_least,
            most=self._config.pool_most, plan=plan, name=self._name(tenant, shape),
        )  # fmt: skip
        self._pools[tenant, shape] = pool
        return pool

    def _name(self, tenant: str, shape: Shape) -> str:
        """What people know a pool by. The plain name is the default policy's, whoever comes first; others are numbered."""
        plain = f"{tenant}/{shape.net}" if shape.seccomp == "default" else f"{tenant}/{shape.net}/{shape.seccomp}"
        taken = {pool.name for pool in self._pools.values()}
        if shape != shape_of(DEFAULT):
            taken.add(f"{tenant}/{DEFAULT.net}")
        return next(name for name in (plain, *(f"{plain}#{number}" for number in range(2, len(taken) + 3))) if name not in taken)

    def adjust(self, slot: Slot, plan: Plan) -> None:
        """Give a slot's leaf other limits than it has.

        Raises:
            HostError: one could not be written.
        """
        slot.leaf.write(changes(slot.plan.files, plan.files))
        slot.plan = plan

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
        old = self._zygotes.forget_one(shape, self.tenants.id_base(tenant))
        pool.renew()  # at once: whoever comes next finds the session his
        with trio.CancelScope(shield=True):
            for zygote in old:
                await zygote.aclose()
            # Nobody waits for a slot of these: he would hold the session.
            await self._retire([key for key, known in self._pools.items() if known is not pool and _same(shape, key[1])])

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

    async def _renew(self) -> None:
        """Look at the host's root anew: sandboxes that are built from now on have it as it is now."""
        self.sessions.remount()
        old = self._zygotes.forget()  # before the pools ask for new slots
        for pool in self._pools.values():
            pool.renew()
        for zygote in old:
            await zygote.aclose()

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
            for zygote in self._zygotes.drop((shape, self.tenants.id_base(tenant)) for tenant, shape in self._pools):
                await zygote.aclose()
        # A tenant keeps its range of ids for good, and its cgroup if it has a budget: those are as many as were configured.
        for tenant in self._tree.drop_tenants({tenant for tenant, _ in self._pools} | self._config.tenant_limits.keys()):
            self._zygotes.forget_ids(self.tenants.id_base(tenant))

    def statistics(self, tenant: str | None = None) -> dict[str, PoolStats]:
        """The pools, or a tenant's, by their names (``_name``)."""
        return {pool.name: pool.statistics() for (owner, _), pool in self._pools.items() if tenant in (None, owner)}

    async def aclose(self) -> None:
        """End the idle slots and the zygotes."""
        self.chores.finish()
        for pool in self._pools.values():
            pool.close()
        for zygote in self._zygotes.close():
            await zygote.aclose()


def _same(shape: Shape, other: Shape) -> bool:
    """Whether two shapes have the same session, in whatever state."""
    return shape.fs.session.partition(".")[0] == other.fs.session.partition(".")[0]
