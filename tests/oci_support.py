# SPDX-License-Identifier: Apache-2.0
"""What the tests of the OCI runtime share: bundles with a busybox in them, and a runtime with a root of its own.

Everything is named after our pid and looked for by that name afterwards: cgroups, mounts, processes, directories.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from agentrun_shim import native
from agentrun_shim.oci import cgroup
from agentrun_shim.oci.documents import example

RUNTIME = str(native.DIRECTORY / "agentrun-oci")
APPLETS = (
    "cat chmod dd echo env false grep head hostname id kill ln ls mkdir mount ps readlink rm sh sleep stat stty test touch"
    " true tty wc"
)
PATIENCE = 20.0
MARK = f"oci-test-{os.getpid()}"
_numbers = itertools.count(1)


def missing_requirement() -> str | None:
    """Why these tests cannot run here; None if they can."""
    if os.geteuid() != 0:
        return "not root"
    if not Path(RUNTIME).exists():
        return "the native runtime is not built (make build)"
    if shutil.which("busybox") is None:
        return "no busybox (apt-get install busybox-static)"
    if cgroup.find_mount() is None:
        return "no cgroup2 mount"
    return None


def has_controllers(*names: str) -> bool:
    """Whether cgroup v2 has these controllers here."""
    mount = cgroup.find_mount()
    return mount is not None and set(names) <= set(cgroup.read(mount[0], "cgroup.controllers").split())


def make_rootfs(path: Path) -> Path:
    """A root file system: busybox under the names of its applets, and the directories every image has."""
    for name in ("bin", "dev", "etc", "mnt", "proc", "run", "sys", "tmp", "work"):
        (path / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(shutil.which("busybox") or "busybox", path / "bin" / "busybox")
    for applet in APPLETS.split():
        if not (path / "bin" / applet).is_symlink():
            (path / "bin" / applet).symlink_to("busybox")
    (path / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\nworker:x:77:77:A worker:/work:/bin/sh\n")
    (path / "plain").write_text("no program\n")
    return path


def config(script: str, **changes: Any) -> dict[str, Any]:
    """The runtime's own example with a script as its program; ``changes`` replace top-level keys, dictionaries are merged."""
    made = example()
    made["process"] |= {"terminal": False, "args": ["sh", "-c", script], "env": ["PATH=/bin"]}
    made["linux"].pop("resources", None)
    return merge(made, changes)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(base)
    for key, value in changes.items():
        made[key] = merge(made[key], value) if isinstance(value, dict) and isinstance(made.get(key), dict) else value
    return made


class Oci:
    """The runtime, with a root and bundles in a directory of the test's own."""

    def __init__(self, directory: Path, *, runtime: str = RUNTIME) -> None:
        self.directory, self.runtime = directory, runtime
        self.root = directory / "state"
        self.bundle = directory / "bundle"
        make_rootfs(self.bundle / "rootfs")
        self.ids: list[str] = []

    def id(self) -> str:
        name = f"{MARK}-{next(_numbers)}"
        self.ids.append(name)
        return name

    def write(self, configuration: dict[str, Any]) -> Path:
        path = self.bundle / "config.json"
        path.write_text(json.dumps(configuration))
        return path

    def call(self, *arguments: str, check: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
        """One call, without PATH and HOME, as engines make them."""
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 60, "env": {}} | options
        done = subprocess.run([self.runtime, "--root", str(self.root), *arguments], text=True, **options)
        if check:
            assert done.returncode == 0, (arguments, done.stderr)
        return done

    def quietly(self, *arguments: str) -> None:
        """A call whose program goes on when it returns: it must not hold our pipes."""
        with open(self.directory / "stderr", "w+") as errors:
            done = self.call(*arguments, capture_output=False, stdout=subprocess.DEVNULL, stderr=errors)
            errors.seek(0)
            assert done.returncode == 0, errors.read()

    def run(self, configuration: dict[str, Any], *flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """``run`` in the foreground."""
        self.write(configuration)
        return self.call("run", "--bundle", str(self.bundle), *flags, self.id(), **options)

    def inside(self, script: str, *flags: str, **changes: Any) -> str:
        """What a script says in a container with these changes; it has to succeed."""
        done = self.run(config(script, **changes), *flags)
        assert (done.returncode, done.stderr) == (0, ""), (done.returncode, done.stderr, done.stdout)
        return done.stdout.strip()

    def refused(self, *flags: str, **changes: Any) -> str:
        """The error of a configuration that cannot be."""
        done = self.run(config("echo should not run", **changes), *flags)
        assert (done.returncode, done.stdout) == (1, ""), (done.returncode, done.stdout)
        return done.stderr.strip()

    def create(self, configuration: dict[str, Any], *flags: str, **options: Any) -> str:
        """A container that waits for ``start``; returns its name. Its streams are /dev/null."""
        self.write(configuration)
        name = self.id()
        null = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "capture_output": False}
        # A pipe for stderr would stay open in the container: a file is read instead.
        with open(self.directory / "stderr", "w+") as errors:
            done = self.call("create", "--bundle", str(self.bundle), *flags, name, **{**null, "stderr": errors, **options})
            errors.seek(0)
            assert done.returncode == 0, errors.read()
        return name

    def running(self, script: str, **changes: Any) -> str:
        """A container that runs a script."""
        name = self.create(config(script, **changes))
        self.call("start", name, check=True)
        return name

    def state(self, name: str) -> dict[str, Any]:
        return json.loads(self.call("state", name, check=True).stdout)

    def wait(self, name: str, status: str) -> dict[str, Any]:
        """Until it has that status."""
        deadline = time.monotonic() + PATIENCE
        while (state := self.state(name))["status"] != status:
            assert time.monotonic() < deadline, state
            time.sleep(0.01)
        return state

    def clean(self) -> None:
        """Remove every container, and look whether anything is left."""
        for name in self.ids:
            self.call("delete", "--force", name, check=True)
        assert leftovers(self.ids) == []
        assert [entry for entry in os.listdir(self.root) if entry != ".filters"] == [] if self.root.exists() else True


def leftovers(names: list[str]) -> list[str]:
    """Cgroups, mounts and processes that have one of these names in them."""
    found = []
    mount = cgroup.find_mount()
    wanted = set(names)
    for directory, below, _ in os.walk(mount[0] if mount else "/sys/fs/cgroup"):
        found += [f"{directory}/{name}" for name in below if any(name.endswith(one) for one in wanted)]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if any(name in line for name in names)]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(name in (process / "cgroup").read_text() for name in names):
                with contextlib.suppress(OSError):
                    if (process / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                        found.append(f"process {process.name}: {(process / 'cmdline').read_bytes()!r}")
    return found
