"""A blob as the bytes it was compressed from, with both digests taken on the way.

A digest is only known at the end. So whoever reads one of these writes to where nobody looks, and calls ``finish`` before
anybody may.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from typing import Final, Protocol, Self

import msgspec

from agentrun.errors import HostError
from agentrun.image.limits import ArchiveError, Limits, Report, silent
from agentrun.image.programs import Unzstd
from agentrun.units import show_size

CHUNK: Final = 1 << 18
_GZIP: Final = b"\x1f\x8b"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_OTHERS: Final = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x04\x22\x4d\x18": "lz4"}


class Blob(msgspec.Struct, frozen=True):
    """A stretch of a file: a blob of a layout, a member of an archive, a tar."""

    path: str
    what: str
    """What messages call it."""
    start: int = 0
    size: int | None = None
    """None: to the end of the file."""
    digest: str | None = None
    """What has to come out, ``sha256:…``."""

    def open(self) -> BlobReader:
        """Start to read it.

        Raises:
            HostError: it cannot be opened.
            ArchiveError: it is not a plain file, or does not have its size.
        """
        return BlobReader(self)

    def content(self, most: int) -> bytes:
        """All of a small one, verified.

        Raises:
            ArchiveError: it is not small, or not what its digest says.
        """
        with self.open() as reader:
            if reader.size > most:
                raise ArchiveError(self.what, f"has {reader.size} bytes; more than {most} are not read")
            data = b"".join(iter(lambda: reader.read(CHUNK), b""))
            reader.finish()
        return data


class BlobReader:
    """Reads a blob from front to back."""

    def __init__(self, blob: Blob, report: Report = silent) -> None:
        self._blob = blob
        self._report = report
        self._hash = hashlib.sha256()
        self.done = 0
        try:
            # Non-blocking, so that a FIFO where a file should be keeps nobody waiting.
            self._fd = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise HostError(f"{blob.what}: {reason} ({blob.path})") from error
        found = os.fstat(self._fd)
        self.size = found.st_size - blob.start if blob.size is None else blob.size
        if not stat.S_ISREG(found.st_mode) or found.st_size < blob.start + self.size:
            self.close()
            raise ArchiveError(blob.what, "is not a plain file of the size it should have (truncated)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; none at the end."""
        data = os.pread(self._fd, min(size, self.size - self.done), self._blob.start + self.done)
        self._hash.update(data)
        self.done += len(data)
        self._report(self._blob.what, self.done, self.size)
        return data

    def peek(self) -> bytes:
        """The first bytes, without reading them."""
        return os.pread(self._fd, min(8, self.size), self._blob.start)

    def finish(self) -> None:
        """Everything was read: is it what it should be?

        Raises:
            ArchiveError: it is not.
        """
        if self.done != self.size:
            raise ArchiveError(self._blob.what, "was cut short while it was read (truncated)")
        check_digest(self._blob.what, "sha256:" + self._hash.hexdigest(), self._blob.digest)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def check_digest(what: str, found: str, expected: str | None) -> None:
    """Is a digest the one that was promised?

    Raises:
        ArchiveError: it is not.
    """
    if expected is not None and found != expected:
        raise ArchiveError(what, f"digest mismatch: it should be {expected} and is {found}")


class _Decoder(Protocol):
    def read(self, size: int) -> bytes: ...
    def close(self) -> None: ...


class _Plain:
    def __init__(self, source: BlobReader) -> None:
        self.read = source.read

    def close(self) -> None:
        pass


