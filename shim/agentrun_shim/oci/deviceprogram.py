"""Change the device rules of a container that runs: another program on its cgroup in the place of the one it has.

The first one is attached by the native half (``device_program`` in ``shim/native/oci_process.c``), under a name by which it is
found again. The new one is attached before the old one goes: a device must be allowed by all programs of a cgroup and of those
above, so in between both hold. bpf(2) through ctypes, which only `update` with other rules than before pays for.
"""

from __future__ import annotations

import ctypes
import os
from struct import pack, unpack_from

from agentrun_shim.oci.errors import OciError, strerror

NAME = b"agentrun_dev"
_NR_BPF = 321  # x86-64
_LOAD, _ATTACH, _DETACH, _FD_BY_ID, _INFO_BY_FD, _QUERY = 5, 8, 9, 13, 15, 16
_TYPE, _ATTACH_TYPE, _ALLOW_MULTI = 15, 6, 2  # BPF_PROG_TYPE_CGROUP_DEVICE, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI
_MOST = 64
_INFO_SIZE, _INFO_NAME = 80, 64  # struct bpf_prog_info up to its name

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def replace(path: str, rules: bytes) -> None:
    """Hold the cgroup at ``path`` to ``rules`` (``devices.compile_rules``) instead of those of ours it has; ``b""`` is to none.

    Raises:
        OciError: the kernel refused. What was in force still is.
    """
    try:
        cgroup = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OciError(f"{path}: {strerror(error)}") from None
    before: list[int] = []
    try:
        before = _ours(cgroup)
        if rules:
            program = _load(rules)
            try:
                _bpf(_ATTACH, pack("<IIII", cgroup, program, _ATTACH_TYPE, _ALLOW_MULTI))
            finally:
                os.close(program)
        for old in before:
            _bpf(_DETACH, pack("<IIII", cgroup, old, _ATTACH_TYPE, 0))
    except OSError as error:
        raise OciError(f"linux.resources.devices: {strerror(error)}") from None
    finally:
        for fd in [cgroup, *before]:
            os.close(fd)


def _load(rules: bytes) -> int:
    code, license_ = ctypes.create_string_buffer(rules, len(rules)), ctypes.create_string_buffer(b"Apache-2.0")
    attr = pack("<IIQQ", _TYPE, len(rules) // 8, ctypes.addressof(code), ctypes.addressof(license_))
    return _bpf(_LOAD, attr + pack("<IIQII16s", 0, 0, 0, 0, 0, NAME))


def _ours(cgroup: int) -> list[int]:
    """Descriptors of the programs on it that have our name: an administrator's, or systemd's, stay."""
    ids = ctypes.create_string_buffer(4 * _MOST)
    query = ctypes.create_string_buffer(pack("<IIIIQI", cgroup, _ATTACH_TYPE, 0, 0, ctypes.addressof(ids), _MOST), 32)
    _call(_QUERY, query)
    found = []
    for number in unpack_from(f"<{unpack_from('<I', query.raw, 24)[0]}I", ids.raw):
        fd = _bpf(_FD_BY_ID, pack("<III", number, 0, 0))
        info = ctypes.create_string_buffer(_INFO_SIZE)
        _bpf(_INFO_BY_FD, pack("<IIQ", fd, _INFO_SIZE, ctypes.addressof(info)))
        if info.raw[_INFO_NAME:].rstrip(b"\0") == NAME:
            found.append(fd)
        else:
            os.close(fd)
    return found


def _bpf(command: int, attr: bytes) -> int:
    return _call(command, ctypes.create_string_buffer(attr, len(attr)))


def _call(command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    result: int = _libc.syscall(_NR_BPF, command, attr, len(attr))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
