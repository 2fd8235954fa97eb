# SPDX-License-Identifier: Apache-2.0
"""The shipped units under a real systemd: run in a guest by test_systemd.py.

    python -m tests.vm.run --ext4 6.12 -- .venv/bin/python -m tests.vm.guest_systemd [NAME...]

Everything is done as systemd/README.md says, with systemctl and the real commands. CALLS are made under the unit with its
programs in the kernel; LIFE is how the unit starts, ends and begins again, six times, so there without them (`probes = false`).
Each has a systemd of its own and its steps build on each other. Output as of guest_oci.py; only the standard library, as there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.vm.guest_oci import step
from tests.vm.manager import Tool, booted

UNITS = Path(__file__).resolve().parents[2] / "systemd"
ETC = Path("/etc/agentrun")
SYSTEM = Path("/etc/systemd/system")
EXT4 = Path("/mnt/ext4")
SERVICE = Path("/sys/fs/cgroup/agentrun.slice/agentrun.service")
SOCKET = Path("/run/agentrun/agentrun.sock")
HOMES = ("/home/agent", "/root/agent", "/tmp/agent")
STOP_SECONDS = 30
"""TimeoutStopSec= of the unit."""
POLICY = 'name = "{}"\ndescription = "For a test."\nextends = "default"\n{}\n'
POLICIES = {
    "changing": 'process.hostname = "first"',
    "bursty": 'memory = { high = "64M", max = "512M", on_exhausted = "kill" }',
    "fetch": '[net]\nmode = "egress"\nallow = ["files.test:8080"]\nhosts = { "files.test" = "10.99.0.2" }',
}

Step = Callable[["Unit"], Any]
CALLS: dict[str, Step] = {}
LIFE: dict[str, Step] = {}


def calls(function: Step) -> Step:
    CALLS[function.__name__] = function
    return function


def life(function: Step) -> Step:
    LIFE[function.__name__] = function
    return function


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


# ------------------------------------------------------------------------------------------------------- calls


@calls
def the_first_call_starts_the_service(unit: Unit) -> Any:
    unit.systemctl("enable", "agentrun.socket", "agentrun.service")
    unit.systemctl("start", "agentrun.socket")
    same(unit.show("ActiveState"), ["inactive"])
    same((SOCKET.parent.stat().st_mode & 0o777, SOCKET.stat().st_mode & 0o777), (0o700, 0o600))
    unit.inside.must("ls", "/sys/kernel/debug/tracing")  # the kernel mounts it for whoever looks, as the probes process does
    unit.mounted = unit.mounts()
    done = unit.exec("--", "true")
    same((done.returncode, done.stdout, done.stderr), (0, "", ""))
    same(unit.show("ActiveState", "SubState", "Type", "Result", "NRestarts"), ["active", "running", "notify", "success", "0"])
    same(unit.show("StatusText"), [f"serving on {SOCKET}"])
    same(unit.show("ControlGroup"), ["/agentrun.slice/agentrun.service"])


@calls
def its_cgroup_is_delegated(unit: Unit) -> Any:
    """The daemon's own processes are in supervisor/, its calls beside it, and nobody is in the unit's own cgroup."""
    same((SERVICE / "cgroup.procs").read_text(), "")
    assert unit.main_pid() in below(SERVICE / "supervisor")
    controllers = {"cpu", "io", "memory", "pids"}
    for path in (SERVICE, SERVICE / "agentrun-daemon", SERVICE / "agentrun-daemon" / "tenant-default"):
        assert controllers <= set((path / "cgroup.subtree_control").read_text().split()), path
    warm = [path for path in (SERVICE / "agentrun-daemon" / "tenant-default").glob("call-*") if below(path)]
    assert warm
    return len(warm)


@calls
def a_tool_that_is_too_big_is_a_result(unit: Unit) -> Any:
    """Of its own limit, and of a ceiling over everything, as one puts it on the slice. The service does not mind."""
    before = unit.main_pid()
    big = ("dd", "if=/dev/zero", "of=/dev/null", "count=1", "bs=400M")
    done = unit.exec("--json", "--memory", "64M", "--", *big)
    own = json.loads(done.stdout)
    same((done.returncode, own["outcome"], own["verdict"]["reason"]), (137, "memory_killed", "memory"))
    same(own["usage"]["memory_peak"], 64 << 20)
    ceiling = int((SERVICE / "memory.current").read_text()) + (100 << 20)
    unit.systemctl("set-property", "--runtime", "agentrun.slice", f"MemoryMax={ceiling}")
    try:
        above = unit.result("--", *big)
    finally:
        unit.systemctl("set-property", "--runtime", "agentrun.slice", "MemoryMax=infinity")
    same((above["outcome"], above["verdict"]["reason"]), ("memory_killed", "memory"))
    assert above["usage"]["memory_peak"] < ceiling, above
    events = dict(line.split() for line in (SERVICE / "memory.events").read_text().splitlines())
    assert int(events["oom_kill"]) >= 2, events  # systemd saw them
    same((unit.prints("--", "echo", "well"), unit.main_pid()), ("well\n", before))
    same(unit.show("ActiveState", "Result", "NRestarts"), ["active", "success", "0"])


@calls
def tools_inherit_nothing_of_the_unit(unit: Unit) -> Any:
    """Its priority, its descriptors, its capabilities: the daemon has them, the tools have what is theirs."""
    script = "nice; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; grep -E 'CapBnd|CapEff|NoNewPrivs' /proc/self/status"
    nothing = ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"]
    same(unit.prints("--", "sh", "-c", script).splitlines(), ["0", "1024", "524288", "200", *nothing])
    pid = unit.main_pid()
    same(os.getpriority(os.PRIO_PROCESS, pid), -10)
    limits = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max open files"))
    same(limits.split()[3:5], ["1048576", "1048576"])
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    same((status["NoNewPrivs"], status["Seccomp"]), ("1", "0"))
    bounding = int(status["CapBnd"], 16)
    numbers = {"CAP_SYS_MODULE": 16, "CAP_SYS_RAWIO": 17, "CAP_SYS_BOOT": 22, "CAP_SYS_TIME": 25, "CAP_MAC_ADMIN": 33}
    same([name for name, bit in numbers.items() if bounding >> bit & 1], [])
    assert bounding >> 21 & 1  # CAP_SYS_ADMIN


@calls
def workspaces_are_the_callers_own(unit: Unit) -> Any:
    """Below homes and /tmp: those the caller sees, not those of a mount namespace of the unit."""
    for home in HOMES:
        work = Path(home, "project")
        work.mkdir()
        (work / "file").write_text("old\n")
        same(unit.prints("--workspace", ".", "--", "sh", "-c", "pwd; cat file; echo new > made", cwd=str(work)), f"{work}\nold\n")
        same((work / "made").read_text(), "new\n")
        same((work / "made").owner(), "root")
    copy = unit.result("--workspace", f"{HOMES[0]}/project:cow", "--", "sh", "-c", "rm made; echo other > file")
    same((copy["changes"]["modified"], copy["changes"]["deleted"]), (1, 1))
    same(Path(HOMES[0], "project", "file").read_text(), "old\n")


@calls
def networks_are_as_asked_for(unit: Unit) -> Any:
    devices = "grep -c : /proc/net/dev; grep -c lo: /proc/net/dev"
    same(unit.prints("--net", "none", "--", "sh", "-c", devices).split(), ["1", "1"])
    with said_at("10.99.0.2", 8080, b"from the host\n"):
        script = "exec 3<>/dev/tcp/{} && cat <&3"
        there = unit.prints("--policy", "fetch", "--", "bash", "-c", script.format("files.test/8080"))
        same(there, "from the host\n")
        other = unit.result("--policy", "fetch", "--", "bash", "-c", script.format("files.test/22"))
        same((other["outcome"], [one["what"] for one in other["denied"]]), ("exited", ["files.test:22"]))
        assert other["exit_code"] != 0, other


@contextlib.contextmanager
def said_at(address: str, port: int, what: bytes) -> Iterator[None]:
    """A server on the host's side that says one thing to everybody."""
    subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(what)

    with socket.create_server((address, port)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)


