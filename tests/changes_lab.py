# SPDX-License-Identifier: Apache-2.0
"""Trees, what can be done to them, and what they are like: for the tests of change sets. Nothing here is agentrun's own doing."""

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

from agentrun.changes.draft import Draft
from agentrun.changes.store import Store
from agentrun.overlay import mount_overlay
from agentrun_shim import syscalls as sc


class Entry(NamedTuple):
    """All that counts of an entry; ``inode`` and ``ctime`` are for trees that nobody may have touched."""

    kind: str
    mode: int
    owner: tuple[int, int]
    content: bytes
    xattrs: tuple
    mtime: int
    inode: int
    ctime: int

    def essence(self):
        """What two trees have in common that are the same."""
        mtime = self.mtime if self.kind == "f" else 0
        return (self.kind, self.mode if self.kind != "l" else 0, self.owner, self.content, self.xattrs, mtime)


KINDS = {stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l", stat.S_IFIFO: "p", stat.S_IFSOCK: "s"}


def snapshot(root) -> dict[str, Entry]:
    """Everything in a tree, the root as the empty path."""
    found = {"": entry(str(root))}
    for above, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = os.path.join(above, name)
            found[os.path.relpath(path, root)] = entry(path)
    return found


def entry(path: str) -> Entry:
    info = os.stat(path, follow_symlinks=path.startswith("/proc/") and path.count("/") == 4)
    kind = KINDS[stat.S_IFMT(info.st_mode)]
    content = Path(path).read_bytes() if kind == "f" else os.fsencode(os.readlink(path)) if kind == "l" else b""
    xattrs = tuple((name, os.getxattr(path, name)) for name in sorted(os.listxattr(path))) if kind in "fd" else ()
    owner = (info.st_uid, info.st_gid)
    return Entry(kind, stat.S_IMODE(info.st_mode), owner, content, xattrs, info.st_mtime_ns, info.st_ino, info.st_ctime_ns)


def essence(root) -> dict[str, tuple]:
    return {path: found.essence() for path, found in snapshot(root).items()}


def difference(before: dict[str, Entry], after: dict[str, Entry]) -> dict[str, str]:
    """Path → kind of change, by the definition in docs/workspaces.md and nothing but the two trees."""
    changes = {}
    for path in before.keys() | after.keys():
        old, new = before.get(path), after.get(path)
        if old is None:
            changes[path] = "added"
        elif new is None:
            changes[path] = "deleted"
        elif old.kind != new.kind:
            changes[path] = "type"
        elif (old.content, old.xattrs) != (new.content, new.xattrs):
            changes[path] = "modified"
        elif old.owner != new.owner or (old.kind != "l" and old.mode != new.mode):
            changes[path] = "mode"
        elif old.kind == "f" and old.mtime != new.mtime:
            changes[path] = "time"
    return changes


# ---------------------------------------------------------------- random trees, and random things that happen to them

NAMES = st.sampled_from(["a", "b c", "d\udcff"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join) | NAMES
CONTENTS = st.one_of(st.binary(max_size=12), st.just(b"x" * 5000))
MODES = st.sampled_from([0o644, 0o600, 0o755, 0o400, 0o777, 0o1777, 0o2755])
MAKE = st.one_of(
    st.tuples(st.just("write"), PATHS, CONTENTS),
    st.tuples(st.just("mkdir"), PATHS),
    st.tuples(st.just("symlink"), PATHS, PATHS),
    st.tuples(st.just("fifo"), PATHS),
    st.tuples(st.just("link"), PATHS, PATHS),
    st.tuples(st.just("chmod"), PATHS, MODES),
    st.tuples(st.just("xattr"), PATHS, st.binary(max_size=4)),
)
CHANGE = st.one_of(
    MAKE,
    st.tuples(st.just("remove"), PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("append"), PATHS, st.binary(min_size=1, max_size=5)),
    st.tuples(st.just("truncate"), PATHS, st.integers(0, 9000)),
    st.tuples(st.just("touch"), PATHS, st.integers(0, 2000000000)),
    st.tuples(st.just("same"), PATHS),
    st.tuples(st.just("again"), PATHS),
    st.tuples(st.just("replace"), PATHS, CONTENTS),
    st.tuples(st.just("chroot"), MODES),
)
TREES = st.lists(MAKE, min_size=6, max_size=20)
CHANGES = st.lists(CHANGE, min_size=4, max_size=14)


def do(root: str, operations) -> None:
    """What fails is left undone: a tool's doings also fail."""
    for operation in operations:
        with contextlib.suppress(OSError, shutil.Error):
            _do(root, *operation)


def _do(root: str, what: str, *given) -> None:
    if what == "chroot":
        os.chmod(root, given[0] | 0o700)
        return
    path = os.path.join(root, given[0])
    if what in ("write", "symlink", "fifo", "link", "rename"):
        where = os.path.join(root, given[1]) if what == "rename" else path
        os.makedirs(os.path.dirname(where), exist_ok=True)
    match what:
        case "write" | "replace":
            if what == "replace":
                _remove(path)
            if not os.path.exists(path) or os.path.isfile(path):  # a pipe would be waited for
                Path(path).write_bytes(given[1])
        case "mkdir":
            os.makedirs(path, exist_ok=True)
        case "symlink":
            os.symlink(given[1], path)
        case "fifo":
            os.mkfifo(path)
        case "link":
            os.link(os.path.join(root, given[1]), path, follow_symlinks=False)
        case "chmod":
            if not os.path.islink(path):
                os.chmod(path, given[1] | (0o700 if os.path.isdir(path) else 0))
        case "xattr":
            if not os.path.islink(path):
                os.setxattr(path, "user.test", given[1])
        case "remove":
            _remove(path)
        case "rename":
            shutil.move(path, os.path.join(root, given[1]))
        case "append":
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "ab") as file:
                    file.write(given[1])
        case "truncate":
            if os.path.isfile(path) and not os.path.islink(path):
                os.truncate(path, given[1])
        case "touch":
            if not os.path.islink(path):
                os.utime(path, (given[1], given[1]))
        case "same":  # opened for writing, which copies it up, and left as it is
            if os.path.isfile(path) and not os.path.islink(path):
                os.close(os.open(path, os.O_RDWR))
        case "again":
            if os.path.isdir(path) and not os.path.islink(path):
                _remove(path)
                os.mkdir(path)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


# ---------------------------------------------------------------- an overlay without a call


class Lab:
    """A base, layers above it, and the overlay of them all, at a path."""

    def __init__(self, where: Path, layers: int = 1) -> None:
        self.base = where / "base"
        self.base.mkdir()
        self.layers = [where / f"layer{number}" for number in range(layers)]
        """Topmost first; they are written from the last to the first."""
        for layer in self.layers:
            (layer / "upper").mkdir(parents=True)
            (layer / "work").mkdir()

    @contextlib.contextmanager
    def mounted(self, number: int = 0):
        """The overlay in which changes go to layer ``number``, over those below it."""
        fds = [clone(layer / "upper") for layer in self.layers[number + 1 :]] + [clone(self.base)]
        below = fds[0] if number + 1 < len(self.layers) else fds[-1]
        upper = self.layers[number] / "upper"
        found = os.fstat(below)
        os.chmod(upper, stat.S_IMODE(found.st_mode))
        fds.append(clone(self.layers[number]))
        mount = mount_overlay(fds[:-1], upper=fds[-1])
        try:
            yield f"/proc/self/fd/{mount}"
        finally:
            for fd in (*fds, mount):
                os.close(fd)

    @contextlib.contextmanager
    def opened(self):
        """Descriptors of the layers, and of the base."""
        fds = [os.open(layer / "upper", os.O_RDONLY | os.O_DIRECTORY) for layer in self.layers]
        fds.append(os.open(self.base, os.O_RDONLY | os.O_DIRECTORY))
        try:
            yield fds[:-1], fds[-1]
        finally:
            for fd in fds:
                os.close(fd)


def clone(path) -> int:
    return sc.open_tree(sc.AT_FDCWD, str(path), sc.OPEN_TREE_CLONE)


@contextlib.contextmanager
def directory():
    """On a file system that overlay can write to: /tmp need not be one."""
    with tempfile.TemporaryDirectory(prefix="agentrun-test-", dir="/opt", ignore_cleanup_errors=True) as path:
        try:
            yield Path(path)
        finally:
            subprocess.run(["chmod", "-R", "u+rwX", path], check=False, stderr=subprocess.DEVNULL)


# ---------------------------------------------------------------- change sets without calls


def keep(store: Store, base: Path, operations, *, meanwhile=(), uid: int = 0) -> str:
    """A change set of a directory, as a call would leave it; ``meanwhile`` is done to the original. Its id, or nothing."""
    fd = os.open(base, os.O_PATH | os.O_DIRECTORY)
    draft = Draft(store, fd, str(base))
    try:
        fds = [clone(base), sc.open_tree(draft.fd, "", sc.OPEN_TREE_CLONE | sc.AT_EMPTY_PATH)]
        try:
            fds.append(mount_overlay(fds[:1], upper=fds[1]))
            draft.start()
            do(f"/proc/self/fd/{fds[2]}", operations)
            do(str(base), meanwhile)
        finally:
            for each in fds:
                os.close(each)
        changes = draft.seal("test", [b"true"], (uid, uid))
        return "" if changes is None else changes.id
    finally:
        draft.close()
        os.close(fd)