class _Gzip:
    """Any number of gzip members, each of them whole; zeros after the last, as tapes have them."""

    def __init__(self, source: BlobReader, what: str) -> None:
        self._source = source
        self._what = what
        self._member = zlib.decompressobj(wbits=31)
        self._input = b""

    def read(self, size: int) -> bytes:
        while True:
            if self._member.eof:
                self._input = self._member.unused_data or self._source.read(CHUNK)
                if not self._input.strip(b"\0"):
                    while rest := self._source.read(CHUNK):
                        if rest.strip(b"\0"):
                            raise ArchiveError(self._what, "there is something after the end of the compressed data")
                    return b""
                if len(self._input) < 2:
                    self._input += self._source.read(CHUNK)
                if not self._input.startswith(_GZIP):
                    raise ArchiveError(self._what, "there is something after the end of the compressed data")
                self._member = zlib.decompressobj(wbits=31)
            self._input = self._input or self._source.read(CHUNK)
            ended = not self._input
            try:  # without input as well: there may be output that did not fit the last time
                data = self._member.decompress(self._input, size)
            except zlib.error as error:
                raise ArchiveError(self._what, f"the compressed data is damaged: {error}") from error
            if ended and not data and not self._member.eof:
                raise ArchiveError(self._what, "the compressed data ends in the middle (truncated)")
            self._input = self._member.unconsumed_tail
            if data:
                return data

    def close(self) -> None:
        pass


class _Zstd:
    def __init__(self, source: BlobReader, what: str) -> None:
        self._what = what
        self._program = Unzstd(source.read)

    def read(self, size: int) -> bytes:
        data = self._program.read(size)
        if not data and self._program.close():
            raise ArchiveError(self._what, "the compressed data is damaged or ends in the middle (zstd refuses it)")
        return data

    def close(self) -> None:
        self._program.close()


class Uncompressed:
    """What a blob was compressed from. Which compression it is, its first bytes say: not whoever sent it."""

    def __init__(self, blob: Blob, limits: Limits, report: Report = silent) -> None:
        self._what = blob.what
        self._limits = limits
        self._hash = hashlib.sha256()
        self._buffer = b""
        self._at = 0
        self.done = 0
        self._source = BlobReader(blob, report)
        try:
            self._decoder = self._choose(self._source.peek())
        except BaseException:
            self._source.close()
            raise

    @property
    def compressed(self) -> bool:
        """It is anything but a plain file."""
        return not isinstance(self._decoder, _Plain)

    def _choose(self, magic: bytes) -> _Decoder:
        for other, name in _OTHERS.items():
            if magic.startswith(other):
                raise ArchiveError(self._what, f"is compressed with {name}; gzip, zstd and nothing are known")
        if magic.startswith(_GZIP):
            return _Gzip(self._source, self._what)
        if magic.startswith(_ZSTD):
            return _Zstd(self._source, self._what)
        return _Plain(self._source)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._decoder.close()
        finally:
            self._source.close()

    def read(self, size: int) -> bytes:
        """So many bytes, and fewer only at the end.

        Raises:
            ArchiveError: the data is damaged, or far too much.
        """
        if len(self._buffer) - self._at >= size:  # nearly always: headers and small files
            start = self._at
            self._at += size
            return self._buffer[start : self._at]
        parts = [self._buffer[self._at :]]
        have = len(parts[0])
        while have < size:
            chunk = self._decode()
            if not chunk:
                break
            parts.append(chunk)
            have += len(chunk)
        whole = b"".join(parts)
        self._buffer, self._at = whole, min(size, len(whole))
        return whole[:size]

    def _decode(self) -> bytes:
        chunk = self._decoder.read(CHUNK)
        self._hash.update(chunk)
        self.done += len(chunk)
        limits = self._limits
        if self.done > limits.size:
            raise ArchiveError(self._what, f"comes to more than the {show_size(limits.size)} a layer may have, uncompressed")
        if self.done > limits.ratio_from and self.done > limits.ratio * self._source.done:
            raise ArchiveError(self._what, f"is a decompression bomb: more than {limits.ratio} times what it was compressed to")
        return chunk

    def finish(self, diff_id: str | None = None) -> str:
        """Read what is left and check both digests; the digest of what came out.

        Raises:
            ArchiveError: one is not what was promised.
        """
        while self._decode():
            pass
        self._source.finish()
        found = "sha256:" + self._hash.hexdigest()
        check_digest(self._what, found, diff_id)
        return found
