"""The cgroup2 view that container runtimes want, in a private mount namespace; the machine's own mounts are never touched.

crun and runc refuse a hybrid layout (v1 controllers with cgroup2 beside them). There the whole benchmark is started again, once,
in a mount namespace of its own with the machine's cgroup2 mount on /sys/fs/cgroup. Everybody measured is in it, agentrun too, and
nobody pays for it per call. The tree is bound from the machine's own mount: mounting cgroup2 anew would reset its mount options.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.machine import cgroup_layout

_MARK = "AGENTRUN_BENCH_VIEW"
_SCRIPT = """
mount --bind "$1" "$2" && umount -R /sys/fs/cgroup && mount --move "$2" /sys/fs/cgroup && shift 2 && exec "$@"
"""


def enter_view(arguments: list[str]) -> str:
    """Start again in the private view if this machine needs one and can have it; returns a line about it, or ""."""
    if os.environ.get(_MARK):
        os.rmdir(os.environ.pop(_MARK))
        return (
            "in a private mount namespace, cgroup2 on /sys/fs/cgroup: the machine's layout is hybrid, which crun and runc refuse"
        )
    if cgroup_layout() != "hybrid":
        return ""
    if os.geteuid() != 0:
        return "the hybrid cgroup layout stays as it is (a private view needs root): crun, runc and podman may refuse it"
    scratch = tempfile.mkdtemp(prefix="agentrun-bench-cgroup-")
    mount = _cgroup2_mount()
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _SCRIPT, "bench", mount, scratch]
    try:
        trial = subprocess.run([*command, "true"], capture_output=True, text=True, check=False, timeout=10)
        error = trial.stderr.strip() if trial.returncode else ""
    except OSError as missing:
        error = str(missing)
    if error:
        os.rmdir(scratch)
        return f"no private cgroup2 view ({error}): crun, runc and podman may refuse the hybrid layout"
    os.environ[_MARK] = scratch
    if os.environ.get("AGENTRUN_CGROUP", "").startswith(mount):
        os.environ["AGENTRUN_CGROUP"] = "/sys/fs/cgroup" + os.environ["AGENTRUN_CGROUP"].removeprefix(mount)
    sys.stdout.flush()
    return os.execvp(command[0], [*command, sys.executable, "-m", "bench", *arguments])


def _cgroup2_mount() -> str:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            return before.split()[4]
    raise AssertionError("the layout is hybrid, so there is one")
