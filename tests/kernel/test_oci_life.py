# SPDX-License-Identifier: Apache-2.0
"""The life of a container as an engine leads it: create, start, state, kill, delete, exec, hooks, terminals, descriptors."""

import array
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.oci_support import PATIENCE, RUNTIME, config, has_controllers, leftovers

pytestmark = pytest.mark.host


# --------------------------------------------------------------------------------------------------- the verbs


def test_a_whole_life(oci, tmp_path):
    pid_file = tmp_path / "pid"
    name = oci.create(config("echo started > /work/out; sleep 1000", root={"readonly": False}), "--pid-file", str(pid_file))
    state = oci.state(name)
    assert (state["status"], state["id"], state["pid"]) == ("created", name, int(pid_file.read_text()))
    out = oci.bundle / "rootfs" / "work" / "out"
    out.unlink(missing_ok=True)
    oci.call("start", name, check=True)
    assert oci.state(name)["status"] == "running"
    again = oci.call("start", name)
    assert (again.returncode, again.stdout) == (1, "")
    assert "it is running" in again.stderr
    refused = oci.call("delete", name)
    assert refused.returncode == 1
    assert "not stopped" in refused.stderr
    oci.call("kill", name, "KILL", check=True)
    assert oci.wait(name, "stopped")["pid"] == 0
    assert out.read_text() == "started\n"
    late = oci.call("kill", name, "15")
    assert (late.returncode, "container not running" in late.stderr) == (1, True)
    oci.call("delete", name, check=True)
    assert leftovers([name]) == []
    gone = oci.call("state", name)
    assert (gone.returncode, "does not exist" in gone.stderr) == (1, True)
    assert oci.call("delete", name).returncode == 1
    oci.call("delete", "--force", name, check=True)


def test_the_same_name_twice(oci):
    name = oci.create(config("true"))
    done = oci.call("create", "--bundle", str(oci.bundle), name)
    assert (done.returncode, "already exists" in done.stderr) == (1, True)
    assert oci.state(name)["status"] == "created"


def test_a_created_container_is_not_deleted_without_force(oci):
    name = oci.create(config("true"))
    assert oci.call("delete", name).returncode == 1
    oci.call("delete", "--force", name, check=True)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "ä"])
def test_names_that_are_none(oci, name):
    for verb in ("create", "state", "start", "delete"):
        done = oci.call(verb, name)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), (verb, done.stderr)


@pytest.mark.parametrize("word", ["TERM", "SIGTERM", "term", "15"])
def test_signals_by_any_name(oci, word):
    name = oci.running("trap 'exit 9' TERM; echo ready > /dev/null; while :; do sleep 0.05; done")
    time.sleep(0.05)
    oci.call("kill", name, word, check=True)
    oci.wait(name, "stopped")
    done = oci.call("kill", name, "NOSUCH")
    assert "unknown signal" in done.stderr


def test_kill_all_reaches_every_process(oci):
    name = oci.running("sleep 1001 & sleep 1002 & wait")
    oci.call("kill", "--all", name, "KILL", check=True)
    oci.wait(name, "stopped")
    oci.call("kill", "--all", name, "KILL", check=True)  # containerd says it once more


@pytest.mark.parametrize(("args", "code", "words"), [
    (["no-such-program"], 1, 'exec: "no-such-program": executable file not found in $PATH'),
    (["/no/such"], 1, 'exec: "/no/such": no such file or directory'), (["/plain"], 1, 'exec: "/plain": permission denied'),
])  # fmt: skip
def test_programs_that_cannot_be(oci, args, code, words):
    done = oci.run(config("", process={"args": args}))
    assert (done.returncode, done.stdout, done.stderr.strip()) == (code, "", words)


def test_a_program_that_goes_between_create_and_start(oci):
    target = oci.bundle / "rootfs" / "bin" / "going"
    target.unlink(missing_ok=True)
    target.symlink_to("busybox")
    name = oci.create(config("", process={"args": ["going"]}))
    target.unlink()
    done = oci.call("start", name)
    assert (done.returncode, done.stderr.strip()) == (1, 'exec: "going": executable file not found in $PATH')
    assert oci.wait(name, "stopped")


def test_exit_status_of_run(oci):
    assert [oci.run(config(f"exit {code}")).returncode for code in (0, 3, 255)] == [0, 3, 255]
    oci.write(config("", process={"args": ["sleep", "1000"]}))
    oci.quietly("run", "--detach", "--bundle", str(oci.bundle), name := oci.id())
    assert oci.state(name)["status"] == "running"


