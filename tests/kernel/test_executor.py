# SPDX-License-Identifier: Apache-2.0
"""The library: what a call's result says, whatever the tool does."""

import os
import resource
import signal
from pathlib import Path

import pytest

from agentrun import LimitError, Limits, Outcome, Policy, UsageError
from tests.support import FORK_STORM, PYTHON, eventually, pids_below

pytestmark = pytest.mark.host

FORK_TREE = """
import os, time
for depth in range(3):
    for _ in range(3):
        if os.fork() == 0: break
time.sleep(60)
"""


@pytest.mark.parametrize("code", [0, 1, 3, 42, 124, 125, 126, 127, 255])
def test_an_exit_code_is_the_tools_own(executor, code):
    result = executor.sh(f"exit {code}")
    assert (result.outcome, result.exit_code, result.signal, result.returncode) == (Outcome.EXITED, code, None, code)
    assert result.ok is (code == 0)
    assert result.verdict is None


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGPIPE, signal.SIGHUP]
)
def test_a_signal_is_reported_as_one(executor, number):
    result = executor.sh(f"kill -{number.value} $$")
    assert (result.outcome, result.exit_code, result.signal) == (Outcome.SIGNALED, None, number)
    assert result.returncode == 128 + number


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["no-such-command"], 127, "No such file"),
        (["/no/such/command"], 127, "No such file"),
        (["/etc/passwd/x"], 127, "Not a directory"),
        (["/etc/passwd"], 126, "Permission denied"),
        (["/usr"], 126, "Permission denied"),
        (["./x"], 127, "No such file"),
    ],
)
def test_what_cannot_be_executed(executor, argv, code, words):
    result = executor.run(argv)
    assert (result.outcome, result.exit_code, result.returncode) == (Outcome.FAILED_TO_START, code, code)
    assert result.verdict is not None
    assert result.verdict.reason == "start"
    assert result.verdict.message.startswith(f"{argv[0]}: {words}")
    assert "\n" not in result.verdict.message


def test_a_file_of_no_known_format(executor, tmp_path):
    (tmp_path / "tool").write_text("echo no interpreter line")
    (tmp_path / "tool").chmod(0o755)
    (tmp_path / "bad").write_text("#!/no/such/interpreter\n")
    (tmp_path / "bad").chmod(0o755)
    tmp_path.chmod(0o755)
    result = executor.run(["./tool"], workspace=str(tmp_path))
    assert (result.outcome, result.returncode) == (Outcome.FAILED_TO_START, 126)
    assert "Exec format error" in result.verdict.message
    assert executor.run(["./bad"], workspace=str(tmp_path)).returncode == 127


def test_the_path_of_the_call_is_searched(executor):
    assert executor.run(["id", "-u"], env={"PATH": "/nowhere:/usr/bin"}).stdout == b"1000\n"
    assert executor.run(["id"], env={"PATH": "/nowhere"}).returncode == 127


@pytest.mark.parametrize("cwd", ["/nowhere", "/etc/passwd", "/etc/ssl/private"])
def test_a_working_directory_that_is_none(executor, cwd):
    result = executor.run(["true"], cwd=cwd)
    if cwd == "/etc/ssl/private" and not Path(cwd).exists():
        pytest.skip("no such directory here")
    assert (result.outcome, result.returncode) == (Outcome.FAILED_TO_START, 126)
    assert result.verdict.message.startswith(f"working directory {cwd}: ")


def test_a_timeout_kills_the_whole_tree(executor):
    """The call's answer comes when all of it is dead: nobody has to wait or look for more."""
    result = executor.python(FORK_TREE, timeout=1)
    assert (result.outcome, result.returncode, result.signal) == (Outcome.TIMED_OUT, 124, signal.SIGKILL)
    assert (result.verdict.reason, result.verdict.message) == ("timeout", "killed after 1 s")
    assert 0.9 < result.usage.wall < 5
    leaf = executor.executor.tree.path / "tenant-default" / f"call-{result.id}"
    assert pids_below(leaf) == []


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_that_is_none(executor, timeout):
    with pytest.raises(UsageError, match="timeout"):
        executor.run(["true"], timeout=timeout)


def test_output_is_kept_at_both_ends(executor):
    script = "import sys\nfor i in range(12_500_000): sys.stdout.write('%07d\\n' % i)"
    result = executor.python(script, timeout=60)
    limit = executor.config.capture_limit
    assert result.ok
    assert result.truncated
    assert limit <= len(result.stdout) < limit + 100
    assert result.stdout.startswith(b"0000000\n0000001\n")
    assert result.stdout.endswith(b"12499999\n")
    cut = result.stdout.split(b"[agentrun: ")[1].split()[0]
    assert int(cut) == 8 * 10_000_000 + 9 * 2_500_000 - limit


@pytest.mark.parametrize("size", [0, 1, 4096, 65536, 65537, 1 << 20])
def test_output_up_to_the_bound_is_whole(executor, size):
    result = executor.sh(f"head -c {size} /dev/zero; head -c {size} /dev/zero >&2; exit 5")
    assert (result.returncode, result.truncated) == (5, False)
    assert result.stdout == result.stderr == bytes(size)


def test_output_one_beyond_the_bound(executor):
    result = executor.sh(f"head -c {executor.config.capture_limit + 1} /dev/zero")
    assert result.truncated
    assert b"[agentrun: 1 bytes cut]" in result.stdout


def test_much_standard_input(executor):
    data = os.urandom(1 << 20) * 10
    assert executor.sh("cksum", stdin=data).stdout.split()[1] == str(len(data)).encode()
    assert executor.run(["cat"], stdin=b"short").stdout == b"short"


