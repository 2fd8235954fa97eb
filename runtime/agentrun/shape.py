"""A shape: everything of a policy that has to be decided before a sandbox is built, and the plan that builds it.

Two calls of the same tenant can share a pool exactly when their shapes are equal.
"""

from __future__ import annotations

import os

import msgspec

from agentrun import rootfs
from agentrun.errors import UsageError
from agentrun.policy import HOST, Egress, Filesystem, Limits, Network, Policy, Process, Rlimit
from agentrun.policychecks import RLIMITS
from agentrun_shim import landlock
from agentrun_shim import syscalls as sc
from agentrun_shim.plan import Op, pack_op, pack_shape

SCRATCH = rootfs.SCRATCH.encode()
ID_RANGE = 65536
"""User and group ids of one sandbox: 0 to 65535 inside."""

_UNLIMITED = 0xFFFFFFFF
_NOFILE = Rlimit("nofile", 1024, 524288)
"""What systemd and the container engines give: select(2) breaks above 1024, programs that need more raise it."""
_NO_CORE = Rlimit("core", 1, 1)
"""Not 0: at 0 the kernel still runs a handler that core_pattern names, as the host's root, with a tool's memory for input; at 1
it does not (coredump.c, "RLIMIT_CORE is set to 1")."""
_DEVPTS = b"newinstance,ptmxmode=0666,mode=0620,gid=5,max=64"
"""At most so many terminals a sandbox: the host has kernel.pty.max of them, for all together."""
_CPU_GRACE = 5
"""Seconds between SIGXCPU, which a program may handle, and SIGKILL."""
_NAMESPACES = (
    sc.CLONE_NEWNS | sc.CLONE_NEWPID | sc.CLONE_NEWUSER | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS | sc.CLONE_NEWCGROUP
)  # fmt: skip


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which warm sandbox fits. Hashable: it keys the pools."""

    net: Network
    egress: Egress
    scratch_size: int
    limits: Limits
    """What the leaf is made with; a call may still change its own."""
    fs: Filesystem
    process: Process
    seccomp: str

    @property
    def lasting(self) -> Shape:
        """The same for all sessions, of which there are more than shapes that can be told apart."""
        return self if not self.fs.session else msgspec.structs.replace(self, fs=msgspec.structs.replace(self.fs, session=""))

    @property
    def label(self) -> str:
        """What people know it by; others may have the same."""
        return f"{self.net}/{self.seccomp}" + ("" if self.fs.image == HOST else f"@{self.fs.image[7:19]}")


def shape_of(policy: Policy) -> Shape:
    """The shape of a policy."""
    process, fs = policy.process, policy.fs
    return Shape(
        net=policy.net,
        egress=policy.egress,
        scratch_size=policy.scratch_size,
        limits=policy.limits,
        # What a call gets when it is sent is nothing its sandbox has to have been built with.
        fs=msgspec.structs.replace(fs, workspace="rw", workdir="", entrypoint=()),
        process=msgspec.structs.replace(process, umask=0, env_pass=(), env_set=(), env_forbid=()),
        seccomp=policy.seccomp,
    )


def plan_shape(shape: Shape, root: rootfs.RootFs, program: bytes, *, notify: bool) -> bytes:
    """The SHAPE message for a zygote; its descriptors are ``root.fds``, in that order.

    ``program`` is the compiled seccomp profile; with ``notify`` its listener is sent up with READY.
    """
    filter_op = pack_op(Op.FILTER, a=len(program) // 8, b=notify, blob=program)
    ops = [*_template(shape, root), *_slot(shape, root), *_runner(shape, root), filter_op]
    namespaces = _NAMESPACES | (0 if shape.net == "host" else sc.CLONE_NEWNET)
    return pack_shape(namespaces, ops, len(root.fds))


def _template(shape: Shape, root: rootfs.RootFs) -> list[bytes]:
    ops = [pack_op(Op.ROOT, a=0, b=shape.process.oom_score_adj)]
    ops += [pack_op(Op.MOVE, path.encode(), a=index) for index, path in root.moves]
    for source, target in root.binds:
        ops.append(pack_op(Op.BIND, source.encode(), target.encode()))
        ops.append(pack_op(Op.SETATTR, target.encode(), a=sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV))
    ops.append(pack_op(Op.SETATTR, b".", a=(0 if root.whole else sc.MOUNT_ATTR_RDONLY) | sc.MOUNT_ATTR_NOSUID))
    return ops


def _slot(shape: Shape, root: rootfs.RootFs) -> list[bytes]:
    """init's part. One tmpfs serves every writable directory, so that one size bounds them together."""
    no_exec = sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC
    ops = [
        pack_op(Op.MOUNT, b"proc", b"/proc", b"", a=no_exec),
        pack_op(Op.MOUNT, b"tmpfs", SCRATCH, b"mode=711,size=%d" % shape.scratch_size, a=sc.MS_NOSUID | sc.MS_NODEV),
        pack_op(Op.MOUNT, b"devpts", b"/dev/pts", _DEVPTS, a=sc.MS_NOSUID | sc.MS_NOEXEC),
        pack_op(Op.MOUNT, b"cgroup2", b"/sys/fs/cgroup", b"", a=no_exec | sc.MS_RDONLY),
    ]
    uid, gid = shape.process.uid, shape.process.gid
    for private in (*root.private, rootfs.Private("shm", "", 0o1777)):
        source = SCRATCH + b"/" + private.name.encode()
        ops.append(pack_op(Op.MKDIR, source, a=private.mode, b=uid * private.owned, c=gid * private.owned))
        if private.path:
            ops.append(pack_op(Op.SLOT_BIND, source, private.path.encode(), a=private.on_demand))
    if root.has_var_tmp:
        ops.append(pack_op(Op.SLOT_BIND, SCRATCH + b"/tmp", b"/var/tmp"))
    if root.private:  # else the home directory is the root's, which stays: making it again would be writing to a session
        ops.append(pack_op(Op.MKDIR, rootfs.HOME.encode(), a=0o755, b=uid, c=gid))
    for path, below, *owner in root.made:
        ops += _make_steps(path, below, *owner)
    for aside, path, below in root.late:
        ops += _make_steps(path, below)
        ops.append(pack_op(Op.SLOT_BIND, aside.encode(), path.encode()))
    # Only those there are: what this kernel's /proc lacks costs no sandbox anything.
    ops += [pack_op(Op.READ_ONLY, path.encode()) for path in shape.fs.read_only if _may_exist(path)]
    ops += [pack_op(Op.MASK, path.encode()) for path in shape.fs.masked if _may_exist(path)]
    ops.append(pack_op(Op.HOSTNAME, shape.process.hostname.encode()))
    if shape.net != "host":
        ops.append(pack_op(Op.LOOPBACK))
    return ops


