"""A shape: everything of a policy that has to be decided before a sandbox is built, and the plan that builds it.

Two calls of the same tenant can share a pool exactly when their shapes are equal.
"""

from __future__ import annotations

import resource

import msgspec

from agentrun import rootfs
from agentrun.policy import Limits, Network, Policy
from agentrun_shim import seccomp
from agentrun_shim import syscalls as sc
from agentrun_shim.plan import Op, pack_op, pack_shape

HOSTNAME = b"sandbox"
SCRATCH = rootfs.SCRATCH.encode()
ID_RANGE = 65536
"""User and group ids of one sandbox: 0 to 65535 inside."""

_UNLIMITED = 0xFFFFFFFF
_NAMESPACES = (
    sc.CLONE_NEWNS | sc.CLONE_NEWPID | sc.CLONE_NEWUSER | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS | sc.CLONE_NEWCGROUP
)  # fmt: skip


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which warm sandbox fits. Hashable: it keys the pools."""

    net: Network
    scratch_size: int
    limits: Limits
    """What the leaf is made with; a call may still change its own."""


def shape_of(policy: Policy) -> Shape:
    """The shape of a policy."""
    return Shape(net=policy.net, scratch_size=policy.scratch_size, limits=policy.limits)


def plan_shape(shape: Shape, root: rootfs.RootFs) -> bytes:
    """The SHAPE message for a zygote; its descriptors are ``root.fds``, in that order."""
    ops = [*_template(root), *_slot(shape, root), *_runner(shape)]
    namespaces = _NAMESPACES | (sc.CLONE_NEWNET if shape.net == "none" else 0)
    return pack_shape(namespaces, ops, len(root.fds))


def _template(root: rootfs.RootFs) -> list[bytes]:
    ops = [pack_op(Op.ROOT, a=0)]
    ops += [pack_op(Op.MOVE, path.encode(), a=index) for index, path in root.moves]
    for source, target in root.binds:
        ops.append(pack_op(Op.BIND, source.encode(), target.encode()))
        ops.append(pack_op(Op.SETATTR, target.encode(), a=sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV))
    ops.append(pack_op(Op.SETATTR, b".", a=sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID))
    return ops


def _slot(shape: Shape, root: rootfs.RootFs) -> list[bytes]:
    """init's part. One tmpfs serves every writable directory, so that one size bounds them together."""
    no_exec = sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC
    ops = [
        pack_op(Op.MOUNT, b"proc", b"/proc", b"", a=no_exec),
        pack_op(Op.MOUNT, b"tmpfs", SCRATCH, b"mode=711,size=%d" % shape.scratch_size, a=sc.MS_NOSUID | sc.MS_NODEV),
        pack_op(Op.MOUNT, b"devpts", b"/dev/pts", b"newinstance,ptmxmode=0666,mode=0620,gid=5", a=sc.MS_NOSUID | sc.MS_NOEXEC),
        pack_op(Op.MOUNT, b"cgroup2", b"/sys/fs/cgroup", b"", a=no_exec | sc.MS_RDONLY),
    ]
    for name, mode in {**rootfs.PRIVATE, **rootfs.ON_DEMAND, "shm": 0o1777}.items():
        source = SCRATCH + b"/" + name.encode()
        ops.append(pack_op(Op.MKDIR, source, a=mode))
        if name != "shm":
            ops.append(pack_op(Op.SLOT_BIND, source, b"/" + name.encode(), a=name in rootfs.ON_DEMAND))
    if root.has_var_tmp:
        ops.append(pack_op(Op.SLOT_BIND, SCRATCH + b"/tmp", b"/var/tmp"))
    ops.append(pack_op(Op.MKDIR, rootfs.HOME.encode(), a=0o755, b=rootfs.UID, c=rootfs.GID))
    ops.append(pack_op(Op.HOSTNAME, HOSTNAME))
    if shape.net == "none":
        ops.append(pack_op(Op.LOOPBACK))
    return ops


def _runner(shape: Shape) -> list[bytes]:
    ops = [
        _rlimit(resource.RLIMIT_CORE, 0, 0),
        # What systemd and the container engines give: select(2) breaks above 1024, programs that need more raise it.
        _rlimit(resource.RLIMIT_NOFILE, 1024, 524288),
    ]
    if shape.limits.pids_max is not None:
        # Counted per user namespace since Linux 5.14 (commit 21d1c5e386bc), so it bounds this sandbox alone and holds where
        # there is no pids controller.
        ops.append(_rlimit(resource.RLIMIT_NPROC, shape.limits.pids_max, shape.limits.pids_max))
    program = seccomp.default_filter()
    ops.append(pack_op(Op.IDS, a=rootfs.UID, b=rootfs.GID))
    ops.append(pack_op(Op.FILTER, a=len(program) // 8, blob=program))
    return ops


def _rlimit(which: int, soft: int, hard: int) -> bytes:
    return pack_op(Op.RLIMIT, a=which, b=min(soft, _UNLIMITED), c=min(hard, _UNLIMITED), d=1)
