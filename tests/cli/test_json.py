# SPDX-License-Identifier: Apache-2.0
"""The result as a document, as runtime/agentrun/types.py describes it; and the verbs that ask the daemon."""

import base64
import json
import os

import pytest

from agentrun.types import Result, Timings, Usage, Verdict
from tests.support import eventually, result_of

pytestmark = pytest.mark.host


def names(struct) -> set[str]:
    return set(struct.__struct_fields__)


def test_the_document_has_the_documented_fields(daemon):
    done = daemon.exec("--json", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert done.stderr == b""
    assert done.stdout.count(b"\n") == 1
    result = result_of(done)
    assert set(result) == names(Result)
    assert set(result["usage"]) == names(Usage)
    assert set(result["timings"]) == names(Timings)
    expected = {"outcome": "exited", "exit_code": 3, "signal": None, "stdout": "out\n", "stderr": "err\n", "truncated": False,
                "verdict": None, "private_runtime": False}  # fmt: skip
    assert {key: result[key] for key in expected} == expected
    assert done.returncode == 3
    assert isinstance(result["warm"], bool)
    assert all(set(item) == {"limit", "reason"} for item in result["unenforced"])
    steps = [result["timings"][key] for key in ("queued", "leased", "dispatched", "total")]
    assert steps == sorted(steps)
    assert result["usage"]["wall"] > 0


@pytest.mark.parametrize(
    ("command", "code", "outcome", "exit_code", "number", "reason"),
    [
        (["true"], 0, "exited", 0, None, None),
        (["sh", "-c", "kill -15 $$"], 143, "signaled", None, 15, None),
        (["--timeout", "0.2", "--", "sleep", "60"], 124, "timed_out", None, 9, "timeout"),
        (["nope"], 127, "failed_to_start", 127, None, "start"),
        (["/etc/passwd"], 126, "failed_to_start", 126, None, "start"),
    ],
)
def test_every_outcome(daemon, command, code, outcome, exit_code, number, reason):
    done = daemon.exec("--json", *command)
    result = result_of(done)
    assert (done.returncode, done.stderr) == (code, b"")
    assert (result["outcome"], result["exit_code"], result["signal"]) == (outcome, exit_code, number)
    if reason is None:
        assert result["verdict"] is None
    else:
        assert set(result["verdict"]) == names(Verdict)
        assert result["verdict"]["reason"] == reason
        assert all(result["verdict"].values())


def test_bytes_that_are_no_text(daemon):
    result = result_of(daemon.exec("--json", "--", "printf", r"\377\000x"))
    assert result["stdout"] == "\ufffd\0x"
    assert base64.b64decode(result["stdout_base64"]) == b"\xff\0x"
    assert "stderr_base64" not in result


def test_standard_input_goes_along(daemon):
    assert result_of(daemon.exec("--json", "--", "cat", input=b"given"))["stdout"] == "given"


def test_much_output_is_cut_in_the_middle(daemon):
    result = result_of(daemon.exec("--json", "--", "head", "-c", "20000000", "/dev/zero"))
    assert result["truncated"] is True
    assert 1 << 20 <= len(result["stdout"]) < (1 << 20) + 100


def test_the_result_in_a_file(daemon, tmp_path):
    path = tmp_path / "r"
    path.write_text("x" * 10_000)
    done = daemon.exec("--result", str(path), "--", "sh", "-c", "echo out; exit 5", text=True)
    assert (done.returncode, done.stdout, done.stderr) == (5, "out\n", "")
    result = json.loads(path.read_text())
    assert (result["exit_code"], result["stdout"], result["stderr"]) == (5, None, None)
    done = daemon.exec("--json", "--result", str(path), "--", "echo", "x", text=True)
    assert done.stdout == path.read_text()
    assert json.loads(done.stdout)["stdout"] == "x\n"


def test_a_result_file_that_cannot_be_made(daemon):
    done = daemon.exec("--result", "/nowhere/r", "--", "true", text=True)
    assert (done.returncode, done.stderr) == (2, "agentrun: result /nowhere/r: No such file or directory\n")


# ---------------------------------------------------------------- status, ps, kill, stats, doctor


def test_status(daemon):
    data = json.loads(daemon.cli("status", "--json").stdout)
    assert (data["pid"], data["cgroup"]) == (daemon.pid, str(daemon.cgroup))
    text = daemon.cli("status").stdout
    assert f"pid {daemon.pid}" in text
    assert str(daemon.cgroup) in text


@pytest.mark.parametrize("verb", [["status"], ["ps"], ["stats"], ["kill", "1"]])
def test_without_a_daemon(daemon, verb):
    done = daemon.cli(*verb, "--socket", "/nowhere/s")
    assert (done.returncode, done.stderr) == (125, "agentrun: no daemon at /nowhere/s: No such file or directory\n")


def test_ps_and_kill(daemon):
    client = daemon.popen("--tenant", "t1", "--", "sleep", "61")
    (call,) = eventually(daemon.calls)
    assert (call["tenant"], call["argv"], call["policy"]) == ("t1", ["sleep", "61"], "default")
    lines = daemon.cli("ps").stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].split()[0] == call["id"]
    assert lines[1].endswith("sleep 61")
    assert daemon.cli("kill", call["id"]).returncode == 0
    _, err = client.communicate(timeout=20)
    assert (client.returncode, err) == (137, b"agentrun: killed on request\n")
    assert eventually(lambda: not daemon.calls())


@pytest.mark.parametrize("name", ["TERM", "sigterm", "15"])
def test_kill_with_a_signal(daemon, name):
    client = daemon.popen("--", "sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.02; done")
    assert client.stdout.readline() == b"ready\n"
    (call,) = daemon.calls()
    assert daemon.cli("kill", call["id"], name).returncode == 0
    client.communicate(timeout=20)
    assert client.returncode == 9


@pytest.mark.parametrize(
    ("args", "err"),
    [(["nope"], "agentrun: no call 'nope' runs\n"), (["nope", "NOSIG"], "agentrun: signal: there is no 'NOSIG'\n")],
)
def test_kill_of_nothing(daemon, args, err):
    done = daemon.cli("kill", *args)
    assert (done.returncode, done.stderr) == (2, err)


def test_stats_count(daemon):
    before = json.loads(daemon.cli("stats", "--json").stdout)
    daemon.exec("--", "true")
    after = json.loads(daemon.cli("stats", "--json").stdout)
    assert after["completed"] == before["completed"] + 1
    assert (after["running"], after["stuck"]) == (0, 0)
    assert "default/none" in after["pools"]
    assert "default/none" in daemon.cli("stats").stdout


def test_doctor(daemon):
    done = daemon.cli("doctor", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["usable"], done.stderr) == (0, True, "")
    states = {finding["feature"]: finding["state"] for finding in report["findings"]}
    assert (states["root"], states["native slot"], states["sandbox"]) == ("works", "works", "works")
    text = daemon.cli("doctor")
    assert text.returncode == 0
    assert "tool calls can run here" in text.stdout
    assert not [path for path in daemon.cgroup.parent.glob("agentrun-doctor-*") if str(os.getpid()) in path.name]


def test_an_unknown_verb(daemon):
    done = daemon.cli("nope")
    assert done.returncode == 2
    assert "nope" in done.stderr
