# SPDX-License-Identifier: Apache-2.0
"""A laboratory for test_egress.py: three kinds of network namespaces, none of them this machine's.

    the world   8.8.4.4 169.254.169.254 100.100.100.200 10.99.0.2      egress_world.py serves at all of them
      │ veth
    "the host"  10.99.0.1, default route to the world; servers too     this process, with EgressPath in it
    a sandbox   lo                                                     a fresh one for each ``run``

``Lab`` is the tests' side: it starts this file in namespaces of its own and sends it one JSON request a line.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import trio

from agentrun.egress.etc import hosts, resolv_conf
from agentrun.egress.path import EgressPath
from agentrun.egress.rules import parse_rules

PUBLIC = ("8.8.4.4", "169.254.169.254", "100.100.100.200")
DROP = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
"""What a runner does to a tool, as far as the network is concerned."""
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Lab:
    """Runs commands in fresh sandboxes with an egress path."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="agentrun-egress-")
        self.directory = Path(self._directory.name)
        self.directory.chmod(0o755)
        self.env = os.environ | {"PYTHONPATH": f"{ROOT / 'runtime'}:{ROOT / 'shim'}:{ROOT}"}
        self._process = subprocess.Popen(
            ["unshare", "--net", "--mount", "--propagation=private", sys.executable, __file__, self.directory],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.env,
        )  # fmt: skip
        assert self._read() == {"ready": True}

    def run(self, allow, *argv: str, seconds: float = 30, **options):
        """One command; for ``options`` see ``serve``."""
        assert self._process.stdin is not None
        request = {"allow": allow, "argv": list(argv), "seconds": seconds, "hosts": {}, **options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        assert isinstance(answer, dict), answer
        assert answer["left"] == {"fds": 0, "threads": 0}, answer
        return answer

    def _read(self):
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], 90)
        assert ready, "the laboratory does not answer"
        return json.loads(self._process.stdout.readline() or '"the laboratory has ended"')

    def close(self) -> None:
        try:
            self._process.communicate(timeout=20)
            assert self._process.returncode == 0
        finally:
            self._process.kill()
            self._directory.cleanup()


def sh(command: str) -> None:
    subprocess.run(["sh", "-ec", command], check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


@contextlib.contextmanager
def running(*argv: str, **options):
    """A process that says READY, and ends with the block."""
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"READY\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def the_world(directory: Path):
    """Build "the host" around us, and the world beyond it."""
    (directory / "resolv.host").write_text("nameserver 10.99.0.2\noptions timeout:3 attempts:1\nsearch corp.test\n")
    (directory / "hosts.host").write_text("127.0.0.1 localhost\n10.99.0.2 inhosts.test inhosts\n")
    sh(f"mount --bind {directory}/resolv.host /etc/resolv.conf; mount --bind {directory}/hosts.host /etc/hosts")
    env = os.environ | {"EGRESS_ASKED": str(directory / "asked"), "EGRESS_SINK": str(directory / "sink")}
    server = [sys.executable, str(HERE / "egress_world.py")]
    with running("unshare", "--net", "sh", "-c", "echo READY; exec cat") as world:
        sh(f"ip link set lo up; ip link add h0 type veth peer name w0; ip link set w0 netns {world.pid}")
        sh("ip addr add 10.99.0.1/24 dev h0; ip link set h0 up; ip route add default via 10.99.0.2")
        enter = ["nsenter", "-t", str(world.pid), "-n"]
        sh(" ".join(enter) + " ip addr add 10.99.0.2/24 dev w0")
        if os.path.exists("/proc/net/if_inet6"):
            sh("ip addr add fd99::1/64 dev h0 nodad; " + " ".join(enter) + " ip addr add fd99::2/64 dev w0 nodad")
        for device in ("lo", "w0"):
            sh(" ".join(enter) + f" ip link set {device} up")
        for address in PUBLIC:
            sh(" ".join(enter) + f" ip addr add {address}/32 dev lo")
        with running(*enter, *server, "10.99.0.2", env=env), running(*server, env=env):
            yield


@contextlib.contextmanager
def a_sandbox(directory: Path):
    """A namespace like a slot's; yields the pid of a process in it."""
    (directory / "resolv.conf").write_bytes(resolv_conf())
    (directory / "hosts").write_bytes(hosts())
    script = (
        f"mount --bind {directory}/resolv.conf /etc/resolv.conf && mount --bind {directory}/hosts /etc/hosts &&"
        " ip link set lo up && echo READY && exec cat"
    )
    with running("unshare", "--net", "--mount", "--propagation=private", "sh", "-c", script) as process:
        yield process.pid


def count() -> dict[str, int]:
    return {"fds": len(os.listdir("/proc/self/fd")), "threads": sum("netns" in each.name for each in threading.enumerate())}


async def serve(directory: Path, request) -> dict:
    """Carry out one request: ``argv`` in a sandbox with the rules ``allow`` and the table ``hosts``, for ``seconds`` at most.

    ``privileged``: keep the capabilities. The answer also says what the world's DNS server was asked, and what its sink got.
    """
    for name in ("asked", "sink"):
        (directory / name).write_text("")
    rules = parse_rules(request["allow"], request["hosts"], "lab")
    out = ["", ""]
    code = None
    with a_sandbox(directory) as pid:
        before = count()
        async with trio.open_nursery() as nursery:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            begun = time.perf_counter()
            path = await EgressPath.open(fd, rules, nursery)
            opened = time.perf_counter() - begun
            os.close(fd)
            idle = count()
            command = ["nsenter", "-t", str(pid), "-n", "-m", *([] if request.get("privileged") else DROP), *request["argv"]]
            begun, busy = time.perf_counter(), time.process_time()
            with trio.move_on_after(request["seconds"]):
                done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
                code, out = done.returncode, [data.decode(errors="replace") for data in (done.stdout, done.stderr)]
            took, busy = time.perf_counter() - begun, time.process_time() - busy
            denied = path.denied()
            begun = time.perf_counter()
            await path.aclose()
            closed = time.perf_counter() - begun
            await path.aclose()
            assert path.denied()[: len(denied)] == denied
            assert not nursery.child_tasks
        after = count()
    await trio.sleep(0.05)  # the sink writes once it has seen the end
    return {
        "code": code,
        "out": out[0],
        "err": out[1],
        "denied": {denial.target: denial.reason for denial in path.denied()},
        "counts": {denial.target: denial.count for denial in path.denied()},
        "granted": {grant.target: [grant.connections, grant.sent, grant.received] for grant in path.granted()},
        "left": {key: after[key] - before[key] for key in after},
        "idle_fds": idle["fds"] - before["fds"],
        "opened": opened,
        "took": took,
        "cpu": busy,
        "closed": closed,
        "asked": (directory / "asked").read_text().split(),
        "sink": (directory / "sink").read_text().split(),
    }


async def main(directory: Path) -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # nothing that is started here may speak in our place

    def answer(message) -> None:
        os.write(answers, json.dumps(message).encode() + b"\n")

    with the_world(directory):
        answer({"ready": True})
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            answer(await serve(directory, json.loads(line)))


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
