# SPDX-License-Identifier: Apache-2.0
"""What the host-lane tests share: an executor and a daemon of their own, frames made by hand, and a count of what is left.

Several runs may share a machine: everything here has a name with our pid in it, and only what is ours is counted.
"""

import contextlib
import functools
import itertools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import trio

from agentrun import ExecutorConfig, Result, open_executor
from agentrun.cgroup.tree import find_mount
from agentrun_shim import native

BIN = Path(sys.executable).parent
CLIENT = str(native.DIRECTORY / "agentrun" if (native.DIRECTORY / "agentrun").exists() else BIN / "agentrun")
PATIENCE = 20.0
"""Seconds after which what should have happened has not; bounds every wait of the tests."""
RANGE = 65536
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PYTHON = "/usr/bin/python3"
"""The one that is in the sandbox: a virtual environment below /root is not."""

_numbers = itertools.count(1)


def missing_requirement() -> str | None:
    """Why host tests cannot run here; None if they can."""
    if os.geteuid() != 0:
        return "not root"
    if find_mount() is None:
        return "no cgroup2 mount"
    if not (native.DIRECTORY / "agentrun-slot").exists():
        return "the native slot is not built (make build)"
    if not Path(CLIENT).exists():
        return "the native client is not built (make build)"
    return None


FORK_STORM = """
import os, time
n = 1
try:
    while n < 1000:
        if os.fork() == 0: time.sleep(60)
        n += 1
except BlockingIOError: pass
print(n)
"""
"""Has children until it may have no more, and says how many processes there were."""


def unique_name() -> str:
    return f"test-{os.getpid()}-{next(_numbers)}"


def own_config(**changes) -> ExecutorConfig:
    """An executor of our own: its cgroup's name and its range of user ids are nobody else's."""
    base = 0x70000000 + (os.getpid() % 512) * 64 * RANGE
    return ExecutorConfig(**{"name": unique_name(), "id_base": base, **changes})


def run_async(function, *args, seconds: float = 60):
    """trio.run with an end."""

    async def bounded():
        with trio.fail_after(seconds):
            return await function(*args)

    return trio.run(bounded)


def with_executor(function, *args, seconds: float = 60, **config):
    """Run ``await function(executor, *args)`` in an executor made for it; nothing of it may be left afterwards."""
    chosen = own_config(**config)
    before = Leaks(cgroup_of(chosen.name))

    async def body():
        async with open_executor(chosen) as executor:
            return await function(executor, *args)

    try:
        return run_async(body, seconds=seconds)
    finally:
        before.check()
        assert not cgroup_of(chosen.name).exists()


def cgroup_of(name: str) -> Path:
    mount = find_mount()
    assert mount is not None
    return Path(os.environ.get("AGENTRUN_CGROUP", mount)) / f"agentrun-{name}"


