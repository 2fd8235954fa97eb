# SPDX-License-Identifier: Apache-2.0
"""The result of a call: its JSON, name for name, and the exit status it stands for."""

import base64
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun.errors import AgentrunError, HostError, LimitError, Overloaded, SandboxError, UsageError
from agentrun.types import Denied, Hint, Outcome, Result, Timings, Unenforced, Usage, Verdict

USAGE = Usage(
    wall=1.5, cpu_user=0.25, cpu_system=0.5, memory_peak=4096, memory_source="memory.peak", io_read=1, io_written=2, pids_peak=3,
    throttled=0.0,
)  # fmt: skip
RESULT = Result(
    id="3f", outcome=Outcome.TIMED_OUT, exit_code=None, signal=9, stdout=b"out", stderr=b"", truncated=False, usage=USAGE,
    timings=Timings(queued=0.0, leased=0.001, dispatched=0.002, first_exec=None, total=2.0), warm=True,
    verdict=Verdict(reason="timeout", message="m", advice="a"), unenforced=(Unenforced("cpu.max", "no cpu controller"),),
    denied=(Denied(kind="syscall", what="bpf", reason="EPERM", count=3),),
    hint=Hint(asked="memory:high", memory_max=1024, clamped_to="tenant"),
)  # fmt: skip


def change(**changes: object) -> Result:
    return msgspec.structs.replace(RESULT, **changes)


def test_the_json_of_a_result_is_frozen():
    assert json.loads(RESULT.to_json()) == {
        "id": "3f", "outcome": "timed_out", "exit_code": None, "signal": 9, "stdout": "out", "stderr": "", "truncated": False,
        "usage": {
            "wall": 1.5, "cpu_user": 0.25, "cpu_system": 0.5, "memory_peak": 4096, "memory_source": "memory.peak", "io_read": 1,
            "io_written": 2, "pids_peak": 3, "throttled": 0.0,
        },
        "timings": {"queued": 0.0, "leased": 0.001, "dispatched": 0.002, "first_exec": None, "total": 2.0},
        "warm": True,
        "verdict": {"reason": "timeout", "message": "m", "advice": "a"},
        "unenforced": [{"limit": "cpu.max", "reason": "no cpu controller"}],
        "denied": [{"kind": "syscall", "what": "bpf", "reason": "EPERM", "count": 3}],
        "hint": {"asked": "memory:high", "memory_max": 1024, "clamped_to": "tenant"},
        "memory_mode": "none",
        "bursts": [],
        "phases": None,
        "changes": None,
        "private_runtime": False,
    }  # fmt: skip


def test_what_is_not_known_is_null():
    blank = Usage(
        wall=0.0, cpu_user=0.0, cpu_system=0.0, memory_peak=None, memory_source=None, io_read=None, io_written=None,
        pids_peak=None, throttled=None,
    )  # fmt: skip
    tree = json.loads(change(stdout=None, stderr=None, verdict=None, unenforced=(), usage=blank, signal=None).to_json())
    assert [tree[name] for name in ("stdout", "stderr", "verdict", "signal")] == [None] * 4
    assert tree["unenforced"] == []
    assert [name for name, value in tree["usage"].items() if value is None] == [
        "memory_peak", "memory_source", "io_read", "io_written", "pids_peak", "throttled",
    ]  # fmt: skip


@given(st.binary(), st.binary())
def test_captured_bytes_survive(stdout, stderr):
    tree = json.loads(change(stdout=stdout, stderr=stderr).to_json())
    for name, raw in (("stdout", stdout), ("stderr", stderr)):
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            assert base64.b64decode(tree[f"{name}_base64"], validate=True) == raw
            assert tree[name] == raw.decode("utf-8", "replace")
        else:
            assert tree[name] == text
            assert f"{name}_base64" not in tree


def test_a_replacement_character_of_the_tools_own_is_text():
    tree = json.loads(change(stdout="\ufffd".encode(), stderr=b"\xff").to_json())
    assert tree["stdout"] == "\ufffd"
    assert "stdout_base64" not in tree
    assert tree["stderr_base64"] == "/w=="


@pytest.mark.parametrize(
    ("outcome", "exit_code", "signal", "status"),
    [
        (Outcome.EXITED, 0, None, 0),
        (Outcome.EXITED, 255, None, 255),
        (Outcome.EXITED, 124, None, 124),
        (Outcome.SIGNALED, None, 15, 143),
        (Outcome.SIGNALED, None, 11, 139),
        (Outcome.TIMED_OUT, None, 9, 124),
        (Outcome.TIMED_OUT, 0, None, 124),  # it caught SIGTERM and left in time
        (Outcome.MEMORY_KILLED, None, 9, 137),
        (Outcome.MEMORY_KILLED, 1, None, 137),
        (Outcome.CANCELLED, None, 9, 137),
        (Outcome.CANCELLED, None, None, 137),
        (Outcome.FAILED_TO_START, 126, None, 126),
        (Outcome.FAILED_TO_START, 127, None, 127),
    ],
)
def test_returncode(outcome, exit_code, signal, status):
    result = change(outcome=outcome, exit_code=exit_code, signal=signal)
    assert result.returncode == status
    assert result.ok == (outcome is Outcome.EXITED and status == 0)


def test_outcomes_are_frozen():
    assert [*Outcome] == ["exited", "signaled", "timed_out", "memory_killed", "cancelled", "failed_to_start"]


@pytest.mark.parametrize(
    ("error", "status", "parents"),
    [
        (UsageError("x"), 2, (AgentrunError,)),
        (Overloaded("x"), 75, (AgentrunError,)),
        (HostError("x"), 125, (AgentrunError,)),
        (LimitError("x"), 125, (HostError,)),
        (SandboxError("mounts", 1), 125, (HostError,)),
    ],
)
def test_errors_say_whose_turn_it_is(error, status, parents):
    assert error.exit_code == status
    assert isinstance(error, parents)
    assert isinstance(error, HostError) == (status == 125)


def test_a_sandbox_error_names_step_and_cause():
    assert str(SandboxError("id map", 1)) == "building the sandbox failed at id map: Operation not permitted"
    error = SandboxError("mounts", 22, "operation 7 of the plan")
    assert str(error) == "building the sandbox failed at mounts: Invalid argument (operation 7 of the plan)"
    assert (error.step, error.errno) == ("mounts", 22)
