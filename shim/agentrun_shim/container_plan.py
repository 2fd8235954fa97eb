"""The plan of an OCI container: a straight-line program that ``shim/native/oci_*.c`` executes, packed here.

A slot's plan (``plan``) is walked by three processes and kept for many sandboxes. A container is made once, so its plan is a
list that is executed from its first operation to its last, first by a helper process, from CLONE on by the container's own::

    helper      JOIN LEAF TREE ATTR ...     what needs the host: its paths, its namespaces, its privileges
                CLONE                       the container's process is born, in its leaf, a child of whoever asked
    container   ROOT FSMOUNT ATTACH ...     what needs the container's namespaces, within its root
                PIVOT CWD FIND PARK         the host is out of sight; wait for `start`
                IDS CAPS SECCOMP EXEC       give up rights; become the program

What both plans need (ids, host name, loopback) has the same numbers and the same code. This module is read at every start of
the runtime, so it imports next to nothing: no enum, no typing.
"""

from __future__ import annotations

from struct import Struct

KIND = 6
"""``plan.Kind.CONTAINER``."""
MAGIC, VERSION = 0x4C505241, 1

OPS = {
    # shared with slots
    "HOSTNAME": (19, 1),
    "LOOPBACK": (20, 0),
    "IDS": (33, 0),
    # helper
    "JOIN": (64, 1),  # enter the namespace at a path; a its CLONE_NEW* flag
    "ENTER": (65, 0),  # enter namespaces b of the process whose pidfd is a
    "UNSHARE": (66, 0),  # new namespaces a, for this process and those it clones
    "LEAF": (67, 1),  # what is cloned is born in this cgroup
    "PROGRAM": (68, 1),  # attach a device program of a instructions to a cgroup
    "TREE": (
        69,
        1,
    ),  # slot a: a clone of the mount at a path; recursive if b; idmapped by user namespace slot c-1, recursive if d
    "ATTR": (70, 0),  # mount of slot a: set b, clear c; d: 1 recursive, and propagation flags
    "USERNS": (71, 0),  # slot a: a user namespace with b maps in the payload
    "OPEN": (72, 1),  # slot a: a file, opened with flags b
    "CONSOLE": (73, 1),  # connect to the socket that wants the terminal
    "AGENT": (74, 1),  # connect to the seccomp agent
    "LISTEN": (75, 1),  # the socket that `start` connects to
    "CLONE": (76, 0),  # the container's process, in new namespaces a
    # container, before its root is the root
    "WAIT": (77, 0),  # for byte a from the creator
    "STATE": (78, 0),  # receive the state that hooks are given
    "ROOT": (79, 1),  # propagation b of what is there; attach slot a at a path: the root to be
    "MASTER": (80, 0),  # user and group 0 of the user namespace
    "FSMOUNT": (81, 4),  # a new file system: type, source, destination, options by line; attributes a, propagation c, flags d
    "ATTACH": (82, 1),  # slot a at a destination
    "NODE": (83, 1),  # device node: mode a, device b, owner c:d; bound from the host where nodes cannot be made
    "LINK": (84, 2),  # symbolic link: target, path; one that is there stays
    "MASKED": (85, 1),  # nothing to be seen at a path
    "FROZEN": (86, 1),  # a path made read-only
    "WRITE": (87, 2),  # a host file: path, text
    "DOMAIN": (88, 1),  # setdomainname
    "TTY": (89, 0),  # a terminal of the container's as its streams, owner a, b rows, c columns; d: bound to /dev/console too
    "HOOK": (90, 1),  # run a program: a arguments, b variables in the payload, c seconds
    "ROOT_ATTR": (91, 0),  # mount attributes a of the root
    "PIVOT": (92, 0),  # into the root; a: without pivot_root; b propagation of the root afterwards
    # container, inside
    "CWD": (93, 1),  # working directory; a: made if it is not there
    "FIND": (94, 2),  # is there a program: name, PATH; b: look up the home of user a, too
    "PARK": (95, 0),  # tell the creator, and wait for `start`
    "LIMIT": (96, 0),  # resource limit a; two 64-bit numbers in the payload
    "BOUND": (97, 0),  # bounding set
    "KEEP": (98, 0),  # keep capabilities across setuid
    "RAISE": (99, 0),  # all permitted capabilities effective
    "CAPS": (100, 0),  # effective, permitted, inheritable, ambient
    "NNP": (101, 0),  # no_new_privs
    "SECCOMP": (102, 0),  # filter of a instructions, flags b; c: its listener goes to the agent
    "LABEL": (103, 1),  # write a text to slot a
    "PERSONALITY": (104, 0),
    "SCHED": (105, 0),  # struct sched_attr in the payload
    "IOPRIO": (106, 0),
    "UMASK": (107, 0),
    "KEYRING": (108, 1),  # a session keyring of this name
    "EXEC": (109, 0),  # become the program: a arguments, b variables in the payload; c: the last is HOME, as FIND found it
    "AFFINITY": (110, 0),  # processors: a mask of a bytes in the payload
    "MEMPOLICY": (111, 0),  # memory policy: mode a, nodes: a mask of b bytes in the payload
    "SESSION": (112, 0),  # setsid
}
"""Every operation: its number, and how many NUL-terminated strings its payload begins with."""

