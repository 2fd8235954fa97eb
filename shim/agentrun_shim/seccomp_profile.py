"""Seccomp profiles: what the rules of a file come to for a tool, on this machine.

A tool holds no capability and runs on x86-64, so the rules Docker's files keep for others fall away when a profile is loaded
(``includes``, ``excludes``). Of those that remain, the first in the file that fits a call decides it; if none fits,
``defaultAction`` does. The specification leaves open which of two rules wins; docs/seccomp.md says where runc and crun differ.

``Profile.decide`` is the meaning of a profile. ``agentrun_shim.seccomp`` compiles the same decisions for the kernel, and tests
hold the two together.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, get_args

import msgspec

from agentrun_shim import seccomp_file
from agentrun_shim.seccomp_file import Call, ProfileError, applies, notes, reject
from agentrun_shim.syscall_table import ELSEWHERE, NUMBERS

__all__ = ["Action", "Condition", "Kind", "Op", "Profile", "ProfileError", "Rule", "load_profile"]

X32_BIT: Final = 0x40000000
SKIPPED: Final = 0xFFFFFFFF
"""-1: set by a tracer (gdb, proot, strace --inject) so that the kernel skips the call. Not x32."""
MAX_ERRNO: Final = 4094  # libseccomp takes no more; the kernel itself takes 4095 (include/linux/err.h)
_U64: Final = (1 << 64) - 1


Kind = Literal["allow", "errno", "kill_process", "kill_thread", "log", "trap"]
"""What is done with a call. ``log`` allows it, and it is noted by the kernel's audit, or by the supervisor if there is one."""
Op = Literal["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"]
"""How an argument is compared: all 64 bits, unsigned."""

_KINDS: Final[dict[str, Kind]] = {
    "SCMP_ACT_ALLOW": "allow",
    "SCMP_ACT_ERRNO": "errno",
    "SCMP_ACT_KILL": "kill_thread",
    "SCMP_ACT_KILL_PROCESS": "kill_process",
    "SCMP_ACT_KILL_THREAD": "kill_thread",
    "SCMP_ACT_LOG": "log",
    "SCMP_ACT_TRAP": "trap",
}
_NO_KINDS: Final = {
    "SCMP_ACT_NOTIFY": "another supervisor cannot be had, agentrun's own counts refusals (use SCMP_ACT_ERRNO or SCMP_ACT_LOG)",
    "SCMP_ACT_TRACE": "nothing traces a tool, so the kernel would answer ENOSYS (use SCMP_ACT_ERRNO)",
}


class Action(msgspec.Struct, frozen=True):
    """A decision."""

    kind: Kind
    errno: int = 0
    """What the call fails with where ``kind`` is errno; 0 pretends success."""

    def __str__(self) -> str:
        """For people: ``allow``, ``errno EPERM``."""
        return f"errno {errno.errorcode.get(self.errno, self.errno)}" if self.kind == "errno" else self.kind


KILLED: Final = Action("kill_process")
_OPS: Final[dict[str, Op]] = {f"SCMP_CMP_{op}": op for op in get_args(Op)}


class Condition(msgspec.Struct, frozen=True):
    """``args[arg] & mask`` compared with ``value``; the mask is all ones but for MASKED_EQ."""

    arg: int
    op: Op
    value: int
    mask: int = _U64

    def holds(self, args: Sequence[int]) -> bool:
        """Whether it is true of these six arguments."""
        left, right = args[self.arg] & self.mask, self.value
        match self.op:
            case "NE":
                return left != right
            case "LT":
                return left < right
            case "LE":
                return left <= right
            case "GE":
                return left >= right
            case "GT":
                return left > right
            case _:
                return left == right


class Rule(msgspec.Struct, frozen=True):
    """An action, taken if all conditions hold; without conditions, always."""

    action: Action
    conditions: tuple[Condition, ...] = ()


class Profile(msgspec.Struct, frozen=True, eq=False):
    """A profile as it holds for a tool on this machine. Compared by identity: load a file once."""

    name: str
    """What errors call it: the path of the file, as a rule."""
    default: Action
    calls: Mapping[int, tuple[Rule, ...]]
    """By system call number: the rules in the order of the file."""
    unknown: tuple[str, ...] = ()
    """Names that are a system call of no machine we know of: misspelt, or newer than we are. They have no effect."""
    notes: tuple[str, ...] = ()
    """What the file asks for and does not get, a sentence each."""

    def decide(self, nr: int, args: Sequence[int]) -> Action:
        """What becomes of system call ``nr`` (32 bits) with these six arguments (64 bits each).

        Numbers of the x32 interface are killed whatever the profile says.
        """
        if X32_BIT <= nr < SKIPPED:
            return KILLED
        for rule in self.calls.get(nr, ()):
            if all(condition.holds(args) for condition in rule.conditions):
                return rule.action
        return self.default

    def actions(self) -> frozenset[Action]:
        """Every action it can come to."""
        return frozenset(rule.action for rules in self.calls.values() for rule in rules) | {self.default}


