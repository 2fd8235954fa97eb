"""The fleet: every zygote, pool and slot of one executor, and the id ranges of its tenants."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping

import msgspec
import trio
import trio.testing

from agentrun import rootfs
from agentrun.cgroup.limits import plan_budget
from agentrun.cgroup.tree import Tree
from agentrun.errors import HostError
from agentrun.policy import DEFAULT, Limits, Policy
from agentrun.pool import Pool, PoolStats
from agentrun.request import Request
from agentrun.shape import ID_RANGE, Shape, plan_shape, shape_of
from agentrun.slot import Slot, build_slot
from agentrun.workspace import clone_mount
from agentrun.zygote import Zygote

_log = logging.getLogger("agentrun")
_NO_LIMITS = Limits(memory_max=None, memory_swap_max=None, pids_max=None)
_LIFTED = {"memory.max": "max", "memory.oom.group": "0", "memory.swap.max": "max", "pids.max": "max"}
"""What takes back a limit the pool's shape has and the call has not."""
_ID_END = 1 << 32


class FleetConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How many sandboxes are kept, and for whom."""

    pool_least: int = 1
    """Warm slots each pool in use keeps."""
    pool_most: int = 32
    """Warm slots a pool keeps at most. 0: build every slot when it is asked for."""
    id_base: int = 0x60000000
    """First host uid and gid of the ranges given to tenants, 65,536 each."""
    tenant_limits: Mapping[str, Limits] = {}
    """Budgets of tenants: what all calls of one may use together."""


class Fleet:
    """Zygotes by shape, pools by tenant and shape."""

    def __init__(self, config: FleetConfig, tree: Tree, nursery: trio.Nursery, life_read: int) -> None:
        """Everything is built below ``tree`` and in ``nursery``; slots end when ``life_read`` sees its end of file."""
        self._config, self._tree, self._nursery, self._life_read = config, tree, nursery, life_read
        self._zygotes: dict[Shape, Zygote] = {}
        self._zygote_lock = trio.Lock()
        self._pools: dict[tuple[str, Shape], Pool] = {}
        self._tenants: dict[str, int] = {}
        self._tops: frozenset[str] = frozenset()
        self._built = 0
        self._chores: deque[Callable[[], None]] = deque()
        self._bell = trio.Event()
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
        self._tree.tenant(tenant, plan_budget(self._config.tenant_limits.get(tenant, _NO_LIMITS)))
        files, _ = self._tree.plan(shape.limits)

        async def build() -> Slot:
            self._built += 1
            name = f"{self._built:x}"
            return await build_slot(await self._zygote(shape), self._tree, tenant, name, files, maps)

        pool = Pool(build, self._discard, self.later, self._nursery, least=self._config.pool_least, most=self._config.pool_most)
        self._pools[tenant, shape] = pool
        return pool

    def adjust(self, slot: Slot, files: Mapping[str, str]) -> None:
        """Give a slot's leaf a call's own limits: ``files`` instead of those it was made with.

        Raises:
            HostError: one could not be written.
        """
        default, _ = self._tree.plan(DEFAULT.limits)
        lifted = {name: _LIFTED[name] for name in default if name not in files and name in _LIFTED}
        slot.leaf.write(lifted | {name: text for name, text in files.items() if default.get(name) != text})

    async def mount_workspace(self, request: Request) -> int:
        """The detached, owner-mapped mount of a request's workspace.

        Raises:
            HostError: its file system cannot be mounted that way.
        """
        zygote = await self._zygote(shape_of(DEFAULT))
        top = request.workspace_path.split("/")[1]
        if top not in rootfs.HIDDEN and top not in self._tops:
            # A directory of the host's root that is newer than our image of it.
            await self._renew()
            zygote = await self._zygote(shape_of(DEFAULT))
        uid, gid = self.owner(request.tenant)
        caller_uid, caller_gid = request.caller
        userns = await zygote.userns(((False, caller_uid, uid, 1), (True, caller_gid, gid, 1)))
        return clone_mount(request.workspace_fd, request.workspace_path, request.workspace_mode, userns)

    def owner(self, tenant: str) -> tuple[int, int]:
        """The tool's uid and gid as the host sees them."""
        base = self.id_base(tenant)
        return base + rootfs.UID, base + rootfs.GID

    def id_base(self, tenant: str) -> int:
        """The first host id of a tenant's range.

        Raises:
            HostError: there are more tenants than ranges.
        """
        base = self._config.id_base + self._tenants.setdefault(tenant, len(self._tenants)) * ID_RANGE
        if base + ID_RANGE > _ID_END:
            raise HostError(f"no range of user ids is left for tenant {tenant!r} ({len(self._tenants)} have one)")
        return base

    async def _renew(self) -> None:
        """Look at the host's root anew: sandboxes that are built from now on have it as it is now."""
        old, self._zygotes = self._zygotes, {}
        for pool in self._pools.values():
            pool.renew()
        for zygote in old.values():
            await zygote.aclose()

    async def _zygote(self, shape: Shape) -> Zygote:
        zygote = self._zygotes.get(shape)
        if zygote is not None and zygote.alive:
            return zygote
        async with self._zygote_lock:
            zygote = self._zygotes.get(shape)
            if zygote is None or not zygote.alive:
                if zygote is not None:
                    zygote.close()
                self._tops = frozenset(os.listdir("/"))
                root = rootfs.open_host_root()
                try:
                    zygote = await Zygote.start(plan_shape(shape, root), root.fds, self._life_read, self._nursery)
                finally:
                    root.close()
                self._zygotes[shape] = zygote
            return zygote

    def later(self, chore: Callable[[], None]) -> None:
        """Do something after the call that asks for it has returned: nothing it needs may wait for this."""
        self._chores.append(chore)
        if len(self._chores) == 1:
            self._bell.set()

    async def do_chores(self) -> None:
        """Take down used slots and build new ones, when no task has anything better to do; runs as long as the fleet does."""
        while True:
            await self._bell.wait()
            await trio.testing.wait_all_tasks_blocked()
            self._bell = trio.Event()
            self._do_chores()

    def _do_chores(self) -> None:
        while self._chores:
            self._chores.popleft()()

    def _discard(self, slot: Slot) -> None:
        self._nursery.start_soon(self._dispose, slot)

    async def _dispose(self, slot: Slot) -> None:
        try:
            await slot.dispose()
        except HostError as error:
            # Nobody waits for this; the calls go on, and the count in the statistics says that something is left.
            self.stuck += 1
            _log.error("%s", error)

    async def keep_house(self) -> None:
        """Let pools forget old peaks of demand; runs as long as the fleet does."""
        while True:
            await trio.sleep(1)
            for pool in self._pools.values():
                pool.shrink()

    def statistics(self) -> dict[str, PoolStats]:
        """Every pool, as ``tenant/network``."""
        return {f"{tenant}/{shape.net}": pool.statistics() for (tenant, shape), pool in self._pools.items()}

    async def aclose(self) -> None:
        """End the idle slots and the zygotes."""
        self._do_chores()
        for pool in self._pools.values():
            pool.close()
        for zygote in self._zygotes.values():
            await zygote.aclose()
