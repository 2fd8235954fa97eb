"""The container that crun, runc and podman run: the host's own /bin/true with its libraries, and an OCI configuration.

Six namespaces, no capabilities, a read-only root, tmpfs on /dev and /tmp. No user namespace and no seccomp filter for crun and
runc: both are what they do by default as root, and both favour them (about 0.5 ms, and a filter compiled at each start).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import msgspec

PROGRAM = "/bin/true"


def make_bundle(where: Path) -> Path:
    """Write ``where/rootfs`` and ``where/config.json``; returns ``where``."""
    rootfs = where / "rootfs"
    for path in (PROGRAM, *_libraries(PROGRAM)):
        target = rootfs / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in ("dev", "proc", "sys", "tmp"):
        (rootfs / name).mkdir(exist_ok=True)
    (where / "config.json").write_bytes(msgspec.json.encode(_config()))
    return where


def _libraries(program: str) -> list[str]:
    if shutil.which("ldd") is None:  # a static /bin/true needs none; else the runtimes' trial calls say what is missing
        return []
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False, timeout=10)
    return re.findall(r"(/[^\s()]+)", listed.stdout)


def _config() -> dict[str, object]:
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [PROGRAM],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {"bounding": [], "effective": [], "permitted": []},
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "sandbox",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")]},
    }
