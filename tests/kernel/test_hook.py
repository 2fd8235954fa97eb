# SPDX-License-Identifier: Apache-2.0
"""The OCI hook on this host, whatever its cgroups: real containers of runc, a real daemon, the hook as it is installed.

On a hybrid host runc gives a container a cgroup2 cgroup without controllers, which the programs in the kernel hold to its memory,
and crun makes no containers at all. What a memory controller does: tests/vm/test_hook.py.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agentrun.cgroup.tree import find_mount
from tests.containers import Container, hook_argv, make_rootfs
from tests.hog import compile_hog
from tests.kernel.wall import NOBODY
from tests.requirements import lacking
from tests.support import BIN, PATIENCE, PYTHON, Daemon, eventually, frame, missing_requirement, read_answer, unique_name

pytestmark = pytest.mark.host

MIB = 1 << 20
IDLE = ["/bin/busybox", "sleep", "1000"]
POLICIES = {
    "hook-kill": 'memory = { high = "64M", max = "256M", on_exhausted = "kill" }',
    "hook-burst": 'memory = { high = "64M", max = "512M", burst = "256M", burst_seconds = 30 }',
    "hook-stop": 'memory = { high = "64M", max = "256M", on_exhausted = "stop", freeze_seconds = 600 }',
    "hook-max": 'memory.max = "64M"',
    "hook-strict": "cpu.weight = 10\nio.weight = 10\npids.max = 20",
    "hook-easy": "best_effort = true\ncpu.weight = 10\nio.weight = 10\npids.max = 20",
}


class Lab:
    """A directory with a root file system, a daemon's socket and policies of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rootfs = make_rootfs(directory / "rootfs", compile_hog(directory))
        self.daemon: Daemon | None = None
        self.socket = str(directory / "s")
        self.hooks = hook_argv(self.socket, str(directory / "policies.json"))
        self.log = directory / "hook.log"
        self._made: list[Container] = []
        policies = directory / "config/agentrun/policies"
        policies.mkdir(parents=True)
        for name, text in POLICIES.items():
            (policies / f"{name}.toml").write_text(f'name = "{name}"\ndescription = "For the hook."\n{text}\n')

    def start(self, *words: str) -> Daemon:
        os.environ["XDG_CONFIG_HOME"] = str(self.directory / "config")
        try:
            self.daemon = Daemon(self.directory, *words, config="probes = true")
        finally:
            del os.environ["XDG_CONFIG_HOME"]
        return self.daemon

    def stop(self) -> None:
        if self.daemon is not None:
            self.daemon.take_log()
            self.daemon.stop()
            self.daemon = None

    def make(self, args: list[str], **annotations: str) -> Container:
        container = Container("runc", self.directory, unique_name(), self.rootfs, args, self.hooks, **annotations)
        self._made.append(container)
        return container

    def run(self, args: list[str], **annotations: str) -> Container:
        container = self.make(args, **annotations)
        for verb in (container.create, container.start):
            done = verb()
            assert done.returncode == 0, (done, self.said(container))
        return container

    def said(self, container: Container) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.partition(f" {container.name}: ")[2] for line in lines if f" {container.name}: " in line]

    def listed(self, container: Container) -> dict | None:
        assert self.daemon is not None
        rows = self.daemon.ask(op="ps")["data"]["containers"]
        return next((row for row in rows if row["id"] == container.name), None)

    def records(self) -> list[str]:
        return sorted(path.name for path in self.directory.glob("s.containers/*"))

    def remove(self, container: Container) -> None:
        """Nothing may be left of it."""
        done = container.delete()
        self._made.remove(container)
        assert done.returncode == 0, done
        assert not [name for name in self.records() if name.startswith(f"{container.name}-")]
        if self.daemon is not None:
            assert self.listed(container) is None

    def close(self) -> None:
        for container in self._made:
            container.delete()
        self.stop()


