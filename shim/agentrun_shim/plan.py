"""The plan: every message between the daemon and the native slot, defined once.

The native side (``shim/native``) decides nothing. It executes a *plan*: a flat list of operations, versioned and
length-checked, that this module packs. The C header is generated from the tables below when the package is built
(``python -m agentrun_shim.plan``), so the two sides cannot drift apart.

Who talks to whom::

    daemon ──SHAPE──► zygote            once: build the mount template of one shape, keep the rest of the plan
           ◄──DONE───
    daemon ──SLOT───► zygote            many times: clone init and runner into a leaf
           ◄──DONE───         + [init pidfd, runner pidfd]
    daemon ◄──READY── runner            the sandbox is warm
    daemon ──RUN────► runner            argv, env, cwd, stdio: become the tool
           ◄─STARTED─                   the instant before execve
           ◄─FAILED──                   or the step and errno that stopped it
    daemon ──USERNS─► zygote            a user namespace with given maps, for idmapped mounts
           ◄──DONE───         + [namespace fd]

Zygote messages are datagrams (SOCK_SEQPACKET), RUN is a header and a body on a stream, so that a command line may be as
long as the kernel allows. All integers are little-endian, as the machine's.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from agentrun_shim import container_plan

MAGIC = 0x4C505241  # "ARPL"
VERSION = 1
MAX_MESSAGE = 65536
"""Longest zygote datagram, bytes."""
MAX_RUN = 4 * 1024 * 1024
"""Longest RUN body, bytes. The kernel's own bound on argv and environment is a quarter of the stack limit: 2 MiB."""
MAX_FILTER = 4096
"""Most seccomp instructions: BPF_MAXINSNS of linux/bpf_common.h."""


class Kind(enum.IntEnum):
    """What a message is."""

    SHAPE = 1
    SLOT = 2
    USERNS = 3
    RUN = 4
    ATTACH = 5
    CONTAINER = 6  # see container_plan
    DONE = 16
    READY = 17
    STARTED = 18
    FAILED = 19


class Op(enum.IntEnum):
    """One operation of a SHAPE plan. Who executes it: T the zygote's template, I init, R the runner."""

    ROOT = 1  # T  fd a becomes the root of the template; b is the oom_score_adj of everything that is made from it
    MOVE = 2  # T  attach detached mount fd a at path
    BIND = 3  # T  bind path to path
    SETATTR = 4  # T  mount_setattr(path): set flags a, recursive if b
    MOUNT = 16  # I  new file system: type, target, options; mount flags a
    MKDIR = 17  # I  directory with mode a, owner b:c (ids inside)
    SLOT_BIND = 18  # I  bind path to path; a: not before a workspace is attached below it
    HOSTNAME = 19  # I  sethostname
    LOOPBACK = 20  # I  bring lo up
    MASK = 21  # I  path: an empty file or directory instead, if it is there
    READ_ONLY = 22  # I  path: read-only, if it is there
    RLIMIT = 32  # R  resource a; soft b, hard c (0xFFFFFFFF: unlimited; in units of d bytes)
    IDS = 33  # R  uid a, gid b; c supplementary groups in the payload, 32 bits each
    FILTER = 34  # R  seccomp program of a instructions; b: report what it refuses to a listener
    LANDLOCK = 35  # R  ruleset: handled a, scoped b; access c for the workspace; restrict_self flags d
    WRITABLE = 36  # R  path: access a beneath it


STRINGS = {
    Op.MOVE: 1, Op.BIND: 2, Op.SETATTR: 1, Op.MOUNT: 3, Op.MKDIR: 1, Op.SLOT_BIND: 2, Op.HOSTNAME: 1,
    Op.MASK: 1, Op.READ_ONLY: 1, Op.WRITABLE: 1,
}  # fmt: skip
"""How many NUL-terminated strings an operation's payload holds; the others have none."""


class Step(enum.IntEnum):
    """Where something failed; FAILED and DONE carry it so that an error names the step."""

    NONE = 0
    MESSAGE = 1
    PLAN = 2
    TEMPLATE = 3
    CLONE_INIT = 4
    CLONE_RUNNER = 5
    ID_MAP = 6
    LEAF = 7
    ENTER = 8
    MOUNTS = 9
    NETWORK = 10
    IDENTITY = 11
    CAPABILITIES = 12
    FILTER = 13
    RLIMITS = 14
    STDIO = 15
    WORKSPACE = 16
    WORKING_DIRECTORY = 17
    TERMINAL = 18
    EXEC = 19
    LANDLOCK = 20


