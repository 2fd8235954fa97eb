"""Layers on disk: ``layers/<name>/`` has ``root`` and ``workspace``, and each of them overlay's ``upper`` and ``work``.

A layer belongs to whatever session names it; one that none does is removed by the next who prunes. There is no count that could
be wrong.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Final

from agentrun.changes.draft import dress_like
from agentrun.image import locks
from agentrun.session.directory import open_workspace
from agentrun.session.model import Session
from agentrun.session.shelf import Shelf

PARTS: Final = ("root", "workspace")


class Layers:
    """Those of one store."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def path(self, name: str) -> Path:
        """A layer's directory."""
        return self._shelf.layers / name

    def is_empty(self, name: str) -> bool:
        """Nothing was written to it."""
        return not any(any((self.path(name) / part / "upper").iterdir()) for part in PARTS)

    def make(self, session: Session) -> str:
        """An empty layer to go on top of a session's. Its directories are what overlay shows the topmost of each tree as."""
        name = secrets.token_hex(8)
        new = self._shelf.tmp / name
        for part in PARTS:
            for directory in ("upper", "work"):
                (new / part / directory).mkdir(0o755, parents=True)
        below = self.path(session.layers[-1]) if session.layers else None
        for part in PARTS:
            if below is not None:
                fd = os.open(below / part / "upper", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            elif part == "workspace" and session.workspace:
                fd = open_workspace(session)
            else:
                continue
            try:
                dress_like(new / part / "upper", fd)
            finally:
                os.close(fd)
        new.rename(self.path(name))
        return name

    def take_out(self, needed: Collection[str]) -> int:
        """Have no others than these; how many others there were. Their files are there until ``remove_all``."""
        gone = [path for path in self._shelf.layers.iterdir() if path.name not in needed]
        for path in gone:
            path.rename(self._shelf.tmp / path.name)
        return len(gone)

    def left(self) -> list[Path]:
        """What is no layer any more, or was never finished; within ``changing``, or somebody is just making it."""
        return list(self._shelf.tmp.iterdir())


def remove_all(paths: list[Path]) -> None:
    """Remove what ``left`` found, which takes its time."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # somebody else is at it as well
            locks.remove_tree(path)
