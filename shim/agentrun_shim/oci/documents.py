"""Documents that need no container: `features` (features.md of the specification) and `spec`, a configuration to begin with."""

from __future__ import annotations

import os

from agentrun_shim.oci import hooks, names
from agentrun_shim.oci import seccomp_words as seccomp
from agentrun_shim.oci.errors import OciError
from agentrun_shim.oci.jsontext import dumps
from agentrun_shim.oci.names import SPEC_VERSION, VERSION
from agentrun_shim.oci.options import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def features(_options: Options) -> int:
    """Print what this runtime can do."""
    print(dumps(feature_document()))
    return 0


def feature_document() -> dict[str, Any]:
    """What this runtime can do, on this machine where that matters."""
    kernel = {f"CAP_{name}" for number, name in enumerate(names.CAPABILITIES) if number <= _last_capability()}
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": SPEC_VERSION,
        "hooks": list(hooks.STAGES),
        "mountOptions": names.MOUNT_OPTIONS,
        "linux": {
            "namespaces": sorted(names.NAMESPACES),
            "capabilities": [f"CAP_{name}" for name in names.CAPABILITIES if f"CAP_{name}" in kernel],
            "cgroup": {"v1": False, "v2": True, "systemd": True, "systemdUser": True, "rdma": True},
            "seccomp": {
                "enabled": True,
                "actions": sorted(seccomp.ACTIONS),
                "operators": sorted([f"SCMP_CMP_{op}" for op in seccomp.OPERATORS]),
                "archs": sorted([arch for arch in seccomp.ARCHES if arch != "SCMP_ARCH_NATIVE"]),
                "knownFlags": sorted(seccomp.FLAGS),
                "supportedFlags": sorted(seccomp.FLAGS),
            },
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": True}},
            "netDevices": {"enabled": False},
            "memoryPolicy": {"modes": sorted(names.MEMORY_MODES), "flags": sorted(names.MEMORY_FLAGS)},
        },
        "annotations": {"io.agentrun.version": VERSION},
        "potentiallyUnsafeConfigAnnotations": ["io.agentrun."],
    }


def _last_capability() -> int:
    try:
        with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return len(names.CAPABILITIES) - 1


_MASKED = ("acpi", "asound", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi")
_NO = ["nosuid", "noexec", "nodev"]


def spec(options: Options) -> int:
    """Write config.json into the bundle."""
    path = f"{options.get('bundle') or '.'}/config.json"
    text = dumps(example(rootless="rootless" in options)) + "\n"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise OciError(f"{path} exists already: remove it first") from None
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
    return 0


def example(*, rootless: bool = False) -> dict[str, Any]:
    """A container that runs a shell."""
    some = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
    namespaces = ["pid", "ipc", "uts", "mount", "cgroup", "user" if rootless else "network"]
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in namespaces],
        "maskedPaths": [*[f"/proc/{name}" for name in _MASKED], "/sys/firmware"],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    }
    sysfs = {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*_NO, "ro"]}
    if rootless:
        linux["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
        linux["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
        sysfs = {"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", *_NO, "ro"]}
    else:
        linux["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
    pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", *([] if rootless else ["gid=5"])]
    return {
        "ociVersion": SPEC_VERSION,
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": some, "effective": some, "permitted": some},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "agentrun",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
            },
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": pts},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*_NO, "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": _NO},
            sysfs,
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*_NO, "relatime", "ro"]},
        ],
        "linux": linux,
    }