def test_list_and_ps(oci):
    name = oci.running("sleep 1003 & wait")
    found = json.loads(oci.call("list", "--format", "json", check=True).stdout)
    assert [one["status"] for one in found if one["id"] == name] == ["running"]
    assert name in oci.call("list", "-q").stdout.split()
    assert name in oci.call("list").stdout
    pids = json.loads(oci.call("ps", "--format", "json", name, check=True).stdout)
    assert oci.state(name)["pid"] in pids
    assert len(pids) == 2
    assert "sleep 1003" in oci.call("ps", name).stdout


def test_pause_and_resume(oci):
    name = oci.running("sleep 1000")
    oci.call("pause", name, check=True)
    assert oci.state(name)["status"] == "paused"
    assert "is paused" in oci.call("exec", name, "true").stderr
    oci.call("resume", name, check=True)
    assert oci.state(name)["status"] == "running"
    assert "it is running" in oci.call("resume", name).stderr
    oci.call("pause", name, check=True)
    oci.call("kill", name, "KILL", check=True)
    oci.wait(name, "stopped")


def test_a_container_that_was_not_started_is_not_paused(oci):
    name = oci.create(config("sleep 1000"))
    assert "it is created" in oci.call("pause", name).stderr


def test_delete_by_force_does_not_wait_for_who_waits_for_ever(oci):
    """A hook without a timeout holds up `start`, which holds the container."""
    stuck = {"path": "/bin/sleep", "args": ["sleep", "1000"]}
    name = oci.create(config("true", hooks={"startContainer": [stuck]}))
    starting = subprocess.Popen([RUNTIME, "--root", str(oci.root), "start", name], env={}, stderr=subprocess.PIPE, text=True)
    time.sleep(0.2)
    assert starting.poll() is None
    oci.call("delete", "--force", name, check=True)
    _, said = starting.communicate(timeout=PATIENCE)
    assert (starting.returncode, "process died" in said) == (1, True)
    assert leftovers([name]) == []


def test_flags_of_create_and_run(oci, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config("cat /proc/self/mountinfo", hostname="other")))
    done = oci.call(
        "run", "--config", str(other), "--bundle", str(oci.bundle), "--no-pivot", "--no-new-keyring", "--no-subreaper", oci.id()
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "/proc" in done.stdout
    oci.write(config("exit 2"))
    assert oci.call("run", "--keep", "--bundle", str(oci.bundle), name := oci.id()).returncode == 2
    assert oci.state(name)["status"] == "stopped"


def test_the_pidfd_is_sent_to_who_asks_for_it(oci, tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "pidfd"))
        server.listen()
        name = oci.create(config("sleep 1000"), "--pidfd-socket", str(tmp_path / "pidfd"))
        server.settimeout(PATIENCE)
        connection, _ = server.accept()
        with connection:
            _, fds, _, _ = socket.recv_fds(connection, 16, 1)
    try:
        signal.pidfd_send_signal(fds[0], signal.SIGKILL)
    finally:
        os.close(fds[0])
    oci.wait(name, "stopped")


def test_spec_is_a_configuration_to_begin_with(oci, tmp_path):
    oci.call("spec", "--bundle", str(tmp_path), check=True)
    made = json.loads((tmp_path / "config.json").read_text())
    assert "exists already" in oci.call("spec", "--bundle", str(tmp_path)).stderr
    made["process"] |= {"terminal": False, "args": ["id", "-u"]}
    done = oci.run(made)
    assert (done.returncode, done.stdout) == (0, "0\n")
    assert json.loads(oci.call("features", check=True).stdout)["linux"]["cgroup"]["v2"] is True
    assert oci.call("--version").stdout.startswith("agentrun-oci version ")
    assert oci.call("--help").returncode == 0
    assert "usage: agentrun-oci create" in oci.call("create", "--help").stdout


# --------------------------------------------------------------------------------------------------- exec


