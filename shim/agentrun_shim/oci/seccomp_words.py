"""Seccomp's words in the runtime specification (config-linux.md, "Seccomp") as the kernel's and libseccomp's numbers."""

from __future__ import annotations

from agentrun_shim.oci.errors import OciError

ACTIONS = {
    "SCMP_ACT_ALLOW": 0x7FFF0000, "SCMP_ACT_ERRNO": 0x00050000, "SCMP_ACT_KILL": 0, "SCMP_ACT_KILL_THREAD": 0,
    "SCMP_ACT_KILL_PROCESS": 0x80000000, "SCMP_ACT_LOG": 0x7FFC0000, "SCMP_ACT_NOTIFY": 0x7FC00000, "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_TRAP": 0x00030000,
}  # fmt: skip
OPERATORS = ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")
ARCHES = {
    "SCMP_ARCH_X86": 0x40000003, "SCMP_ARCH_X86_64": 0xC000003E, "SCMP_ARCH_X32": 0x4000003E, "SCMP_ARCH_NATIVE": 0,
}  # fmt: skip
FOREIGN = {
    f"SCMP_ARCH_{name}"
    for name in ("ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32", "PPC", "PPC64", "PPC64LE",
                 "S390", "S390X", "PARISC", "PARISC64", "RISCV64", "LOONGARCH64", "M68K", "SH", "SHEB")
}  # fmt: skip
"""Of other machines: a profile may name them all, and here they come to nothing."""
FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 1, "SECCOMP_FILTER_FLAG_LOG": 2, "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 32,
}  # fmt: skip


def action_word(name: str, number: int | None, where: str) -> int:
    """What the filter returns for an action; where no errno is given, EPERM.

    Raises:
        OciError: there is no such action.
    """
    if name not in ACTIONS:
        raise OciError(f"linux.seccomp.{where}: unknown action {name}")
    word = ACTIONS[name]
    if name in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        word |= (1 if number is None else number) & 0xFFFF  # EPERM
    return word
