# SPDX-License-Identifier: Apache-2.0
"""What nobody should ask of the OCI runtime, and somebody does: refused in words, before anything of the host is touched."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from agentrun_shim.oci import cgroup
from agentrun_shim.oci.config import Linux
from agentrun_shim.oci.errors import OciError
from agentrun_shim.oci.later import _remove
from agentrun_shim.oci.options import Options
from agentrun_shim.oci.state import Container
from agentrun_shim.oci.verbs import _bytes, _seconds
from tests.oci_support import MARK, PATIENCE, RUNTIME, config

pytestmark = pytest.mark.host
HOST_UTS = {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "mount", "cgroup", "network")]}


# --------------------------------------------------------------------------------------------------- the host's own


@pytest.mark.parametrize("path", ["/", "//", ".", "./", "/./.", "..", "/a/../.."])
def test_no_container_is_the_root_of_all_cgroups(path):
    """Deleting it would end every process of the machine. (Not tried by making one: where this fails, that would.)"""
    with pytest.raises(OciError, match=r"names no cgroup of its own|has \.\. in it"):
        cgroup.place(path, "x", rootless=False)
    with pytest.raises(OciError, match="not the container's alone"):
        cgroup.must_be_free(cgroup.find_mount()[0])


def test_a_cgroup_that_others_are_in_is_not_taken(oci):
    """It would be frozen, limited and killed with the container."""
    path = Path(cgroup.find_mount()[0]) / f"{MARK}-taken"
    path.mkdir()
    other = subprocess.Popen(["sleep", "1000"])
    try:
        (path / "below").mkdir()
        (path / "below" / "cgroup.procs").write_text(str(other.pid))
        assert "there are processes in it" in oci.refused(linux={"cgroupsPath": f"/{path.name}"})
        assert other.poll() is None
        assert (path / "below").is_dir()
    finally:
        other.kill()
        other.wait()
        for directory in (path / "below", path):
            directory.rmdir()
    assert not path.exists()


def test_a_cgroups_path_of_two_lines_is_not_a_line_of_the_record(oci):
    """Whoever cleans up would end what the second one names."""
    path = Path(cgroup.find_mount()[0]) / f"{MARK}-victim"
    path.mkdir()
    other = subprocess.Popen(["sleep", "1000"])
    try:
        (path / "cgroup.procs").write_text(str(other.pid))
        for given in (f"/x\ncgroup {path}", f"/{path.name}\nx"):
            assert "line break" in oci.refused(linux={"cgroupsPath": given})
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        path.rmdir()


def test_a_record_has_no_line_that_was_not_meant(tmp_path):
    """Of the names in it the program's is the image's to choose: it could name a cgroup to freeze, a unit to stop."""
    container = Container(str(tmp_path), "x", new=True)
    container.save(cgroup="/own", exec="sh\rcgroup /another\x85scope a.service\u2028pid 1\x0bstarted 1")
    container.load()
    assert container.record.keys() == {"cgroup", "exec"}
    assert container.record["cgroup"] == "/own"
    with pytest.raises(OciError, match="line break"):
        container.save(scope="a\ncgroup /another")
    container.close()


@pytest.mark.parametrize("key", ["hostname", "domainname"])
def test_the_hosts_name_stays(key):
    """Looked at, not tried, for the same reason."""
    with pytest.raises(OciError, match=f"{key}: it would be the host's"):
        Linux({"linux": HOST_UTS, key: "x"})
    Linux({"linux": HOST_UTS, key: ""})
    joined = {"namespaces": [*HOST_UTS["namespaces"], {"type": "uts", "path": f"/proc/{os.getpid()}/ns/uts"}]}
    with pytest.raises(OciError, match=f"{key}: it would be the host's"):
        Linux({"linux": joined, key: "x"})


@pytest.mark.parametrize(("kind", "name"), [("network", "net.ipv4.ip_forward"), ("ipc", "kernel.shmmni")])
def test_the_hosts_parameters_stay(kind, name):
    """By its path a namespace of the host's is still the host's."""
    file = {"network": "net"}.get(kind, kind)
    own, new = {"type": kind, "path": f"/proc/self/ns/{file}"}, {"type": kind}
    with pytest.raises(OciError, match="is the host's"):
        Linux({"linux": {"namespaces": [{"type": "mount"}, own], "sysctl": {name: "1"}}}).sysctls()
    assert Linux({"linux": {"namespaces": [{"type": "mount"}, new], "sysctl": {name: "1"}}}).sysctls()


@pytest.mark.parametrize("name", [".hidden", "-x", "..", "a" * 256])
def test_names_that_are_ours_or_look_like_flags(oci, name):
    oci.write(config("true"))
    done = oci.call("create", "--bundle", str(oci.bundle), "--", name)
    assert (done.returncode, "invalid container id" in done.stderr) == (1, True), done.stderr


# --------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(("changes", "words"), [
    ({"process": {"args": "sh"}}, "process.args: 'sh' is not a list"),
    ({"process": {"args": [1]}}, "process.args[0]: 1 is not a string"),
    ({"process": {"args": ["true", None]}}, "process.args[1]: there is nothing"),
    ({"process": {"args": ["true", "a\0b"]}}, "process.args[1]: 'a\\x00b' is not a string without NUL"),
    ({"process": {"user": "root"}}, "process.user: 'root' is not an object"),
    ({"process": {"capabilities": ["CAP_KILL"]}}, "process.capabilities: ['CAP_KILL'] is not an object"),
    ({"process": {"terminal": "no"}}, "process.terminal: 'no' is not true or false"),
    ({"process": {"rlimits": [{"type": "RLIMIT_NOFILE"}]}}, "RLIMIT_NOFILE: soft and hard are needed"),
    ({"linux": {"namespaces": ["mount"]}}, "linux.namespaces[0]: 'mount' is not an object"),
    ({"linux": {"cgroupsPath": 5}}, "linux.cgroupsPath: 5 is not a string"),
    ({"linux": {"resources": {"memory": {"limit": "64m"}}}}, "linux.resources.memory.limit: '64m' is not a whole number"),
    ({"linux": {"resources": {"pids": {"limit": True}}}}, "linux.resources.pids.limit: True is not a whole number"),
    ({"linux": {"seccomp": []}}, "linux.seccomp: [] is not an object"),
    ({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_WAT"]}}},
     "unknown architecture SCMP_ARCH_WAT"),
    ({"linux": {"maskedPaths": "/proc/kcore"}}, "linux.maskedPaths: '/proc/kcore' is not a list"),
    ({"linux": {"resources": {"memory": {"swappiness": 10}}}}, "memory.swappiness: cgroup v2 has no"),
    ({"linux": {"resources": {"memory": {"disableOOMKiller": True}}}}, "memory.disableOOMKiller: cgroup v2 always"),
    ({"hooks": {"poststop": ["/bin/true"]}}, "hooks.poststop[0]: '/bin/true' is not an object"),
    ({"hooks": {"poststop": {"path": "/bin/true"}}}, "hooks.poststop: {'path': '/bin/true'} is not a list"),
    ({"hostname": 5}, "hostname: 5 is not a string"),
    ({"annotations": {"a": 1}}, "annotations.a: 1 is not a string"),
    ({"process": {"args": ["true", "half \ud800"]}}, "'half \\ud800' cannot be written as UTF-8"),
    ({"process": {"selinuxLabel": "system_u:system_r:x_t:s0"}}, "this kernel has no SELinux"),
])  # fmt: skip
def test_a_value_of_another_type(oci, changes, words):
    assert words in oci.refused(**changes)


def test_nothing_where_something_could_be(oci):
    """As Go writes what is empty."""
    empty = {"annotations": None, "hooks": None, "process": {"rlimits": None, "capabilities": None, "env": None},
             "linux": {"resources": None, "seccomp": None, "devices": None, "sysctl": None, "maskedPaths": None}}  # fmt: skip
    assert oci.inside("echo well", **empty) == "well"


@pytest.mark.parametrize("text", ["{nope", '{"a" 1}', "", '{"a":', "[1 2]", '{"ociVersion":"\\q"}'])
def test_what_is_no_json(oci, text):
    (oci.bundle / "config.json").write_text(text)
    done = oci.call("create", "--bundle", str(oci.bundle), oci.id())
    assert done.returncode == 1
    assert done.stderr.startswith(f"{oci.bundle}/config.json: "), done.stderr
    assert "internal error" not in done.stderr


@pytest.mark.parametrize("args", [[""], ["/work"], ["work"]])
def test_what_is_no_program_is_an_error_of_create(oci, args):
    """A directory may be "executed", and an empty name is the directory that is searched."""
    oci.write(config("", process={"args": args, "env": ["PATH=/"]}))
    done = oci.call("create", "--bundle", str(oci.bundle), oci.id())
    words = "executable file not found in $PATH" if args == [""] else "permission denied"
    assert (done.returncode, done.stderr.strip()) == (1, f'exec: "{args[0]}": {words}')


def test_a_working_directory_that_is_not_there(oci):
    """Is made for a container, even if its root is read-only; an exec that names one is wrong."""
    for readonly in (True, False):
        where = f"/work/new-{readonly}/below"
        assert oci.inside(f"pwd; touch {where}/x 2>&1 || true", root={"readonly": readonly}, process={"cwd": where}).startswith(
            where
        )
    name = oci.running("sleep 1000", root={"readonly": False})
    done = oci.call("exec", "--cwd", "/work/no-such", name, "pwd")
    assert (done.returncode, done.stderr.strip()) == (255, "process.cwd /work/no-such: no such file or directory")


def test_start_says_what_failed(oci):
    """In words, not as a number of an operation, and not as if the program were missing."""
    name = oci.create(config("true", hooks={"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "exit 5"]}]}))
    done = oci.call("start", name)
    assert (done.returncode, done.stderr) == (1, "start: startContainer hook /bin/sh: exit status 5\n")
    name = oci.create(config("true", hooks={"startContainer": [{"path": "/bin/sleep", "args": ["sleep", "9"], "timeout": 1}]}))
    assert oci.call("start", name).stderr == "start: startContainer hook /bin/sleep: timed out\n"


# --------------------------------------------------------------------------------------------------- command lines


def test_plain_verbs_in_other_words(oci):
    """The native half takes only the plain forms; the others mean the same."""
    name = oci.running("trap 'exit 9' TERM; while :; do sleep 0.05; done")
    above, below = oci.root.parent, oci.root.name
    calls = [
        ["--root", below, "state", name],
        [f"--root=./{below}", "state", "--", name],
        ["--debug=true", "--root", below, "state", name],
        ["--root", below, "--systemd-cgroup=false", "kill", name, "0"], ["--root", below, "kill", "--all=true", "--", name, "0"],
        ["--root", below, "kill", name, ""], ["--root", below, "delete", "--force=true", name],
    ]  # fmt: skip
    for number, call in enumerate(calls):
        done = subprocess.run([RUNTIME, *call], env={}, cwd=above, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), (call, done.stderr)
        if number < 3:
            assert json.loads(done.stdout)["id"] == name
        if "" in call:
            oci.wait(name, "stopped")
    assert oci.call("state", name).returncode == 1


@pytest.mark.parametrize(("call", "words"), [
    (["state", "a", "b"], "exactly one container id is needed"), (["kill", "--", "a", "-9"], "unknown signal '-9'"),
    (["--log-format", "wat", "state", "a"], "--log-format: 'wat' is none of text, json"),
    (["--log", "journald:x", "create", "a"], "a file is needed"), (["list", "--format", "wat"], "--format 'wat' is none of"),
    (["exec", "--additional-gids", "x", "NAME", "true"], "numbers are needed"),
    (["events", "--interval", "1w", "NAME"], "is no duration"), (["events", "--interval", "nan", "NAME"], "is no duration"),
    (["--root", "/proc/nothing", "create", "a"], "--root /proc/nothing: no such file or directory"),
])  # fmt: skip
def test_command_lines_that_are_wrong(oci, call, words):
    name = oci.running("sleep 1000") if "NAME" in call else "a"
    oci.write(config("true"))
    done = oci.call(*[name if word == "NAME" else word for word in call], cwd=oci.bundle)
    assert done.returncode in (1, 255)
    assert words in done.stderr


@pytest.mark.parametrize("verb", ["start", "pause"])
@pytest.mark.parametrize("form", ["log", "file:log", "file:{}/log"])
def test_a_log_may_be_relative(oci, tmp_path, form, verb):
    """To where the runtime was called; it changes directories before it fails."""
    name = oci.running("true")
    oci.wait(name, "stopped")
    done = oci.call("--log", form.format(tmp_path), "--log-format", "json", verb, name, cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads((tmp_path / "log").read_text())["msg"] == done.stderr.strip()


def test_flags_of_a_program_are_not_ours(oci, tmp_path):
    done = oci.call("exec", "no-such", "tool", "--log", str(tmp_path / "log"))
    assert done.returncode == 255
    assert not (tmp_path / "log").exists()
    assert oci.call("state", "exec").returncode == 1


def test_a_pidfd_socket_may_be_relative(oci, tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "pidfd"))
        server.listen()
        server.settimeout(PATIENCE)
        oci.create(config("sleep 1000"), "--pidfd-socket", "pidfd", cwd=tmp_path)
        connection, _ = server.accept()
        with connection:
            _, fds, _, _ = socket.recv_fds(connection, 16, 1)
    os.close(fds[0])


def test_of_a_variable_the_last_value_counts(oci):
    """For where the program is looked for, and for the program."""
    name = oci.running("sleep 1000")
    assert "not found" in oci.call("exec", "--env", "PATH=/none", name, "id").stderr
    out = oci.call("exec", "--env", "PATH=/bin:/usr/bin", "--env", "A=1", "--env", "A=2", name, "env", check=True).stdout
    assert [line for line in out.splitlines() if line[:2] in ("PA", "A=")] == ["PATH=/bin:/usr/bin", "A=2"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("64m", 64 << 20), ("1.5g", 3 << 29), ("67108864", 64 << 20), ("-1", -1), ("2KB", 2048), ("64x", None), ("m", None),
     ("64mk", None), ("", None)],
)  # fmt: skip
def test_sizes(text, size):
    options = Options({"memory": text}, {}, "update", [])
    if size is not None:
        assert _bytes(options, "memory") == size
        return
    with pytest.raises(OciError, match="is not a"):
        _bytes(options, "memory")


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("5s", 5), ("1m", 60), ("2", 2), ("1.5h", 5400)])
def test_durations(text, seconds):
    assert _seconds(text) == seconds


def test_the_directory_of_readiness_messages_is_no_place_of_the_containers(oci, tmp_path):
    """It is the host's: nothing is put there by a container, and what is there nevertheless is removed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        script = "touch /run/notify/x; ln -s / /run/notify/l; exit 5"
        done = oci.run(config(script), env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
    assert (done.returncode, done.stderr.count("Read-only file system")) == (5, 2), done
    directory = tmp_path / "container"
    (directory / "notify").mkdir(parents=True)
    (directory / "record").touch()
    (directory / "notify" / "link").symlink_to("/")
    _remove(str(directory))
    assert not directory.exists()


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&-", "2>&-"])
def test_a_caller_without_streams(oci, closed):
    """The container has /dev/null for those, and nothing that the runtime opened in their place."""
    found = oci.bundle / "rootfs" / "work" / "streams"
    for verb in ("run", "exec"):
        script = "for n in 0 1 2; do readlink /proc/self/fd/$n; done > /work/streams; exit 5"
        oci.write(config(script, root={"readonly": False}))
        found.unlink(missing_ok=True)
        words = ["run", "--bundle", str(oci.bundle), oci.id()]
        if verb == "exec":
            words = ["exec", oci.running("sleep 1000", root={"readonly": False}), "sh", "-c", script]
        argv = ["sh", "-c", f'exec "$@" {closed}', "sh", RUNTIME, "--root", str(oci.root), *words]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        assert done.returncode == 5, (verb, done)
        streams = found.read_text().splitlines()
        assert len(streams) == 3, (verb, streams)
        assert streams[0] == "/dev/null", (verb, streams)
        assert "2" not in closed or streams[2] == "/dev/null", (verb, streams)


# --------------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize(("text", "words"), [
    ("[]", "update: the resources are not an object"), ("{bad", "the resources on stdin: "),
    ('{"memory": {"limit": "x"}}', "memory.limit: 'x' is not a whole number"),
])  # fmt: skip
def test_an_update_that_is_wrong(oci, text, words):
    name = oci.running("sleep 1000")
    done = oci.call("update", "--resources", "-", name, stdin=None, input=text)
    assert (done.returncode, words in done.stderr) == (1, True), done.stderr


