# SPDX-License-Identifier: Apache-2.0
"""One call without a daemon: a runtime of its own, of which nothing stays."""

import os
import signal
import subprocess

import pytest

from tests.support import BIN, CLIENT, SYSTEM_PATH, Watched, cgroup_of, descendants, eventually, pids_below, result_of

pytestmark = pytest.mark.host


@pytest.fixture
def env(tmp_path):
    """No daemon's socket, and a cgroup base of our own, so that what is left can be seen."""
    base = cgroup_of(f"x-{os.getpid()}").with_name(f"test-private-{os.getpid()}")
    base.mkdir()
    env = {key: value for key, value in os.environ.items() if key != "AGENTRUN_SOCKET"}
    yield env | {"PATH": f"{BIN}:{SYSTEM_PATH}", "AGENTRUN_CGROUP": str(base)}, base
    assert list(base.glob("*/")) == []
    base.rmdir()


def run(env, *args, **options):
    return subprocess.run(
        [CLIENT, "exec", "--no-daemon", *args], env=env[0], capture_output=True, timeout=60, check=False, **options
    )


def test_it_says_that_it_was_private(env):
    result = result_of(run(env, "--json", "--", "sh", "-c", "cat; exit 3", input=b"in"))
    assert (result["private_runtime"], result["warm"], result["exit_code"], result["stdout"]) == (True, False, 3, "in")


@pytest.mark.parametrize(
    ("command", "code"),
    [(["true"], 0), (["sh", "-c", "exit 9"], 9), (["nope"], 127), (["sh", "-c", "kill -9 $$"], 137),
     (["--timeout", "0.2", "sleep", "60"], 124), (["--timeout", "x", "true"], 2), (["--workspace", "/etc", "true"], 2)],
)  # fmt: skip
def test_exit_codes(env, command, code):
    done = run(env, *command, stdin=subprocess.DEVNULL)
    assert done.returncode == code
    assert done.stderr.count(b"\n") == (0 if code in (0, 9, 137) else 1)


def test_streams_and_workspace(env, tmp_path):
    done = run(env, "--workspace", str(tmp_path), "--", "sh", "-c", "cat > made; echo out; echo err >&2", input=b"data")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"err\n")
    assert (tmp_path / "made").read_bytes() == b"data"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_client_ends_in_the_middle(env, number):
    script = "(setsid sleep 300 &) ; echo ready; exec sleep 300"
    client = subprocess.Popen([CLIENT, "exec", "--no-daemon", "--", "sh", "-c", script],
                              env=env[0], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)  # fmt: skip
    assert client.stdout.readline() == b"ready\n"
    watched = Watched([*descendants(client.pid), *pids_below(env[1])])
    assert len(watched) >= 4
    client.send_signal(number)
    client.communicate(timeout=20)
    assert client.returncode == (143 if number == signal.SIGTERM else -9)
    watched.all_die()
    eventually(lambda: not list(env[1].glob("*/")))
