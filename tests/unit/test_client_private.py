# SPDX-License-Identifier: Apache-2.0
"""The native client without a daemon: a private runtime, and the Python command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.client_support import WENT_AWAY, needs_client

pytestmark = needs_client

CLI = f"""#!{sys.executable}
import json, os, signal, socket, struct, sys, time
from pathlib import Path
import msgspec
log = Path(os.environ["LOG"])
log.write_text(json.dumps(sys.argv[1:]))
if sys.argv[1] != "serve-one":
    sys.exit(42)
if os.environ.get("DIE"):
    sys.exit(int(os.environ["DIE"]))
blocked = [line for line in open("/proc/self/status") if line.startswith("SigBlk")][0]
conn = socket.socket(fileno=3)
data, fds, _, _ = socket.recv_fds(conn, 65536, 16)
send = lambda answer: conn.sendall(struct.pack("<I", len(b := msgspec.msgpack.encode(answer))) + b)
number = msgspec.msgpack.decode(conn.recv(4096)[4:])["signal"] if "WAIT" in os.environ else 0
send({{"op": "result", "exit": number or 11, "json": json.dumps({{
    "fds": len(fds), "session": os.getsid(0) == os.getpid(), "blocked": int(blocked.split()[1], 16),
    "stdio": [os.readlink(f"/proc/self/fd/{{fd}}") for fd in (0, 1)],
    "open": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))}}).encode()}})
assert conn.recv(1) == b""
time.sleep(0.2)
log.write_text("cleaned up")
"""


@pytest.fixture
def installed(agentrun, tmp_path):
    """The client copied to a directory of its own, agentrun-cli beside it, the environment for both."""
    shutil.copy(agentrun, tmp_path / "agentrun")
    (tmp_path / "agentrun-cli").write_text(CLI)
    (tmp_path / "agentrun-cli").chmod(0o755)
    return tmp_path / "agentrun", {"LOG": str(tmp_path / "log")}


def run(program, *args, env, **popen):
    return subprocess.run([program, *args], env=env, capture_output=True, text=True, timeout=20, **popen)


def test_private_runtime(installed):
    client, env = installed
    inherit = {"close_fds": False, "preexec_fn": lambda: os.dup2(0, 50)}
    done = run(client, "exec", "--no-daemon", "--json", "ls", env=env, **inherit)
    assert (done.returncode, done.stderr) == (11, "")
    seen = json.loads(done.stdout)
    assert (seen["fds"], seen["session"], seen["blocked"], seen["stdio"]) == (1, True, 0, ["/dev/null"] * 2)
    assert 50 not in seen["open"]
    assert Path(env["LOG"]).read_text() == "cleaned up"


def test_private_runtime_is_told_of_signals_and_waited_for(installed):
    client, env = installed
    env = {**env, "WAIT": "1"}
    proc = subprocess.Popen([client, "exec", "--no-daemon", "ls"], env=env, stdin=subprocess.DEVNULL)
    while not Path(env["LOG"]).exists():
        assert proc.poll() is None
    proc.send_signal(signal.SIGTERM)
    assert proc.wait(20) == signal.SIGTERM
    assert Path(env["LOG"]).read_text() == "cleaned up"


@pytest.mark.skipif(Path("/run/agentrun/agentrun.sock").exists(), reason="a daemon is installed on this machine")
def test_private_runtime_stands_in_for_a_missing_daemon(installed):
    client, env = installed
    assert run(client, "exec", "ls", env=env).returncode == 11


@pytest.mark.parametrize("status", [1, 125])
def test_private_runtime_that_dies(installed, status):
    client, env = installed
    done = run(client, "exec", "--no-daemon", "ls", env={**env, "DIE": str(status)})
    assert (done.returncode, done.stderr) == (125, WENT_AWAY)


@pytest.mark.parametrize("args", [["--version"], ["ps", "--x=1", ""], ["executable"]])
@pytest.mark.parametrize("beside", [True, False])
def test_everything_else_is_the_python_program(installed, tmp_path, args, beside):
    client, env = installed
    if not beside:
        (tmp_path / "bin").mkdir()
        (tmp_path / "agentrun-cli").rename(tmp_path / "bin" / "agentrun-cli")
        env = {**env, "PATH": f"/nonexistent::{tmp_path}/bin"}
    assert run(client, *args, env=env).returncode == 42
    assert json.loads(Path(env["LOG"]).read_text()) == args


@pytest.mark.parametrize("args", [[], ["ps"], ["exec", "--no-daemon", "ls"]])
def test_no_python_program(installed, args):
    client, env = installed
    (client.parent / "agentrun-cli").unlink()
    done = run(client, *args, env={**env, "PATH": "/nonexistent:"}, cwd="/")
    line = f"agentrun: cannot find agentrun-cli beside {client} or on PATH: is the package installed?\n"
    assert (done.returncode, done.stdout, done.stderr) == (125, "", line)


@pytest.mark.parametrize(("interpreter", "reason"), [("/nonexistent/python", "No such file or directory"),
                                                     ("/dev/null", "Permission denied")])  # fmt: skip
@pytest.mark.parametrize("args", [["ps"], ["exec", "--no-daemon", "ls"]])
def test_a_python_program_whose_interpreter_is_out_of_reach(installed, interpreter, reason, args):
    client, env = installed
    program = client.parent / "agentrun-cli"
    program.write_text(f"#!{interpreter}\n")
    done = run(client, *args, env={**env, "PATH": "/nonexistent"}, cwd="/")
    why = f"{reason} (the file is there; so must be the interpreter in its first line, for this user)"
    assert (done.returncode, done.stdout, done.stderr) == (125, "", f"agentrun: cannot run {program}: {why}\n")
    other = client.parent / "other"
    other.mkdir()
    (other / "agentrun-cli").write_text(CLI)
    (other / "agentrun-cli").chmod(0o755)
    assert run(client, "ps", env={**env, "PATH": str(other)}).returncode == 42
