"""A seccomp profile as it is written in a file.

The form is the ``linux.seccomp`` object of the OCI runtime specification (config-linux.md, "Seccomp") with what Docker and
containers-common add in the files they ship: ``archMap``, ``defaultErrno``, and for each rule ``comment``, ``includes``,
``excludes``, ``errno`` and, in old files, ``name``. Anything else is an error rather than ignored: a misspelt key of a security
profile should not be a hole. Here is what a file may contain, and which of its rules are for a tool; what those mean is in
``seccomp_profile``.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SHOWN: Final = 60
"""Characters of a wrong value that an error quotes."""
_ARCHES: Final = _words(
    """amd64 x32 x86 386 arm arm64 loong64 loongarch64 m68k mips mips64 mips64le mips64n32 mips64p32 mips64p32le mipsel mipsel64
    mipsel64n32 mipsle mips3l64n32 parisc parisc64 ppc ppc64 ppc64le riscv64 s390 s390x sh sheb"""
)
"""Architectures as ``includes`` and ``excludes`` call them: libseccomp's words and Go's."""
_ARCH_TOKENS: Final = _words(
    """NATIVE X86 X86_64 X32 ARM AARCH64 LOONGARCH64 M68K MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PARISC PARISC64 PPC
    PPC64 PPC64LE RISCV64 S390 S390X SH SHEB"""
)
"""Architectures as ``architectures`` and ``archMap`` call them, behind SCMP_ARCH_."""
_FOREIGN: Final = "architectures: {} are not served, their callers are killed"
_FLAGS: Final = ("TSYNC", "LOG", "SPEC_ALLOW", "WAIT_KILLABLE_RECV")


class ProfileError(ValueError):
    """A seccomp profile cannot be used. One line: the file, the key, its value, and what would be right."""


class Arg(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """One comparison of one argument of a system call."""

    index: int
    value: int
    op: str
    value_two: int = 0


class Filter(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """When a rule applies, or does not. Docker's, no part of the OCI specification."""

    caps: tuple[str, ...] | None = None
    arches: tuple[str, ...] | None = None
    min_kernel: str | None = None


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A rule: an action for some system calls."""

    action: str
    names: tuple[str, ...] | None = None
    name: str | None = None
    args: tuple[Arg, ...] | None = None
    errno_ret: int | None = None
    errno: str | None = None
    comment: str | None = None
    includes: Filter | None = None
    excludes: Filter | None = None


class ArchMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """An architecture, and those whose programs its kernels run as well."""

    architecture: str
    sub_architectures: tuple[str, ...] | None = None


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """The whole object."""

    default_action: str
    default_errno_ret: int | None = None
    default_errno: str | None = None
    architectures: tuple[str, ...] | None = None
    arch_map: tuple[ArchMap, ...] | None = None
    flags: tuple[str, ...] | None = None
    listener_path: str | None = None
    listener_metadata: str | None = None
    syscalls: tuple[Call, ...] | None = None


def read(source: Path | bytes, name: str) -> File:
    """Decode a profile: the file at a path, or the bytes of one; ``name`` is what errors call it.

    Raises:
        ProfileError: the file cannot be read, is no JSON, or has not the form of a profile.
    """
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise ProfileError(f"{name}: {error.strerror}") from error
    try:
        written = msgspec.json.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProfileError(f"{name}: {error} (a seccomp profile is a JSON object, such as Docker's default.json)") from error
    try:
        return msgspec.convert(written, File)
    except msgspec.ValidationError as error:
        what, _, at = str(error).partition(" - at `$")
        path = at.rstrip("`").lstrip(".")
        try:
            there = _look_up(written, path)
            if what.startswith("Object contains unknown field"):
                known = {field.encode_name for field in msgspec.structs.fields(_struct_at(path))}
                extra = min(there.keys() - known)
                what = f"no such key (known: {', '.join(sorted(known))})"
                path, there = f"{path}.{extra}".lstrip("."), there[extra]
        except (AttributeError, LookupError, TypeError, ValueError):  # a key made up so that it looks like the end of the message
            path, there = "", written
        reject(name, path or "the file", there, what[:1].lower() + what[1:])


def reject(name: str, key: str, value: object, why: str) -> NoReturn:
    """Raise the one-line error about a value: the file's name, the key, what stands there, and why it cannot."""
    shown = msgspec.json.encode(value).decode()
    if len(shown) > _SHOWN:
        shown = shown[:_SHOWN] + "…"
    text = f"{name}: {key}: {shown}: {why}"
    raise ProfileError("".join(char if char.isprintable() else "?" for char in text))


