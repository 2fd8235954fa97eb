"""A tar stream as entries, read once, front to back: ustar, GNU and pax.

It is strict. ``tarfile`` takes a damaged header in the middle for the end, and where two readers of one archive differ there is
room for an entry that one checks and the other writes. So what is ambiguous is refused: a checksum that is wrong, numbers
that are none, data behind a link or a directory, a name said twice, anything but zeros after the end, and no end at all.

Sources: POSIX pax(1), "tar Internals" and "Sparse Formats" in the GNU tar manual.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from agentrun.image.limits import ArchiveError, Limits
from agentrun.image.tarsparse import Piece, from_old_header, from_pax, read_map

BLOCK: Final = 512
CHUNK: Final = 1 << 20
_ZEROS: Final = bytes(BLOCK)
_DIGITS: Final = re.compile(rb"[0-7]*")
_TIME: Final = re.compile(rb"(-?)([0-9]{1,11})(?:\.([0-9]*))?")
_KINDS: Final = {
    b"0": "file", b"\0": "file", b"7": "file", b"S": "file", b"1": "hard link", b"2": "symbolic link",
    b"3": "character device", b"4": "block device", b"5": "directory", b"6": "FIFO",
}  # fmt: skip
_LARGEST_ID: Final = (1 << 32) - 2
_LARGEST: Final = (1 << 63) - 1
_XATTR: Final = b"SCHILY.xattr."


class Entry(msgspec.Struct):
    """One entry, as the archive has it: nothing is checked but that it can be read in one way only."""

    name: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    mtime: int
    """Nanoseconds since 1970."""
    size: int
    """Of the file that it becomes, holes included."""
    link: bytes
    xattrs: dict[str, bytes]
    pieces: list[Piece]
    """Where in the file there is data."""


class TarReader:
    """The entries of a stream. ``read(n)`` gives n bytes, and fewer only at its end."""

    def __init__(self, read: Callable[[int], bytes], limits: Limits, skip: Callable[[int], bool] | None = None) -> None:
        """``skip(n)`` passes over n bytes without reading them, and says whether there were so many."""
        self._read = read
        self._skip = skip
        self._limits = limits
        self._last = b"the first header"
        self._left = 0
        self._padding = 0
        self._pieces: list[Piece] = []
        self._globals: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[Entry]:
        """Every entry. Data that was not taken is passed over.

        Raises:
            ArchiveError: the stream is not a whole archive.
        """
        while (entry := self._next()) is not None:
            yield entry

    def data(self) -> Iterator[tuple[int, bytes]]:
        """The data of the entry that came last, and where in the file each part goes.

        Raises:
            ArchiveError: the stream ends in it.
        """
        pieces, self._pieces = self._pieces, []
        for start, length in pieces:
            at, end = start, start + length
            while at < end:
                chunk = self._take(min(CHUNK, end - at))
                yield at, chunk
                at += len(chunk)

    def _next(self) -> Entry | None:
        self._pass_over()
        pax: dict[bytes, bytes] | None = None
        long: dict[bytes, bytes] = {}
        records: list[tuple[bytes, bytes]] = []
        while (block := self._header()) is not None:
            kind = block[156:157]
            if kind in (b"x", b"g"):
                found = _records(self._metadata(block), self._last)
                if kind == b"g":
                    self._check_globals(found)
                elif pax is not None:
                    raise self._bad("two extended headers for one entry")
                else:
                    pax, records = dict(found), found
            elif kind in (b"L", b"K"):
                key = b"path" if kind == b"L" else b"linkpath"
                if key in long:
                    raise self._bad("two long names for one entry")
                long[key] = self._metadata(block).removesuffix(b"\0")
            else:
                if pax and long.keys() & pax.keys():
                    raise self._bad("a GNU long name and a pax one for the same entry")
                return self._entry(block, {**long, **(pax or {})}, records)
        if pax is not None or long:
            raise self._bad("the archive ends between an extended header and its entry")
        return None

    def _entry(self, block: bytes, extra: dict[bytes, bytes], records: list[tuple[bytes, bytes]]) -> Entry:
        flag = block[156:157]
        name = extra.get(b"GNU.sparse.name") or extra.get(b"path") or _name(block)
        if name:
            self._last = name
        if flag not in _KINDS:
            raise ArchiveError(name, f"is of a type that no layer has, {flag!r}")
        kind = "directory" if flag in (b"0", b"\0") and name.endswith(b"/") else _KINDS[flag]
        stored = self._number(extra, b"size", block[124:136])
        if kind != "file" and stored:
            raise ArchiveError(name, f"is a {kind} with data")
        entry = Entry(
            name,
            kind,
            self._octal(block[100:108], "mode") & 0o7777,
            self._number(extra, b"uid", block[108:116], _LARGEST_ID),
            self._number(extra, b"gid", block[116:124], _LARGEST_ID),
            self._time(extra, block),
            stored,
            extra.get(b"linkpath", _text(block[157:257])),
            _xattrs(extra),
            [],
        )
        self._left, self._padding = stored, -stored % BLOCK
        if kind == "file":
            self._map(entry, block, extra, records)
        self._pieces = entry.pieces
        return entry

    def _map(self, entry: Entry, block: bytes, extra: dict[bytes, bytes], records: list[tuple[bytes, bytes]]) -> None:
        """Find out where the data of a file goes: all in one piece, unless it is sparse."""
        if block[156:157] == b"S":
            entry.size, entry.pieces = from_old_header(entry.name, block, self._block, self._limits.pieces)
        elif any(key.startswith(b"GNU.sparse.") for key in extra):
            sparse = from_pax(entry.name, extra, records, self._limits.pieces)
            if sparse is None:  # version 1.0: the map is in front of the data
                entry.size, entry.pieces = read_map(entry.name, extra, self._take_block, self._limits.pieces)
            else:
                entry.size, entry.pieces = sparse
        else:
            entry.pieces = [(0, entry.size)] if entry.size else []
            return
        if sum(length for _, length in entry.pieces) != self._left:
            raise ArchiveError(entry.name, "its map of a sparse file does not come to the data that follows")

    def _pass_over(self) -> None:
        rest, self._padding = self._left + self._padding, 0
        while rest:
            step = rest if self._skip else min(CHUNK, rest)
            if not (self._skip(step) if self._skip else len(self._read(step)) == step):
                raise ArchiveError(self._last, "the archive ends in the middle of it (truncated)")
            rest -= step
        self._left = 0
        self._pieces = []

    def _take(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) < size or size > self._left:
            raise ArchiveError(self._last, "the archive ends in the middle of it (truncated)")
        self._left -= size
        return data

    def _take_block(self) -> bytes:
        return self._take(BLOCK)

    def _block(self) -> bytes:
        block = self._read(BLOCK)
        if len(block) < BLOCK:
            raise ArchiveError(self._last, "the archive ends after it, without an end mark (truncated)")
        return block

    def _header(self) -> bytes | None:
        block = self._block()
        if block == _ZEROS:
            while rest := self._read(CHUNK):
                if rest.strip(b"\0"):
                    raise self._bad("there is something after the end of the archive")
            return None
        total = sum(block) - sum(block[148:156]) + 8 * 32
        if self._octal(block[148:156], "checksum") != total:
            raise self._bad("the header after it is damaged (checksum)")
        return block

    def _metadata(self, block: bytes) -> bytes:
        size = self._number({}, b"size", block[124:136])
        if size > self._limits.metadata:
            raise self._bad(f"the extended header after it has {size} bytes, more than {self._limits.metadata}")
        self._left, self._padding = size, -size % BLOCK
        data = self._take(size)
        self._pass_over()
        return data

    def _check_globals(self, records: list[tuple[bytes, bytes]]) -> None:
        """A global header may comment. That one is asked to change every entry is something only some readers would do."""
        for key, _ in records:
            if key in (b"path", b"linkpath", b"size", b"uid", b"gid") or key.startswith((b"GNU.sparse.", _XATTR)):
                raise self._bad(f"a global header sets {key!r} for all that follow")

    def _number(self, extra: dict[bytes, bytes], key: bytes, field: bytes, most: int = _LARGEST) -> int:
        value = extra.get(key)
        if value is None:
            number = self._octal(field, key.decode())
        elif not value.isdigit() or len(value) > 20:
            raise self._bad(f"{key.decode()} {value[:40]!r} is not a number")
        else:
            number = int(value)
        if not 0 <= number <= most:
            raise self._bad(f"{key.decode()} {number} is out of bounds")
        return number

    def _octal(self, field: bytes, what: str) -> int:
        if field[0] & 0x80:  # GNU: the rest of the field is the number, in two's complement
            return int.from_bytes(bytes([field[0] & 0x7F | (field[0] & 0x40) << 1]) + field[1:], "big", signed=True)
        digits = field.partition(b"\0")[0].strip(b" ")
        if not _DIGITS.fullmatch(digits):
            raise self._bad(f"{what} {field!r} is not a number")
        return int(digits or b"0", 8)

    def _time(self, extra: dict[bytes, bytes], block: bytes) -> int:
        text = extra.get(b"mtime")
        if text is None:
            seconds, nanoseconds = self._octal(block[136:148], "mtime"), 0
        else:
            match = _TIME.fullmatch(text)
            if not match:
                raise self._bad(f"mtime {text[:40]!r} is not a time")
            sign = -1 if match[1] else 1
            seconds, nanoseconds = sign * int(match[2]), sign * int((match[3] or b"")[:9].ljust(9, b"0"))
        if not -(1 << 36) < seconds < 1 << 36:
            raise self._bad(f"mtime {seconds} is out of bounds")
        return seconds * 1_000_000_000 + nanoseconds

    def _bad(self, reason: str) -> ArchiveError:
        return ArchiveError(self._last, reason)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _name(block: bytes) -> bytes:
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):
        return prefix + b"/" + name
    return name


def _records(data: bytes, where: bytes) -> list[tuple[bytes, bytes]]:
    """The records of an extended header: length, key, value."""
    found = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        digits = data[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = data[space + 1 : end].partition(b"=")
        if end <= space or end > len(data) or not key or not equals or not value.endswith(b"\n"):
            raise ArchiveError(where, "the extended header after it is damaged")
        found.append((key, value[:-1]))
        at = end
    for key in (b"path", b"linkpath", b"size"):
        values = [value for name, value in found if name == key]
        if len(values) > 1 or b"" in values:
            raise ArchiveError(where, f"the extended header after it has several values for {key.decode()}, or an empty one")
    return found


def _xattrs(extra: dict[bytes, bytes]) -> dict[str, bytes]:
    return {
        key[len(_XATTR) :].decode("utf-8", "surrogateescape"): value for key, value in extra.items() if key.startswith(_XATTR)
    }