class SlotFlag(enum.IntFlag):
    """Flags of a SLOT request and of its answer."""

    LEAF = 1  # the second fd is the leaf
    NO_CLONE3 = 2  # request: use the fallback; answer: it was used


class RunFlag(enum.IntFlag):
    """Flags of a RUN request."""

    TERMINAL = 1  # the first fd is the console socket; there are no stdio fds
    ATTACH = 2  # the last fd is a mount to attach before the tool starts


# name -> its fields, in wire order; every struct is naturally aligned.
_LAYOUT = {
    "plan_header": "magic:u32 version:u16 kind:u16 length:u32 nfds:u32",
    "plan_shape": "namespaces:u32 nops:u32",
    "plan_op": "type:u32 size:u32 a:u32 b:u32 c:u32 d:u32",
    "plan_slot": "flags:u32 nmaps:u32",
    "plan_map": "gid:u32 inside:u32 outside:u32 count:u32",
    "plan_done": "error:i32 step:u32 init:i32 runner:i32 flags:u32 op:u32",
    "plan_run": "flags:u32 argc:u32 envc:u32 umask:u32 nproc:u32 reserved:u32",
    "plan_attach": "flags:u32 pathlen:u32",
    "plan_event": "kind:u32 step:u32 error:i32 op:u32 ns:u64",
}
_C_TYPES = {"u16": "uint16_t", "u32": "uint32_t", "i32": "int32_t", "u64": "uint64_t"}
_CODES = {"uint16_t": "H", "uint32_t": "I", "int32_t": "i", "uint64_t": "Q"}


def _fields(layout: str) -> list[tuple[str, str]]:
    return [(name, _C_TYPES[kind]) for name, kind in (field.split(":") for field in layout.split())]


STRUCTS = {name: _fields(layout) for name, layout in _LAYOUT.items()}
"""Every struct of the format: name → [(field, C type)]."""
_STRUCT = {name: struct.Struct("<" + "".join(_CODES[kind] for _, kind in fields)) for name, fields in STRUCTS.items()}
HEADER_SIZE = _STRUCT["plan_header"].size
EVENT_SIZE = _STRUCT["plan_event"].size
DONE_SIZE = HEADER_SIZE + _STRUCT["plan_done"].size


class PlanError(ValueError):
    """A message that breaks the format: too long, a NUL inside a string, an unknown kind."""


class Done(NamedTuple):
    """The zygote's answer. ``error`` is an errno or 0; pids are 0 where there is no process."""

    error: int
    step: Step
    init: int
    runner: int
    flags: SlotFlag
    op: int


class Event(NamedTuple):
    """What a runner reports. ``ns`` is CLOCK_MONOTONIC; ``op`` the number of the plan operation that failed."""

    kind: Kind
    step: Step
    error: int
    op: int
    ns: int

    @classmethod
    def of(cls, fields: tuple[int, int, int, int, int]) -> Event:
        """An event from its fields."""
        return cls(Kind(fields[0]), Step(fields[1]), *fields[2:])


def pack_op(op: Op, *strings: bytes, a: int = 0, b: int = 0, c: int = 0, d: int = 0, blob: bytes = b"") -> bytes:
    """One operation of a SHAPE plan.

    Raises:
        PlanError: the number of strings is not the operation's, or one contains a NUL.
    """
    if len(strings) != STRINGS.get(op, 0):
        raise PlanError(f"{op.name} takes {STRINGS.get(op, 0)} strings, not {len(strings)}")
    payload = b"".join(_terminated(s) for s in strings) + blob
    payload += bytes(-len(payload) % 8)
    head = _STRUCT["plan_op"]
    return head.pack(op, head.size + len(payload), a, b, c, d) + payload


def pack_shape(namespaces: int, ops: Sequence[bytes], nfds: int) -> bytes:
    """The SHAPE message: clone flags of the slot's namespaces and its operations."""
    return _message(Kind.SHAPE, nfds, _STRUCT["plan_shape"].pack(namespaces, len(ops)) + b"".join(ops))


def pack_slot(flags: SlotFlag, maps: Iterable[tuple[bool, int, int, int]], nfds: int) -> bytes:
    """The SLOT message; ``maps`` are (is a gid map, first id inside, first id outside, count).

    The first one's id outside owns the sandbox's user namespace: what the kernel counts by user is counted for it.
    """
    return _message(Kind.SLOT, nfds, _maps(flags, maps))


def pack_userns(maps: Iterable[tuple[bool, int, int, int]]) -> bytes:
    """The USERNS message: make a user namespace with these maps and send its fd."""
    return _message(Kind.USERNS, 0, _maps(SlotFlag(0), maps))


