"""A session's layers as mounts: what its sandboxes have for a root, and for a workspace."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import msgspec
import trio

from agentrun.errors import HostError, UsageError
from agentrun.imageview import clone_layers
from agentrun.overlay import mount_overlay
from agentrun.rootfs import RootFs, move
from agentrun.session.directory import open_workspace
from agentrun.session.holds import Busy
from agentrun.session.model import Session
from agentrun.session.store import Sessions
from agentrun.workspace import owner_maps, with_mounter
from agentrun.zygote import Zygote
from agentrun_shim import syscalls as sc

ROOT, WORKSPACE = "root", "workspace"
_PATIENCE = 1.0
"""Seconds to wait for who uses it otherwise."""
_ASIDE = "/run/agentrun/workspace"


def frozen(store: Sessions, session: Session, part: str) -> tuple[Path, ...]:
    """The layers of a session that do not change any more, lowest first; those in which there is nothing left out.

    Raises:
        HostError: one cannot be read.
    """
    trees = (store.layer(name) / part / "upper" for name in session.layers)
    try:
        return tuple(tree for tree in trees if any(tree.iterdir()))
    except OSError as error:
        raise HostError(f"session {session.id}: {error.filename}: {error.strerror}") from error


def open_upper(store: Sessions, session: Session, part: str, userns: int) -> int:
    """A detached mount of where a session writes, for ``mount_overlay``.

    Raises:
        HostError: its file system cannot map owners.
    """
    path = store.layer(session.upper) / part
    fd = -1
    try:
        fd = sc.open_tree(sc.AT_FDCWD, str(path), sc.OPEN_TREE_CLONE)
        sc.mount_setattr(fd, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_IDMAP, userns_fd=userns)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        why = (
            "its file system cannot map owners; set AGENTRUN_SESSIONS" if error.errno in sc.CANNOT_MAP_OWNERS else error.strerror
        )
        raise HostError(f"session {session.id}: {path}: {why}") from error
    return fd


class SessionRoots:
    """The sessions of one store, for one executor. The store is opened when somebody first asks for a session."""

    def __init__(self, strangers: int) -> None:
        """``strangers`` is the first of 65,536 host ids of nobody's: see ``owner_maps``."""
        self._strangers = strangers
        self._opened: Sessions | None = None
        self._mounts: WeakKeyDictionary[object, str] = WeakKeyDictionary()
        """What the store calls the mount that a pool's sandboxes have."""

    @property
    def store(self) -> Sessions:
        """The store."""
        if self._opened is None:
            self._opened = Sessions()
        return self._opened

    async def hold(self, key: str, pool: object) -> tuple[Callable[[], None], bool]:
        """Keep a session as it is until what is returned is called; and whether what the pool has mounted is outdated.

        Raises:
            UsageError: it is not as the key says any more; or calls of other pools run in it, or somebody has it alone, for long.
        """
        deadline = trio.current_time() + _PATIENCE
        while True:
            known = self._mounts.get(pool, "")
            try:
                fd, mounted = self.store.hold(key, known)
            except Busy:  # perhaps only for the moment of a snapshot, or until a call that has returned is taken down
                if trio.current_time() > deadline:
                    raise
                await trio.sleep(0.005)
                continue
            self._mounts[pool] = mounted
            return functools.partial(os.close, fd), mounted != known

    def remount(self) -> None:
        """Nothing that is mounted is to be used any more."""
        self._mounts.clear()

    def exists(self, key: str) -> bool:
        """Whether there is still a session, in whatever state."""
        return self.store.exists(key.partition(".")[0])

    def points(self, key: str, others: Mapping[str, bool]) -> Mapping[str, bool]:
        """What a root needs to be there for a session: see ``open_image_root``."""
        workspace = self._find(key).workspace
        return {workspace: True, **others} if workspace else others

    @contextlib.contextmanager
    def root(self, key: str, userns: int) -> Iterator[tuple[int, tuple[Path, ...]]]:
        """What ``open_image_root`` takes for a root that stays: where it writes, and what it wrote before.

        Raises:
            HostError: it cannot be mounted so.
        """
        session = self._find(key)
        upper = open_upper(self.store, session, ROOT, userns)
        try:
            yield upper, frozen(self.store, session, ROOT)
        except HostError as error:  # whoever mounts it knows the image, and not for whom
            raise HostError(f"session {session.id}: {error}") from error
        finally:
            os.close(upper)

    async def add_workspace(self, zygote: Zygote, root: RootFs, key: str, owner: tuple[int, int]) -> None:
        """Attach a session's workspace at its path, if it has one: its layers above the directory, which nobody writes to.

        Raises:
            HostError: a mount call failed.
        """
        session = self._find(key)
        if not session.workspace:
            return
        userns = await zygote.userns(with_mounter(owner_maps(session.caller, owner, self._strangers)))
        opened = [open_workspace(session)]
        try:
            opened.append(open_upper(self.store, session, WORKSPACE, userns))
            base = Path(f"/proc/self/fd/{opened[0]}")
            opened += clone_layers((base, *frozen(self.store, session, WORKSPACE)), userns)
            mount = mount_overlay(opened[2:], upper=opened[1])
        except OSError as error:
            why = "its file system cannot map owners" if error.errno in sc.CANNOT_MAP_OWNERS else error.strerror
            raise HostError(f"session {session.id}: workspace {session.workspace}: {why} ({error.filename})") from error
        finally:
            for fd in opened:
                os.close(fd)
        _attach(root, mount, session.workspace)

    def _find(self, key: str) -> Session:
        session = self.store.get(key.partition(".")[0])
        if session.key != key:
            raise UsageError(f"session {session.id} was changed while a call waited for its turn; try again")
        return session


def _attach(root: RootFs, mount: int, path: str) -> None:
    """Where the call's own directories would hide it, init binds it when those are there."""
    root.writable.append((path, True))
    private = [*(known.path for known in root.private), *(["/var/tmp"] if root.has_var_tmp else [])]
    hiding = next((below for below in private if path.startswith(below + "/")), None)
    if hiding is None:
        move(root, mount, path[1:])
        return
    root.private = [msgspec.structs.replace(p, on_demand=p.on_demand and p.path != hiding) for p in root.private]
    os.mkdir(_ASIDE[1:], 0o755, dir_fd=root.fds[0])
    move(root, mount, _ASIDE[1:])
    root.late.append((_ASIDE, path, hiding))
