"""Names of the runtime specification as the kernel's numbers: namespaces, mount options, capabilities, limits, policies."""

from __future__ import annotations

VERSION = "0.1.0"
SPEC_VERSION = "1.3.0"
"""Of this runtime, and of the specification it was written by; configurations of any 1.x are taken."""

NAMESPACES = {
    "mount": 0x00020000, "cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000,
    "network": 0x40000000, "time": 0x00000080,
}  # fmt: skip
"""linux.namespaces[].type → CLONE_NEW*."""

_CAPABILITIES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST
NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE
SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND
AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
CAPABILITIES = _CAPABILITIES.split()
"""By number: linux/capability.h."""

_RLIMITS = "CPU FSIZE DATA STACK CORE RSS NPROC NOFILE MEMLOCK AS LOCKS SIGPENDING MSGQUEUE NICE RTPRIO RTTIME"
RLIMITS = {name: number for number, name in enumerate(_RLIMITS.split())}
"""RLIMIT_*: asm-generic/resource.h."""

RDONLY, NOSUID, NODEV, NOEXEC, NOATIME, STRICTATIME, NODIRATIME, NOSYMFOLLOW = 1, 2, 4, 8, 0x10, 0x20, 0x80, 0x200000
ATIME = 0x70
"""MOUNT_ATTR_*: linux/mount.h."""

SET = {
    "ro": RDONLY, "nosuid": NOSUID, "nodev": NODEV, "noexec": NOEXEC, "noatime": NOATIME, "strictatime": STRICTATIME,
    "nodiratime": NODIRATIME, "nosymfollow": NOSYMFOLLOW,
}  # fmt: skip
CLEAR = {
    "rw": RDONLY, "suid": NOSUID, "dev": NODEV, "exec": NOEXEC, "atime": NOATIME, "diratime": NODIRATIME,
    "symfollow": NOSYMFOLLOW, "relatime": ATIME, "norelatime": ATIME, "nostrictatime": ATIME,
}  # fmt: skip
"""Mount options that are attributes of the mount; with an r in front they are those of all mounts below as well."""
RECURSIVE_SET = {f"r{name}": bit for name, bit in SET.items()}
RECURSIVE_CLEAR = {f"r{name}": bit for name, bit in CLEAR.items()}

MS_REC, MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 0x4000, 1 << 17, 1 << 18, 1 << 19, 1 << 20
PROPAGATION = {
    prefix + name: bit | rec
    for prefix, rec in (("", 0), ("r", MS_REC))
    for name, bit in (("private", MS_PRIVATE), ("slave", MS_SLAVE), ("shared", MS_SHARED), ("unbindable", MS_UNBINDABLE))
}
BIND = {"bind": False, "rbind": True}
IDMAP = {"idmap": False, "ridmap": True}
SUPERBLOCK = ("sync", "async", "dirsync", "lazytime", "nolazytime", "mand", "nomand", "iversion", "noiversion", "silent", "loud")
"""Flags of the file system itself, passed on to it."""
IGNORED = ("defaults", "remount", "copy-symlink")
COPY_UP = "tmpcopyup"

MOUNT_OPTIONS = sorted({
    *SET, *CLEAR, *RECURSIVE_SET, *RECURSIVE_CLEAR, *PROPAGATION, *BIND, *IDMAP, *SUPERBLOCK, COPY_UP, "defaults"
})  # fmt: skip

SCHEDULERS = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_ISO": 4,
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
SCHEDULER_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 1, "SCHED_FLAG_RECLAIM": 2, "SCHED_FLAG_DL_OVERRUN": 4, "SCHED_FLAG_KEEP_POLICY": 8,
    "SCHED_FLAG_KEEP_PARAMS": 16, "SCHED_FLAG_UTIL_CLAMP_MIN": 32, "SCHED_FLAG_UTIL_CLAMP_MAX": 64,
}  # fmt: skip
IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
PERSONALITIES = {"LINUX": 0, "LINUX32": 8}
MEMORY_MODES = {
    "MPOL_DEFAULT": 0, "MPOL_PREFERRED": 1, "MPOL_BIND": 2, "MPOL_INTERLEAVE": 3, "MPOL_LOCAL": 4, "MPOL_PREFERRED_MANY": 5,
    "MPOL_WEIGHTED_INTERLEAVE": 6,
}  # fmt: skip
MEMORY_FLAGS = {"MPOL_F_NUMA_BALANCING": 1 << 13, "MPOL_F_RELATIVE_NODES": 1 << 14, "MPOL_F_STATIC_NODES": 1 << 15}