def test_exec_is_in_the_container_and_in_a_leaf_of_its_own(oci):
    name = oci.running("sleep 1000")
    pid = oci.state(name)["pid"]
    done = oci.call(
        "exec",
        name,
        "sh",
        "-c",
        "for n in pid ipc uts mnt net; do readlink /proc/self/ns/$n; done; cat /proc/self/cgroup; hostname",
    )
    lines = done.stdout.split("\n")
    assert lines[:5] == [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("pid", "ipc", "uts", "mnt", "net")]
    own = Path(f"/proc/{pid}/cgroup").read_text().split("0::")[1].strip()
    assert own.endswith("/init")
    # Seen from the container's own cgroup namespace, its neighbour.
    assert any(line.startswith("0::/../exec-") for line in lines)
    stats = json.loads(oci.call("events", "--stats", name, check=True).stdout)["data"]
    assert stats["execs"]["ended"]["count"] == 1
    assert stats["execs"]["ended"]["cpu_usec"] > 0
    assert stats["execs"]["running"] == []


def test_usage_of_an_exec_that_runs(oci):
    name = oci.running("sleep 1000")
    oci.quietly("exec", "--detach", name, "sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 1000")
    deadline = time.monotonic() + PATIENCE
    while True:
        data = json.loads(oci.call("events", "--stats", name, check=True).stdout)["data"]
        (running,) = data["execs"]["running"]
        if running["cpu_usec"] > 1000:
            break
        assert time.monotonic() < deadline
    assert data["cpu"]["usage"]["total"] >= running["cpu_usec"] * 1000
    if has_controllers("memory", "pids"):
        assert running["memory"] > 0
        assert running["pids"] == 1
    oci.call("kill", "--all", name, "KILL", check=True)


@pytest.mark.parametrize(
    ("args", "code"), [(["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$"], 137), (["nope"], 255), (["/plain"], 255)]
)
def test_exit_status_of_exec(oci, args, code):
    name = oci.running("sleep 1000")
    assert oci.call("exec", name, *args).returncode == code


def test_exec_as_the_command_line_says(oci):
    name = oci.running("sleep 1000", process={"user": {"uid": 5, "gid": 5}})
    flags = [
        "--user",
        "7:8",
        "--cwd",
        "/work",
        "--env",
        "A=b c",
        "--additional-gids",
        "9",
        "--cap",
        "CAP_NET_RAW",
        "--no-new-privs",
    ]
    out = oci.call(
        "exec",
        *flags,
        name,
        "sh",
        "-c",
        "id -u; id -g; id -G; pwd; echo $A; grep -E 'CapBnd|NoNew' /proc/self/status",
        check=True,
    ).stdout
    lines = out.split("\n")
    assert lines[:2] == ["7", "8"]
    assert lines[3:5] == ["/work", "b c"]
    assert "NoNewPrivs:\t1" in out
    assert int(out.split("CapBnd:")[1].split()[0], 16) & 1 << 13


def test_exec_by_a_process_file(oci, tmp_path):
    name = oci.running("sleep 1000")
    pid_file, process = tmp_path / "pid", tmp_path / "process.json"
    given = {
        "user": {"uid": 3, "gid": 4},
        "args": ["sleep", "1000"],
        "cwd": "/tmp",
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 55, "hard": 66}],
    }
    process.write_text(json.dumps(given))
    oci.quietly("exec", "--process", str(process), "--detach", "--pid-file", str(pid_file), name)
    pid = int(pid_file.read_text())
    status = Path(f"/proc/{pid}/status").read_text()
    assert "Uid:\t3\t3\t3\t3" in status
    assert "Max open files            55                   66" in Path(f"/proc/{pid}/limits").read_text()
    assert "CapEff:\t0000000000000000" in status


def test_exec_has_the_containers_filter(oci):
    deny = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
    }
    name = oci.running("sleep 1000", linux={"seccomp": deny})
    out = oci.call("exec", name, "sh", "-c", "mkdir /tmp/x; grep Seccomp: /proc/self/status")
    assert "Function not implemented" in out.stderr
    assert "Seccomp:\t2" in out.stdout


def test_exec_in_a_container_that_is_gone(oci):
    name = oci.running("true")
    oci.wait(name, "stopped")
    done = oci.call("exec", name, "true")
    assert (done.returncode, "container not running" in done.stderr) == (255, True)


@pytest.mark.parametrize("annotations", [{"io.agentrun.exec-leaf": "false"}, {"io.agentrun.policy": "test"}])
def test_exec_without_a_leaf_of_its_own(oci, annotations):
    name = oci.running("sleep 1000", annotations=annotations)
    assert "0::/\n" in oci.call("exec", name, "cat", "/proc/self/cgroup", check=True).stdout


# --------------------------------------------------------------------------------------------------- hooks


def hook(path, script, **more):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"path": str(path), "args": [path.name, "an argument"], "env": ["PATH=/usr/bin:/bin", "WHY=test"], **more}


