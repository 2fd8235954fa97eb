"""The hook's end of the daemon's socket (docs/protocol.md), without msgspec: importing that takes longer than all the rest."""

from __future__ import annotations

import _socket  # the class of `socket`, without the milliseconds that the enums of `socket` take to import
import os

PATIENCE = 2.0
"""Seconds to wait for the daemon; one that is slower is taken for none."""
_LONGEST = 16 << 20


class NoDaemon(Exception):
    """Nobody answers at the socket; the message says why."""


class Refused(Exception):
    """The daemon refused the request; the message is its own."""


def ask(path: str, request: dict[str, object], fd: int = -1) -> dict[str, object]:
    """One request and the reply's data; ``fd`` travels with it.

    Raises:
        NoDaemon: nobody answers there, or not in time, or not in this protocol.
        Refused: the answer is an error.
    """
    body = pack(request)
    data = len(body).to_bytes(4, "little") + body
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, "little"))] if fd >= 0 else []
        sent = sock.sendmsg([data], rights)
        if sent < len(data):
            sock.sendall(data[sent:])
        answer, _ = unpack(_receive(sock), 0)
        if not isinstance(answer, dict):
            raise TypeError("no map")
        if answer["op"] == "error":
            raise Refused(answer["message"])
        found: dict[str, object] = answer["data"]
    except TimeoutError as error:
        raise NoDaemon(f"no answer within {PATIENCE:g} s") from error
    except OSError as error:
        raise NoDaemon(os.strerror(error.errno) if error.errno else str(error)) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise NoDaemon(f"what answers there does not speak this protocol ({error})") from error
    finally:
        sock.close()
    return found


def _receive(sock: _socket.socket) -> bytes:
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
        if len(data) >= 4 and int.from_bytes(data[:4], "little") > _LONGEST:
            raise ValueError("a frame that is too long")
        chunk = sock.recv(65536)
        if not chunk:
            raise ConnectionResetError(0, "it closed the connection")
        data += chunk
    return data[4:]


def pack(value: object) -> bytes:
    """msgpack of what requests are made of: maps, lists, text, bytes, whole numbers, true, false, nil.

    Raises:
        TypeError: of anything else.
    """
    if value is None:
        return b"\xc0"
    if value is True or value is False:
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return bytes([value]) if 0 <= value < 128 else b"\xd3" + value.to_bytes(8, "big", signed=True)
    if isinstance(value, str):
        raw = value.encode("utf-8", "replace")
        return b"\xdb" + len(raw).to_bytes(4, "big") + raw
    if isinstance(value, bytes):
        return b"\xc6" + len(value).to_bytes(4, "big") + value
    if isinstance(value, list):
        return b"\xdd" + len(value).to_bytes(4, "big") + b"".join(map(pack, value))
    if isinstance(value, dict):
        return b"\xdf" + len(value).to_bytes(4, "big") + b"".join(pack(key) + pack(item) for key, item in value.items())
    raise TypeError(f"{type(value).__name__} cannot be packed")


_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_MANY = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_NUMBERS = {0xCC: (1, False), 0xCD: (2, False), 0xCE: (4, False), 0xCF: (8, False),
            0xD0: (1, True), 0xD1: (2, True), 0xD2: (4, True), 0xD3: (8, True)}  # fmt: skip


def unpack(data: bytes, at: int) -> tuple[object, int]:
    """The value at a place, and the place behind it.

    Raises:
        ValueError, IndexError: it is not msgpack, or ends too early. Floats are not read: no answer to the hook has one.
    """
    kind = data[at]
    at += 1
    if kind < 0x80 or kind >= 0xE0:
        return kind if kind < 0x80 else kind - 256, at
    if 0xA0 <= kind < 0xC0:
        return _text(data, at, kind & 31), at + (kind & 31)
    if kind < 0xA0:
        return _container(data, at, kind & 15, kind < 0x90)
    if kind in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[kind], at
    if kind in _SIZED:
        width = _SIZED[kind]
        size = int.from_bytes(data[at : at + width], "big")
        at += width
        raw: object = _text(data, at, size) if kind >= 0xD9 else data[at : at + size]
        return raw, at + size
    if kind in _NUMBERS:
        width, signed = _NUMBERS[kind]
        return int.from_bytes(data[at : at + width], "big", signed=signed), at + width
    if kind in _MANY:
        width = _MANY[kind]
        return _container(data, at + width, int.from_bytes(data[at : at + width], "big"), kind >= 0xDE)
    raise ValueError(f"byte {kind:#x}")


def _text(data: bytes, at: int, size: int) -> str:
    if at + size > len(data):
        raise IndexError("the end")
    return data[at : at + size].decode("utf-8", "replace")


def _container(data: bytes, at: int, count: int, is_map: bool) -> tuple[object, int]:
    found = []
    for _ in range(2 * count if is_map else count):
        value, at = unpack(data, at)
        found.append(value)
    return (dict(zip(found[::2], found[1::2], strict=True)) if is_map else found), at