COPY_UP = 1
BIND_INSTEAD = 2
"""Flags of FSMOUNT: copy what is at the destination into it; where it may not be made, bind the host's (the source's path)."""

# What is said on the pipe to the creator: struct plan_event. `op` is the operation's number, or the pid where one was cloned.
READY, STARTED, FAILED, CLONED, PARKED = 17, 18, 19, 20, 21
EVENT = Struct("<IIiIQ")
_OP = Struct("<6I")
_HEAD = Struct("<IHHIIII")


class Plan:
    """A plan being written; ``about[n]`` says in words what operation ``n`` does, for the error message if it fails."""

    def __init__(self) -> None:
        self.ops: list[bytes] = []
        self.about: list[str] = []
        self.slots = 0
        self.names: list[str] = []

    def slot(self) -> int:
        """A new place in the native side's table of descriptors."""
        self.slots += 1
        return self.slots - 1

    def add(
        self, name: str, *strings: str | bytes, a: int = 0, b: int = 0, c: int = 0, d: int = 0, blob: bytes = b"", about: str = ""
    ) -> None:
        """Append one operation.

        Raises:
            ValueError: a NUL in a string, which would end it early.
        """
        number, count = OPS[name]
        assert len(strings) == count, name
        raw = [text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape") for text in strings]
        if any(0 in text for text in raw):
            raise ValueError(f"a NUL byte in {about or name}")
        payload = b"".join([text + b"\0" for text in raw])
        if raw and blob:
            payload += bytes(-len(payload) % 8)
        payload += blob
        payload += bytes(-len(payload) % 8)
        self.ops.append(_OP.pack(number, _OP.size + len(payload), a, b, c, d) + payload)
        self.about.append(about or name.lower())
        self.names.append(name)

    def pack(self) -> bytes:
        """The message."""
        body = b"".join(self.ops)
        return _HEAD.pack(MAGIC, VERSION, KIND, _HEAD.size + len(body), 0, 0, len(self.ops)) + body


def strings(items: list[str]) -> bytes:
    """The payload of a list of strings.

    Raises:
        ValueError: a NUL in one.
    """
    raw = [item.encode("utf-8", "surrogateescape") for item in items]
    if any(0 in item for item in raw):
        raise ValueError("a NUL byte in the command line or environment")
    return b"".join([item + b"\0" for item in raw])


def c_header() -> list[str]:
    """The lines of the C header about containers."""
    body = ", ".join(f"COP_{name} = {number}" for name, (number, _) in OPS.items())
    lines = [f"enum {{ {body} }};", "static const struct { uint8_t type, strings; } container_strings[] = {"]
    lines += [f"    {{{number}, {count}}}," for number, count in OPS.values()]
    lines.append("};")
    lines.append(f"enum {{ EVENT_CLONED = {CLONED}, EVENT_PARKED = {PARKED} }};")
    lines.append(f"enum {{ FSMOUNT_COPY_UP = {COPY_UP}, FSMOUNT_BIND_INSTEAD = {BIND_INSTEAD} }};")
    return lines