def test_hooks_of_all_stages(oci, tmp_path):
    """In order, where the specification has them, with the state on stdin; those in the container's namespaces see its root."""
    for stage in ("prestart", "createRuntime", "createContainer"):
        hook(
            tmp_path / stage,
            f'cat > {tmp_path}/{stage}.json; echo {stage} "$1" $WHY >> {tmp_path}/order; '
            f"readlink /proc/self/ns/mnt >> {tmp_path}/{stage}.ns",
        )
    hook(tmp_path / "poststart", f"cat > {tmp_path}/poststart.json; echo poststart >> {tmp_path}/order")
    hook(tmp_path / "poststop", f"cat > {tmp_path}/poststop.json; echo poststop >> {tmp_path}/order")
    stages = {
        stage: [{"path": str(tmp_path / stage), "args": [stage, "an argument"], "env": ["PATH=/usr/bin:/bin", "WHY=test"]}]
        for stage in ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
    }
    inside = {"path": "/bin/sh", "args": ["sh", "-c", "cat > /work/startContainer.json; hostname >> /work/startContainer.json"]}
    name = oci.create(config("sleep 1000", hooks={**stages, "startContainer": [inside]}, root={"readonly": False}))
    assert (tmp_path / "order").read_text().split("\n")[:3] == [f"{stage} an argument test" for stage in list(stages)[:3]]
    oci.call("start", name, check=True)
    pid = oci.state(name)["pid"]
    started, _, said = (oci.bundle / "rootfs" / "work" / "startContainer.json").read_text().rpartition("}")
    assert said == "agentrun\n"
    assert (tmp_path / "createContainer.ns").read_text().strip() == os.readlink(f"/proc/{pid}/ns/mnt")
    assert (tmp_path / "createRuntime.ns").read_text().strip() == os.readlink("/proc/self/ns/mnt")
    oci.call("delete", "--force", name, check=True)
    assert (tmp_path / "order").read_text().split("\n")[3:] == ["poststart", "poststop", ""]
    states = {stage: json.loads((tmp_path / f"{stage}.json").read_text()) for stage in stages} | {
        "startContainer": json.loads(started + "}")
    }
    told = {stage: state["status"] for stage, state in states.items()}
    assert told == {
        **dict.fromkeys(("prestart", "createRuntime", "createContainer", "startContainer"), "created"),
        "poststart": "running",
        "poststop": "stopped",
    }
    assert all((state["id"], state["bundle"]) == (name, str(oci.bundle)) for state in states.values())
    assert all(state["pid"] == pid for stage, state in states.items() if stage != "poststop")


@pytest.mark.parametrize("stage", ["prestart", "createRuntime", "createContainer"])
def test_a_hook_that_fails_before_the_start(oci, tmp_path, stage):
    bad, last = hook(tmp_path / "bad", "exit 5"), hook(tmp_path / "last", f"touch {tmp_path}/stopped")
    done = oci.run(config("echo no", hooks={stage: [bad], "poststop": [last]}))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{stage} hook {tmp_path}/bad: exit status 5" in done.stderr
    assert (tmp_path / "stopped").exists()
    assert leftovers([oci.ids[-1]]) == []


def test_a_hook_that_fails_at_the_start(oci, tmp_path):
    inside = {"path": "/bin/false"}
    name = oci.create(config("echo no", hooks={"startContainer": [inside]}))
    done = oci.call("start", name)
    assert (done.returncode, "startContainer hook" in done.stderr) == (1, True)
    name = oci.create(config("sleep 1000", hooks={"poststart": [hook(tmp_path / "bad", "exit 6")]}))
    done = oci.call("start", name)
    assert (done.returncode, "poststart hook" in done.stderr) == (1, True)
    assert oci.call("state", name).returncode == 1  # stopped and removed: specification 1.3