class Blocking:
    """An executor in a thread, called without ``await``: one for a whole file, so that its calls are warm."""

    def __init__(self, config: ExecutorConfig) -> None:
        self.config = config
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        self._ready.wait(PATIENCE)
        if self._failure:
            raise self._failure

    def _main(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:  # noqa: BLE001 - raised again where the thread is waited for
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        async with open_executor(self.config) as self.executor:
            self._stop = trio.Event()
            self._token = trio.lowlevel.current_trio_token()
            self._ready.set()
            await self._stop.wait()

    def call(self, function, *args):
        return trio.from_thread.run(function, *args, trio_token=self._token)

    def run(self, argv, **options) -> Result:
        return self.call(functools.partial(self.executor.run, argv, **{"timeout": 30, **options}))

    def sh(self, script: str, *args: str, **options) -> Result:
        return self.run(["sh", "-c", script, "sh", *args], **options)

    def python(self, script: str, *args: str, **options) -> Result:
        return self.run([PYTHON, "-c", script, *args], **options)

    def text(self, script: str, *args: str, **options) -> str:
        """What a shell script prints; it must succeed and complain about nothing."""
        result = self.sh(script, *args, **options)
        assert (result.returncode, result.stderr) == (0, b""), result
        return (result.stdout or b"").decode().strip()

    def close(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self.call(self._set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self._failure:
            raise self._failure

    async def _set(self) -> None:
        self._stop.set()


class Daemon:
    """A private ``agentrun daemon``."""

    def __init__(self, directory: Path, *args: str, config: str = "", name: str = "") -> None:
        self.name = name or unique_name()
        self.socket = str(directory / "s")
        self.cgroup = cgroup_of(self.name)
        self.env = {**os.environ, "AGENTRUN_SOCKET": self.socket, "PATH": f"{BIN}:{SYSTEM_PATH}"}
        self._log = directory / "log"
        # Most tests have no use for the probes process, which takes seconds to come and go.
        (directory / "config.toml").write_text(config if "probes" in config else f"probes = false\n{config}")
        notify = self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        (directory / "notify").unlink(missing_ok=True)
        notify.bind(str(directory / "notify"))
        notify.settimeout(PATIENCE)
        command = [BIN / "agentrun-cli", "daemon", "--name", self.name, "--socket", self.socket]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--config", directory / "config.toml", *args], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self.env | {"NOTIFY_SOCKET": str(directory / "notify"), "DAEMON_SECRET": "hunter2"},
            )  # fmt: skip
        self.pid = self.process.pid
        try:
            assert notify.recv(4096).startswith(b"READY=1")
        except TimeoutError:
            self.kill()
            raise AssertionError(f"the daemon did not start: {self.log()}") from None

    def kill(self) -> None:
        """SIGKILL: what it leaves is left."""
        self.process.kill()
        self.process.wait()
        self._notify.close()

    def log(self) -> str:
        return self._log.read_text()

    def take_log(self) -> str:
        """What it has logged since; what is not taken, ``stop`` takes for a fault."""
        said = self.log()
        os.truncate(self._log, 0)
        return said

    def exec(self, *args: str, **options) -> subprocess.CompletedProcess:
        """``agentrun exec`` and its end."""
        options = {"env": self.env, "capture_output": True, "timeout": 60, "stdin": subprocess.DEVNULL, **options}
        if "input" in options or options["capture_output"] is None:
            options.pop("stdin" if "input" in options else "capture_output")
        return subprocess.run([CLIENT, "exec", *args], check=False, **options)

    def popen(self, *args: str, **options) -> subprocess.Popen:
        options = {"env": self.env, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen([CLIENT, "exec", *args], **options)

    def cli(self, *args: str) -> subprocess.CompletedProcess:
        return subprocess.run([CLIENT, *args], env=self.env, capture_output=True, timeout=60, check=False, text=True)

    def ask(self, **request):
        """One question over the socket, and its answer."""
        with connect(self.socket) as sock:
            sock.sendall(frame({"v": 1, **request}))
            return read_answer(sock)

    @contextlib.contextmanager
    def stopped(self):
        """Out of the way for the block: what arrives meanwhile it finds all at once."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            eventually(lambda: processes()[self.pid][1] == "T")
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def calls(self) -> list[dict]:
        return self.ask(op="ps")["data"]["calls"]

    def works(self) -> None:
        """A normal call, to see that the daemon still serves."""
        done = self.exec("--", "sh", "-c", "cat; echo err >&2; exit 3", input=b"in")
        assert (done.returncode, done.stdout, done.stderr) == (3, b"in", b"err\n")
        assert self.process.poll() is None

    def stop(self) -> None:
        """SIGTERM, and it has to leave nothing."""
        try:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(PATIENCE) == 0, self.log()
        finally:
            self.kill()
        assert not self.cgroup.exists()
        assert not Path(self.socket).exists()
        assert self.log() == ""


@contextlib.contextmanager
def open_daemon(*args: str, config: str = ""):
    """A daemon for the block; its directory is short, since a socket's path is bounded, and open to every user."""
    with tempfile.TemporaryDirectory(prefix="agentrun-test-") as directory:
        os.chmod(directory, 0o755)
        daemon = Daemon(Path(directory), *args, config=config)
        try:
            yield daemon
        finally:
            daemon.stop()


# ---------------------------------------------------------------- frames by hand


def frame(message) -> bytes:
    body = msgspec.msgpack.encode(message)
    return struct.pack("<I", len(body)) + body


def exec_frame(*argv: bytes, **changes) -> bytes:
    """An ``exec`` request that captures its output, unless it is changed."""
    request = {"v": 1, "op": "exec", "argv": list(argv) or [b"true"], "env": [], "options": {"capture": "1"}, "fds": []}
    return frame(request | changes)


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE)
    sock.connect(path)
    return sock


def read_answer(sock: socket.socket):
    """The one answer, and that nothing follows it; None if the daemon hung up without one."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(1 << 20):
            data += chunk
    if not data:
        return None
    (length,) = struct.unpack_from("<I", data)
    assert len(data) == 4 + length
    return msgspec.msgpack.decode(data[4:])


# ---------------------------------------------------------------- waiting, and what is left


def eventually(condition, what: str = "", seconds: float = PATIENCE):
    """Wait for something nobody will announce to us; returns what ``condition`` gave."""
    deadline = time.monotonic() + seconds
    delay = 0.001
    while not (found := condition()):
        assert time.monotonic() < deadline, f"still not after {seconds} s: {what or condition}"
        select.select([], [], [], delay)
        delay = min(delay * 1.5, 0.1)
    return found


def processes() -> dict[int, tuple[int, str, str]]:
    """pid → (parent, state, name), from /proc."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                before, _, after = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")
                fields = after.split()
                found[int(entry)] = (int(fields[1]), fields[0], before.partition("(")[2])
    return found


def descendants(root: int) -> dict[int, tuple[int, str, str]]:
    everyone = processes()
    found: dict[int, tuple[int, str, str]] = {}
    todo = [root]
    while todo:
        parent = todo.pop()
        for pid, entry in everyone.items():
            if entry[0] == parent and pid not in found:
                found[pid] = entry
                todo.append(pid)
    return found


def pids_below(cgroup: Path) -> list[int]:
    """Every process in a cgroup tree, leaf by leaf; a leaf that goes away meanwhile has none."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in cgroup.glob("**/"):  # itself too
            with contextlib.suppress(OSError):
                found += [int(pid) for pid in (path / "cgroup.procs").read_text().split()]
    return found


def is_init(pid: int) -> bool:
    """It is PID 1 of a sandbox."""
    try:
        return f"\nNSpid:\t{pid}\t1\n" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def has_taken_its_signals(pid: int) -> bool:
    """Nothing is pending, and it waits again."""
    status = Path(f"/proc/{pid}/status").read_text()
    return "State:\tS" in status and f"SigPnd:\t{0:016x}\nShdPnd:\t{0:016x}\n" in status


class Watched:
    """Processes by pidfd: however the numbers are used again, these are meant."""

    def __init__(self, pids) -> None:
        self._fds = {}
        for pid in set(pids):
            with contextlib.suppress(ProcessLookupError):
                self._fds[pid] = os.pidfd_open(pid)

    def __len__(self) -> int:
        return len(self._fds)

    def all_die(self, seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        poll = select.poll()
        for fd in self._fds.values():
            poll.register(fd, select.POLLIN)
        left = set(self._fds.values())
        while left:
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            assert ready, f"still alive: {[pid for pid, fd in self._fds.items() if fd in left]}"
            for fd, _ in ready:
                poll.unregister(fd)
                left.discard(fd)
        self.close()

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


class Leaks:
    """A count of what a run must give back, taken now; ``check`` waits (bounded) until it is no more than that.

    Waiting is needed: the slots of ended calls are taken down in the background, and so are namespaces in the kernel.
    """

    def __init__(self, cgroup: Path, owner: int = 0) -> None:
        self._cgroup, self._owner = cgroup, owner or os.getpid()
        self.before = self.count()

    def count(self) -> dict[str, int]:
        family = descendants(self._owner)
        members = {*family, *pids_below(self._cgroup)}
        spaces = set()
        fds = Path(f"/proc/{self._owner}/fd")
        links = []
        for pid in members:
            with contextlib.suppress(OSError):  # it has just ended
                links += Path(f"/proc/{pid}/ns").glob("*")
        for path in [*links, *(fds.iterdir() if fds.exists() else ())]:
            with contextlib.suppress(OSError):
                target = os.readlink(path)
                if target.split(":[")[0] in ("mnt", "pid", "net", "user", "ipc", "uts", "cgroup"):
                    spaces.add(target)
        return {
            "cgroups": sum(1 for _ in self._cgroup.glob("**/call-*")) if self._cgroup.exists() else 0,
            "processes": len(members),
            "zombies": sum(state == "Z" for _, state, _ in family.values()),
            "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
            "namespaces": len(spaces),
            "fds": len(os.listdir(fds)) if fds.exists() else 0,
        }

    def check(self, seconds: float = PATIENCE) -> None:
        last: dict[str, int] = {}

        def settled() -> bool:
            nonlocal last
            last = self.count()
            return all(last[key] <= self.before[key] for key in last)

        try:
            eventually(settled, seconds=seconds)
        except AssertionError:
            raise AssertionError(f"left behind: before {self.before}, now {last}") from None


def result_of(done: subprocess.CompletedProcess) -> dict:
    """The document of ``agentrun exec --json``."""
    return json.loads(done.stdout)
