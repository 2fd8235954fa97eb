# SPDX-License-Identifier: Apache-2.0
"""Who asks the daemon: a user who is not root sees his own calls and nothing of the others', a tool is no caller at all."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.kernel.wall import NOBODY, workspace_directory
from tests.support import PATIENCE, PYTHON, Daemon, eventually, exec_frame, frame, open_daemon, read_answer

pytestmark = pytest.mark.host

ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    sock.sendall(bytes.fromhex(sys.argv[2]))
    while data := sock.recv(65536):
        print(end=data.hex(), flush=True)
"""
"""Sends a frame and prints what comes back."""


class Said:
    """What a program printed, as ``read_answer`` reads a socket."""

    def __init__(self, text: str) -> None:
        self._data = bytes.fromhex(text)

    def recv(self, _size: int) -> bytes:
        data, self._data = self._data, b""
        return data


@pytest.fixture(scope="module")
def other():
    """A daemon open to a group, and what another user of that group is answered."""
    with open_daemon("--group", "users") as daemon:
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--groups=users", PYTHON, "-I", "-S", "-c", ASK]

        def start(data: bytes) -> subprocess.Popen:
            return subprocess.Popen([*command, daemon.socket, data.hex()], cwd="/", stdout=subprocess.PIPE, text=True)

        def ask(**request):
            with start(frame({"v": 1, **request})) as program:
                return read_answer(Said(program.communicate(timeout=PATIENCE)[0]))

        yield daemon, start, ask


def test_another_user_sees_only_his_own(other):
    daemon, start, ask = other
    daemon.works()
    with daemon.popen("sleep", "60") as roots:
        (known,) = eventually(daemon.calls)
        before = ask(op="status")["data"]
        assert before["running"] == 0
        assert ask(op="ps")["data"] == {"calls": [], "containers": []}
        assert ask(op="top")["data"]["calls"] == []
        assert ask(op="stats")["data"] == {"running": 0, "pools": {}}
        assert ask(op="kill", id=known["id"])["message"] == f"no call '{known['id']}' runs"
        with start(exec_frame(b"sleep", b"60")) as program:
            eventually(lambda: len(daemon.calls()) == 2)
            assert daemon.ask(op="status")["data"]["running"] == 2
            assert ask(op="status")["data"]["running"] == 1
            (mine,) = ask(op="ps")["data"]["calls"]
            assert mine["tenant"] == f"uid-{NOBODY}"
            assert [row["call"] for row in ask(op="top")["data"]["calls"]] == [mine["id"]]
            stats = ask(op="stats")["data"]
            assert (stats["running"], list(stats["pools"])) == (1, [f"uid-{NOBODY}/none"])
            assert {"default/none", f"uid-{NOBODY}/none"} <= set(daemon.ask(op="stats")["data"]["pools"])
            assert ask(op="kill", id=mine["id"])["op"] == "reply"
            assert read_answer(Said(program.communicate(timeout=PATIENCE)[0]))["op"] == "result"
        roots.terminate()


def test_what_adds_up_everybodys_calls_is_roots(other):
    daemon, _, ask = other
    answer = ask(op="latency")
    assert (answer["op"], answer["exit"]) == ("error", 2)
    assert "only root" in answer["message"]
    assert daemon.ask(op="latency")["op"] == "reply"


def test_the_counters_another_user_gets_can_be_printed(other):
    """As the command line does it, which cannot run below /root."""
    _, _, ask = other
    script = "import json, sys; from agentrun.cli import query; query._print_stats(json.load(sys.stdin))"
    stats = json.dumps(ask(op="stats")["data"])
    done = subprocess.run([sys.executable, "-c", script], input=stats, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("running 0\nPOOL ")


def test_a_tool_that_finds_the_daemons_socket_is_no_caller():
    """It may connect to what its caller may; but with another policy it would have what its own keeps from it."""
    with workspace_directory() as place:
        daemon = Daemon(place)
        try:
            for data in (exec_frame(b"id", options={"net": "host"}), frame({"v": 1, "op": "status"})):
                done = daemon.exec("--workspace", str(place), "--", PYTHON, "-c", ASK, daemon.socket, data.hex(), text=True)
                assert (done.returncode, done.stderr) == (0, "")
                answer = read_answer(Said(done.stdout))
                assert (answer["op"], answer["exit"]) == ("error", 2)
                assert answer["message"] == "a tool call may not ask for tool calls"
        finally:
            daemon.stop()


def test_a_directory_for_the_socket_is_not_made_up():
    with tempfile.TemporaryDirectory(prefix="agentrun-test-") as directory, open_daemon() as daemon:
        missing = Path(directory, "nope", "x")
        done = daemon.cli("daemon", "--name", f"{daemon.name}-2", "--socket", str(missing))
        assert (done.returncode, done.stderr) == (2, f"agentrun: socket {missing}: No such file or directory\n")
        assert os.listdir(directory) == []
