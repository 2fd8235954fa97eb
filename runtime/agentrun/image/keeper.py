"""A store's locks, put to its files: who is in it, who uses what, and what nobody uses any more."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from agentrun.errors import HostError
from agentrun.image import locks
from agentrun.image.shelf import Shelf


class Keeper:
    """The locks of one store. Who holds any of them waits for ``locked`` at most, and who has that waits for nothing."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Be the only one who looks at what belongs together, or changes it."""
        return locks.exclusive(self._shelf.root / "lock")

    def hold(self, layer: str, leases: contextlib.ExitStack) -> int:
        """Take a lease on one layer, the store being locked; a descriptor of its directory.

        Raises:
            HostError: there is no such layer.
        """
        try:
            fd = locks.lease(self._shelf.layers / layer)
        except OSError as error:
            where = f"image store {self._shelf.root}: layer {layer}"
            raise HostError(f"{where}: {error.strerror}; import its image again") from error
        leases.callback(os.close, fd)
        return fd

    @contextlib.contextmanager
    def work(self) -> Iterator[locks.Work]:
        """A directory to build in, for the length of a block."""
        self.sweep()
        with self.errors("making a place to build in"), self.locked():
            work = locks.start_work(self._shelf.tmp)
        try:
            yield work
        finally:
            with self.errors("clearing up"):
                locks.end_work(work)

    def sweep(self) -> None:
        """Remove what those who were killed have left."""
        with self.errors("clearing up"):
            with self.locked():
                left = locks.abandoned(self._shelf.tmp)
                locks.remove_unheld(self._shelf.locks)
                for directory in (self._shelf.root, self._shelf.images):
                    for path in directory.glob(".*.new"):
                        path.unlink()
            for work in left:
                locks.end_work(work)

    @contextlib.contextmanager
    def errors(self, step: str) -> Iterator[None]:
        """Name the store, and what it was doing, in whatever goes wrong with its files.

        Raises:
            HostError: something did.
        """
        try:
            yield
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise HostError(f"image store {self._shelf.root}: {step}: {error.strerror}{where}") from error
