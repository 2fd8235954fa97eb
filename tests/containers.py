# SPDX-License-Identifier: Apache-2.0
"""Containers made by other runtimes, crun and runc, for the tests of the hook: a bundle of busybox and the hog, and its life.

Standard library only, for guests that have no time to import more.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from agentrun_shim import hook

RUNTIMES = ("crun", "runc")
STAGES = ("createRuntime", "poststart", "poststop")
BUSYBOX = "/bin/busybox"


def hook_argv(socket: str, cache: str, *, python: str = sys.executable) -> list[str]:
    """The hook as `agentrun setup oci` has it run."""
    return [python, "-I", "-S", "-E", os.path.abspath(hook.__file__), f"--socket={socket}", f"--policies={cache}"]


def make_rootfs(where: Path, *programs: Path) -> Path:
    """Busybox, whose shell finds its own applets, and static programs besides."""
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        (where / name).mkdir(parents=True, exist_ok=True)
    for program in (Path(BUSYBOX), *programs):
        shutil.copy(program, where / "bin" / program.name)
    (where / "bin/sh").symlink_to("busybox")
    return where


def configuration(
    rootfs: Path,
    args: Sequence[str],
    cgroup: str,
    annotations: Mapping[str, str],
    hooks: Sequence[str],
    memory: Mapping[str, int],
) -> dict[str, object]:
    """A config.json. ``hooks`` is the argv of the hook, empty for none; ``memory`` what the engine itself limits."""
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False, "user": {"uid": 0, "gid": 0}, "args": list(args), "env": ["PATH=/bin", "HOG_DIR=/tmp"], "cwd": "/",
            "noNewPrivileges": True, "capabilities": {"bounding": [], "effective": [], "permitted": []},
        },
        "root": {"path": str(rootfs), "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            # Else runc makes its links in the rootfs, which others start from at the same time.
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"]},
        ],
        "annotations": dict(annotations),
        "hooks": {stage: [{"path": hooks[0], "args": [*hooks, stage], "timeout": 30}] for stage in STAGES} if hooks else {},
        "linux": {
            "cgroupsPath": cgroup, "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
            "resources": {"memory": dict(memory)} if memory else {},
        },
    }  # fmt: skip


class Container:
    """One container, from its bundle to its deletion."""

    def __init__(
        self, runtime: str, directory: Path, name: str, rootfs: Path, args: Sequence[str], hooks: Sequence[str],
        memory: Mapping[str, int] = {}, cgroup: str = "", words: Sequence[str] = (), **annotations: str,
    ) -> None:  # fmt: skip
        """``words`` are the runtime's own options, ``annotations`` ours without their prefix."""
        self.runtime, self.name, self.bundle = runtime, name, directory / f"bundle-{name}"
        self.bundle.mkdir()
        ours = {f"io.agentrun.{key}": value for key, value in annotations.items()}
        config = configuration(rootfs, args, cgroup or f"/{name}", ours, hooks, memory)
        (self.bundle / "config.json").write_text(json.dumps(config))
        self._runtime = [runtime, "--root", str(directory / f"state-{runtime}"), *words]
        self.output = self.bundle / "output"

    def call(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """One verb of its runtime. Its standard error is a file: what the container keeps open must not hold us up."""
        said = self.bundle / "said"
        with self.output.open("ab") as output, said.open("wb") as errors:
            done = subprocess.run(
                [*self._runtime, *words], stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                check=False, timeout=timeout,
            )  # fmt: skip
        return subprocess.CompletedProcess(done.args, done.returncode, "", said.read_text(errors="replace"))

    def create(self) -> subprocess.CompletedProcess[str]:
        return self.call("create", "--bundle", str(self.bundle), "--pid-file", str(self.bundle / "pid"), self.name)

    def start(self) -> subprocess.CompletedProcess[str]:
        return self.call("start", self.name)

    def delete(self) -> subprocess.CompletedProcess[str]:
        return self.call("delete", "--force", self.name)

    @property
    def pid(self) -> int:
        return int((self.bundle / "pid").read_text())

    def cgroup(self, mount: Path) -> Path:
        """The directory of the cgroup its init is in."""
        line = next(line for line in Path(f"/proc/{self.pid}/cgroup").read_text().splitlines() if line.startswith("0::"))
        return mount / line[3:].lstrip("/")

    def is_running(self) -> bool:
        """Its init is there, and no zombie."""
        try:
            return ") Z" not in Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
