"""How much an archive may come to, and how one is refused.

An archive is written by a stranger. Each bound is far above what real images are, and far below what hurts a host; the largest
images that agents' tasks were seen to use have 17 GB.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from agentrun.errors import UsageError
from agentrun.tomltext import show_path
from agentrun.units import GIB, MIB, show_size

Report = Callable[[str, int, int | None], None]
"""Told now and then what is being worked on, how many bytes of it are done, and of how many, if that is known. 0 of 0: over."""

NO_SPECIAL = "an image has no devices, FIFOs and sockets (--skip-special leaves them out)"


def silent(_what: str, _done: int, _total: int | None) -> None:
    """A ``Report`` for nobody."""


class ArchiveError(UsageError):
    """An archive is not taken: ``entry`` is where in it, ``reason`` why. Nothing of it is in the store."""

    def __init__(self, entry: bytes | str, reason: str) -> None:
        self.entry = os.fsdecode(entry)
        self.reason = reason
        super().__init__(f"{show_path(self.entry)}: {reason}")

    def add_archive(self, what: str) -> None:
        """Have the message say which archive the entry is in."""
        if self.entry != what:
            self.args = (f"{show_path(what)}: {self.args[0]}",)


class Limits(msgspec.Struct, frozen=True):
    """Bounds for one layer."""

    size: int = 64 * GIB
    """Bytes of the uncompressed archive, and of its files with their holes: a hole costs no disk, but whoever reads it."""
    entries: int = 2_000_000
    ratio: int = 250
    """Uncompressed to compressed. gzip reaches 1032, on zeros; real layers 2 to 10."""
    ratio_from: int = 256 * MIB
    """Less than this is no bomb, whatever it was compressed to."""
    depth: int = 200
    """Components of a path; the deepest node_modules seen have 60."""
    metadata: int = MIB
    """Bytes of one extended header."""
    pieces: int = 1 << 20
    """Stretches of data in one sparse file."""
    skip_special: bool = False
    """Leave devices, FIFOs and sockets out, where they would be refused."""


class Budget:
    """What of its limits a layer has used up. Nothing is given back: what is replaced later was written all the same."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.entries = 0
        self.size = 0

    def take_entry(self, name: bytes, size: int) -> None:
        """Count one entry of so many bytes.

        Raises:
            ArchiveError: it is one too many.
        """
        self.entries += 1
        self.size += size
        if self.entries > self.limits.entries:
            raise ArchiveError(name, f"is one entry more than the {self.limits.entries} a layer may have")
        if self.size > self.limits.size:
            raise ArchiveError(name, f"brings the files to more than the {show_size(self.limits.size)} a layer may have")