def pack_run(
    argv: Sequence[bytes],
    env: Sequence[bytes],
    *,
    cwd: bytes,
    flags: int,
    umask: int,
    nproc: int,
    attach: bytes,
    nfds: int,
) -> bytes:
    """The RUN message: header and body. ``flags`` are RunFlag's; ``nproc`` is the call's RLIMIT_NPROC, 0 to keep the shape's.

    Raises:
        PlanError: a NUL in a string, or a body longer than MAX_RUN.
    """
    # One join and one count instead of a check for each string: this is on the way of every call.
    strings = b"\0".join([cwd, attach, *argv, *env, b""])
    if strings.count(b"\0") != 2 + len(argv) + len(env):
        raise PlanError("a NUL byte in the command line or environment")
    body = _STRUCT["plan_run"].pack(flags, len(argv), len(env), umask, nproc, 0) + strings
    if len(body) > MAX_RUN:
        raise PlanError(f"the command line and environment take {len(strings)} bytes; the limit is {MAX_RUN}")
    return _STRUCT["plan_header"].pack(MAGIC, VERSION, Kind.RUN, HEADER_SIZE + len(body), nfds) + body


def unpack_done(data: bytes) -> Done:
    """Decode the zygote's answer.

    Raises:
        PlanError: it is not one of this version.
    """
    if len(data) != DONE_SIZE:
        raise PlanError(f"the zygote's answer has {len(data)} bytes, not {DONE_SIZE}")
    magic, version, kind, _length, _nfds = _STRUCT["plan_header"].unpack_from(data)
    if (magic, version, kind) != (MAGIC, VERSION, Kind.DONE):
        raise PlanError(f"the zygote answers in version {version}, kind {kind}; this is version {VERSION}")
    error, step, init, runner, flags, op = _STRUCT["plan_done"].unpack_from(data, HEADER_SIZE)
    try:
        return Done(error, Step(step), init, runner, SlotFlag(flags), op)
    except ValueError as unknown:
        raise PlanError(f"the zygote's answer is not of version {VERSION}: {unknown}") from unknown


def unpack_event(data: bytes) -> Event:
    """Decode one event of a runner (the first ``EVENT_SIZE`` bytes of ``data``)."""
    return Event.of(_STRUCT["plan_event"].unpack_from(data))


def unpack_events(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """The whole events in ``data``, as they came: the fields of ``Event``, for ``Event.of``."""
    return _STRUCT["plan_event"].iter_unpack(data[: len(data) - len(data) % EVENT_SIZE])


def _terminated(text: bytes) -> bytes:
    if b"\0" in text:
        raise PlanError(f"a NUL byte in {text[:64]!r}")
    return text + b"\0"


def _maps(flags: SlotFlag, maps: Iterable[tuple[bool, int, int, int]]) -> bytes:
    entries = [_STRUCT["plan_map"].pack(*entry) for entry in maps]
    return _STRUCT["plan_slot"].pack(flags, len(entries)) + b"".join(entries)


def _message(kind: Kind, nfds: int, body: bytes) -> bytes:
    length = HEADER_SIZE + len(body)
    if length > MAX_MESSAGE:
        raise PlanError(f"a {kind.name} plan of {length} bytes; the limit is {MAX_MESSAGE}")
    return _STRUCT["plan_header"].pack(MAGIC, VERSION, kind, length, nfds) + body


def c_header() -> str:
    """This module's tables as the C header the native programs are compiled with."""
    lines = ["// Generated from agentrun_shim/plan.py by `python -m agentrun_shim.plan`. Do not edit.", "#pragma once"]
    lines += ["#include <stdint.h>", ""]
    for constant in ("MAGIC", "VERSION", "MAX_MESSAGE", "MAX_RUN", "MAX_FILTER"):
        lines.append(f"#define PLAN_{constant} {globals()[constant]:#x}u")
    for prefix, members in (("KIND", Kind), ("OP", Op), ("STEP", Step), ("SLOT", SlotFlag), ("RUN", RunFlag)):
        body = ", ".join(f"{prefix}_{m.name} = {m.value}" for m in members)
        lines.append(f"enum {{ {body} }};")
    lines.append("static const struct { uint8_t type, strings; } op_strings[] = {")
    lines += [f"    {{{op.value}, {STRINGS.get(op, 0)}}}," for op in Op]
    lines.append("};")
    lines += container_plan.c_header()
    for name, fields in STRUCTS.items():
        lines.append(f"struct {name} {{ {' '.join(f'{kind} {field};' for field, kind in fields)} }};")
        lines.append(f'_Static_assert(sizeof(struct {name}) == {_STRUCT[name].size}, "{name}");')
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(c_header(), end="")
