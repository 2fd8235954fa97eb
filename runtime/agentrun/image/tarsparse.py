"""Where the data of a sparse file goes: the four ways in which GNU tar has written that down.

A map is a list of (offset, length), in order and without overlap, within the size of the file.
"""

from __future__ import annotations

from collections.abc import Callable

from agentrun.image.limits import ArchiveError

Piece = tuple[int, int]
_MOST = 1 << 62


def from_old_header(name: bytes, block: bytes, more: Callable[[], bytes], most: int) -> tuple[int, list[Piece]]:
    """Type S: four pieces in the header, 21 in each block that follows while the one before says so.

    Raises:
        ArchiveError: the map is none.
    """
    size = _field(name, block[483:495])
    fields, extended = block[386:482], block[482]
    pieces: list[Piece] = []
    while True:
        for at in range(0, len(fields), 24):
            if fields[at] != 0:
                pieces.append((_field(name, fields[at : at + 12]), _field(name, fields[at + 12 : at + 24])))
        if len(pieces) > most:
            raise ArchiveError(name, f"is a sparse file of more than {most} pieces")
        if not extended:
            return size, _checked(name, size, pieces)
        block = more()
        fields, extended = block[:504], block[504]


def from_pax(
    name: bytes, extra: dict[bytes, bytes], records: list[tuple[bytes, bytes]], most: int
) -> tuple[int, list[Piece]] | None:
    """Versions 0.0 and 0.1: the map is in the extended header. None: it is version 1.0, ``read_map``.

    Raises:
        ArchiveError: the map is none.
    """
    version = (extra.get(b"GNU.sparse.major"), extra.get(b"GNU.sparse.minor"))
    if version == (b"1", b"0"):
        return None
    if version not in ((None, None), (b"0", b"0"), (b"0", b"1")):
        raise ArchiveError(name, "is a sparse file of a version that is not known")
    if b"GNU.sparse.map" in extra:
        words = extra[b"GNU.sparse.map"].split(b",")
    else:
        words = [value for key, value in records if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes")]
        keys = [key for key, _ in records if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes")]
        if keys != [b"GNU.sparse.offset", b"GNU.sparse.numbytes"] * (len(keys) // 2):
            raise ArchiveError(name, "its map of a sparse file is damaged")
    if len(words) > 2 * most:
        raise ArchiveError(name, f"is a sparse file of more than {most} pieces")
    size = _decimal(name, extra.get(b"GNU.sparse.size", extra.get(b"GNU.sparse.realsize", b"")))
    return size, _checked(name, size, _pairs(name, [_decimal(name, word) for word in words]))


def read_map(name: bytes, extra: dict[bytes, bytes], take: Callable[[], bytes], most: int) -> tuple[int, list[Piece]]:
    """Version 1.0: decimal numbers, a line each, in as many whole blocks as they need, in front of the data.

    Raises:
        ArchiveError: the map is none.
    """
    text = take()
    count = _decimal(name, text.partition(b"\n")[0])
    if count > most:
        raise ArchiveError(name, f"is a sparse file of more than {most} pieces")
    blocks, lines = [text], text.count(b"\n")
    while lines < 1 + 2 * count:
        blocks.append(take())
        lines += blocks[-1].count(b"\n")
    words = b"".join(blocks).split(b"\n")
    size = _decimal(name, extra.get(b"GNU.sparse.realsize", b""))
    return size, _checked(name, size, _pairs(name, [_decimal(name, word) for word in words[1 : 1 + 2 * count]]))


def _pairs(name: bytes, numbers: list[int]) -> list[Piece]:
    if len(numbers) % 2:
        raise ArchiveError(name, "its map of a sparse file is damaged")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _checked(name: bytes, size: int, pieces: list[Piece]) -> list[Piece]:
    end = 0
    for start, length in pieces:
        if start < end or start + length > size:
            raise ArchiveError(name, "its map of a sparse file overlaps, is out of order, or goes beyond its size")
        end = start + length
    return [piece for piece in pieces if piece[1]]


def _decimal(name: bytes, text: bytes) -> int:
    if not text.isdigit() or len(text) > 19 or int(text) > _MOST:
        raise ArchiveError(name, f"its map of a sparse file has {text[:40]!r}, which is not a number")
    return int(text)


def _field(name: bytes, field: bytes) -> int:
    if field[0] == 0x80:
        number = int.from_bytes(field[1:], "big")
    else:
        digits = field.partition(b"\0")[0].strip(b" ")
        number = int(digits or b"0", 8) if set(digits) <= set(b"01234567") else -1
    if not 0 <= number <= _MOST:
        raise ArchiveError(name, f"its map of a sparse file has {field!r}, which is not a number")
    return number