def test_a_hook_that_takes_too_long_and_one_that_fails_at_the_end(oci, tmp_path):
    slow = hook(tmp_path / "slow", "exec sleep 100", timeout=1)
    done = oci.run(config("", hooks={"createRuntime": [slow]}))
    assert f"hook {tmp_path}/slow: timed out after 1 s" in done.stderr
    done = oci.run(config("", hooks={"createContainer": [slow]}))
    assert "onnection timed out" in done.stderr
    name = oci.running(
        "true", hooks={"poststop": [hook(tmp_path / "bad", "exit 1"), hook(tmp_path / "good", f"touch {tmp_path}/ran")]}
    )
    oci.wait(name, "stopped")
    done = oci.call("delete", name, check=True)
    assert "warning: poststop hook" in done.stderr
    assert (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------- terminals and descriptors


def receive_terminal(server):
    server.settimeout(PATIENCE)
    connection, _ = server.accept()
    with connection:
        name, ancillary, _, _ = connection.recvmsg(256, socket.CMSG_LEN(4))
        fds = array.array("i")
        fds.frombytes(ancillary[0][2][:4])
    return fds[0], name.decode()


def read_all(fd, until, seconds=PATIENCE):
    said, deadline = b"", time.monotonic() + seconds
    while until not in said and time.monotonic() < deadline:
        if select.select([fd], [], [], 0.1)[0]:
            try:
                said += os.read(fd, 4096)
            except OSError:
                break
    return said.decode().replace("\r\n", "\n")


def test_a_terminal(oci, tmp_path):
    where = tmp_path / ("a-long-name-" * 9)  # longer than a socket's address may be
    where.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(where)
        server.bind("console")
        os.chdir(before)
        server.listen()
        script = "tty; stty size; test -c /dev/console && echo console; echo typed $(head -n 1); cat /proc/self/stat"
        made = config(script, process={"terminal": True, "consoleSize": {"height": 33, "width": 77}})
        name = oci.create(made, "--console-socket", str(where / "console"))
        master, slave = receive_terminal(server)
        assert slave.startswith("/dev/pts/")
        oci.call("start", name, check=True)
        os.write(master, b"hello\n")
        said = read_all(master, b"(cat)") + read_all(master, b"\n", 1)
        os.close(master)
    lines = said.split("\n")
    assert lines[0] in ("/dev/pts/0", "hello")
    assert {"33 77", "console", "typed hello"} <= set(lines)


def test_a_terminal_for_an_exec(oci, tmp_path):
    name = oci.running("sleep 1000")
    process = tmp_path / "process.json"
    process.write_text(
        json.dumps(
            {"args": ["sh", "-c", "tty; echo done; sleep 0.2"], "cwd": "/", "terminal": True, "user": {"uid": 0, "gid": 0}}
        )
    )
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "console"))
        server.listen()
        oci.quietly("exec", "--process", str(process), "--detach", "--console-socket", str(tmp_path / "console"), name)
        master, _ = receive_terminal(server)
        assert "/dev/pts/0" in read_all(master, b"done")
        os.close(master)


def test_a_terminal_needs_its_socket(oci):
    oci.write(config("true", process={"terminal": True}))
    done = oci.call("create", "--bundle", str(oci.bundle), oci.id())
    assert (done.returncode, "a --console-socket is needed" in done.stderr) == (1, True)


@pytest.mark.parametrize("verb", ["run", "exec"])
def test_a_terminal_by_hand(oci, verb):
    """Called from a terminal: its bytes and its size are passed on, and the exit status is the program's."""
    script = "tty; stty size; echo typed $(head -n 1); exit 5"
    if verb == "run":
        oci.write(config(script, process={"terminal": True}))
        arguments = ["--bundle", str(oci.bundle), oci.id()]
    else:
        arguments = ["--tty", oci.running("sleep 1000"), "sh", "-c", script]
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 44, 99, 0, 0))
    process = subprocess.Popen(
        [RUNTIME, "--root", str(oci.root), verb, *arguments], env={}, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    try:
        said = read_all(master, b"99")
        os.write(master, b"hello\n")
        said += read_all(master, b"typed hello")
        assert process.wait(PATIENCE) == 5
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert "/dev/pts/0\n44 99" in said, repr(said)
    assert "typed hello" in said, repr(said)
    assert not [name for name in os.listdir(oci.root) if name.startswith(".console")]


def test_descriptors_that_are_passed_on_and_those_that_are_not(oci):
    reader, writer = os.pipe()
    secret = os.open("/", os.O_RDONLY)
    try:
        target = max(reader, writer, secret) + 10
        os.dup2(writer, 3) if writer != 3 else None
        made = oci.write(config("ls /proc/self/fd; echo through >&3"))
        assert made
        launcher = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True); os.dup2(int(sys.argv[2]), 9); "
            "os.set_inheritable(9, True);"
            "os.execve(sys.argv[3], sys.argv[3:], {})"
        )
        argv = [sys.executable, "-c", launcher, str(writer), str(secret), RUNTIME, "--root", str(oci.root), "run",
        "--preserve-fds", "1",
                "--bundle", str(oci.bundle), oci.id()]  # fmt: skip
        done = subprocess.run(argv, capture_output=True, text=True, pass_fds=[writer, secret], timeout=60)
        assert done.returncode == 0, done.stderr
        assert {"0", "1", "2", "3"} <= set(done.stdout.split()) <= {"0", "1", "2", "3", "4"}  # 4 is ls's own
        assert os.read(reader, 100) == b"through\n"
        assert target
    finally:
        for fd in (reader, writer, secret):
            os.close(fd)
    done = oci.call("run", "--preserve-fds", "7", "--bundle", str(oci.bundle), oci.id())
    assert "--preserve-fds: descriptor" in done.stderr