@calls
def programs_in_the_kernel_strike(unit: Unit) -> Any:
    """The probes process has what it needs: a burst ends in the kernel, and the result says what held the call.

    What `agentrun status` prints is asked for by hand: starting that takes a guest ten seconds.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(SOCKET))
        connection.sendall(b"\x0e\0\0\0\x82\xa1v\1\xa2op\xa6status")
        answer = connection.recv(4096)
    assert b"\xa4mode\xaecontroller+bpf" in answer, answer
    assert os.fsencode(SERVICE / "agentrun-daemon") in answer, answer
    found = unit.result("--policy", "bursty", "--", "dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1")
    same((found["outcome"], found["memory_mode"], found["bursts"][-1]["rung"]), ("memory_killed", "controller+bpf", "killed"))
    assert found["usage"]["memory_peak"] < 72 << 20, found
    return found["usage"]["memory_peak"]


@calls
def the_doctor_is_content(unit: Unit) -> Any:
    said = unit.inside.must("agentrun", "doctor")
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert f"ok daemon {SOCKET}" in lines, said
    same([line for line in lines if line.startswith("no ")], [])
    same(lines[-1], "tool calls can run here")


@calls
def nothing_was_mounted_where_systemd_is(unit: Unit) -> Any:
    """Mounts are shared on a host with systemd; none of a sandbox may get out of it."""
    same(unit.mounts(), unit.mounted)


# -------------------------------------------------------------------------------------------------------- life


@life
def enabled_it_starts_at_once(unit: Unit) -> Any:
    unit.systemctl("enable", "--now", "agentrun.socket", "agentrun.service")
    same(unit.show("ActiveState", "SubState", "UnitFileState"), ["active", "running", "enabled"])
    same(unit.prints("--", "echo", "hello"), "hello\n")


@life
def reload_reads_policies(unit: Unit) -> Any:
    """All or none; what came of it is in the status, not in the exit code."""
    policy = ETC / "policies" / "changing.toml"
    host = ("--policy", "changing", "--", "hostname")
    before = unit.main_pid()
    same(unit.prints(*host), "first\n")
    policy.write_text(POLICY.format("changing", 'process.hostname = "second"'))
    same(unit.prints(*host), "first\n")
    unit.systemctl("reload", "agentrun.service")
    eventually(lambda: unit.show("StatusText")[0].endswith(" policies reloaded"), "reloaded")
    same(unit.prints(*host), "second\n")
    policy.write_text("name = 3\n")
    unit.systemctl("reload", "agentrun.service")
    said = eventually(lambda: next(iter([text for text in unit.show("StatusText") if "refused" in text]), None), "refused")
    assert f"the old policies stay: {policy}: " in said, said
    same(unit.prints(*host), "second\n")
    same((unit.show("ActiveState", "NRestarts"), unit.main_pid()), (["active", "0"], before))
    policy.unlink()
    return said


@life
def killed_it_comes_back(unit: Unit) -> Any:
    client = unit.begin("4711", "--", "sleep", "4711")
    old, processes, path = cgroups(SERVICE), below(SERVICE), identity(SOCKET)
    os.kill(unit.main_pid(), signal.SIGKILL)
    stdout, stderr = client.communicate(timeout=60)
    same((client.returncode, stdout), (125, ""))
    same(stderr, "agentrun: the daemon went away during the call; the tool call was killed with it\n")
    same(unit.prints("--", "echo", "again"), "again\n")  # it waits at the socket until there is a daemon again
    same(unit.show("ActiveState", "SubState", "NRestarts"), ["active", "running", "1"])
    same(sleeping("4711"), [])
    same([pid for pid in processes if Path(f"/proc/{pid}").exists()], [])
    same([str(old[inode]) for inode in old.keys() & cgroups(SERVICE).keys()], [])
    same(identity(SOCKET), path)


@life
def stopped_it_ends_its_calls(unit: Unit) -> Any:
    """In time, and its clients are told; what listens goes on listening."""
    path = identity(SOCKET)
    told = unit.begin("4712", "--json", "--", "sh", "-c", "echo begun; sleep 4712")
    deaf = unit.begin("4713", "--", "sh", "-c", "trap '' TERM INT HUP; sleep 4713")
    begun = time.monotonic()
    unit.systemctl("stop", "agentrun.service")
    seconds = time.monotonic() - begun
    assert seconds < STOP_SECONDS / 2, seconds
    stdout, stderr = told.communicate(timeout=60)
    result = json.loads(stdout)
    message = "killed because the daemon was stopped"
    same((told.returncode, result["outcome"], result["verdict"]["message"]), (137, "cancelled", message))
    same((result["stdout"], stderr), ("begun\n", ""))
    stdout, stderr = deaf.communicate(timeout=60)
    same((deaf.returncode, stdout, stderr), (137, "", f"agentrun: {message}\n"))
    same(sleeping("4712") + sleeping("4713"), [])
    same(cgroups(SERVICE), {})
    same(unit.show("ActiveState", "Result"), ["inactive", "success"])
    same(unit.show("ActiveState", "SubState", unit="agentrun.socket"), ["active", "listening"])
    same(identity(SOCKET), path)
    return round(seconds, 1)


@life
def a_mistake_in_its_configuration_is_told(unit: Unit) -> Any:
    """Whoever calls is told at once and systemd does not try for ever; when it is mended, the next call starts the service."""
    config = ETC / "config.toml"
    good, path = config.read_text(), identity(SOCKET)
    config.write_text("prbes = false\n")
    done = unit.exec("--", "true")
    same((done.returncode, done.stderr), (125, "agentrun: the daemon could not be started; its log says why\n"))
    eventually(lambda: unit.show("ActiveState") == ["failed"], "failed")
    same(unit.show("Result", "NRestarts", "ExecMainStatus"), ["exit-code", "0", "2"])
    log = unit.inside.must("journalctl", "--boot", "--no-pager", "--unit", "agentrun.service")
    assert f"agentrun: {config}: " in log, log
    same(unit.show("ActiveState", unit="agentrun.socket"), ["active"])
    config.write_text(good)
    same(unit.prints("--", "echo", "mended"), "mended\n")
    same((unit.show("ActiveState"), identity(SOCKET)), (["active"], path))


@life
def a_group_is_let_in(unit: Unit) -> Any:
    subprocess.run(["groupadd", "--system", "agentrun"], check=True)
    subprocess.run(["useradd", "--groups", "agentrun", "member"], check=True)
    subprocess.run(["useradd", "stranger"], check=True)
    uid = int(unit.inside.must("id", "-u", "member"))
    refusal = f"agentrun: cannot connect to {SOCKET}: Permission denied"
    before = unit.exec("--", "true", user="member")
    assert (before.returncode, before.stderr.startswith(refusal)) == (125, True), before
    drop_in("agentrun.socket", "[Socket]\nSocketGroup=agentrun\nSocketMode=0660\nDirectoryMode=0711\n")
    drop_in("agentrun.service", "[Service]\nRuntimeDirectoryMode=0711\n")
    unit.systemctl("daemon-reload")
    unit.systemctl("restart", "agentrun.socket", "agentrun.service")
    owner, _, mode = identity(SOCKET)
    same((owner, mode, identity(SOCKET.parent)[::2]), ("root:agentrun", "660", ("root:root", "711")))
    same(unit.prints("--", "id", "-un", user="member"), "tool\n")
    assert (SERVICE / "agentrun-daemon" / f"tenant-uid-{uid}").is_dir()
    other = unit.exec("--tenant", "default", "--", "true", user="member")
    same((other.returncode, other.stderr), (2, f"agentrun: tenant: user {uid} may not call for 'default' (yours is uid-{uid})\n"))
    stranger = unit.exec("--", "true", user="stranger")
    assert (stranger.returncode, stranger.stderr.startswith(refusal)) == (125, True), stranger
    listed = unit.inside("runuser", "-u", "member", "--", "ls", str(SOCKET.parent))
    assert listed.returncode != 0, listed
    same(unit.prints("--", "echo", "root"), "root\n")


@life
def without_its_socket_it_ends(unit: Unit) -> Any:
    """Then it is as if there was no daemon: root's calls have a runtime each, and others none."""
    unit.systemctl("stop", "agentrun.socket")
    same((unit.show("ActiveState", "Result"), cgroups(SERVICE), SOCKET.exists()), (["inactive", "success"], {}, False))
    alone = unit.exec("--json", "--", "echo", "alone")
    same((alone.returncode, json.loads(alone.stdout)["private_runtime"]), (0, True))
    same(unit.exec("--", "true", user="member").returncode, 125)


def drop_in(name: str, text: str) -> None:
    """What `systemctl edit` leaves behind."""
    directory = SYSTEM / f"{name}.d"
    directory.mkdir()
    (directory / "override.conf").write_text(text)


# --------------------------------------------------------------------------------------------------- the script


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


def jobs(wanted: list[str]) -> Iterator[tuple[str, dict[str, Step]]]:
    """What this guest does: of several kernels, the second has the units' life and the first their calls."""
    kernels, own = os.environ.get("SYSTEMD_KERNELS", "").split(), os.environ.get("AGENTRUN_VM", "")
    share = kernels.index(own) % 2 if len(kernels) > 1 and own in kernels else None
    for number, (config, steps) in enumerate((("", CALLS), ("probes = false\n", LIFE))):
        if wanted:
            steps = {name: function for name, function in steps.items() if name in wanted}
        if steps and share in (None, number):
            yield config, steps


def main(wanted: list[str]) -> int:
    good = True
    prepare()
    for config, steps in jobs(wanted):
        with installed(config) as unit:
            for name, function in steps.items():
                good &= step(name, "agentrun", lambda function=function: function(unit))  # type: ignore[misc]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
