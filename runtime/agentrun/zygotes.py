"""The zygotes of one executor: one for each shape, with the host as it was when it was started.

A zygote's image is the host's root at one moment. What has changed since shows in its ``View``, and then all of them are
replaced together, so that calls of different policies see the same host.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import trio

from agentrun import rootfs
from agentrun.binds import open_source
from agentrun.egress.etc import hosts, resolv_conf
from agentrun.errors import HostError
from agentrun.imageroot import Owners, open_image_root, scratch_upper
from agentrun.images import Images
from agentrun.latency import Latency
from agentrun.policy import DEFAULT, HOST, Bind
from agentrun.rootfs import NOBODY, add_bind
from agentrun.session.mount import SessionRoots
from agentrun.shape import ID_RANGE, Shape, plan_shape, shape_of
from agentrun.workspace import owner_maps, with_mounter, workspace_tops
from agentrun.zygote import Zygote
from agentrun_shim.seccomp import compile_profile, find_profile
from agentrun_shim.seccomp_front import harden
from agentrun_shim.seccomp_profile import Profile, ProfileError

_LAID_OVER = ("/etc/passwd", "/etc/group", "/etc/resolv.conf")


class View(NamedTuple):
    """What of the host an image depends on and may change under it."""

    tops: frozenset[str]
    """The entries of its root directory."""
    accounts: tuple[int, ...]
    """The inodes of the files we bind over: useradd(8) renames a new one there, and the kernel then detaches ours."""

    @classmethod
    def now(cls) -> View:
        """The host at this moment."""
        return cls(frozenset(os.listdir("/")), tuple(os.stat(path).st_ino for path in _LAID_OVER if os.path.exists(path)))


class Zygotes:
    """Zygotes by shape, started when they are first asked for."""

    def __init__(
        self,
        nursery: trio.Nursery,
        life_read: int,
        strangers: int,
        latency: Latency,
        images: Images,
        sessions: SessionRoots,
    ) -> None:
        """Their slots end when ``life_read`` sees its end of file; ``strangers`` is the first of 65,536 host ids of nobody's."""
        self._latency, self._images, self._sessions = latency, images, sessions
        self._nursery, self._life_read, self._strangers = nursery, life_read, strangers
        self._started: dict[tuple[Shape, int], tuple[Zygote, View]] = {}
        self._lock = trio.Lock()
        self._generation = 0
        self._closed = False
        self._profiles: dict[str, Profile] = {}
        self._notify = True

    @property
    def notify(self) -> bool:
        """Their filters report what they refuse to a listener."""
        return self._notify

    async def find(self, shape: Shape, id_base: int) -> Zygote:
        """The zygote of a shape; where the shape shows an image or writable binds, of it and a tenant, whose ids own those.

        Raises:
            HostError: its image or profile cannot be made.
            SandboxError: its plan failed.
        """
        key = _key(shape, id_base)
        if (found := self._started.get(key)) and found[0].alive:
            return found[0]
        async with self._lock:
            while True:
                if self._closed:
                    raise HostError("the executor is closing")
                found, generation = self._started.get(key), self._generation
                if found and found[0].alive:
                    return found[0]
                if found:
                    found[0].close()
                view, zygote = View.now(), await self._start(shape, id_base)
                if generation == self._generation:
                    self._started[key] = zygote, view
                    return zygote
                zygote.close()  # all were forgotten meanwhile, and this one sees no more than they did

    async def single(self, shape: Shape, id_base: int) -> Zygote:
        """One for a single slot, whose root can be written to and is nobody else's; the caller's to end.

        Raises:
            HostError: its image or profile cannot be made.
            SandboxError: its plan failed.
        """
        if self._closed:
            raise HostError("the executor is closing")
        return await self._start(shape, id_base)

    async def _start(self, shape: Shape, id_base: int) -> Zygote:
        zygote = Zygote.spawn(self._life_read, self._nursery)
        self._latency.zygote(zygote, self._latency.shape(shape.lasting, shape.label))
        try:
            await self._give_shape(zygote, shape, id_base)
        except BaseException:
            zygote.close()
            raise
        return zygote

    async def plain(self) -> Zygote:
        """That of the default policy, for what any zygote can do."""
        return await self.find(shape_of(DEFAULT), 0)

    async def _give_shape(self, zygote: Zygote, shape: Shape, id_base: int) -> None:
        ids, nobody = (shape.process.uid, shape.process.gid), await zygote.userns(NOBODY)
        with contextlib.ExitStack() as stack:
            sources: list[tuple[Bind, int, os.stat_result]] = []
            for bind in shape.fs.binds:
                source, found = open_source(bind)
                stack.callback(os.close, source)
                sources.append((bind, source, found))
            root = await self._open_root(zygote, shape, id_base, {b.target: stat.S_ISDIR(f.st_mode) for b, _, f in sources})
            stack.callback(root.close)
            for bind, source, found in sources:
                userns = nobody
                if bind.mode == "rw":
                    owner = (id_base + ids[0], id_base + ids[1])
                    userns = await zygote.userns(owner_maps((found.st_uid, found.st_gid), owner, self._strangers))
                add_bind(root, bind, source, found, userns)
            program = compile_profile(self.profile(shape.seccomp), notify=self._notify)
            await zygote.shape(plan_shape(shape, root, program, notify=self._notify), root.fds)

    async def _open_root(self, zygote: Zygote, shape: Shape, id_base: int, points: Mapping[str, bool]) -> rootfs.RootFs:
        ids, etc = (shape.process.uid, shape.process.gid), _etc(shape)
        if shape.fs.session:
            points = self._sessions.points(shape.fs.session, points)
        if shape.fs.image == HOST:
            root = rootfs.open_host_root(ids=ids, etc=etc, nobody=await zygote.userns(NOBODY))
        else:
            root = await self._open_image(zygote, shape, id_base, points)
        if shape.fs.session:
            try:
                await self._sessions.add_workspace(zygote, root, shape.fs.session, (id_base + ids[0], id_base + ids[1]))
            except BaseException:
                root.close()
                raise
        return root

    async def _open_image(self, zygote: Zygote, shape: Shape, id_base: int, points: Mapping[str, bool]) -> rootfs.RootFs:
        ids, etc = (shape.process.uid, shape.process.gid), _etc(shape)
        lease = zygote.lease = self._images.lease(shape.fs.image)
        owners = Owners(id_base, *shape.fs.owners)
        userns = await zygote.userns(owners.maps())
        open_root = functools.partial(open_image_root, lease.layers, ids, etc, owners, userns, workdir=lease.config.workdir)
        if shape.fs.root == "scratch" and not shape.fs.session:
            with scratch_upper(shape.scratch_size, owners) as upper:
                return open_root(workspace_tops(), points, upper)
        if not shape.fs.session:
            return open_root(workspace_tops(), points)
        with self._sessions.root(shape.fs.session, await zygote.userns(with_mounter(owners.maps()))) as kept:
            return open_root((), points, *kept)

    def profile(self, name: str) -> Profile:
        """A seccomp profile, with the rules that are in front of every one.

        Raises:
            HostError: there is none, or it cannot be used.
        """
        if name not in self._profiles:
            try:
                self._profiles[name] = harden(find_profile(name))
            except (ProfileError, OSError) as error:
                raise HostError(f"seccomp.profile: {error}") from error
        return self._profiles[name]

    def show(self, top: str) -> bool:
        """Every image has this entry of the host's root directory."""
        return all(top in view.tops for _, view in self._started.values())

    def outdated(self) -> bool:
        """The host's accounts are in other files than those some image shows."""
        now = View.now().accounts
        return any(view.accounts != now for _, view in self._started.values())

    def do_without_listener(self) -> None:
        """Filters report nothing from now on; for zygotes that are started after this."""
        self._notify = False

    def drop(self, needed: Iterable[tuple[Shape, int]]) -> list[Zygote]:
        """Forget those that are for none of these shapes and tenants, but for the plain one; they are the caller's to end."""
        keys = {_key(shape, id_base) for shape, id_base in (*needed, (shape_of(DEFAULT), 0))}
        return [self._started.pop(key)[0] for key in self._started.keys() - keys]

    def forget_ids(self, first: int) -> None:
        """The tenant whose ids begin here has nothing left."""
        for zygote, _ in self._started.values():
            zygote.forget_userns(first, ID_RANGE)

    def close(self) -> list[Zygote]:
        """From this moment on whoever asks is refused; the zygotes are the caller's to end."""
        self._closed = True
        return self.forget()

    def forget_one(self, shape: Shape, id_base: int) -> list[Zygote]:
        """The same for one shape and tenant."""
        found = self._started.pop(_key(shape, id_base), None)
        self._generation += 1
        return [] if found is None else [found[0]]

    def forget(self) -> list[Zygote]:
        """From this moment on whoever asks gets a new one; the old ones are the caller's to end (``Zygote.aclose``)."""
        old, self._started = [zygote for zygote, _ in self._started.values()], {}
        self._generation += 1
        return old


def _key(shape: Shape, id_base: int) -> tuple[Shape, int]:
    return shape, id_base if shape.fs.image != HOST or shape.fs.session or any(
        bind.mode == "rw" for bind in shape.fs.binds
    ) else 0


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
