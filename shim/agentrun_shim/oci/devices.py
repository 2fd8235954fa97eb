"""Devices: the nodes every container has, and the rules about all others as a program for the cgroup.

The rules of ``linux.resources.devices`` are cgroup v1's: a list, each entry changing what those before it said. cgroup v2 has no
files for them but asks a BPF program (Documentation/admin-guide/cgroup-v2.rst, "Device controller"). So the list is played
through to what remains of it, a default and exceptions, and those are compiled.
"""

from __future__ import annotations

from struct import Struct

from agentrun_shim.oci.errors import OciError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NODES = (
    ("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0),
)  # fmt: skip
"""config-linux.md, "Default Devices"."""
LINKS = (
    ("/proc/self/fd", "/dev/fd"), ("/proc/self/fd/0", "/dev/stdin"), ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"), ("pts/ptmx", "/dev/ptmx"),
)  # fmt: skip
_KINDS = {"b": 0o060000, "c": 0o020000, "u": 0o020000, "p": 0o010000}
_BLOCK, _CHAR = 1, 2
_ACCESS = {"m": 1, "r": 2, "w": 4}
_ANY = -1
# Nobody is kept from making nodes (which says nothing about opening them), nor from the default devices and terminals.
_ALWAYS = [
    ("c", _ANY, _ANY, "m"), ("b", _ANY, _ANY, "m"), *[("c", major, minor, "rwm") for _, major, minor in NODES],
    ("c", 5, 2, "rwm"), ("c", 136, _ANY, "rwm"), ("c", 5, 1, "rwm"),
]  # fmt: skip
_INSTRUCTION = Struct("<BBhi")
_LDX_W, _MOV, _AND, _RSH, _EXIT, _MOV_REG = 0x61, 0xB7, 0x57, 0x77, 0x95, 0xBF
_JNE, _JEQ = 0x55, 0x15


def node(device: dict[str, Any]) -> tuple[str, int, int, int, int]:
    """path, mode with type, device number as mknod(2) takes it, uid, gid of an entry of ``linux.devices``.

    Raises:
        OciError: it has no type or path.
    """
    path, kind = device.get("path"), device.get("type")
    if kind not in _KINDS or not isinstance(path, str) or not path.startswith("/"):
        raise OciError(f"linux.devices: {path!r}: a device has an absolute path, and type b, c, u or p, not {kind!r}")
    mode = device.get("fileMode")
    return (
        path, _KINDS[kind] | (0o666 if mode is None else mode), number(device.get("major", 0), device.get("minor", 0)),
        device.get("uid", 0), device.get("gid", 0),
    )  # fmt: skip


def number(major: int, minor: int) -> int:
    """A device number as mknod(2) takes it (include/linux/kdev_t.h, new_encode_dev)."""
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


Key = tuple[str, int, int]


def play(rules: list[dict[str, Any]]) -> tuple[bool, dict[Key, int]]:
    """What a list of rules comes to: whether devices are allowed by default, and the access bits of those that differ.

    Raises:
        OciError: a rule that is none.
    """
    default, rest = True, dict[Key, int]()
    for rule in rules:
        kind, allow = rule.get("type", "a"), bool(rule.get("allow"))
        major, minor = rule.get("major"), rule.get("minor")
        access = rule.get("access") or "rwm"
        if kind not in ("a", "b", "c", "u") or not set(access) <= set(_ACCESS):
            raise OciError(f"linux.resources.devices: type {kind!r}, access {access!r}: types are a, b, c; access is of r, w, m")
        if kind == "a":
            default = allow
            rest.clear()
            continue
        _change(default, rest, allow, (
            "c" if kind == "u" else kind, _ANY if major is None else major, _ANY if minor is None else minor
        ), sum([_ACCESS[letter] for letter in set(access)]))  # fmt: skip
    return default, rest


def _change(default: bool, rest: dict[Key, int], allow: bool, key: Key, bits: int) -> None:
    if allow != default:
        rest[key] = rest.get(key, 0) | bits
        return
    for other in list(rest):
        if other[0] == key[0] and key[1] in (_ANY, other[1]) and key[2] in (_ANY, other[2]):
            rest[other] &= ~bits
            if not rest[other]:
                del rest[other]


def compile_rules(rules: list[dict[str, Any]]) -> bytes:
    """The rules as a BPF_PROG_TYPE_CGROUP_DEVICE program; ``b""`` where everything is allowed anyway.

    Raises:
        OciError: see ``play``.
    """
    default, rest = play(rules)
    for kind, major, minor, access in _ALWAYS:
        _change(default, rest, True, (kind, major, minor), sum([_ACCESS[letter] for letter in access]))
    if default and not rest:
        return b""
    # struct bpf_cgroup_dev_ctx: access << 16 | type, major, minor
    code = [
        _op(_LDX_W, 2, 1, 0), _op(_MOV_REG, 3, 2), _op(_AND, 3, value=0xFFFF), _op(_RSH, 2, value=16),
        _op(_LDX_W, 4, 1, 4), _op(_LDX_W, 5, 1, 8),
    ]  # fmt: skip
    for (kind, major, minor), bits in rest.items():
        tests = [(3, _JNE, _BLOCK if kind == "b" else _CHAR)]
        tests += [(4, _JNE, major)] if major != _ANY else []
        tests += [(5, _JNE, minor)] if minor != _ANY else []
        # An exception that allows must allow all that is asked for; one that denies, any of it.
        mask = (~bits & 7) if not default else bits
        body = [_op(_MOV_REG, 6, 2), _op(_AND, 6, value=mask), _op(_JNE if not default else _JEQ, 6, 0, 2, 0)]
        body += [_op(_MOV, 0, value=int(not default)), _op(_EXIT)]
        ahead = len(tests) + len(body)
        code += [_op(jump, register, 0, ahead - at - 1, value) for at, (register, jump, value) in enumerate(tests)] + body
    code += [_op(_MOV, 0, value=int(default)), _op(_EXIT)]
    return b"".join(code)


def _op(code: int, destination: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, source << 4 | destination, offset, value)