@contextlib.contextmanager
def open_lab():
    if shutil.which("runc", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        lacking("no runc")
    if reason := missing_requirement():
        lacking(reason)
    with tempfile.TemporaryDirectory(prefix="agentrun-hook-") as directory:
        os.chmod(directory, 0o755)
        lab = Lab(Path(directory))
        try:
            yield lab
        finally:
            lab.close()


@pytest.fixture(scope="module")
def lab():
    """With a daemon."""
    with open_lab() as found:
        if not found.start("--group", "users").ask(op="status")["data"]["memory"]["hook"]:
            lacking("no program could be attached")
        eventually(lambda: found.daemon.ask(op="latency")["data"]["recording"], "phases to be recorded")
        yield found
        found.stop()
        assert not Path(f"{found.socket}.containers").exists()


@pytest.fixture
def alone():
    """Without one."""
    with open_lab() as found:
        yield found


@contextlib.contextmanager
def bursts(lab):
    """What `agentrun bursts` prints meanwhile: a function that gives what there is of a container."""
    path = lab.directory / "bursts"
    with path.open("wb") as out:
        program = subprocess.Popen([BIN / "agentrun-cli", "bursts", "--json", "--socket", lab.socket], stdout=out)
    try:
        eventually(lambda: b"listening" in path.read_bytes())
        yield lambda container: [
            news for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n") and (news := json.loads(line)).get("call") == container.name
        ]  # fmt: skip
    finally:
        program.send_signal(signal.SIGINT)
        program.wait(PATIENCE)


def ended(container):
    eventually(lambda: not container.is_running(), "the end of the container")


# ---------------------------------------------------------------- with a daemon


def test_a_hog_in_a_container_is_killed_at_its_budget_and_bursts_tells(lab):
    with bursts(lab) as news:
        container = lab.run(["/bin/hog", "anon", "512"], policy="hook-kill")
        ended(container)
        steps = eventually(lambda: [one for one in news(container) if one["event"] == "step"])
    assert steps[-1]["rung"] == "killed"
    assert steps[-1]["usage"] < 80 * MIB
    assert lab.listed(container)["killed"] == "above its memory budget"
    assert "killed: above its memory budget" in lab.daemon.cli("ps").stdout
    lab.remove(container)
    assert f"container {container.name} (policy hook-kill) was killed" in lab.daemon.take_log()


def test_a_burst_is_granted(lab):
    with bursts(lab) as news:
        container = lab.run(["/bin/hog", "anon", "128"], policy="hook-burst")
        ended(container)
        steps = eventually(lambda: [one["rung"] for one in news(container) if one["event"] == "step"])
    assert steps[0] == "granted"
    assert not {"throttled", "frozen", "killed"} & set(steps)
    assert container.output.read_text().startswith("done anon")
    lab.remove(container)


def test_the_limit_alone(lab):
    container = lab.run(["/bin/hog", "anon", "256"], policy="hook-max")
    ended(container)
    assert container.output.read_text() == ""
    lab.remove(container)
    lab.daemon.take_log()


def test_it_is_listed_and_its_set_up_recorded(lab):
    container = lab.run(["/bin/busybox", "sh", "-c", "echo hello; sleep 1000"], policy="hook-easy", tenant="ci")
    eventually(lambda: container.output.read_text() == "hello\n")
    row = lab.listed(container)
    assert (row["policy"], row["tenant"], row["cgroup"]) == ("hook-easy", "ci", str(container.cgroup(find_mount())))
    assert {"mounts", "exec", "first_syscall", "first_write"} <= {name for name, value in row["phases"].items() if value}
    for verb in (["ps"], ["top", "1", "1"]):
        done = lab.daemon.cli(*verb)
        assert (done.returncode, done.stderr) == (0, "")
        assert container.name[:7] in done.stdout, verb
        assert "hook-easy" in done.stdout
    lab.remove(container)
    said = lab.daemon.cli("lat", "-s", "-p", "exec", "-p", "teardown").stdout
    assert "exec, cold, container/hook-easy: 1 times" in said
    assert "teardown, cold, container/hook-easy: 1 times" in said


def test_the_hook_imports_next_to_nothing(lab):
    """What takes its time is starting an interpreter; how long, docs/oci.md says."""
    container = lab.run(IDLE, policy="hook-easy")
    state = json.dumps({
        "ociVersion": "1.0.2", "id": container.name, "status": "running", "pid": container.pid, "bundle": str(container.bundle),
        "annotations": {"io.agentrun.policy": "hook-easy"},
    }).encode()  # fmt: skip
    argv = [lab.hooks[0], "-X", "importtime", *lab.hooks[1:], "poststart"]
    done = subprocess.run(argv, input=state, env={}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = {
        line.rpartition(b"|")[2].strip().decode() for line in done.stderr.splitlines() if line.startswith(b"import time:")
    }
    assert "agentrun_shim.hook_state" in imported
    heavy = {"agentrun", "trio", "msgspec", "json", "re", "typing", "enum", "socket", "subprocess", "argparse", "inspect"}
    assert not imported & heavy
    lab.remove(container)


@pytest.mark.parametrize(
    ("policy", "fail", "starts"),
    [
        ("hook-strict", "", False),
        ("hook-strict", "open", True),
        ("hook-easy", "", True),
        ("hook-easy", "closed", False),
        ("no-such", "", False),
        ("no-such", "open", True),
    ],
)
def test_failures_are_as_the_policy_says(lab, policy, fail, starts):
    """This host's cgroup2 has no pids controller, or the test has nothing to fail by."""
    if "pids" in Path(find_mount(), "cgroup.controllers").read_text() and policy != "no-such":
        pytest.skip("this host enforces everything")
    container = lab.make(IDLE, policy=policy, **({"fail": fail} if fail else {}))
    done = container.create()
    said = " | ".join(lab.said(container))
    assert (done.returncode == 0) is starts, (done, said)
    if policy == "no-such":
        assert 'there is no policy "no-such"' in said
    else:
        assert "its cgroup has no" in said
    if starts:
        assert "not enforced" in said
        assert container.start().returncode == 0
        assert container.is_running()
    else:
        assert said.startswith("not started: ")
        assert said.partition('"')[0] in done.stderr  # runc shows what a hook said, with its quotation marks escaped
    lab.remove(container)


def test_what_vanishes_without_a_word_is_dropped(lab):
    container = lab.run(IDLE, policy="hook-kill")
    cgroup = container.cgroup(find_mount())
    os.kill(container.pid, signal.SIGKILL)

    def removed():
        with contextlib.suppress(OSError):
            cgroup.rmdir()
        return not cgroup.exists()

    eventually(removed)
    eventually(lambda: lab.listed(container) is None, seconds=5)
    assert not [name for name in lab.records() if name.startswith(container.name)]


def test_many_at_once(lab):
    def life(_number):
        container = lab.run(["/bin/busybox", "sh", "-c", "exec sleep 0.2"], policy="hook-kill")
        assert lab.listed(container)
        ended(container)
        lab.remove(container)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(life, range(24)))
    assert lab.daemon.ask(op="ps")["data"]["containers"] == []
    assert lab.records() == []


def test_other_programs_hold_it_when_the_first_have_died(lab):
    container = lab.run(IDLE, policy="hook-kill")
    before = lab.daemon.ask(op="status")["data"]["memory"]
    os.kill(before["pid"], signal.SIGKILL)

    def again():
        memory = lab.daemon.ask(op="status")["data"]["memory"]
        return memory["starts"] > before["starts"] and memory["hook"]

    eventually(again)

    def struck():  # for some seconds the dead one's programs are there as well
        container.call("exec", container.name, "/bin/hog", "anon", "512")
        return not container.is_running()

    eventually(struck)
    assert lab.listed(container)["killed"] == "above its memory budget"
    lab.remove(container)


# ---------------------------------------------------------------- who may

ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    sock.sendall(bytes.fromhex(sys.argv[2]))
    while data := sock.recv(65536):
        print(end=data.hex(), flush=True)
"""


class Said:
    def __init__(self, text: str) -> None:
        self._data = bytes.fromhex(text)

    def recv(self, _size: int) -> bytes:
        data, self._data = self._data, b""
        return data


def ask_as_nobody(lab, **request):
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--groups=users", PYTHON, "-I", "-S", "-c", ASK]
    data = frame({"v": 1, **request}).hex()
    done = subprocess.run([*command, lab.socket, data], cwd="/", capture_output=True, text=True, check=True, timeout=PATIENCE)
    return read_answer(Said(done.stdout))


@contextlib.contextmanager
def cgroup(owner: int = 0):
    path = Path(find_mount(), unique_name())
    path.mkdir()
    try:
        os.chown(path, owner, owner)
        yield path
    finally:
        path.rmdir()


def registration(path: Path, **changes) -> dict:
    name = "/" + str(path.relative_to(find_mount()))
    return {"op": "register", "id": "a", "bundle": "/b", "cgroup": name, "inode": path.stat().st_ino, "policy": "hook-easy",
            "started": True} | changes  # fmt: skip


def test_only_root_or_the_owner_of_a_cgroup_may(lab):
    with cgroup() as roots, cgroup(NOBODY) as own:
        refused = ask_as_nobody(lab, **registration(roots))
        assert (refused["op"], refused["exit"]) == ("error", 2)
        assert f"belongs to user 0, not to {NOBODY}" in refused["message"]
        assert ask_as_nobody(lab, **registration(own))["data"]["known"] is False
        assert ask_as_nobody(lab, **registration(own))["data"]["known"] is True
        (row,) = ask_as_nobody(lab, op="ps")["data"]["containers"]
        assert (row["id"], row["tenant"]) == ("a", f"uid-{NOBODY}")
        assert lab.daemon.ask(**registration(roots, id="r"))["data"]["known"] is False
        assert [row["id"] for row in ask_as_nobody(lab, op="ps")["data"]["containers"]] == ["a"]
        denied = ask_as_nobody(lab, op="unregister", id="r", bundle="/b")
        assert "was registered by user 0" in denied["message"]
        assert ask_as_nobody(lab, **registration(own, policy="/etc/passwd"))["message"].startswith("policy: only root")
        assert ask_as_nobody(lab, **registration(own, id="b", tenant="default"))["message"].startswith("tenant: user")
        assert ask_as_nobody(lab, op="unregister", id="a", bundle="/b")["data"] == {"known": True}
        assert lab.daemon.ask(op="unregister", id="r", bundle="/b")["data"] == {"known": True}
        assert lab.daemon.ask(op="unregister", id="r", bundle="/b")["data"] == {"known": False}


def test_only_a_cgroup_that_is_somebody_elses_is_taken(lab):
    mount = find_mount()
    root = registration(mount)
    with cgroup() as path:
        for request, why in (
            (root | {"cgroup": "/"}, "is the root"),
            (registration(path, inode=1), "another one"),
            (registration(path, cgroup="/no/such"), "No such file"),
            (registration(path, cgroup="/../.."), "no cgroup2 file system"),
            (registration(path, id="../x"), "id: "),
            (registration(path, policy="no-such"), "there is no policy"),
            (registration(lab.daemon.cgroup), "the daemon's own"),
            (registration(path, hint="memory:much"), "hint"),
            (registration(path, tenant="../x"), "tenant"),
        ):
            answer = lab.daemon.ask(**request)
            assert answer["op"] == "error", (request, answer)
            assert why in answer["message"], (request, answer)
        (path / "below").mkdir()
        (path / "below/cgroup.type").write_text("threaded")
        try:
            answer = lab.daemon.ask(**registration(path / "below"))
        finally:
            (path / "below").rmdir()
        assert "threaded: cgroups(7)" in answer["message"]
    assert lab.daemon.ask(op="ps")["data"]["containers"] == []


def test_cgroups_at_many_levels(lab):
    """Every page has to be looked up at each: where there is no controller, four levels of the tree are as many as can be."""
    if lab.daemon.ask(op="status")["data"]["memory"]["mode"] != "bpf":
        pytest.skip("this host has a memory controller")
    with cgroup() as path:
        levels = [path]
        while len(levels) < 5:
            levels.append(levels[-1] / "x")
            levels[-1].mkdir()
        answers = []
        try:
            for place in levels:
                request = registration(place, id=f"at-{len(answers)}", policy="hook-max")
                answers.append(lab.daemon.ask(**request))
            # The daemon's own leaves are at the third.
            assert [answer["op"] for answer in answers] == ["reply"] * 4 + ["error"]
            assert "watch cgroups at four levels" in answers[-1]["message"]
            request = registration(levels[-1], id="at-4", policy="hook-max", fail="open")
            assert lab.daemon.ask(**request)["data"]["unenforced"][-1][0] == "memory.max"
            lab.daemon.ask(op="unregister", id="at-0", bundle="/b")
            lab.daemon.ask(op="unregister", id="at-4", bundle="/b")
            assert lab.daemon.ask(**registration(levels[-1], id="at-4", policy="hook-max"))["op"] == "reply"
        finally:
            for number, place in reversed(list(enumerate(levels))):
                lab.daemon.ask(op="unregister", id=f"at-{number}", bundle="/b")
                if place != path:
                    place.rmdir()
    assert lab.daemon.ask(op="ps")["data"]["containers"] == []


def test_a_daemon_that_does_not_answer_is_none(lab):
    """Two seconds for each stage, and the container runs; when the daemon comes to itself it knows all the same."""
    with lab.daemon.stopped():
        container = lab.run(IDLE, policy="test")
        said = lab.said(container)
    assert f"no daemon at {lab.socket}: no answer within 2 s: the static limits of policy test are in force" in said[-1]
    row = eventually(lambda: lab.listed(container))
    assert row["notes"] == []  # what the hook wrote is not taken for the engine's own
    lab.remove(container)


# ---------------------------------------------------------------- without a daemon, and with the next one


def test_without_a_daemon_it_says_so_and_the_next_one_takes_over(alone):
    """Policies are those of /etc and the shipped ones then. `test` is best effort: what has no controller is listed."""
    container = alone.run(IDLE, policy="test")
    said = alone.said(container)
    assert f"no daemon at {alone.socket}: No such file or directory: the static limits of policy test are in force" in said[-1]
    assert "policies had to be read anew" in said[-1]
    assert json.loads((alone.directory / "policies.json").read_text())["policies"]["test"]["governed"] is True
    again = alone.run(IDLE, policy="test")  # now it finds them worked out
    assert "read anew" not in alone.said(again)[-1]
    alone.remove(again)
    alone.start()
    assert alone.listed(container)["policy"] == "test"
    assert len(alone.records()) == 1
    alone.stop()
    assert len(alone.records()) == 1  # it lives, and so does what is known of it
    alone.start()
    assert alone.listed(container)["policy"] == "test"
    alone.remove(container)
    alone.stop()


def test_what_the_last_daemon_held_the_next_one_holds(alone):
    alone.start()
    container = alone.run(IDLE, policy="hook-kill")
    gone = alone.run(IDLE, policy="hook-kill")
    alone.daemon.kill()  # not even time to say good-bye
    alone.daemon = None
    gone.delete()
    alone._made.remove(gone)
    alone.start()
    assert [row["id"] for row in alone.daemon.ask(op="ps")["data"]["containers"]] == [container.name]

    def struck():  # for some seconds the dead daemon's programs are there as well, and may be first: they only signal
        container.call("exec", container.name, "/bin/hog", "anon", "512")
        return not container.is_running()

    eventually(struck)
    eventually(lambda: "was killed: above its memory budget" in alone.daemon.log())
    alone.remove(container)
    alone.stop()


def test_the_next_daemon_wakes_whom_the_last_one_froze_and_nobody_else(alone):
    def is_frozen(container):
        return (container.cgroup(find_mount()) / "cgroup.freeze").read_text() == "1\n"

    alone.start()
    frozen = alone.run(["/bin/hog", "anon", "128"], policy="hook-stop")
    paused = alone.run(IDLE, policy="hook-stop")
    (paused.cgroup(find_mount()) / "cgroup.freeze").write_text("1")  # as `podman pause` does
    eventually(lambda: is_frozen(frozen))
    alone.daemon.kill()
    alone.daemon = None
    assert is_frozen(frozen)
    alone.start()
    eventually(lambda: not frozen.is_running() or not is_frozen(frozen))
    assert is_frozen(paused)
    (paused.cgroup(find_mount()) / "cgroup.freeze").write_text("0")
    alone.remove(frozen)
    alone.remove(paused)
    alone.stop()


@pytest.mark.parametrize(
    ("annotations", "why"),
    [
        ({"policy": "test", "daemon": "required"}, "no daemon at"),
        ({"policy": "no-such"}, "there is no policy"),
        ({"policy": "strict", "fail": "closed"}, ""),
    ],
)
def test_closed_without_a_daemon(alone, annotations, why):
    if not why and "pids" in Path(find_mount(), "cgroup.controllers").read_text():
        pytest.skip("this host enforces everything")
    container = alone.make(IDLE, **annotations)
    assert container.create().returncode == 1
    assert alone.said(container)[0].startswith(f"not started: policy {annotations['policy']} is not enforced: ")
    assert why in alone.said(container)[0]
    assert alone.records() == []
    alone.remove(container)