def _make_steps(path: str, below: str, uid: int = 0, gid: int = 0) -> list[bytes]:
    """A directory, and those between it and the one that it is below."""
    steps = path.removeprefix(below).strip("/").split("/")
    every = ("/".join([below, *steps[:depth]]) for depth in range(1, len(steps) + 1))
    return [pack_op(Op.MKDIR, step.encode(), a=0o755, b=uid, c=gid) for step in every]


def _may_exist(path: str) -> bool:
    """False for a file of /proc that this kernel does not have; paths of the image are found out by trying."""
    return not path.startswith("/proc/") or os.path.lexists(path)


def _runner(shape: Shape, root: rootfs.RootFs) -> list[bytes]:
    process = shape.process
    limits = {"core": _NO_CORE, "nofile": _NOFILE} | {limit.name: limit for limit in process.rlimits}
    if process.cpu_seconds is not None:
        limits["cpu"] = Rlimit("cpu", process.cpu_seconds, process.cpu_seconds + _CPU_GRACE)
    if shape.fs.file_size is not None:
        limits["fsize"] = Rlimit("fsize", shape.fs.file_size, shape.fs.file_size)
    ops = [_rlimit(limit) for limit in limits.values()]
    ops += _landlock(shape, root)
    groups = b"".join(group.to_bytes(4, "little") for group in process.groups)
    ops.append(pack_op(Op.IDS, a=process.uid, b=process.gid, c=len(process.groups), blob=groups))
    return ops


def _landlock(shape: Shape, root: rootfs.RootFs) -> list[bytes]:
    abi = landlock.version()
    if not shape.fs.landlock or not abi:
        return []
    rights = landlock.rights(abi)
    ops = [pack_op(Op.LANDLOCK, a=rights.handled, b=rights.scoped, c=rights.directory, d=rights.flags)]
    own = [b"/"] if root.whole else [SCRATCH, *([b"/var/tmp"] if root.has_var_tmp else [])]
    own += [private.path.encode() for private in root.private if not private.on_demand]
    ops += [pack_op(Op.WRITABLE, path, a=rights.directory) for path in own]
    ops += [pack_op(Op.WRITABLE, path, a=rights.files) for path in (b"/dev", b"/proc")]
    for path, is_directory in root.writable:
        ops.append(pack_op(Op.WRITABLE, path.encode(), a=rights.directory if is_directory else rights.files))
    return ops


def _rlimit(limit: Rlimit) -> bytes:
    """RLIMIT: numbers are 32 bits in a unit that both are multiples of; a limit beyond that has lost its odd bytes."""
    known = [value for value in (limit.soft, limit.hard) if value is not None]
    unit = 1
    while any(value // unit >= _UNLIMITED for value in known):
        unit *= 16
    if unit > 1 << 28:
        raise UsageError(f"process.rlimits.{limit.name}: {max(known)} is more than can be set; say none")
    soft, hard = (_UNLIMITED if value is None else value // unit for value in (limit.soft, limit.hard))
    return pack_op(Op.RLIMIT, a=RLIMITS[limit.name], b=soft, c=hard, d=unit)
