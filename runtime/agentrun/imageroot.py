"""The root of a sandbox from an image: one overlay of its layers, idmapped for the tenant, under a small layer of our own.

Our layer is a tmpfs on top of the image's: mount points, a minimal /dev, accounts with the tool's user, and the files of /etc
that its network needs. The image's layers are shared by everybody, their page cache included; nothing is copied or chowned.

::

    ours     /dev /proc /run/agentrun … /etc/passwd     a few kB
    layer n  ┐
    …        │ of the image, as they are in the store, owners mapped to the tenant's range
    layer 1  ┘
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from agentrun import rootfs
from agentrun.errors import HostError
from agentrun.imageview import View, clone_layers, view
from agentrun.overlay import mount_overlay
from agentrun.rootfs import Private, RootFs
from agentrun.workspace import IdMap
from agentrun_shim import syscalls as sc

_OURS = ("proc", "dev", "run", "sys", "sys/fs", "sys/fs/cgroup", "run/agentrun", rootfs.SCRATCH[1:], "tmp", "etc")
_NOT_FOR_WORKSPACES = frozenset({"boot", "dev", "etc", "proc", "run", "sys", "tmp", "home", "lost+found"})
ID_RANGE = 65536
_HOSTS = b"127.0.0.1\tlocalhost\n::1\tlocalhost\n"


class Owners(NamedTuple):
    """Whose an image's files are, as the host sees it: a tenant's range of ids, in which two may have changed places with 0."""

    base: int
    root_uid: int
    root_gid: int

    def uid(self, uid: int) -> int:
        """The host's uid for one of the image's."""
        return self.base + swap(uid, self.root_uid)

    def gid(self, gid: int) -> int:
        """The same for a gid."""
        return self.base + swap(gid, self.root_gid)

    def maps(self) -> tuple[IdMap, ...]:
        """The maps of a user namespace for it."""
        maps: list[IdMap] = []
        for is_gid, other in ((False, self.root_uid), (True, self.root_gid)):
            cuts = (0, 1, other, other + 1, ID_RANGE) if other > 1 else (0, 1, 2, ID_RANGE) if other else (0, ID_RANGE)
            maps += [(is_gid, a, self.base + swap(a, other), b - a) for a, b in pairwise(cuts)]
        return tuple(maps)


def swap(number: int, other: int) -> int:
    """An id where 0 and ``other`` have changed places."""
    return other if number == 0 else 0 if number == other else number


def open_image_root(
    layers: Sequence[Path],
    ids: tuple[int, int],
    etc: Mapping[str, bytes],
    owners: Owners,
    userns: int,
    tops: Collection[str],
    points: Mapping[str, bool],
    upper: int = -1,
    frozen: Sequence[Path] = (),
    *,
    workdir: str = "/",
) -> RootFs:
    """Mount an image's layers, lowest first, as a sandbox's root.

    Args:
        layers: directories of the store, which the caller holds a lease on.
        ids: the tool's uid and gid inside.
        etc: files laid over those of /etc.
        owners: the tenant's ids for the image's.
        userns: a user namespace with the maps of ``owners``.
        tops: directories in the host's root: where workspaces may be. None: nothing is the call's own, all of the root stays.
        points: paths to attach something at, and whether it is a directory.
        upper: a mount with the directories ``upper`` and ``work``, for a root that can be written to; -1: none.
        frozen: what was written to such a root before, lowest first.
        workdir: where the image's programs start; made if it is not there, as docker run does.

    Raises:
        HostError: a mount call failed; the message names it.
    """
    root = RootFs([], [], [], whole=upper >= 0, points=frozenset(points))
    clones: list[int] = []
    try:
        # What a session wrote is above ours: it may have changed its accounts.
        clones += clone_layers(frozen, userns)
        with view(layers) as image:
            ours = _build_layer(root, image, ids, etc, owners, tops, points, workdir)
        clones.append(ours)
        try:
            root.fds.insert(0, _mount(clones, layers, userns, upper))
        except OSError as error:
            if root.whole or error.errno not in sc.CANNOT_MAP_OWNERS:
                raise
            # Before Linux 5.19, or on a file system that cannot map owners: they are nobody's; what only root may read stays so.
            root.fds.insert(0, _mount(clones, layers, -1, upper))
        root.moves = [(index + 1, path) for index, path in root.moves]
    except OSError as error:
        root.close()
        why = " (its file system, or this kernel, cannot map owners)" if error.errno in sc.CANNOT_MAP_OWNERS else ""
        raise HostError(f"mounting an image: {error.filename}: {error.strerror}{why}") from error
    except BaseException:
        root.close()
        raise
    finally:
        for fd in clones:
            os.close(fd)
    return root


@contextlib.contextmanager
def scratch_upper(size: int, owners: Owners) -> Iterator[int]:
    """The ``upper`` of a root that is gone with its sandbox: a tmpfs of so many bytes, for the length of a block.

    Raises:
        HostError: it cannot be made.
    """
    try:
        upper = sc.new_filesystem("tmpfs", {"size": str(size), "mode": "700"}, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV)
    except OSError as error:
        raise HostError(f"making a scratch root: {error.filename}: {error.strerror}") from error
    try:
        for name in ("upper", "work"):
            os.mkdir(name, 0o755, dir_fd=upper)
        os.chown("upper", owners.uid(0), owners.gid(0), dir_fd=upper)  # it is what the root directory is seen as
        yield upper
    finally:
        os.close(upper)


def _mount(above: Sequence[int], layers: Sequence[Path], userns: int, upper: int) -> int:
    clones: list[int] = []
    try:
        clones += clone_layers(layers, userns)
        return mount_overlay([*above, *clones], upper=upper, flags=sc.MOUNT_ATTR_NOSUID)
    finally:
        for fd in clones:
            os.close(fd)


def _build_layer(
    root: RootFs,
    image: View,
    ids: tuple[int, int],
    etc: Mapping[str, bytes],
    owners: Owners,
    tops: Collection[str],
    points: Mapping[str, bool],
    workdir: str,
) -> int:
    layer = sc.new_filesystem("tmpfs", {"size": "16m", "mode": "755"}, sc.MOUNT_ATTR_NOSUID)
    try:
        _copy_owner(layer, ".", image.stat("/"), owners)
        for name in _OURS:
            _make_directory(layer, name, image, owners)
        if not tops:
            _make_directory(layer, rootfs.HOME[1:], image, owners)
            os.chown(rootfs.HOME[1:], owners.base + ids[0], owners.base + ids[1], dir_fd=layer)
        else:
            _choose_private(root, layer, image, owners, tops)
            root.has_var_tmp = _is_directory(image, "/var/tmp")
        for path, is_directory in points.items():
            # Though the image may have it: the way there has to be free of links, for the mount is attached from outside.
            _make_directory(layer, path[1:] if is_directory else os.path.dirname(path)[1:], image, owners)
            if not is_directory:
                rootfs.write(layer, path[1:], b"")
        _make_workdir(root, layer, image, os.path.normpath("/" + workdir.lstrip("/")), owners)
        root.attached |= set(image.names())
        _add_dev(root, layer)
        rootfs.move(root, sc.open_tree(sc.AT_FDCWD, "/proc", sc.OPEN_TREE_CLONE), "proc")
        _write_etc(layer, image, ids, etc, owners, points)
    except BaseException:
        os.close(layer)
        raise
    return layer


def _make_workdir(root: RootFs, layer: int, image: View, path: str, owners: Owners) -> None:
    """Where it is not there; what is below a directory of the call's own is made in that. The image's links are followed."""
    private = [rootfs.HOME, *(own.path for own in root.private if not own.on_demand)] if root.private else []
    private += ["/var/tmp"] if root.has_var_tmp else []
    hiding = next((own for own in private if path == own or path.startswith(own + "/")), None)
    if hiding is None and not image.leads_to_directory(path):
        _make_directory(layer, path.strip("/"), image, owners)
    elif hiding is not None and path != hiding:
        root.made.append((path, hiding, owners.uid(0) - owners.base, owners.gid(0) - owners.base))


def _add_dev(root: RootFs, layer: int) -> None:
    """/dev: in our layer; where the root can be written to a mount, of which no tool can remove anything: masks bind its null."""
    if not root.whole:
        rootfs.build_dev(root, layer, "/")
        return
    dev = sc.new_filesystem("tmpfs", {"size": "1m", "mode": "755"}, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NOEXEC)
    rootfs.move(root, dev, "dev")
    rootfs.build_dev(root, dev, "/", "")


def _choose_private(root: RootFs, layer: int, image: View, owners: Owners, tops: Collection[str]) -> None:
    """Which directories are the call's own: /tmp and its home, and wherever a workspace may be and the image has nothing."""
    names = set(image.names())
    private = [Private("tmp", "/tmp", 0o1777)]
    whole = not image.names("/home")
    private.append(Private("home", "/home" if whole else rootfs.HOME, 0o755, owned=not whole))
    _make_directory(layer, "home" if whole else rootfs.HOME[1:], image, owners)
    for name in sorted({*tops, *rootfs.ON_DEMAND} - _NOT_FOR_WORKSPACES):
        # root's home has some dotfiles in every image, which are nobody's: the tool's home is another.
        empty = name in rootfs.ON_DEMAND or not image.names(f"/{name}")
        if name not in names or (empty and _is_directory(image, f"/{name}")):
            _make_directory(layer, name, image, owners)
            private.append(Private(name, f"/{name}", 0o755, on_demand=True))
    root.private = private


