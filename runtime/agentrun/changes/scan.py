"""What overlay layers change of the base below them.

Only what is in a layer is looked at, and what it hides: the rest of the base is as it was, however large it is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import Final

from agentrun.changes.beneath import DIRECTORY, join, look_at, opened, walk
from agentrun.changes.layered import ORIGIN, Found, is_whiteout, list_layers
from agentrun.changes.model import Change, in_order
from agentrun.changes.nodes import Node, has_xattr, read_node, read_target, read_xattrs, same_content, seen

NEVER: Final = 1 << 63
"""For ``since``: nothing has been changed as late as that."""


def scan(layers: Sequence[int], base: int, *, since: int = NEVER) -> tuple[Change, ...]:
    """Every difference between the base with the layers over it, and the base alone.

    Args:
        layers: descriptors of the layers' directories, topmost first; of ``Node.layer`` they are the meaning.
        base: that of the directory below them. Owners have to be those on the disk: no idmapped mounts.
        since: nanoseconds. What the base has that was changed then or later is marked as ``raced``.

    Raises:
        OSError: something cannot be read, or lies too deep.
    """
    return in_order(_Scan(layers, base, since).run())


class _Scan:
    def __init__(self, layers: Sequence[int], base: int, since: int) -> None:
        self._layers, self._base, self._since = layers, base, since

    def run(self) -> Iterator[Change]:
        every = tuple(range(len(self._layers)))
        yield from self._compare(b"", Found(0, os.fstat(self._layers[0]), every), os.fstat(self._base), racy=False)
        todo: list[tuple[bytes, tuple[int, ...], bool, bool]] = [(b"", every, True, False)]
        while todo:
            path, directories, on_base, hides = todo.pop()
            merged = list_layers(self._layers, directories, path)
            below, racy = self._list_base(path) if on_base else ({}, False)
            for name, found in merged.items():
                here, original = join(path, name), below.get(name)
                if found.layer < 0:
                    if original is not None:
                        yield from self._deleted(here, original)
                    continue
                yield from self._compare(here, found, original, racy=racy)
                if found.directories:
                    is_directory = original is not None and stat.S_ISDIR(original.st_mode)
                    todo.append((here, found.directories, is_directory, hides or not found.shows_base))
            if hides:
                for name in below.keys() - merged.keys():
                    yield from self._deleted(join(path, name), below[name])

    def _list_base(self, path: bytes) -> tuple[dict[bytes, os.stat_result], bool]:
        """What the base has in a directory, and whether names came or went there since."""
        with opened(self._base, path, DIRECTORY) as fd:
            racy = os.fstat(fd).st_ctime_ns >= self._since
            names = [os.fsencode(name) for name in os.listdir(fd)]
            found = {name: there for name in names if (there := look_at(fd, name)) is not None}
        return {name: there for name, there in found.items() if not is_whiteout(there)}, racy

    def _deleted(self, path: bytes, original: os.stat_result) -> Iterator[Change]:
        yield self._gone(path, original)
        if stat.S_ISDIR(original.st_mode):
            for inner, found in walk(self._base, path):
                if not is_whiteout(found):
                    yield self._gone(inner, found)

    def _gone(self, path: bytes, original: os.stat_result) -> Change:
        return Change(path, "deleted", old=seen(original), raced=original.st_ctime_ns >= self._since)

    def _compare(self, path: bytes, found: Found, original: os.stat_result | None, *, racy: bool) -> Iterator[Change]:
        layer = self._layers[found.layer]
        node = read_node(layer, path, found.stat, found.layer)
        if original is None:
            # Either new, or the original went while the call ran; where names came and went meanwhile nobody can tell.
            raced = racy and node.kind == "f" and has_xattr(layer, path, ORIGIN)
            yield Change(path, "added", node, raced=raced)
            return
        old, raced = seen(original), original.st_ctime_ns >= self._since
        if old.kind != node.kind:
            yield Change(path, "type", node, old, raced=raced)
            if old.kind == "d":
                yield from (self._gone(inner, gone) for inner, gone in walk(self._base, path) if not is_whiteout(gone))
            return
        if what := tuple(self._differences(path, node, original)):
            yield Change(path, _kind(what), node, old, what, raced)

    def _differences(self, path: bytes, node: Node, original: os.stat_result) -> Iterator[str]:
        layer = self._layers[node.layer]
        if node.kind == "f" and not (node.size == original.st_size and same_content(layer, path, self._base, path)):
            yield "content"
        if node.kind == "l" and node.target != read_target(self._base, path):
            yield "target"
        if node.kind in "cb" and node.size != original.st_rdev:
            yield "content"
        if node.mode != stat.S_IMODE(original.st_mode):
            yield "mode"
        if (node.uid, node.gid) != (original.st_uid, original.st_gid):
            yield "owner"
        if node.kind in "fd" and node.xattrs != read_xattrs(self._base, path):
            yield "xattrs"
        if node.kind == "f" and node.mtime != original.st_mtime_ns:  # a directory's goes with its entries
            yield "time"


def _kind(what: tuple[str, ...]) -> str:
    if {"content", "target", "xattrs"} & set(what):
        return "modified"
    return "mode" if {"mode", "owner"} & set(what) else "time"


def size_on_disk(layers: Sequence[int]) -> int:
    """Bytes that layers take."""
    return sum(512 * found.st_blocks for layer in layers for _, found in walk(layer, b""))
