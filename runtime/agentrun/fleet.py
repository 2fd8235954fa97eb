"""The fleet: every zygote, pool and slot of one executor, and the id ranges of its tenants."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import trio
import trio.testing

from agentrun import rootfs
from agentrun.binds import open_source
from agentrun.cgroup.limits import plan_budget
from agentrun.cgroup.tree import Tree
from agentrun.denials import Denials
from agentrun.egress.etc import hosts, resolv_conf
from agentrun.egress.path import EgressPath
from agentrun.egress.rules import parse_rules
from agentrun.errors import HostError, SandboxError
from agentrun.policy import DEFAULT, Limits, Policy
from agentrun.pool import Pool, PoolStats
from agentrun.rootfs import NOBODY, add_bind
from agentrun.shape import ID_RANGE, Shape, plan_shape, shape_of
from agentrun.slot import Slot, build_slot
from agentrun.workspace import Mode, clone_mount, owner_maps
from agentrun.zygote import IdMap, Zygote, ZygoteDied
from agentrun_shim.seccomp import compile_profile, find_profile
from agentrun_shim.seccomp_front import harden
from agentrun_shim.seccomp_profile import Profile, ProfileError

_log = logging.getLogger("agentrun")
_NO_LIMITS = Limits(memory_max=None, memory_swap_max=None, pids_max=None)
_LIFTED = {"memory.max": "max", "memory.oom.group": "0", "memory.swap.max": "max", "pids.max": "max"}
"""What takes back a limit the pool's shape has and the call has not."""
_ID_END = 1 << 32
_CHORES_WAIT = 0.02
"""Seconds for which chores give way to tasks that always have something to do, such as busy relays."""


class FleetConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How many sandboxes are kept, and for whom."""

    pool_least: int = 1
    """Warm slots each pool in use keeps."""
    pool_most: int = 32
    """Warm slots a pool keeps at most. 0: build every slot when it is asked for."""
    id_base: int = 0x60000000
    """First host uid and gid of ranges of 65,536: one for whoever is a stranger in a workspace, then one for each tenant."""
    tenant_limits: Mapping[str, Limits] = {}
    """Budgets of tenants: what all calls of one may use together."""


class Fleet:
    """Zygotes by shape, pools by tenant and shape."""

    def __init__(self, config: FleetConfig, tree: Tree, nursery: trio.Nursery, life_read: int) -> None:
        """Everything is built below ``tree`` and in ``nursery``; slots end when ``life_read`` sees its end of file."""
        self._config, self._tree, self._nursery, self._life_read = config, tree, nursery, life_read
        self._zygotes: dict[tuple[Shape, str], Zygote] = {}
        self._zygote_lock = trio.Lock()
        self._pools: dict[tuple[str, Shape], Pool] = {}
        self._tenants: dict[str, int] = {}
        self._tops: frozenset[str] = frozenset()
        self._accounts = _accounts()
        self._built = 0
        self._chores: deque[Callable[[], None]] = deque()
        self._bell = trio.Event()
        self._profiles: dict[str, Profile] = {}
        self._notify = True
        self.denials = Denials()
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
        self._tree.tenant(tenant, plan_budget(self.budget(tenant)))
        files, _ = self._tree.plan(shape.limits)

        async def build() -> Slot:
            self._built += 1
            return await self._build(shape, tenant, f"{self._built:x}", files, maps)

        pool = Pool(build, self._discard, self.later, self._nursery, least=self._config.pool_least, most=self._config.pool_most)
        self._pools[tenant, shape] = pool
        return pool

    async def _build(self, shape: Shape, tenant: str, name: str, files: Mapping[str, str], maps: Sequence[IdMap]) -> Slot:
        try:
            try:
                slot = await build_slot(await self._zygote(shape, tenant), self._tree, tenant, name, files, maps)
            except ZygoteDied:  # the next one is started for it; if that dies as well, something is wrong with the host
                slot = await build_slot(await self._zygote(shape, tenant), self._tree, tenant, name, files, maps)
        except SandboxError as error:
            if not (self._notify and error.step == "filter" and error.errno == errno.EBUSY):
                raise
            # Somebody around us listens to a filter already, and the kernel takes one listener: do without reports.
            self._notify = False
            await self._renew()
            return await self._build(shape, tenant, name, files, maps)
        if slot.listener >= 0:
            try:
                self.denials.watch(slot.listener, slot.id, self._profile(shape.seccomp))
            except (OSError, ValueError) as error:
                await slot.dispose()
                raise HostError(f"watching a sandbox's refused calls: {error}") from error  # out of descriptors, or closing
            slot.listener = -1
        if shape.net == "egress":
            try:
                slot.network = await self._open_network(slot, shape)
            except BaseException:
                self.denials.forget(slot.id)
                await slot.dispose()
                raise
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

    def _profile(self, name: str) -> Profile:
        if name not in self._profiles:
            try:
                self._profiles[name] = harden(find_profile(name))
            except (ProfileError, OSError) as error:
                raise HostError(f"seccomp.profile: {error}") from error
        return self._profiles[name]

    def adjust(self, slot: Slot, files: Mapping[str, str]) -> None:
        """Give a slot's leaf a call's own limits: ``files`` instead of those it was made with.

        Raises:
            HostError: one could not be written.
        """
        default, _ = self._tree.plan(DEFAULT.limits)
        lifted = {name: _LIFTED[name] for name in default if name not in files and name in _LIFTED}
        slot.leaf.write(lifted | {name: text for name, text in files.items() if default.get(name) != text})

    async def mount_workspace(self, fd: int, path: str, mode: Mode, *, owner: tuple[int, int], caller: tuple[int, int]) -> int:
        """The detached mount of a workspace, where the caller's files are the owner's.

        Raises:
            HostError: its file system cannot be mounted that way.
        """
        zygote = await self._zygote(shape_of(DEFAULT))
        top = path.split("/")[1]
        if top not in rootfs.HIDDEN and top not in self._tops:
            # A directory of the host's root that is newer than our image of it.
            await self._renew()
            zygote = await self._zygote(shape_of(DEFAULT))
        userns = await zygote.userns(owner_maps(caller, owner, self._config.id_base))
        return clone_mount(fd, path, mode, userns)

    def owner(self, tenant: str, policy: Policy) -> tuple[int, int]:
        """The tool's uid and gid as the host sees them."""
        base = self.id_base(tenant)
        return base + policy.process.uid, base + policy.process.gid

    def budget(self, tenant: str) -> Limits:
        """What all calls of a tenant may use together."""
        return self._config.tenant_limits.get(tenant, _NO_LIMITS)

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
        old, self._zygotes = self._zygotes, {}
        for pool in self._pools.values():
            pool.renew()
        for zygote in old.values():
            await zygote.aclose()

    async def _zygote(self, shape: Shape, tenant: str = "") -> Zygote:
        """The zygote of a shape; where it shows writable binds, of a shape and tenant, for their owner is the tenant's tool."""
        key = (shape, tenant if any(bind.mode == "rw" for bind in shape.fs.binds) else "")
        zygote = self._zygotes.get(key)
        if zygote is not None and zygote.alive:
            return zygote
        async with self._zygote_lock:
            zygote = self._zygotes.get(key)
            if zygote is None or not zygote.alive:
                if zygote is not None:
                    zygote.close()
                zygote = self._zygotes[key] = await self._start_zygote(shape, tenant)
            return zygote

    async def _start_zygote(self, shape: Shape, tenant: str) -> Zygote:
        zygote = Zygote.spawn(self._life_read, self._nursery)
        try:
            await self._shape(zygote, shape, tenant)
        except BaseException:
            zygote.close()
            raise
        return zygote

    async def _shape(self, zygote: Zygote, shape: Shape, tenant: str) -> None:
        """Make a shape's image and plan, and give them to a zygote."""
        self._tops, self._accounts = frozenset(os.listdir("/")), _accounts()
        ids, nobody = (shape.process.uid, shape.process.gid), await zygote.userns(NOBODY)
        root = rootfs.open_host_root(ids=ids, etc=_etc(shape), nobody=nobody)
        try:
            for bind in shape.fs.binds:
                source, found = open_source(bind)
                try:
                    userns = nobody
                    if bind.mode == "rw":
                        owner = tuple(self.id_base(tenant) + number for number in ids)
                        maps = owner_maps((found.st_uid, found.st_gid), (owner[0], owner[1]), self._config.id_base)
                        userns = await zygote.userns(maps)
                    add_bind(root, bind, source, found, userns)
                finally:
                    os.close(source)
            program = compile_profile(self._profile(shape.seccomp), notify=self._notify)
            await zygote.shape(plan_shape(shape, root, program, notify=self._notify), root.fds)
        finally:
            root.close()

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

    async def _dispose(self, slot: Slot) -> None:
        self.denials.forget(slot.id)
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
            if self._zygotes and _accounts() != self._accounts:
                # useradd(8) renames over /etc/passwd, and what was bound over the old file is gone from every sandbox.
                await self._renew()
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


def _accounts() -> tuple[int, ...]:
    """Which files the host's accounts are in now."""
    inodes = []
    for path in ("/etc/passwd", "/etc/group", "/etc/resolv.conf"):
        with contextlib.suppress(OSError):
            inodes.append(os.stat(path).st_ino)
    return tuple(inodes)


def _etc(shape: Shape) -> dict[str, bytes]:
    """Files of /etc that a shape's network needs to be others than the image's."""
    if shape.net == "egress":
        return {"resolv.conf": resolv_conf(), "hosts": hosts(shape.process.hostname)}
    if shape.net == "none":
        return {}
    try:
        # Often a link into /run, where the host's services live and a sandbox has nothing.
        return {"resolv.conf": Path("/etc/resolv.conf").read_bytes()}
    except OSError:
        return {}
