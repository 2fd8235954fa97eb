"""What an applying that was killed has left beside the places of its units: cleared away, or given back to whose it is.

A unit is made as ``.part``, which is ours. It is renamed to ``.new`` when it is complete, and then changes places with what is
there: so ``.new`` is what is to be, or what was, or what somebody put there just before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from agentrun.changes.beneath import (
    DIRECTORY,
    ESCAPES,
    NOT_THERE,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    look_at,
    open_beneath,
    rename,
    split,
)
from agentrun.changes.build import remove_tree
from agentrun.changes.check import Conflict, differences, is_new
from agentrun.changes.model import Change
from agentrun.changes.units import Unit, make_units


def names(name: str, unit: Unit) -> tuple[bytes, bytes, bytes]:
    """Where a unit is made, where it waits, and its own name. ``name`` is that of the applying."""
    stem = f".agentrun-{name}-{unit.number}".encode()
    return stem + b".part", stem + b".new", split(unit.path)[1]


def clear(changes: Sequence[Change], layers: Sequence[int], root: int, *, name: str) -> list[Conflict]:
    """Clear away what is left of applying these changes below ``root``; what only a human can decide is told, and kept.

    Raises:
        OSError: something cannot be removed.
    """
    return [conflict for unit in make_units(changes) for conflict in clear_unit(unit, layers, root, name)]


def clear_unit(unit: Unit, layers: Sequence[int], root: int, name: str) -> list[Conflict]:
    """The same for one unit."""
    if unit.attributes:
        return []
    try:
        parent = open_beneath(root, split(unit.path)[0], DIRECTORY)
    except OSError as error:
        if error.errno in (*NOT_THERE, *ESCAPES):
            return []  # the check has more to say about that
        raise
    try:
        part, new, _ = names(name, unit)
        remove_tree(parent, part)
        if look_at(parent, new) is None:
            return []
        if _is_new(unit, layers, parent, new):  # not installed
            remove_tree(parent, new)
        elif unit.old and not list(differences(unit, parent, new, moved=True)):
            remove_tree(parent, new)  # taken out, and looked at or not: it was what it had to be
        else:
            return _give_back(unit, layers, parent, name)
    finally:
        os.close(parent)
    return []


def _give_back(unit: Unit, layers: Sequence[int], parent: int, name: str) -> list[Conflict]:
    """What was taken out and not expected goes back to its place; where that is taken, nobody but a human can tell."""
    _, new, own = names(name, unit)
    if look_at(parent, own) is None:
        rename(parent, new, own, RENAME_NOREPLACE)
    elif _is_new(unit, layers, parent, own):
        rename(parent, new, own, RENAME_EXCHANGE)
        remove_tree(parent, new)
    else:
        return [Conflict(unit.path, f"was replaced twice; what was there first is kept as {os.fsdecode(new)}")]
    return []


def _is_new(unit: Unit, layers: Sequence[int], parent: int, at: bytes) -> bool:
    try:
        return is_new(unit, layers, parent, at)
    except OSError as error:
        if error.errno in NOT_THERE:  # a session goes on, and its layer may not have the file any more
            return False
        raise
