"""Rules that go in front of every profile, for what they keep off is the host, and no business of the sandbox's.

Set-id bits. A sandbox never honours setuid and setgid bits. But a file that a tool makes in a writable workspace is the caller's
on the host, and root's if root called; with a setuid bit on it, any user of the host could become the caller through it. The
kernel lets an owner set the bits, so the calls that set them are refused, as systemd's RestrictSUIDSGID= refuses them. openat2(2)
takes its mode in memory, which a filter cannot see: it does not exist here, and libraries fall back on openat.

Siblings. The tool is the daemon's child, so what it clones with CLONE_PARENT is so too, and nobody would ever collect it.
clone3(2) has its flags in memory as well: it does not exist here, and libraries fall back on clone.
"""

from __future__ import annotations

import errno
from typing import Final

import msgspec

from agentrun_shim.seccomp_profile import Action, Condition, Profile, Rule
from agentrun_shim.syscall_table import NUMBERS

_REFUSED: Final = Action("errno", errno.EPERM)
_IGNORED: Final = Action("errno", 0)
_ABSENT: Final = Action("errno", errno.ENOSYS)
_CLONE_PARENT: Final = 0x8000
_RLIMIT_CORE: Final = 4
_SET_IDS: Final = (0o4000, 0o2000)
_CREATING: Final = (0o100, 0o20000000)  # O_CREAT and the bit of O_TMPFILE that is its own: without them there is no mode
_MODE_AT: Final = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "creat": 1, "mknod": 1, "mknodat": 2}
"""System call → which argument is the mode."""
_OPEN_AT: Final = {"open": (1, 2), "openat": (2, 3)}
"""System call → which arguments are the flags and the mode."""


def harden(profile: Profile) -> Profile:
    """The profile with these rules in front of its own."""
    front: dict[str, list[Rule]] = {"openat2": [Rule(_ABSENT)], "clone3": [Rule(_ABSENT)]}
    front["clone"] = [Rule(_REFUSED, (_has(0, _CLONE_PARENT),))]
    # RLIMIT_CORE stays 1: at 0 the kernel runs the host's handler of dumps (coredump.c). `ulimit -c 0` may believe it worked.
    front["setrlimit"] = [Rule(_IGNORED, (_is(0, _RLIMIT_CORE),))]
    front["prlimit64"] = [Rule(_IGNORED, (_is(1, _RLIMIT_CORE), Condition(2, "NE", 0)))]
    for name, mode in _MODE_AT.items():
        front[name] = [Rule(_REFUSED, (_has(mode, bit),)) for bit in _SET_IDS]
    for name, (flags, mode) in _OPEN_AT.items():
        front[name] = [Rule(_REFUSED, (_has(flags, new), _has(mode, bit))) for new in _CREATING for bit in _SET_IDS]
    calls = dict(profile.calls)
    for name, rules in front.items():
        nr = NUMBERS[name]
        calls[nr] = (*rules, *calls.get(nr, ()))
    return msgspec.structs.replace(profile, calls=calls)


def _has(arg: int, bit: int) -> Condition:
    return Condition(arg, "MASKED_EQ", bit, bit)


def _is(arg: int, value: int) -> Condition:
    return Condition(arg, "MASKED_EQ", value, 0xFFFFFFFF)
