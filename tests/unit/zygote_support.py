# SPDX-License-Identifier: Apache-2.0
"""The real zygote over a bare socket, with the test in the daemon's place, and plans to spoil."""

import array
import contextlib
import fcntl
import os
import random
import signal
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from agentrun.policy import DEFAULT
from agentrun.rootfs import RootFs, open_host_root
from agentrun.shape import plan_shape, shape_of
from agentrun_shim.native import slot_program
from agentrun_shim.plan import DONE_SIZE, EVENT_SIZE, HEADER_SIZE, Done, Event, Kind, SlotFlag, pack_slot, unpack_done, unpack_event

MAPS = [(False, 0, 300_000, 65536), (True, 0, 300_000, 65536)]
PATIENCE = 10.0
"""Seconds after which something that did not answer is said to hang."""


class Gone(Exception):
    """The zygote has closed its socket."""


class RawZygote:
    """A zygote without a plan yet."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE)
        life, self.life = os.pipe2(os.O_CLOEXEC)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (theirs.fileno(), life)]
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_DUP2, 0, 2),
            (os.POSIX_SPAWN_DUP2, high[0], 3),
            (os.POSIX_SPAWN_DUP2, high[1], 4),
        ]
        self.pid = os.posix_spawn(slot_program(), ["agentrun-zygote"], {}, file_actions=actions)
        theirs.close()
        for fd in (life, *high):
            os.close(fd)
        self.status: int | None = None

    def ask(self, message: bytes, fds: Sequence[int] = ()) -> tuple[Done, list[int]]:
        """One datagram, one answer, and the descriptors that came with it."""
        try:
            socket.send_fds(self.sock, [message], array.array("i", fds))
            data, received, flags, _ = socket.recv_fds(self.sock, DONE_SIZE + 1, 8)
        except (BrokenPipeError, ConnectionResetError):
            raise Gone from None
        if not data:
            raise Gone
        assert not flags & socket.MSG_CTRUNC
        return unpack_done(data), received

    def shape(self, fds: Sequence[int], message: bytes) -> Done:
        done, received = self.ask(message, fds)
        assert received == []
        return done

    def descriptors(self) -> list[str]:
        return sorted(os.listdir(f"/proc/{self.pid}/fd"), key=int)

    @property
    def alive(self) -> bool:
        return self.status is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self) -> int:
        """Its wait status, once it has ended by itself."""
        if self.status is None:
            fd = os.pidfd_open(self.pid)
            try:
                assert ready(fd), "the zygote lives on"
            finally:
                os.close(fd)
            self.status = os.waitpid(self.pid, 0)[1]
        return self.status

    def close(self) -> None:
        self.sock.close()
        os.close(self.life)
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


class RawSlot:
    """init and runner, from an answer; ``control`` is our end of the runner's socket."""

    def __init__(self, done: Done, pidfds: list[int], control: socket.socket) -> None:
        self.done, self.pidfds, self.control = done, pidfds, control
        control.settimeout(PATIENCE)

    def event(self) -> Event | None:
        """The runner's next event; None at its end."""
        data = b""
        while len(data) < EVENT_SIZE:
            try:
                piece = self.control.recv(EVENT_SIZE - len(data))
            except ConnectionResetError:
                return None
            if not piece:
                assert data == b""
                return None
            data += piece
        return unpack_event(data)

    def dispose(self) -> list[int]:
        """Kill and collect both; their exit statuses, the runner's first (a signal is negative)."""
        self.control.close()
        return collect(self.pidfds)


