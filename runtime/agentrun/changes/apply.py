"""Changes → the directory that they were made to. Each file or tree is replaced in one step, and never what it does not expect.

A unit is made under one name beside its place (``.part``), gets another when it is complete and on the disk (``.new``), and
then changes places with what is there (renameat2(2), RENAME_EXCHANGE). What came out is looked at once more: if somebody was
faster, the two change back. Only then it is removed. So a run that is killed anywhere leaves every path either old or new, and
the next one knows what it finds: ``.part`` is ours; ``.new`` is the new, or the old, or somebody's, who gets it back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from agentrun.changes.beneath import (
    DIRECTORY,
    FILE,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    look_at,
    open_beneath,
    opened,
    rename,
    split,
    sync_file_system,
)
from agentrun.changes.build import build, dress, remove_tree
from agentrun.changes.check import Conflict, State, check, differences, find_damage
from agentrun.changes.leftovers import clear_unit, names
from agentrun.changes.model import Change
from agentrun.changes.units import Unit, make_units
from agentrun.errors import HostError, UsageError

_CANNOT_EXCHANGE: Final = (errno.EINVAL, errno.ENOSYS)
Step = Callable[[str, int, int], None]
"""Told what is being done, and how much of it is, of how much."""
_AT_ONCE: Final = 256
"""Units that are made before the first of them is put into its place."""
_MANY: Final = 32
"""From so many new entries on, the whole file system is synced once instead of each of them."""


def no_step(_what: str, _done: int, _total: int) -> None:
    """A ``Step`` for nobody."""


class Report(msgspec.Struct):
    """What came of applying."""

    applied: int = 0
    already: int = 0
    """Units that were there before: of a run that was killed, or somebody did the same."""
    conflicts: list[Conflict] = []
    begun: bool = False
    """Something may have been applied. False: there were conflicts, and nothing was touched."""

    @property
    def complete(self) -> bool:
        """Everything is there now."""
        return self.begun and not self.conflicts


def apply(
    changes: Sequence[Change],
    layers: Sequence[int],
    root: int,
    *,
    name: str,
    force: bool = False,
    begin: Callable[[], None] = lambda: None,
    step: Step = no_step,
) -> Report:
    """Apply changes to the directory ``root``, with the rights of whoever calls this.

    Args:
        layers: what ``Node.layer`` numbers: directories with the new files.
        name: of the change set; in the names used beside what is replaced.
        force: overwrite files that were changed meanwhile; see ``check``.
        begin: called when nothing is in the way, before anything is touched.
        step: told how far it is: "checking", then "applying", where each file or tree counts twice, made and put into place.

    Raises:
        UsageError: the caller has not the right to.
        HostError: the change set is damaged.
        OSError: something cannot be written.
    """
    return _Apply(changes, layers, root, name, force, step).run(begin)


class _Apply:
    def __init__(self, changes: Sequence[Change], layers: Sequence[int], root: int, name: str, force: bool, step: Step) -> None:
        self._changes, self._units = changes, make_units(changes)
        self._layers, self._root, self._name, self._force, self._step = layers, root, name, force, step
        self._steps = 0
        self._touched: set[bytes] = set()
        self._report = Report()

    def run(self, begin: Callable[[], None]) -> Report:
        report = self._report
        if (problem := find_damage(self._changes, self._layers)) is not None:
            raise HostError(f"change set {self._name} is damaged: {problem}; nothing was applied")
        for number, unit in enumerate(self._units):
            self._step("checking", number, len(self._units))
            _check_rights(unit, self._layers)
            report.conflicts += clear_unit(unit, self._layers, self._root, self._name)
            report.conflicts += check(unit, self._layers, self._root, force=self._force)[1]
        self._step("checking", len(self._units), len(self._units))
        if report.conflicts:
            return report
        begin()
        report.begun = True
        for number in range(0, len(self._units), _AT_ONCE):
            some = self._units[number : number + _AT_ONCE]
            self._build(some)
            for unit in some:
                self._finish(unit)
                self._count()
        for path in self._touched:
            # One that has gone is somebody's doing, and was reported if anything of ours went with it.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), opened(self._root, path, DIRECTORY) as fd:
                os.fsync(fd)
        return report

    def _count(self) -> None:
        self._steps += 1
        self._step("applying", self._steps, 2 * len(self._units))

    def _build(self, units: Sequence[Unit]) -> None:
        """Make what is new of some units, and have it on the disk, all of it at once where that is cheaper."""
        made = [unit for unit in units if unit.new is not None and not unit.attributes]
        one_by_one = sum(1 + len(unit.inner) for unit in made) < _MANY
        for unit in made:
            if check(unit, self._layers, self._root, force=self._force)[0] is State.TODO:
                with opened(self._root, split(unit.path)[0], DIRECTORY) as parent:
                    build(unit, self._layers, parent, names(self._name, unit)[0], sync=one_by_one)
            self._count()
        self._steps += len(units) - len(made)
        if not one_by_one:
            with opened(self._root, b"", DIRECTORY) as fd:
                sync_file_system(fd)

    def _finish(self, unit: Unit) -> None:
        report = self._report
        state, conflicts = check(unit, self._layers, self._root, force=self._force)
        if state is State.TODO:
            conflicts = self._carry_out(unit)
        elif unit.new is not None and not unit.attributes:
            self._drop_part(unit)
        report.already += state is State.DONE
        report.applied += state is State.TODO and not conflicts
        report.conflicts += conflicts
        self._touched.add(split(unit.path)[0])

    def _drop_part(self, unit: Unit) -> None:
        """What was made is not wanted any more: somebody was faster."""
        above = split(unit.path)[0]
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), opened(self._root, above, DIRECTORY) as parent:
            remove_tree(parent, names(self._name, unit)[0])

    def _carry_out(self, unit: Unit) -> list[Conflict]:
        if unit.attributes:
            assert unit.new is not None
            with opened(self._root, unit.path, DIRECTORY) as fd:
                dress(fd, unit.new)
            return []
        with opened(self._root, split(unit.path)[0], DIRECTORY) as parent:
            return self._remove(unit, parent) if unit.new is None else self._put(unit, parent)

    def _remove(self, unit: Unit, parent: int) -> list[Conflict]:
        _, new, name = names(self._name, unit)
        rename(parent, name, new, RENAME_NOREPLACE)
        if conflicts := list(differences(unit, parent, new, moved=True, force=self._force)):
            rename(parent, new, name, RENAME_NOREPLACE)
            return conflicts
        remove_tree(parent, new)
        return []

    def _put(self, unit: Unit, parent: int) -> list[Conflict]:
        part, new, name = names(self._name, unit)
        rename(parent, part, new, RENAME_NOREPLACE)
        if look_at(parent, name) is None:
            try:
                rename(parent, new, name, RENAME_NOREPLACE)
            except FileExistsError:
                remove_tree(parent, new)
                return [Conflict(unit.path, "is new: somebody made it just now")]
            return []
        try:
            rename(parent, new, name, RENAME_EXCHANGE)
        except OSError as error:
            if error.errno not in _CANNOT_EXCHANGE:
                raise
            return self._put_over(unit, parent)
        if conflicts := self._came_out(unit, parent, new):
            rename(parent, new, name, RENAME_EXCHANGE)
            remove_tree(parent, new)
            return conflicts
        remove_tree(parent, new)
        return []

    def _came_out(self, unit: Unit, parent: int, new: bytes) -> list[Conflict]:
        """What is wrong with that which was at the unit's path until just now."""
        if self._force and not unit.old:
            found = look_at(parent, new)
            return [Conflict(unit.path, "is a directory now")] if found and stat.S_ISDIR(found.st_mode) else []
        return list(differences(unit, parent, new, moved=True, force=self._force))

    def _put_over(self, unit: Unit, parent: int) -> list[Conflict]:
        """On a file system where names cannot change places: between the last look and the rename somebody may be faster."""
        _, new, name = names(self._name, unit)
        if "d" in {entry.kind for entry in (unit.new, unit.old.get(unit.path)) if entry is not None}:
            remove_tree(parent, new)
            raise OSError(errno.EOPNOTSUPP, "this file system cannot exchange a file and a directory", os.fsdecode(unit.path))
        os.rename(new, name, src_dir_fd=parent, dst_dir_fd=parent)
        return []


def _check_rights(unit: Unit, layers: Sequence[int]) -> None:
    """Refuse what would fail half-way.

    Raises:
        UsageError: something belongs to another user, and who is not root cannot make it his; or he may not even read it.
    """
    user = os.geteuid()
    if user == 0:
        return
    groups = {os.getegid(), *os.getgroups()}
    for path, node in ((unit.path, unit.new), *unit.inner.items()):
        problem = ""
        if node is not None and (node.uid != user or node.gid not in groups):
            problem = f"belongs to {node.uid}:{node.gid}"
        elif node is not None and node.kind == "f":
            try:
                os.close(open_beneath(layers[node.layer], path, FILE))
            except PermissionError:
                problem = "cannot be read, because of its mode or that of its directory"
        if problem:
            raise UsageError(f"change set: {os.fsdecode(path) or '.'} {problem}: only root can apply that; nothing was done")
