"""flock(2), which ends with its holder however that ends: nobody who was killed keeps anything from anybody.

* the store: short, for whatever reads several things that have to fit, or changes one;
* a layer that is being built, by name: whoever wants the same one waits, and finds it;
* a place to build in: what is not locked there has no builder any more;
* a lease: the layer's own directory, shared.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class Work(msgspec.Struct, frozen=True):
    """A directory to build in, gone afterwards."""

    path: Path
    lock: int
    """A descriptor; a program that writes into the directory inherits it, so that the directory stays for as long as it runs."""


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Be the only one that holds this file, for the length of a block; waits."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def exclusive_name(path: Path) -> Iterator[None]:
    """The same for a file that is there only while somebody holds it or waits for it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_at(fd, path):  # and not one that its last holder has removed while we waited
                try:
                    yield
                finally:
                    path.unlink()
                return
        finally:
            os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def remove_unheld(where: Path) -> None:
    """Remove the files of ``exclusive_name`` that nobody holds. Who is about to will notice, and make a new one."""
    for path in where.iterdir():
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(fd, path):
                    path.unlink()
            finally:
                os.close(fd)


def lease(directory: Path) -> int:
    """Keep a directory from being removed until the descriptor is closed. Called with the store locked, so it never waits.

    Raises:
        OSError: it is not there.
    """
    fd = os.open(directory, _DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def claim(directory: Path) -> int | None:
    """A descriptor that holds a directory for ourselves alone; None if anybody else has it, or had it and has removed it."""
    try:
        fd = os.open(directory, _DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(fd, directory):
            return fd
    except BlockingIOError:
        pass
    os.close(fd)
    return None


def start_work(where: Path) -> Work:
    """A new directory, held by us. Called with the store locked: between making and holding it, ``sweep`` must not see it."""
    path = where / secrets.token_hex(8)
    path.mkdir(0o700)
    lock = claim(path)
    assert lock is not None  # nobody else has ever seen it
    return Work(path, lock)


def end_work(work: Work) -> None:
    """Remove the directory and everything in it."""
    try:
        remove_tree(work.path)
    finally:
        os.close(work.lock)


def abandoned(where: Path) -> list[Work]:
    """Directories whose builders are gone, now held by us. Called with the store locked."""
    found = []
    for path in where.iterdir():
        if path.is_dir() and not path.is_symlink():
            lock = claim(path)
            if lock is not None:
                found.append(Work(path, lock))
        else:
            path.unlink(missing_ok=True)
    return found


def remove_tree(path: Path) -> None:
    """Remove a tree, also one of which its owner, who is not root, has no right to write to every directory."""
    if os.geteuid() != 0:
        for directory, _, _ in os.walk(path):
            os.chmod(directory, 0o700, follow_symlinks=True)
    shutil.rmtree(path)


def sync(path: Path) -> None:
    """Have everything on the disk that has been written to the file system of ``path``: one call, however many files it was."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(path))
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk."""
    fd = os.open(path, _DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
