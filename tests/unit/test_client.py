# SPDX-License-Identifier: Apache-2.0
"""The native client against a daemon played by the test: what it asks for, and what it refuses to ask."""

import fcntl
import os
import resource
import socket

import pytest

from tests.unit.client_support import finish, needs_client

pytestmark = needs_client

# ---------------------------------------------------------------- the request


def test_request_carries_everything(start, daemon, tmp_path):
    workspace = tmp_path / "w"
    workspace.mkdir()
    files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("in", "out", "err")]
    client = start(
        *("--policy", "strict", "--cwd=/src", "--timeout", "2.5", "--memory=1G", "--cpus", "2", "--pids", "9"),
        *("--net", "none", "--tenant", "t", "--best-effort", "--timings", f"--workspace={workspace}:ro", "--policy=last"),
        *("--env", "A=1=2", "--env=B=", "--env", "HOME", "--env", "UNSET", "--", "prog", "--json", b"\xff", ""),
        stdin=files[0], stdout=files[1], stderr=files[2], env={"HOME": "/h", "HOMEX": "no"},
    )  # fmt: skip
    call = daemon.accept()
    assert call.request.argv == [b"prog", b"--json", b"\xff", b""]
    assert call.request.env == [b"A=1=2", b"B=", b"HOME=/h"]
    assert call.request.options == {
        "policy": "last", "cwd": "/src", "timeout": "2.5", "memory": "1G", "cpus": "2", "pids": "9", "net": "none",
        "tenant": "t", "best-effort": "1", "timings": "1", "workspace": "ro",
    }  # fmt: skip
    assert call.request.fds == ["stdin", "stdout", "stderr", "workspace"]
    for name, file in zip(("stdin", "stdout", "stderr"), files, strict=True):
        assert os.path.sameopenfile(call.fds[name], file)
    assert os.path.samestat(os.fstat(call.fds["workspace"]), workspace.stat())
    assert fcntl.fcntl(call.fds["workspace"], fcntl.F_GETFL) & os.O_PATH
    call.answer(op="result", exit=3, json=b"{}")
    assert finish(client)[0] == 3
    assert [os.fstat(file).st_size for file in files] == [0, 0, 0]
    for file in files:
        os.close(file)


@pytest.mark.parametrize(("given", "mode"), [("{}", "rw"), ("{}:rw", "rw"), ("{}:ro", "ro"), ("{}:x", None)])
def test_workspace_mode(start, daemon, tmp_path, given, mode):
    client = start("--workspace", given.format(tmp_path), "true")
    if mode is None:
        assert finish(client)[::2] == (2, f"agentrun: workspace {tmp_path}:x: No such file or directory\n")
    else:
        assert daemon.accept().request.options == {"workspace": mode}


def test_command_without_dashes_keeps_its_options(start, daemon):
    start("ls", "--policy", "x", "--", "-h")
    request = daemon.accept().request
    assert (request.argv, request.options, request.env) == ([b"ls", b"--policy", b"x", b"--", b"-h"], {}, [])


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_closed_stdio_is_not_passed_and_not_reused(start, daemon, tmp_path, closed):
    def close():
        for fd in closed:
            os.close(fd)

    client = start("--workspace", tmp_path, "--result", tmp_path / "r", "true", preexec_fn=close)
    call = daemon.accept()
    kept = [name for fd, name in enumerate(("stdin", "stdout", "stderr")) if fd not in closed]
    assert call.request.fds == [*kept, "workspace"]
    assert os.path.samestat(os.fstat(call.fds["workspace"]), tmp_path.stat())
    assert all(os.readlink(f"/proc/{client.pid}/fd/{fd}") == "/dev/null" for fd in closed)
    call.answer(op="result", exit=0, json=b"{}")
    assert finish(client)[0] == 0


def test_large_command_line(start, daemon):
    args = [bytes([65 + i]) * 100_000 for i in range(15)]
    client = start("cat", *args)
    call = daemon.accept()
    assert call.request.argv == [b"cat", *args]
    assert call.request.fds == ["stdin", "stdout", "stderr"]
    call.answer(op="result", exit=0, json=b"{}")
    assert finish(client)[0] == 0


def test_command_line_over_the_frame_limit(start, daemon):
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if hard not in (-1, resource.RLIM_INFINITY):
        pytest.skip("needs an unlimited hard stack limit to pass 4 MiB of arguments")
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
    try:
        client = start("cat", *["x" * 131_000] * 33)
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
    code, _, err = finish(client)
    size = err.split("take ")[1].split()[0]
    assert abs(int(size) - 33 * 131_005 - 130) < 60  # every argument has a head of five bytes
    text = f"the command line and environment take {size} bytes; the limit is 4194304"
    assert code == 126
    assert err == f"agentrun: Argument list too long: {text}\n"
    assert daemon.nobody_called()


# ---------------------------------------------------------------- wrong usage

SEE = " (see agentrun exec --help)"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--foo", "ls"], "unknown option '--foo'" + SEE),
        (["--foo=1", "ls"], "unknown option '--foo'" + SEE),
        (["-x", "ls"], "unknown option '-x'" + SEE),
        (["--capture", "ls"], "unknown option '--capture'" + SEE),
        (["--json=1", "ls"], "option '--json' takes no value" + SEE),
        (["--cwd"], "option '--cwd' needs a value" + SEE),
        (["--cwd", "--", "ls"], "option '--cwd' needs a value" + SEE),
        (["--env", "=x", "ls"], "option '--env' needs NAME or NAME=VALUE" + SEE),
        ([], "no command given" + SEE),
        (["--json", "--"], "no command given" + SEE),
        (["--workspace", "/dev/null", "ls"], "workspace /dev/null: Not a directory"),
        (["--workspace", "/a\nb", "ls"], "workspace /a?b: No such file or directory"),
        (["--result", "/nonexistent/r", "ls"], "result /nonexistent/r: No such file or directory"),
        (["--result", "/", "ls"], "result /: Is a directory"),
    ],
)
def test_refused_before_anything_runs(start, daemon, args, message):
    assert finish(start(*args)) == (2, "", f"agentrun: {message}\n")
    assert daemon.nobody_called()


def test_json_needs_stdout(start):
    assert finish(start("--json", "ls", preexec_fn=lambda: os.close(1))) == (
        2, "", "agentrun: option '--json' needs an open standard output\n")  # fmt: skip


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(start, option):
    code, out, err = finish(start(option))
    assert code == 0
    assert not err
    assert out.startswith("usage: agentrun exec ")
    assert all(f"--{name}" in out for name in ("env", "tenant", "best-effort", "result", "no-daemon", "socket"))
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("option", [True, False])
def test_named_socket_is_never_replaced(start, tmp_path, option):
    def refused(path):
        args, env = (["--socket", path], {}) if option else ([], {"AGENTRUN_SOCKET": path})
        return finish(start(*args, "ls", env=env))

    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    for path, why in [("/none", "No such file or directory"), (f"{tmp_path}/stale", "Connection refused"),
                      ("/" + "x" * 107, "File name too long")]:  # fmt: skip
        assert refused(path) == (125, "", f"agentrun: cannot connect to {path}: {why}\n")