def test_standard_input_nobody_reads(executor):
    assert executor.run(["true"], stdin=bytes(10 << 20)).ok


def test_streams_may_be_descriptors(executor, tmp_path):
    with (tmp_path / "out").open("w+b") as out, (tmp_path / "in").open("w+b") as source:
        source.write(b"abc")
        source.seek(0)
        result = executor.sh("tr a-c A-C; echo err >&2", stdin=source.fileno(), stdout=out.fileno(), stderr=out.fileno())
        assert (result.stdout, result.stderr) == (None, None)
        out.seek(0)
        assert out.read() == b"ABCerr\n"


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_descriptor_that_is_not_open(executor, name):
    with pytest.raises(UsageError, match=f"{name}: descriptor 9999 is not open"):
        executor.run(["true"], **{name: 9999})


def test_a_tool_that_closes_its_streams(executor):
    result = executor.sh("exec <&- >&- 2>&-; exit 9")
    assert (result.outcome, result.exit_code, result.stdout) == (Outcome.EXITED, 9, b"")


def test_orphans_that_hold_stdout_do_not_delay_the_result(executor):
    result = executor.sh("(setsid sleep 60 &) ; echo done")
    assert result.stdout == b"done\n"
    assert result.timings.total < 10
    assert pids_below(executor.executor.tree.path / "tenant-default" / f"call-{result.id}") == []


@pytest.mark.parametrize(
    ("argv", "options", "words"),
    [
        ([], {}, "no command"),
        ([""], {}, "no command"),
        ("true", {}, "not one string"),
        (["echo", "a\0b"], {}, "argument 1 contains a NUL"),
        (["env"], {"env": {"A\0": "x"}}, "NUL"),
        (["env"], {"env": {"A": "x\0"}}, "NUL"),
        (["env"], {"env": {"": "x"}}, "environment variable"),
        (["env"], {"env": {"A=B": "x"}}, "environment variable"),
        (["true"], {"tenant": "../x"}, "tenant"),
        (["true"], {"tenant": ""}, "tenant"),
        (["true"], {"tenant": "x" * 65}, "tenant"),
        (["true"], {"policy": "nope"}, "policy"),
        (["true"], {"cwd": "/a\0b"}, "NUL"),
    ],
)
def test_requests_that_are_none(executor, argv, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        executor.run(argv, **options)
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize("pieces", [1, 30, 3000])
def test_an_environment_of_3_mb(executor, pieces):
    env = {f"V{number}": "x" * ((3 << 20) // pieces) for number in range(pieces)}
    result = executor.run(["true"], env=env)
    assert (result.outcome, result.returncode) == (Outcome.FAILED_TO_START, 126)
    assert result.verdict.message == "true: Argument list too long"


def test_what_no_message_can_carry_is_refused(executor):
    with pytest.raises(UsageError) as caught:
        executor.run(["true"], env={f"V{number}": "x" * (1 << 20) for number in range(64)})
    assert len(str(caught.value)) < 300


def test_timings_are_in_order(executor):
    result = executor.sh("sleep 0.1; exit 0")
    steps = result.timings
    assert 0 <= steps.queued <= steps.leased <= steps.dispatched <= steps.total
    assert steps.first_exec is not None
    assert steps.leased <= steps.first_exec <= steps.total
    assert 0.1 <= result.usage.wall <= steps.total


def test_usage_is_measured(executor):
    result = executor.python("x = bytearray(50 << 20)\nfor _ in range(3_000_000): pass")
    assert result.usage.cpu_user > 0.01
    assert result.usage.memory_peak > 50 << 20
    assert result.usage.memory_source in ("memory.peak", "rusage")


def test_a_fork_bomb_is_bounded(executor):
    result = executor.python(FORK_STORM, policy=Policy(limits=Limits(pids_max=20)))
    assert 16 <= int(result.stdout) <= 21
    bomb = executor.sh("b() { b | b & }; b; sleep 1", policy=Policy(limits=Limits(pids_max=30)), timeout=10)
    assert bomb.outcome in (Outcome.EXITED, Outcome.TIMED_OUT)
    assert executor.sh("echo well").stdout == b"well\n"


def test_each_call_has_its_own_limit_of_processes(executor):
    most = resource.getrlimit(resource.RLIMIT_NPROC)[1]  # in a container root may not have more than this
    for wanted in (None, 1024, 20, None, 700, 512):
        result = executor.python(
            "import resource; print(*resource.getrlimit(resource.RLIMIT_NPROC))", policy=Policy(limits=Limits(pids_max=wanted))
        )
        given = most if wanted is None or 0 <= most < wanted else wanted
        assert result.stdout.split() == [b"%d" % given] * 2, wanted


def test_a_memory_limit_holds_or_is_refused(executor):
    policy = Policy(limits=Limits(memory_max=64 << 20))
    if "memory" in executor.executor.tree.controllers:
        result = executor.python("bytearray(256 << 20)", policy=policy)
        assert (result.outcome, result.returncode, result.verdict.reason) == (Outcome.MEMORY_KILLED, 137, "memory")
        return
    with pytest.raises(LimitError, match=r"memory\.max cannot be enforced here"):
        executor.run(["true"], policy=policy)
    result = executor.run(["true"], policy=Policy(limits=policy.limits, best_effort=True))
    assert result.ok
    assert "memory.max" in [item.limit for item in result.unenforced]


def test_calls_are_warm_once_the_pool_is(executor):
    executor.run(["true"])
    eventually(lambda: executor.executor.statistics().pools["default/none"].idle)
    result = executor.run([PYTHON, "-c", "pass"])
    assert result.warm