def test_listen_fds_are_told(oci):
    with open("/dev/null", "rb") as file:
        code = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True);"
            "os.execve(sys.argv[2], sys.argv[2:], {'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())})"
        )
        oci.write(config("echo $LISTEN_FDS $LISTEN_PID; ls /proc/self/fd"))
        argv = [
            sys.executable,
            "-c",
            code,
            str(file.fileno()),
            RUNTIME,
            "--root",
            str(oci.root),
            "run",
            "--bundle",
            str(oci.bundle),
            oci.id(),
        ]
        done = subprocess.run(argv, capture_output=True, text=True, pass_fds=[file.fileno()], timeout=60)
    assert done.stdout.split("\n")[0] == "1 1", done.stderr
    assert "3" in done.stdout.split()


def test_readiness_is_passed_on(oci, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE)
        # busybox has no datagram client, so the test's own Python sends from outside, by the path the container is given.
        name = oci.create(
            config("echo $NOTIFY_SOCKET > /work/where; sleep 1000", root={"readonly": False}),
            env={"NOTIFY_SOCKET": str(tmp_path / "notify")},
        )
        starting = subprocess.Popen([RUNTIME, "--root", str(oci.root), "start", name], env={})
        try:
            deadline = time.monotonic() + PATIENCE
            while oci.state(name)["status"] != "running":
                assert time.monotonic() < deadline
                time.sleep(0.02)
            pid = oci.state(name)["pid"]
            time.sleep(0.1)
            where = (oci.bundle / "rootfs" / "work" / "where").read_text().strip()
            assert where == "/run/notify/notify.sock"
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as tool:
                tool.sendto(b"STATUS=x\nREADY=1", f"/proc/{pid}/root{where}")
            assert manager.recv(4096).split() == [b"READY=1", b"MAINPID=%d" % pid]
            assert starting.wait(PATIENCE) == 0
        finally:
            starting.kill()
            starting.wait()


# --------------------------------------------------------------------------------------------------- errors


def test_an_error_is_one_line_of_json_in_the_log(oci, tmp_path):
    log = tmp_path / "log.json"
    for arguments in (["create", "--bundle", "/no/such", "x"], ["start", "no-such"], ["state", "no-such"], ["kill", "no-such",
    "9"], ["delete", "no-such"],
                      ["exec", "no-such", "true"], ["nonsense"], ["create", "--no-such-flag", "x"], ["checkpoint", "x"],
                      ["pause", "no-such"]):  # fmt: skip
        log.unlink(missing_ok=True)
        done = oci.call("--log", str(log), "--log-format", "json", *arguments)
        (line,) = log.read_text().splitlines()
        entry = json.loads(line)
        assert (entry.keys(), entry["level"]) == ({"level", "msg", "time"}, "error"), arguments
        assert done.returncode in (1, 255)
        assert done.stderr.strip() == entry["msg"]
        time.strptime(entry["time"], "%Y-%m-%dT%H:%M:%SZ")
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_text_log(oci, tmp_path):
    oci.call("--log", str(tmp_path / "log"), "start", "no-such")
    assert 'level=error msg="container no-such does not exist"' in (tmp_path / "log").read_text()


def test_a_creator_that_dies_leaves_what_delete_removes(oci):
    """SIGKILL at any moment: `delete --force` finds everything, and the container's process has ended by itself."""
    for delay in range(0, 40, 2):
        oci.write(config("sleep 1000"))
        name = oci.id()
        creator = subprocess.Popen([RUNTIME, "--root", str(oci.root), "create", "--bundle", str(oci.bundle), name], env={},
        stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        time.sleep(delay / 1000)
        creator.send_signal(signal.SIGKILL)
        creator.wait()
        oci.call("delete", "--force", name, check=True)
        assert leftovers([name]) == []
