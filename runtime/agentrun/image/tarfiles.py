"""The members of a tar that is itself a container: of layers, as `docker save` and `skopeo copy oci-archive:` write it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, Self

from agentrun.errors import HostError
from agentrun.image.limits import ArchiveError, Limits, Report
from agentrun.image.streams import Blob, Uncompressed
from agentrun.image.tarstream import Entry, TarReader

_CONTAINERS: Final = re.compile(
    rb"blobs|blobs/.*|oci-layout|index\.json|manifest\.json|repositories"
    rb"|[0-9a-f]{64}(?:\.json|\.tar|/|/layer\.tar|/json|/VERSION)?"
)
_LINKS: Final = 8
_MEMBERS: Final = 100_000


def is_container(path: str, limits: Limits, report: Report) -> bool:
    """Is this tar one of layers, and not a root file system? It is if no entry of it could be one of the latter."""
    with Uncompressed(Blob(path, path), limits, report) as stream:
        some = False
        try:
            for entry in TarReader(stream.read, limits):
                name = entry.name.removeprefix(b"./").rstrip(b"/")
                if name and not _CONTAINERS.fullmatch(name):
                    return False
                some = some or name in (b"oci-layout", b"manifest.json")
        except ArchiveError as error:
            error.add_archive(path)
            raise
    return some


class Members:
    """Where the members of an uncompressed tar are in it."""

    def __init__(self, path: str, limits: Limits) -> None:
        """Read its headers.

        Raises:
            ArchiveError: it is no tar.
            HostError: it cannot be read.
        """
        self._path = path
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        with _Cursor(path) as cursor:
            try:
                for entry in TarReader(cursor.read, limits, cursor.skip):
                    self._add(entry, cursor.at)
            except ArchiveError as error:
                error.add_archive(path)
                raise

    def _add(self, entry: Entry, at: int) -> None:
        name = os.fsdecode(entry.name.removeprefix(b"./"))
        if name in self._files or name in self._links:
            raise ArchiveError(name, "is in the archive twice")
        if len(self._files) + len(self._links) >= _MEMBERS:
            raise ArchiveError(name, f"is one member more than the {_MEMBERS} an archive of layers may have")
        if entry.kind == "file" and entry.pieces in ([], [(0, entry.size)]):
            self._files[name] = at, entry.size
        elif entry.kind == "hard link":
            self._links[name] = os.fsdecode(entry.link)
        elif entry.kind == "symbolic link":  # `docker save` used to make these for layers that are in there twice
            self._links[name] = os.path.normpath(os.path.join(os.path.dirname(name), os.fsdecode(entry.link)))

    def blob(self, name: str, digest: str | None = None) -> Blob | None:
        """A member; None if there is none. Links are looked up in the archive and nowhere else."""
        for _ in range(_LINKS):
            if name not in self._links:
                break
            name = self._links[name]
        found = self._files.get(name)
        return Blob(self._path, f"{self._path}: {name}", *found, digest) if found else None


class _Cursor:
    """A place in a file."""

    def __init__(self, path: str) -> None:
        self.at = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}") from error
        self._size = os.fstat(self._fd).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, size: int) -> bytes:
        data = os.pread(self._fd, size, self.at)
        self.at += len(data)
        return data

    def skip(self, size: int) -> bool:
        self.at += size
        return self.at <= self._size


def unpack(path: str, scratch: Path, limits: Limits, report: Report) -> str:
    """The path of the same tar, uncompressed: itself, or a file that is written for it."""
    with Uncompressed(Blob(path, path), limits, report) as stream:
        if not stream.compressed:
            return path
        target = scratch / "archive.tar"
        with target.open("xb") as file:
            while chunk := stream.read(1 << 20):
                file.write(chunk)
        stream.finish()
    return str(target)
