"""``linux.seccomp`` by way of libseccomp: the part that is only needed for a filter that was not compiled before."""

from __future__ import annotations

import ctypes
import os

from agentrun_shim import libseccomp
from agentrun_shim.oci.errors import OciError
from agentrun_shim.oci.log import Log
from agentrun_shim.oci.seccomp_words import ARCHES, FOREIGN, OPERATORS, action_word

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def compile_rules(config: dict[str, Any], rules: list[dict[str, Any]], log: Log) -> bytes:
    """Compile; loads libseccomp, which takes a while, and only happens for a configuration that is new.

    Raises:
        OciError: something is unknown, or refused.
    """
    library = libseccomp._library()
    default = action_word(config.get("defaultAction", ""), config.get("defaultErrnoRet"), "defaultAction")
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    if not context:
        raise OciError("linux.seccomp: libseccomp refuses the default action")
    try:
        for arch in config.get("architectures") or ():
            if arch in ARCHES:
                result = library.seccomp_arch_add(context, ctypes.c_uint32(ARCHES[arch]))
                if result not in (0, -17):  # EEXIST: the native one is there already
                    raise OciError(f"linux.seccomp.architectures: {arch}: {os.strerror(-result)}")
            elif arch not in FOREIGN:
                raise OciError(f"linux.seccomp.architectures: unknown architecture {arch}")
        # no_new_privs is the configuration's to set; what fits no architecture is killed, as by default.
        library.seccomp_attr_set(context, 3, ctypes.c_uint32(0))
        for rule in rules:
            _add(library, context, rule, default, log)
        library.seccomp_attr_set(context, 8, ctypes.c_uint32(2))  # SCMP_FLTATR_CTL_OPTIMIZE: a binary tree
        fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            result = library.seccomp_export_bpf(context, fd)
            if result < 0:
                raise OciError(f"linux.seccomp: {os.strerror(-result)} (seccomp_export_bpf)")
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)
    finally:
        library.seccomp_release(context)


def _add(library: ctypes.PyDLL, context: ctypes.c_void_p, rule: dict[str, Any], default: int, log: Log) -> None:
    word = action_word(rule.get("action", ""), rule.get("errnoRet"), "syscalls")
    if word == default:
        return  # libseccomp takes no rule that says what is said already
    sets = _comparisons(rule.get("args") or [])
    for name in rule.get("names") or ():
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:  # __NR_SCMP_ERROR: a name libseccomp does not know, of a newer or another kernel
            log.write("debug", f"linux.seccomp: unknown system call {name}")
            continue
        for comparisons in sets:
            array = (libseccomp._Comparison * len(comparisons))(*comparisons)
            result = library.seccomp_rule_add_array(context, ctypes.c_uint32(word), number, len(comparisons), array)
            if result < 0 and result != -33:  # EDOM: no such call on one of the architectures
                raise OciError(f"linux.seccomp: rule for {name}: {os.strerror(-result)}")


def _comparisons(args: list[dict[str, Any]]) -> list[list[libseccomp._Comparison]]:
    """Sets of comparisons of which one has to hold: several of one argument are alternatives, as in runc and crun."""
    made = []
    for arg in args:
        op = str(arg.get("op", "")).removeprefix("SCMP_CMP_")
        if op not in OPERATORS:
            raise OciError(f"linux.seccomp.syscalls.args: unknown operator {arg.get('op')}")
        mask = 2**64 - 1
        made.append(
            libseccomp._Comparison(
                arg["index"], OPERATORS.index(op) + 1, arg.get("value", 0) & mask, arg.get("valueTwo", 0) & mask
            )
        )
    if len({one.arg for one in made}) == len(made):
        return [made]
    return [[one] for one in made]