def load_profile(source: Path | bytes, name: str = "", *, kernel: tuple[int, int] | None = None) -> Profile:
    """Load a profile from a file, or from the bytes of one, for tools on this machine.

    ``name`` is what errors call it (the path, if there is one). ``kernel`` is the version ``minKernel`` is compared with: the
    running kernel's.

    Raises:
        ProfileError: the file cannot be read, or does not say something that can be done.
    """
    name = name or (str(source) if isinstance(source, Path) else "seccomp profile")
    file = seccomp_file.read(source, name)
    if file.listener_path is not None:
        reject(name, "listenerPath", file.listener_path, _NO_KINDS["SCMP_ACT_NOTIFY"])
    if file.listener_metadata is not None:
        reject(name, "listenerMetadata", file.listener_metadata, "nothing would read it (remove it)")
    missed = tuple(notes(name, file))
    default = _action(name, "default", file.default_action, file.default_errno_ret, file.default_errno, default=True)
    version = kernel or _kernel()
    calls: dict[int, list[Rule]] = {}
    unknown: dict[str, None] = {}
    for number, call in enumerate(file.syscalls or ()):
        key = f"syscalls[{number}]"
        names = _names(name, key, call)
        rules = _rules(name, key, call)
        if applies(name, key, call, version):
            for syscall in names:
                if syscall in NUMBERS:
                    calls.setdefault(NUMBERS[syscall], []).extend(rules)
                elif syscall not in ELSEWHERE:
                    unknown[syscall] = None
    return Profile(name, default, {nr: tuple(rules) for nr, rules in calls.items()}, tuple(unknown), missed)


def _names(name: str, key: str, call: Call) -> tuple[str, ...]:
    if call.name is not None and call.names:
        reject(name, f"{key}.name", call.name, "there are names as well (use names alone)")
    names = (call.name,) if call.name is not None else call.names or ()
    if not names:
        reject(name, f"{key}.names", call.names, "a rule is about at least one system call (name it, or remove the rule)")
    if not all(names):
        reject(name, f"{key}.names", names, "an empty name is no system call")
    return names


def _action(name: str, key: str, action: str, number: int | None, word: str | None, *, default: bool = False) -> Action:
    """The action at ``key``. The keys of ``defaultAction`` are named differently from those of a rule."""
    keys = [f"{key}{part}" for part in (("Action", "ErrnoRet", "Errno") if default else (".action", ".errnoRet", ".errno"))]
    if action in _NO_KINDS:
        reject(name, keys[0], action, _NO_KINDS[action])
    if action not in _KINDS:
        reject(name, keys[0], action, f"no action (known: {', '.join(_KINDS)})")
    kind = _KINDS[action]
    if kind != "errno":
        for at, value in ((keys[1], number), (keys[2], word)):
            if value not in (None, ""):
                reject(name, at, value, f"{action} takes no errno (remove it, or use SCMP_ACT_ERRNO)")
        return Action(kind)
    if number is not None and not 0 <= number <= MAX_ERRNO:
        reject(name, keys[1], number, f"no errno (0 to {MAX_ERRNO})")
    if not word:
        return Action(kind, errno.EPERM if number is None else number)
    named = getattr(errno, word, None) if re.fullmatch("E[A-Z0-9]+", word) else None
    if not isinstance(named, int):
        reject(name, keys[2], word, "no errno's name (such as EPERM)")
    if number is not None and number != named:
        reject(name, keys[2], word, f"it is {named}, but {keys[1].rpartition('.')[2]} says {number} (make them agree)")
    return Action(kind, named)


def _rules(name: str, key: str, call: Call) -> tuple[Rule, ...]:
    """What a rule of the file comes to. Conditions on different arguments have to hold all; where an argument occurs twice, each
    condition makes a rule of its own, as in runc and crun: a list of values for one argument is written that way.
    """
    action = _action(name, key, call.action, call.errno_ret, call.errno)
    conditions = []
    for number, arg in enumerate(call.args or ()):
        at = f"{key}.args[{number}]"
        if not 0 <= arg.index <= 5:
            reject(name, f"{at}.index", arg.index, "a system call has arguments 0 to 5")
        for word, value in (("value", arg.value), ("valueTwo", arg.value_two)):
            if not 0 <= value <= _U64:
                reject(name, f"{at}.{word}", value, "not an unsigned number of 64 bits")
        if arg.op not in _OPS:
            reject(name, f"{at}.op", arg.op, f"no comparison (known: {', '.join(_OPS)})")
        op = _OPS[arg.op]
        if op != "MASKED_EQ":
            conditions.append(Condition(arg.index, op, arg.value))
            continue
        if arg.value_two & ~arg.value:
            reject(
                name, f"{at}.valueTwo", arg.value_two, f"has bits outside the mask, value {arg.value} (it could never be equal)"
            )
        conditions.append(Condition(arg.index, op, arg.value_two, arg.value))
    if len({condition.arg for condition in conditions}) == len(conditions):
        return (Rule(action, tuple(conditions)),)
    return tuple(Rule(action, (condition,)) for condition in conditions)


def _kernel() -> tuple[int, int]:
    major, minor = re.findall(r"\d+", os.uname().release)[:2]
    return int(major), int(minor)