def test_devices_are_allowed_and_denied_by_update(oci):
    """Rules of an update replace those before; the same ones again, as containerd passes them, change nothing."""
    deny, zero = {"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "rw"}
    node = [{"path": "/dev/mine", "type": "c", "major": 1, "minor": 11, "fileMode": 0o666}]  # kmsg: none that all may use
    name = oci.running("sleep 1000", linux={"resources": {"devices": [deny]}, "devices": node})
    look = ["exec", name, "sh", "-c", "(: > /dev/mine) 2>/dev/null && echo open; (: > /dev/null) && echo null"]

    def update(*rules: object) -> str:
        done = oci.call("update", "--resources", "-", name, stdin=None, input=json.dumps({"devices": rules}))
        assert (done.returncode, done.stderr) == (0, "")
        return oci.call(*look, check=True).stdout

    assert oci.call(*look, check=True).stdout == "null\n"
    assert [update(deny, zero), update(deny, zero), update(deny), update(), update(deny)] == [
        "open\nnull\n", "open\nnull\n", "null\n", "open\nnull\n", "null\n",
    ]  # fmt: skip


def test_an_update_where_no_limits_were(oci):
    name = oci.running("sleep 1000", linux={"resources": None})
    done = oci.call("update", "--resources", "-", name, stdin=None, input='{"memory": null, "devices": []}')
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_that_ends_a_created_container(oci):
    """Of a pid namespace's first process: as long as it is not the program, only SIGKILL does."""
    name = oci.create(config("true"))
    oci.call("kill", name, "TERM", check=True)
    time.sleep(0.1)
    assert oci.state(name)["status"] == "created"
    os.kill(oci.state(name)["pid"], signal.SIGKILL)
    oci.wait(name, "stopped")
    oci.call("delete", name, check=True)
