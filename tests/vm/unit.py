# SPDX-License-Identifier: Apache-2.0
"""agentrun.service on a guest's systemd: what the steps of unit_calls.py and unit_life.py do with it, and look at.

Only the standard library, as everything of guest_systemd.py.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.vm.manager import Tool, booted

UNITS = Path(__file__).resolve().parents[2] / "systemd"
ETC = Path("/etc/agentrun")
SYSTEM = Path("/etc/systemd/system")
EXT4 = Path("/mnt/ext4")
SERVICE = Path("/sys/fs/cgroup/agentrun.slice/agentrun.service")
SOCKET = Path("/run/agentrun/agentrun.sock")
HOMES = ("/home/agent", "/root/agent", "/tmp/agent")
POLICY = 'name = "{}"\ndescription = "For a test."\nextends = "default"\n{}\n'
POLICIES = {
    "changing": 'process.hostname = "first"',
    "bursty": 'memory = { high = "64M", max = "512M", on_exhausted = "kill" }',
    "fetch": '[net]\nmode = "egress"\nallow = ["files.test:8080"]\nhosts = { "files.test" = "10.99.0.2" }',
}

Step = Callable[["Unit"], Any]


def same(found: object, expected: object) -> None:
    assert found == expected, f"found {found!r}, expected {expected!r}"


def eventually(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)
    return value


class Unit:
    """The service and who uses it, seen from inside systemd's namespaces."""

    def __init__(self, inside: Tool) -> None:
        self.inside = inside
        self.mounted: list[str] = []
        """Where something was mounted before the first call."""

    def show(self, *names: str, unit: str = "agentrun.service") -> list[str]:
        lines = self.inside.must("systemctl", "show", unit, *(f"--property={name}" for name in names)).splitlines()
        found = dict(line.split("=", 1) for line in lines)
        return [found[name] for name in names]

    def systemctl(self, *words: str) -> None:
        self.inside.must("systemctl", *words)

    def exec(self, *words: str, user: str | None = None, cwd: str = "/") -> subprocess.CompletedProcess[str]:
        as_user = ["runuser", "-u", user, "--"] if user else []
        return self.inside("env", f"--chdir={cwd}", *as_user, "agentrun", "exec", *words)

    def result(self, *words: str, **options: Any) -> dict[str, Any]:
        """The document of a call that was made."""
        done = self.exec("--json", *words, **options)
        assert done.stdout.startswith("{"), (words, done)
        found: dict[str, Any] = json.loads(done.stdout)
        same((found["private_runtime"], found["unenforced"]), (False, []))
        return found

    def prints(self, *words: str, **options: Any) -> str:
        found = self.result(*words, **options)
        same((found["outcome"], found["exit_code"], found["stderr"]), ("exited", 0, ""))
        return str(found["stdout"])

    def mounts(self) -> list[str]:
        """Where something is mounted, for systemd."""
        return sorted(line.split()[4] for line in self.inside.must("cat", "/proc/1/mountinfo").splitlines())

    def begin(self, number: str, *words: str) -> subprocess.Popen[str]:
        """A client whose tool sleeps for that many seconds by now."""
        argv = [*self.inside.front, "agentrun", "exec", *words]
        client = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        eventually(lambda: sleeping(number), f"sleep {number}")
        return client

    def main_pid(self) -> int:
        """The daemon's, as processes outside of systemd's namespace see it."""
        wanted = self.show("MainPID")[0]
        for pid in below(SERVICE):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            if next(line for line in lines if line.startswith("NSpid:")).split()[-1] == wanted:
                return pid
        raise AssertionError(f"no process {wanted} in {SERVICE}")


def sleeping(number: str) -> list[int]:
    """The processes that are `sleep NUMBER`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if path.read_bytes() == b"sleep\0" + number.encode() + b"\0":
                found.append(int(path.parent.name))
    return found


def cgroups(path: Path) -> dict[int, Path]:
    """A cgroup and what is below it, by inode: another one of the same name is another one."""
    return {one.stat().st_ino: one for one in (path, *path.rglob("*")) if one.is_dir()} if path.exists() else {}


def below(path: Path) -> set[int]:
    return {int(pid) for one in cgroups(path).values() for pid in (one / "cgroup.procs").read_text().split()}


def identity(path: Path) -> tuple[str, int, str]:
    """What a restart of the service must not replace."""
    found = path.stat()
    return path.owner() + ":" + path.group(), found.st_ino, f"{found.st_mode & 0o7777:o}"


def drop_in(name: str, text: str) -> None:
    """What `systemctl edit` leaves behind."""
    directory = SYSTEM / f"{name}.d"
    directory.mkdir()
    (directory / "override.conf").write_text(text)


def prepare() -> None:
    """An installation where a package has it: others cannot follow a link into this checkout, if it is in a home."""
    here = Path(sys.executable).parent
    Path("/usr/bin/agentrun").unlink(missing_ok=True)
    shutil.copy(here / "agentrun", "/usr/bin/agentrun")
    Path("/usr/bin/agentrun-cli").unlink(missing_ok=True)
    Path("/usr/bin/agentrun-cli").symlink_to(here / "agentrun-cli")
    shutil.rmtree(ETC, ignore_errors=True)
    (ETC / "policies").mkdir(parents=True)
    for name, text in POLICIES.items():
        (ETC / "policies" / f"{name}.toml").write_text(POLICY.format(name, text))
    # Where owners can be mapped: the guest's root is an overlay.
    for number, place in enumerate((*HOMES, "/var/lib/agentrun")):
        disk = EXT4 / str(number)
        disk.mkdir()
        Path(place).mkdir(exist_ok=True)
        subprocess.run(["mount", "--bind", disk, place], check=True)


@contextlib.contextmanager
def installed(config: str) -> Iterator[Unit]:
    """systemd with the units. It is more patient than usual: a guest is twenty times slower than a host, and may not be alone."""
    (ETC / "config.toml").write_text(config)
    patience = Path("/etc/systemd/system.conf.d/patience.conf")
    patience.parent.mkdir(exist_ok=True)
    patience.write_text("[Manager]\nDefaultTimeoutStartSec=200\n")
    with booted() as inside:
        units = [str(path) for path in sorted(UNITS.glob("agentrun.*"))]
        inside.must("install", "-m", "0644", *units, f"{SYSTEM}/")
        unit = Unit(inside)
        unit.systemctl("daemon-reload")
        yield unit
        # Or the next systemd finds cgroups in the way, as none does after a boot.
        inside("systemctl", "disable", "--now", "agentrun.socket", "agentrun.service")