def applies(name: str, key: str, call: Call, kernel: tuple[int, int]) -> bool:
    """Whether the rule at ``key`` is for a tool: no capability, x86-64, this version of the kernel.

    Raises:
        ProfileError: ``includes`` or ``excludes`` says something that is none of these.
    """
    wanted, least = _filter(name, f"{key}.includes", call.includes)
    unwanted, below = _filter(name, f"{key}.excludes", call.excludes)
    included = not wanted.caps and (not wanted.arches or "amd64" in wanted.arches) and (least is None or kernel >= least)
    excluded = "amd64" in (unwanted.arches or ()) or (below is not None and kernel >= below)
    return included and not excluded


def notes(name: str, file: File) -> Iterator[str]:
    """What a file asks for and does not get: a sentence for each.

    Raises:
        ProfileError: an architecture or flag that does not exist, or both ways to name architectures.
    """
    if file.architectures and file.arch_map:
        reject(name, "architectures", file.architectures, "there is an archMap as well (use one of them)")
    asked = [(f"architectures[{i}]", arch) for i, arch in enumerate(file.architectures or ())]
    for i, entry in enumerate(file.arch_map or ()):
        subs = [(f"archMap[{i}].subArchitectures[{j}]", arch) for j, arch in enumerate(entry.sub_architectures or ())]
        asked += [(f"archMap[{i}].architecture", entry.architecture)]
        asked += subs
        if entry.architecture == "SCMP_ARCH_X86_64" and subs:
            yield _FOREIGN.format(", ".join(arch for _, arch in subs))
    for key, arch in asked:
        if arch.removeprefix("SCMP_ARCH_") not in _ARCH_TOKENS or not arch.startswith("SCMP_ARCH_"):
            reject(name, key, arch, "no architecture (such as SCMP_ARCH_X86_64)")
    foreign = [arch for arch in file.architectures or () if arch not in ("SCMP_ARCH_X86_64", "SCMP_ARCH_NATIVE")]
    if foreign:
        yield _FOREIGN.format(", ".join(foreign))
    for i, flag in enumerate(file.flags or ()):
        if flag.removeprefix("SECCOMP_FILTER_FLAG_") not in _FLAGS or not flag.startswith("SECCOMP_FILTER_FLAG_"):
            reject(name, f"flags[{i}]", flag, f"no flag (known: SECCOMP_FILTER_FLAG_ and {', '.join(_FLAGS)})")
        if not flag.endswith("_TSYNC"):  # a tool has one thread when its filter is loaded
            yield f"flags: {flag} is not passed on"


def _filter(name: str, key: str, given: Filter | None) -> tuple[Filter, tuple[int, int] | None]:
    """A checked filter, and its ``minKernel`` as numbers."""
    if given is None:
        return Filter(), None
    for number, cap in enumerate(given.caps or ()):
        if not re.fullmatch("CAP_[A-Z_]+", cap):
            reject(name, f"{key}.caps[{number}]", cap, "no capability (such as CAP_SYS_ADMIN)")
    for number, arch in enumerate(given.arches or ()):
        if arch not in _ARCHES:
            reject(name, f"{key}.arches[{number}]", arch, "no architecture (such as amd64 or arm64)")
    if not given.min_kernel:
        return given, None
    match = re.fullmatch(r"(\d{1,3})\.(\d{1,3})", given.min_kernel)
    if match is None or int(match[1]) == 0:
        reject(name, f"{key}.minKernel", given.min_kernel, "no kernel version (such as 4.8)")
    return given, (int(match[1]), int(match[2]))


def _look_up(value: Any, path: str) -> Any:
    """What stands at a path as msgspec writes it: ``syscalls[3].args[0].index``. Every key in it is one of ours."""
    for key, index in re.findall(r"(\w+)|\[(\d+)\]", path):
        value = value[int(index)] if index else value[key]
    return value


def _struct_at(path: str) -> type[msgspec.Struct]:
    for end, struct in (("args", Arg), ("cludes", Filter), ("archMap", ArchMap), ("syscalls", Call)):
        if path.rstrip("[0123456789]").endswith(end):
            return struct
    return File
