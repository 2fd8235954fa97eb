"""Changes → units: what is applied as one. A file is one; so is a whole tree that came, or went, or gave way to a file."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agentrun.changes.model import Change
from agentrun.changes.nodes import Node, Seen


class Unit(msgspec.Struct, frozen=True):
    """One step of applying."""

    number: int
    """Of its first change; it has the names it uses beside the path from it."""
    path: bytes
    new: Node | None
    """What is put there; None: nothing is there afterwards."""
    inner: dict[bytes, Node]
    """What is put inside, if that is a directory: by paths below the workspace, parents first."""
    old: dict[bytes, Seen]
    """What was there, with all that was inside, by paths below the workspace."""
    raced: tuple[bytes, ...]
    """Of those the ones that were changed while the call ran."""
    attributes: bool
    """A directory that stays, and becomes what ``new`` says."""

    @property
    def opens(self) -> bool:
        """A directory that its owner can change afterwards: then it comes before what is in it, and else after."""
        return self.new is not None and self.new.mode & 0o300 == 0o300


def make_units(changes: Sequence[Change]) -> list[Unit]:
    """The units, in an order in which each finds the directory that it belongs to. ``changes`` are in theirs."""
    units: list[Unit] = []
    at = 0
    while at < len(changes):
        head, last = changes[at], at + 1
        stays = head.new is not None and head.old is not None and head.new.kind == head.old.kind == "d"
        if not stays:
            while last < len(changes) and changes[last].path.startswith(head.path + b"/"):
                last += 1
        units.append(_unit(at, changes[at:last], attributes=stays))
        at = last
    before = [unit for unit in units if unit.attributes and unit.opens]
    after = [unit for unit in units if unit.attributes and not unit.opens]
    return [*before, *(unit for unit in units if not unit.attributes), *reversed(after)]


def _unit(number: int, changes: Sequence[Change], *, attributes: bool) -> Unit:
    head = changes[0]
    return Unit(
        number=number,
        path=head.path,
        new=head.new,
        inner={change.path: change.new for change in changes[1:] if change.new is not None},
        old={change.path: change.old for change in changes if change.old is not None},
        raced=tuple(change.path for change in changes if change.raced),
        attributes=attributes,
    )