def collect(pidfds: list[int], *, kill: bool = True) -> list[int]:
    """End and reap clones by their pidfds, the runner before init, as init's exit waits for its namespace to be reaped."""
    statuses = []
    for pidfd in reversed(pidfds):
        if kill:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert ready(pidfd), "a killed clone does not die"
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        statuses.append(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
        os.close(pidfd)
    return statuses


def ready(fd: int) -> bool:
    """Readable within PATIENCE."""
    import select

    return bool(select.select([fd], [], [], PATIENCE)[0])


def children() -> set[int]:
    """Pids of this process's children, zombies too."""
    return {int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


@contextlib.contextmanager
def host_plan() -> Iterator[tuple[bytes, RootFs]]:
    """The default policy's plan, and mounts for one zygote."""
    root = open_host_root()
    try:
        yield plan_shape(shape_of(DEFAULT), root), root
    finally:
        root.close()


def ready_zygote() -> RawZygote:
    with host_plan() as (plan, root):
        zygote = RawZygote()
        done = zygote.shape(root.fds, plan)
    assert done.error == 0, done
    return zygote


def clone(zygote: RawZygote, leaf: int = -1, flags: SlotFlag = SlotFlag(0)) -> RawSlot:
    """A correct slot, READY."""
    ours, theirs = socket.socketpair()
    fds = [theirs.fileno()] if leaf < 0 else [theirs.fileno(), leaf]
    done, received = zygote.ask(pack_slot(flags if leaf < 0 else flags | SlotFlag.LEAF, MAPS, len(fds)), fds)
    theirs.close()
    slot = RawSlot(done, received, ours)
    assert done.error == 0, done
    event = slot.event()
    assert event is not None
    assert event.kind is Kind.READY, event
    return slot


# ---------------------------------------------------------------- spoiling

OP_ROOT, OP_MOVE, OP_IDS, OP_FILTER = 1, 2, 33, 34
OP_AT = HEADER_SIZE + 8


def header(message: bytes, *, nfds: int | None = None) -> bytes:
    """The message with a header that tells its length, so that only what is inside is wrong."""
    spoilt = bytearray(message)
    struct.pack_into("<I", spoilt, 8, len(spoilt))
    if nfds is not None:
        struct.pack_into("<I", spoilt, 12, nfds)
    return bytes(spoilt)


def split_ops(plan: bytes) -> list[bytes]:
    at, ops = OP_AT, []
    while at < len(plan):
        size = struct.unpack_from("<I", plan, at + 4)[0]
        ops.append(plan[at : at + size])
        at += size
    return ops


def join_ops(plan: bytes, ops: Sequence[bytes], count: int | None = None) -> bytes:
    body = plan[HEADER_SIZE : HEADER_SIZE + 4] + struct.pack("<I", len(ops) if count is None else count) + b"".join(ops)
    return header(plan[:HEADER_SIZE] + body)


def put(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + struct.pack("<I", value & 0xFFFFFFFF) + data[at + 4 :]


def kind(op: bytes) -> int:
    return struct.unpack_from("<I", op)[0]


def find(ops: list[bytes], *kinds: int) -> int:
    return next(number for number, op in enumerate(ops) if kind(op) in kinds)


def spoil_plan(rng: random.Random, plan: bytes, nfds: int) -> tuple[str, bytes]:
    """A plan that must be refused, and what is wrong with it."""
    ops = split_ops(plan)
    texts = [number for number, op in enumerate(ops) if kind(op) not in (OP_ROOT, OP_IDS, OP_FILTER, 20, 32)]
    number = rng.randrange(len(ops))
    what = rng.choice(SPOILS)
    if what == "truncated":
        return what, header(plan[: rng.randrange(HEADER_SIZE, len(plan))])
    if what == "longer":
        return what, header(plan + rng.randbytes(rng.randrange(1, 64)))
    if what == "count":
        return what, join_ops(plan, ops, rng.choice([n for n in (0, 1, len(ops) - 1, len(ops) + 1, 2**31, 2**32 - 1)]))
    if what == "size":
        size = rng.choice([0, 1, 8, 16, 23, len(ops[number]) + 4, 2**31, 2**32 - 8, 2**32 - 1, rng.randrange(2**16, 2**32)])
        ops[number] = put(ops[number], 4, size)
    elif what == "type":
        ops[number] = put(ops[number], 0, rng.choice([0, 5, 15, 23, 31, 35, 255, 256, 2**16 + 1, 2**32 - 1]))
    elif what == "unterminated":
        number = rng.choice(texts)
        ops[number] = ops[number][:24] + bytes(b or 1 for b in ops[number][24:])
    elif what == "fd":
        number = rng.choice([n for n, op in enumerate(ops) if kind(op) in (OP_ROOT, OP_MOVE)])
        ops[number] = put(ops[number], 8, rng.choice([nfds, nfds + 1, 64, 2**31, 2**32 - 1]))
    elif what == "filter":
        number = find(ops, OP_FILTER)
        ops[number] = put(ops[number], 8, rng.choice([0, (len(ops[number]) - 24) // 8 + 1, 4097, 2**29 + 1, 2**31, 2**32 - 1]))
    elif what == "no ids":
        del ops[find(ops, OP_IDS)]
    elif what == "root's ids":
        number = find(ops, OP_IDS)
        ops[number] = put(ops[number], 8, 0)
    elif what == "no root":
        del ops[find(ops, OP_ROOT)]
    elif what == "two roots":
        ops.insert(rng.randrange(1, len(ops)), ops[0])
    elif what == "late root":
        other = rng.randrange(1, len(ops))
        ops[0], ops[other] = ops[other], ops[0]
    else:
        assert what == "namespaces"
        flags = struct.unpack_from("<I", plan, HEADER_SIZE)[0]
        bad = rng.choice([0, 0x80, 0x100, 0x10000, 2**31, 2**32 - 1, *(flags & ~bit for bit in (0x20000, 0x10000000, 0x20000000))])
        return what, put(plan, HEADER_SIZE, bad)
    return what, join_ops(plan, ops)


SPOILS = (
    "truncated", "longer", "count", "size", "type", "unterminated", "fd", "filter", "no ids", "root's ids", "no root", "two roots",
    "late root", "namespaces",
)  # fmt: skip


def flip(rng: random.Random, message: bytes, first: int = 0, last: int | None = None) -> bytes:
    spoilt = bytearray(message)
    for _ in range(rng.randrange(1, 4)):
        spoilt[rng.randrange(first, last or len(spoilt))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)
