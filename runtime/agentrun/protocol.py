"""The socket protocol as types, and its framing. docs/protocol.md is the description; this is its Python side."""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import Any, Literal

import msgspec
import trio

VERSION = 1
MAX_FRAME = 4 * 1024 * 1024
MAX_FDS = 16
LONGEST_LINE = 400
_LENGTH = struct.Struct("<I")

Descriptor = Literal["stdin", "stdout", "stderr", "workspace", "console"]


class ProtocolError(Exception):
    """The peer does not speak this protocol; the message says how."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """The command line's options as they were typed; the daemon judges them."""

    policy: str = "default"
    cwd: str | None = None
    timeout: str | None = None
    memory: str | None = None
    cpus: str | None = None
    pids: str | None = None
    net: str | None = None
    hint: str | None = None
    image: str | None = None
    session: str | None = None
    tenant: str | None = None
    workspace: Literal["rw", "ro", "cow"] | None = None
    best_effort: Literal["", "1"] = ""
    capture: Literal["", "1"] = ""
    timings: Literal["", "1"] = ""


class _Request(msgspec.Struct, frozen=True, tag_field="op", tag=str.lower, forbid_unknown_fields=True, kw_only=True):
    v: Literal[1]


class Exec(_Request, frozen=True, kw_only=True):
    """Run a tool call."""

    argv: list[bytes]
    env: list[bytes] = []
    options: Options = Options()
    fds: list[Descriptor] = []


class Signal(_Request, frozen=True, kw_only=True):
    """Signal the tool of this connection's call."""

    signal: int


class Status(_Request, frozen=True):
    """Who is there?"""


class Ps(_Request, frozen=True):
    """Which calls run?"""


class Stats(_Request, frozen=True):
    """Counters and pools."""


class Latency(_Request, frozen=True):
    """How long the phases of sandboxes took."""


class Top(_Request, frozen=True):
    """What do the calls that run use?"""


class Bursts(_Request, frozen=True):
    """What memory control does from now on: a reply for each thing, until the connection is closed."""


class Changes(_Request, frozen=True, kw_only=True):
    """What is kept of calls in copy-on-write workspaces: list it; get one, to look at or to apply; discard one."""

    action: Literal["list", "open", "take", "begin", "discard"]
    id: str = ""
    force: bool = False


class Kill(_Request, frozen=True, kw_only=True):
    """End a call, or signal it."""

    id: str
    signal: int | None = None


class Register(_Request, frozen=True, kw_only=True):
    """Control the cgroup of a container that another runtime made; from its hook."""

    id: str
    bundle: str
    """With ``id``, what it is known by: engines do not share either."""
    cgroup: str
    """As /proc/PID/cgroup has it."""
    inode: int
    """Of its directory: the cgroup's id."""
    policy: str
    tenant: str | None = None
    hint: str | None = None
    fail: Literal["", "open", "closed"] = ""
    """What the container wants to happen if its policy cannot be in force; else the policy says (``best_effort``)."""
    started: bool = False
    """Its program runs: there is no set-up to be recorded any more."""


class Unregister(_Request, frozen=True, kw_only=True):
    """A container is gone."""

    id: str
    bundle: str


Request = Exec | Signal | Status | Ps | Stats | Latency | Top | Bursts | Changes | Kill | Register | Unregister

_decoder = msgspec.msgpack.Decoder(Request)
_encode = msgspec.msgpack.Encoder().encode


def decode(frame: bytes) -> Request:
    """A request from its frame.

    Raises:
        ProtocolError: it is not one; the message names the key.
    """
    try:
        request: Request = _decoder.decode(frame)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a request of protocol version {VERSION}: {error}") from error
    return request


def result_frame(exit_code: int, json: bytes, message: str | None) -> bytes:
    """The answer to a call that was carried out."""
    answer: dict[str, Any] = {"v": VERSION, "op": "result", "exit": exit_code, "json": json}
    return frame(answer | ({"message": one_line(message)} if message else {}))


def error_frame(exit_code: int, message: str) -> bytes:
    """The answer when nothing was run."""
    return frame({"v": VERSION, "op": "error", "exit": exit_code, "message": one_line(message)})


def reply_frame(data: object) -> bytes:
    """The answer to a question."""
    return frame({"v": VERSION, "op": "reply", "data": data})


def frame(message: object) -> bytes:
    """Length and msgpack."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


def one_line(text: str) -> str:
    """Text that cannot break out of its line, nor talk to a terminal, nor fill one."""
    if len(text) > LONGEST_LINE:
        text = text[: LONGEST_LINE // 2] + " … " + text[-LONGEST_LINE // 2 :]
    return "".join(c if c.isprintable() else "?" for c in text)


async def receive_frame(sock: trio.socket.SocketType, rest: bytearray | None = None) -> tuple[bytes, list[int]] | None:
    """One frame and the descriptors that came with it (the receiver's to close); None if the peer closed before it.

    ``rest`` keeps, from one call to the next, what was received beyond a frame; without it that is an error.

    Raises:
        ProtocolError: a length that cannot be, or an end in the middle. Descriptors that came are closed.
    """
    fds: list[int] = []
    if rest is not None and len(rest) >= _LENGTH.size and len(rest) >= _LENGTH.size + _LENGTH.unpack_from(rest)[0]:
        return _take(rest), fds
    try:
        data, ancillary, flags, _ = await sock.recvmsg(65536, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % 4])
                fds += numbers
        if not data and not rest:
            return None
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError(f"more than {MAX_FDS} descriptors")
        buffer = bytearray(data) if rest is None else rest + data
        await _fill(sock, buffer, _LENGTH.size)
        (length,) = _LENGTH.unpack_from(buffer)
        if not 0 < length <= MAX_FRAME:
            raise ProtocolError(f"a frame of {length} bytes; 1 to {MAX_FRAME} are allowed")
        await _fill(sock, buffer, _LENGTH.size + length)
        if rest is not None:
            rest[:] = buffer
            return _take(rest), fds
        if len(buffer) > _LENGTH.size + length:
            raise ProtocolError("a second frame before the first was answered")
        return _take(buffer), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _take(buffer: bytearray) -> bytes:
    """Cut the complete frame at the start of ``buffer`` out of it."""
    end = _LENGTH.size + int(_LENGTH.unpack_from(buffer)[0])
    frame = bytes(buffer[_LENGTH.size : end])
    del buffer[:end]
    return frame


async def _fill(sock: trio.socket.SocketType, buffer: bytearray, size: int) -> None:
    while len(buffer) < size:
        data = await sock.recv(min(size - len(buffer), 1 << 20))
        if not data:
            raise ProtocolError(f"the connection ended {size - len(buffer)} bytes before the frame did")
        buffer += data
