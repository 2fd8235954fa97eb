"""Several overlay layers seen as one: what is in a directory, from which layer, and what of the base below it still shows.

Layers are what overlay has written with redirect_dir and metacopy off (``agentrun.overlay``): a character device 0:0 hides what
is below it, and so does a directory marked opaque. The order is overlay's own: topmost first.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Final

import msgspec

from agentrun.changes.beneath import join, names_in
from agentrun.changes.nodes import has_xattr

OPAQUE: Final = "trusted.overlay.opaque"
ORIGIN: Final = "trusted.overlay.origin"
"""Overlay's note of which file in a lower layer one was copied up from."""


class Found(msgspec.Struct):
    """One name in a directory, as the layers have it."""

    layer: int
    """The topmost that has it; -1: it was deleted."""
    stat: os.stat_result
    directories: tuple[int, ...] = ()
    """The layers that make up a directory."""
    shows_base: bool = False
    """What the base has in this directory is in it as well, unless a layer says otherwise."""


def is_whiteout(found: os.stat_result) -> bool:
    """Overlay's mark for what is not there any more; where overlay sees one in a base, it shows nothing."""
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def list_layers(layers: Sequence[int], directories: Sequence[int], path: bytes) -> dict[bytes, Found]:
    """What those of the layers that have the directory at ``path`` say of what is in it."""
    merged: dict[bytes, Found] = {}
    undecided: set[bytes] = set()
    """Directories that go on in the layers below."""
    for layer in directories:
        for name, found in names_in(layers[layer], path):
            known = merged.get(name)
            if known is not None and name not in undecided:
                continue
            if is_whiteout(found) or not stat.S_ISDIR(found.st_mode):
                if known is None:
                    merged[name] = Found(-1 if is_whiteout(found) else layer, found)
                undecided.discard(name)
                continue
            if known is None:
                known = merged[name] = Found(layer, found)
            known.directories += (layer,)
            if has_xattr(layers[layer], join(path, name), OPAQUE, b"y"):
                undecided.discard(name)
            else:
                undecided.add(name)
    for name in undecided:
        merged[name].shows_base = True
    return merged