def _make_directory(layer: int, path: str, image: View, owners: Owners) -> None:
    """A directory and those above it; with the image's owner and mode, because overlay shows those of the topmost layer.

    Raises:
        HostError: the image has something else there: ours would hide it.
    """
    steps = path.split("/") if path else []
    for depth in range(1, len(steps) + 1):
        step = "/".join(steps[:depth])
        try:
            os.mkdir(step, 0o755, dir_fd=layer)
        except FileExistsError:
            continue
        found = image.stat(f"/{step}")
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise HostError(f"mounting an image: its /{step} is not a directory")
        _copy_owner(layer, step, found, owners)


def _copy_owner(layer: int, path: str, found: os.stat_result | None, owners: Owners) -> None:
    uid, gid, mode = (0, 0, 0o755) if found is None else (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode))
    os.chown(path, owners.uid(uid), owners.gid(gid), dir_fd=layer)
    os.chmod(path, mode, dir_fd=layer)


def _is_directory(image: View, path: str) -> bool:
    found = image.stat(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def _write_etc(
    layer: int, image: View, ids: tuple[int, int], etc: Mapping[str, bytes], owners: Owners, points: Mapping[str, bool]
) -> None:
    uid, gid = ids
    files = {"hosts": image.read("/etc/hosts") or _HOSTS, **etc}
    for name, number, entry in (
        ("passwd", uid, f"{rootfs.USER}:x:{uid}:{gid}:agentrun tool call:{rootfs.HOME}:/bin/sh"),
        ("group", gid, f"{rootfs.USER}:x:{gid}:"),
    ):
        text = image.read(f"/etc/{name}")
        if all(line.split(b":")[2:3] != [b"%d" % number] for line in text.splitlines()):
            files[name] = rootfs.replace_entry(text, entry.encode())
    for name, content in files.items():
        if f"/etc/{name}" in points:
            continue  # the policy has another one
        rootfs.write(layer, f"etc/{name}", content)
        os.chown(f"etc/{name}", owners.uid(0), owners.gid(0), dir_fd=layer)
