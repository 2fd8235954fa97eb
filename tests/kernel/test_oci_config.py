# SPDX-License-Identifier: Apache-2.0
"""Every field of config.json that engines write, asserted from inside the container it made.

Runs on this host and, in the VM lane, where cgroup v2 has its controllers.
"""

import json
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from tests.oci_support import config, has_controllers

pytestmark = pytest.mark.host
NO = ["nosuid", "noexec", "nodev"]
IDS = {
    "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
    "gidMappings": [{"containerID": 0, "hostID": 200000, "size": 65536}],
}
ALL = ["pid", "ipc", "uts", "mount", "network", "cgroup"]
controllers = pytest.mark.skipif(
    not has_controllers("memory", "pids"), reason="no cgroup v2 controllers here (the VM lane has them)"
)


def spaces(*kinds, **paths):
    return {"namespaces": [*({"type": kind} for kind in kinds), *({"type": kind, "path": path} for kind, path in paths.items())]}


def mounts(*more):
    return [*config("")["mounts"], *more]


# --------------------------------------------------------------------------------------------------- the process


def test_args_env_and_cwd(oci):
    out = oci.inside(
        "echo $0 $A; pwd",
        process={"args": ["sh", "-c", "echo $1 $A; pwd", "x", "two words"], "env": ["PATH=/bin", "A=1=2"], "cwd": "/work"},
    )
    assert out.split("\n") == ["two words 1=2", "/work"]


def test_a_working_directory_that_is_not_there_is_made(oci):
    out = oci.inside("pwd", process={"cwd": "/tmp/a/b"}, root={"readonly": False})
    assert out == "/tmp/a/b"


def test_user_groups_and_umask(oci):
    out = oci.inside(
        "id -u; id -g; id -G; umask", process={"user": {"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 0o27}}
    )
    uid, gid, groups, umask = out.split("\n")
    assert (uid, gid, sorted(groups.split()), umask) == ("1000", "1001", ["1001", "5", "7"], "0027")


@pytest.mark.parametrize(("uid", "env", "home"), [(0, [], "/"), (77, [], "/work"), (78, [], "/"), (77, ["HOME=/own"], "/own")])
def test_home(oci, uid, env, home):
    assert oci.inside("echo $HOME", process={"user": {"uid": uid, "gid": 0}, "env": ["PATH=/bin", *env]}) == home


def test_what_the_callers_umask_is_is_nobodys_business(oci):
    before = os.umask(0o77)
    try:
        new = [
            {"destination": "/mnt", "type": "tmpfs", "options": ["mode=700"]},
            {"destination": "/mnt/new/below", "type": "tmpfs"},
        ]
        out = oci.inside("umask; stat -c %a /mnt/new /mnt", mounts=mounts(*new))
    finally:
        os.umask(before)
    assert out.split() == ["0022", "755", "700"]


def status_of(oci, *fields, **process):
    out = oci.inside("cat /proc/self/status", process={"args": ["cat", "/proc/self/status"], **process})
    lines = dict(line.split(":", 1) for line in out.split("\n") if ":" in line)
    return [lines[field].strip() for field in fields]


def test_capabilities_of_root(oci):
    sets = {
        "bounding": ["CAP_KILL", "CAP_CHOWN"],
        "effective": ["CAP_KILL"],
        "permitted": ["CAP_KILL", "CAP_CHOWN"],
        "inheritable": [],
        "ambient": [],
    }
    # Root gains, at execve, what the bounding set leaves it: capabilities(7).
    assert status_of(oci, "CapBnd", "CapPrm", "CapEff", "CapAmb", capabilities=sets) == ["0000000000000021"] * 3 + ["0" * 16]


def test_capabilities_of_another_user(oci):
    sets = {"bounding": ["CAP_KILL", "CAP_NET_RAW"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL", "CAP_NET_RAW"],
            "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]}  # fmt: skip
    found = status_of(oci, "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", capabilities=sets, user={"uid": 5, "gid": 5})
    assert [int(mask, 16) for mask in found] == [0x20, 0x20, 0x20, 0x2020, 0x20]


def test_without_capabilities_there_are_none(oci):
    made = config("cat /proc/self/status")
    del made["process"]["capabilities"]
    out = oci.run(made).stdout
    assert "CapEff:\t0000000000000000" in out
    assert "CapBnd:\t0000000000000000" in out


def test_a_capability_nobody_knows_is_left_out(oci):
    assert status_of(oci, "CapBnd", capabilities={"bounding": ["CAP_KILL", "CAP_OF_TOMORROW"]}) == ["0000000000000020"]
    assert "is no capability" in oci.refused(process={"capabilities": {"bounding": ["KILL"]}})


@pytest.mark.parametrize("wanted", [True, False])
def test_no_new_privileges(oci, wanted):
    assert status_of(oci, "NoNewPrivs", noNewPrivileges=wanted) == [str(int(wanted))]


def test_rlimits(oci):
    limits = [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 2**64 - 1}]
    out = oci.inside("cat /proc/self/limits", process={"rlimits": limits})
    rows = {line[:25].strip(): line[25:].split()[:2] for line in out.split("\n")}
    assert (rows["Max open files"], rows["Max core file size"]) == (["100", "200"], ["0", "unlimited"])
    assert "unknown type 'RLIMIT_X'" in oci.refused(process={"rlimits": [{"type": "RLIMIT_X", "soft": 1, "hard": 1}]})


def test_oom_score(oci):
    # Not every host's root may go below what it has.
    assert oci.inside("cat /proc/self/oom_score_adj", process={"oomScoreAdj": 321}) == "321"


def test_scheduler_and_io_priority(oci):
    read = "cat /proc/self/stat; cat /proc/self/status"
    out = oci.inside(
        read,
        process={"scheduler": {"policy": "SCHED_BATCH", "nice": 7}, "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 0}},
    )
    fields = out.split("\n")[0].rpartition(")")[2].split()
    assert (fields[16], fields[38]) == ("7", "3")  # nice, policy: proc_pid_stat(5)
    assert "unknown policy" in oci.refused(process={"scheduler": {"policy": "SCHED_NONE"}})


def test_real_time(oci):
    out = oci.inside("cat /proc/self/stat", process={"scheduler": {"policy": "SCHED_FIFO", "priority": 3}})
    fields = out.rpartition(")")[2].split()
    assert (fields[37], fields[38]) == ("3", "1")


def test_exec_cpu_affinity(oci):
    assert oci.inside("grep Cpus_allowed_list /proc/self/status", process={"execCPUAffinity": {"final": "0"}}).split() == [
        "Cpus_allowed_list:",
        "0",
    ]


def test_personality(oci):
    assert oci.inside("cat /proc/self/personality", linux={"personality": {"domain": "LINUX32"}}) == "00000008"
    assert "the domains are" in oci.refused(linux={"personality": {"domain": "BSD"}})


def test_memory_policy(oci):
    out = oci.inside("head -n 1 /proc/self/numa_maps", linux={"memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0"}})
    assert "bind:0" in out
    assert "unknown 'MPOL_X'" in oci.refused(linux={"memoryPolicy": {"mode": "MPOL_X"}})


def test_apparmor_without_apparmor_is_an_error(oci):
    if os.path.isdir("/sys/kernel/security/apparmor"):
        pytest.skip("this kernel has it")
    assert "no AppArmor" in oci.refused(process={"apparmorProfile": "docker-default"})


# --------------------------------------------------------------------------------------------------- namespaces


def test_new_namespaces_and_those_left_out(oci):
    read = "for n in pid ipc uts mnt net cgroup user time; do readlink /proc/self/ns/$n; done"
    out = oci.inside(read, linux=spaces(*ALL)).split()
    own = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "ipc", "uts", "mnt", "net", "cgroup", "user", "time")]
    assert [a == b for a, b in zip(out, own, strict=True)] == [False] * 6 + [True] * 2
    shared = oci.inside(read, linux=spaces("mount", "pid"), hostname="").split()
    assert [a == b for a, b in zip(shared, own, strict=True)] == [False, True, True, False, True, True, True, True]


def test_joined_namespaces(oci):
    name = oci.running("sleep 1000")
    pid = oci.state(name)["pid"]
    paths = {
        kind: f"/proc/{pid}/ns/{file}" for kind, file in (("pid", "pid"), ("ipc", "ipc"), ("uts", "uts"), ("network", "net"))
    }
    out = oci.inside(
        "for n in pid ipc uts net; do readlink /proc/self/ns/$n; done; hostname; ps", linux=spaces("mount", **paths), hostname=""
    )
    lines = out.split("\n")
    assert lines[:4] == [os.readlink(path) for path in paths.values()]
    assert lines[4] == "agentrun"
    assert any("sleep 1000" in line for line in lines)


def test_a_user_namespace(oci):
    out = oci.inside(
        "cat /proc/self/uid_map /proc/self/gid_map; id -u; stat -c %u /proc/self/", linux={**spaces(*ALL, "user"), **IDS}
    )
    assert [line.split() for line in out.split("\n")] == [["0", "100000", "65536"], ["0", "200000", "65536"], ["0"], ["0"]]
    assert "needs both" in oci.refused(linux=spaces(*ALL, "user"))


def test_a_joined_user_namespace(oci):
    """As the containers of a pod that has one: with the namespaces that belong to it."""
    name = oci.running("sleep 1000", linux={**spaces(*ALL, "user"), **IDS})
    pid = oci.state(name)["pid"]
    paths = {
        kind: f"/proc/{pid}/ns/{file}" for kind, file in (("user", "user"), ("ipc", "ipc"), ("uts", "uts"), ("network", "net"))
    }
    out = oci.inside("id -u; readlink /proc/self/ns/user; touch /tmp/x && stat -c %u /tmp/x", hostname="",
                     linux=spaces("mount", "pid", **paths), mounts=mounts({"destination": "/tmp", "type": "tmpfs"}))  # fmt: skip
    assert out.split() == ["0", os.readlink(paths["user"]), "0"]
    done = oci.call("exec", name, "sh", "-c", "id -u; readlink /proc/self/ns/user", check=True)
    assert done.stdout.split() == ["0", os.readlink(paths["user"])]


def test_what_a_user_namespace_makes_is_its_own(oci, tmp_path):
    tmp_path.chmod(0o777)
    Path(tmp_path.parent).chmod(0o755)
    out = oci.inside(
        "touch /mnt/x /tmp/y && stat -c %u /tmp/y && ls -l /dev/null", linux={**spaces(*ALL, "user"), **IDS},
        mounts=mounts({"destination": "/mnt", "source": str(tmp_path), "options": ["rbind"]}, {"destination": "/tmp",
        "type": "tmpfs"}),
    )  # fmt: skip
    assert out.split("\n")[0] == "0"
    assert (tmp_path / "x").stat().st_uid == 100000


def test_time_offsets(oci):
    boot = {"secs": 1_000_000, "nanosecs": 0}
    out = oci.inside("cat /proc/uptime", linux={**spaces(*ALL, "time"), "timeOffsets": {"boottime": boot, "monotonic": boot}})
    assert float(out.split()[0]) > 1_000_000
    assert "without a new time namespace" in oci.refused(linux={"timeOffsets": {"boottime": boot}})


def test_host_and_domain_name(oci):
    out = oci.inside("hostname; cat /proc/sys/kernel/domainname", hostname="box", domainname="example")
    assert out.split("\n") == ["box", "example"]


def test_loopback_is_up(oci):
    assert oci.inside("cat /proc/net/dev; cat /proc/net/if_inet6 2>/dev/null || true", linux=spaces(*ALL)).count("lo") >= 1


def test_sysctl(oci):
    out = oci.inside(
        "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax",
        linux={"sysctl": {"net.ipv4.ip_forward": "1", "kernel.msgmax": "4444"}},
    )
    assert out.split() == ["1", "4444"]
    assert "is not of a namespace" in oci.refused(linux={"sysctl": {"vm.swappiness": "1"}})
    assert "is the host's" in oci.refused(linux={**spaces("mount"), "sysctl": {"net.ipv4.ip_forward": "1"}}, hostname="")


# --------------------------------------------------------------------------------------------------- the root and mounts


def mount_line(out, path):
    return next(line for line in out.split("\n") if line.split()[2] == path)


def test_the_root_is_read_only_or_not(oci):
    assert "Read-only" in oci.inside("touch /x 2>&1 || true")
    assert oci.inside("touch /x && echo done; rm /x", root={"readonly": False}) == "done"


def test_the_hosts_root_is_out_of_sight(oci):
    assert oci.inside("ls /").split() == sorted(["bin", "dev", "etc", "mnt", "plain", "proc", "run", "sys", "tmp", "work"])


def test_default_file_systems_and_their_options(oci):
    out = oci.inside("mount")
    assert "type proc" in mount_line(out, "/proc")
    for path, kind, options in (
        ("/dev", "tmpfs", ["nosuid", "size=65536k", "mode=755"]), ("/dev/pts", "devpts", ["nosuid", "noexec", "gid=5",
        "ptmxmode=666"]),
        ("/dev/shm", "tmpfs", NO), ("/dev/mqueue", "mqueue", NO), ("/sys", "sysfs", [*NO, "ro"]), ("/sys/fs/cgroup", "cgroup2",
        [*NO, "ro"]),
    ):  # fmt: skip
        line = mount_line(out, path)
        assert f"type {kind}" in line
        assert set(options) <= set(line.split("(")[1].rstrip(")").split(",")), line


def test_devices_and_links(oci):
    out = oci.inside("ls -l /dev; echo x > /dev/null && head -c 3 /dev/zero | wc -c 2>/dev/null; echo y > /dev/stdout")
    for name, numbers in (
        ("null", "1,   3"),
        ("zero", "1,   5"),
        ("full", "1,   7"),
        ("random", "1,   8"),
        ("urandom", "1,   9"),
        ("tty", "5,   0"),
    ):
        assert any(line.startswith("crw-rw-rw-") and line.endswith(f" {name}") and numbers in line for line in out.split("\n")), (
            name
        )
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("ptmx", "pts/ptmx")):
        assert f"{name} -> {target}" in out


def test_devices_of_the_configuration(oci):
    wanted = [
        {"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 3, "gid": 4},
        {"path": "/dev/pipe", "type": "p"},
    ]
    out = oci.inside("stat -c '%F %a %u %g %t %T' /dev/mine; stat -c %F /dev/pipe", linux={"devices": wanted})
    assert out.split("\n") == ["character special file 640 3 4 1 3", "fifo"]
    assert "a device has an absolute path" in oci.refused(linux={"devices": [{"path": "x", "type": "c"}]})


def bind(source, *options, destination="/mnt", **more):
    return {
        "mounts": mounts({"destination": destination, "type": "bind", "source": str(source), "options": list(options), **more})
    }


def test_binds(oci, tmp_path):
    (tmp_path / "file").write_text("hello\n")
    assert oci.inside("cat /mnt/file; touch /mnt/made", **bind(tmp_path, "rbind")) == "hello"
    assert (tmp_path / "made").exists()
    assert "Read-only" in oci.inside("touch /mnt/more 2>&1 || true", **bind(tmp_path, "rbind", "ro"))
    assert (
        oci.inside("cat /work/sub/one", **bind(tmp_path / "file", "bind", destination="/work/sub/one"), root={"readonly": False})
        == "hello"
    )


def test_bind_options(oci, tmp_path):
    out = oci.inside("mount", **bind(tmp_path, "bind", "nosuid", "nodev", "noexec", "noatime"))
    assert {"nosuid", "nodev", "noexec", "noatime"} <= set(mount_line(out, "/mnt").split("(")[1].rstrip(")").split(","))
    out = oci.inside("mount", **bind(tmp_path, "bind", "ro", "rw"))
    assert mount_line(out, "/mnt").split("(")[1].startswith("rw")


def test_a_relative_source_begins_at_the_bundle(oci):
    (oci.bundle / "data").mkdir(exist_ok=True)
    (oci.bundle / "data" / "f").write_text("here")
    assert oci.inside("cat /mnt/f", **bind("data", "rbind", "ro")) == "here"


def test_recursive_read_only_reaches_what_is_mounted_below(oci, tmp_path):
    below = tmp_path / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", below], check=True)
    try:
        assert oci.inside("touch /mnt/below/x && echo yes", **bind(tmp_path, "rbind", "ro")) == "yes"
        assert "Read-only" in oci.inside("touch /mnt/below/y 2>&1 || true", **bind(tmp_path, "rbind", "rro"))
        assert oci.inside("ls /mnt/below", **bind(tmp_path, "bind")) == ""  # not recursive: not there
    finally:
        subprocess.run(["umount", below], check=True)


def test_propagation(oci, tmp_path):
    subprocess.run(["mount", "--bind", tmp_path, tmp_path], check=True)
    subprocess.run(["mount", "--make-shared", tmp_path], check=True)
    try:
        for option, word in (("rshared", "shared:"), ("rslave", "master:"), ("rprivate", None), ("runbindable", "unbindable")):
            out = oci.inside("cat /proc/self/mountinfo", **bind(tmp_path, "rbind", option))
            tags = next(line for line in out.split("\n") if line.split()[4] == "/mnt").split(" - ")[0].split()[6:]
            assert ([word in tag for tag in tags] == [True]) if word else tags == [], (option, tags)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_root_propagation(oci):
    for wanted, word in (("shared", "shared:"), ("private", None), ("unbindable", "unbindable"), (None, None)):
        out = oci.inside("cat /proc/self/mountinfo", linux={"rootfsPropagation": wanted} if wanted else {})
        tags = next(line for line in out.split("\n") if line.split()[4] == "/").split(" - ")[0].split()[6:]
        assert ([word in tag for tag in tags] == [True]) if word else not any("shared" in tag for tag in tags), (wanted, tags)


def test_tmpfs_is_as_what_it_covers_and_copies_it_up_if_asked(oci):
    stored = oci.bundle / "rootfs" / "work"
    stored.chmod(0o750)
    (stored / "dir").mkdir(exist_ok=True)
    (stored / "dir" / "file").write_text("kept")
    os.chown(stored / "dir" / "file", 7, 8)
    (stored / "dir" / "file").chmod(0o604)
    if not (stored / "link").is_symlink():
        (stored / "link").symlink_to("dir/file")
    empty = {"mounts": mounts({"destination": "/work", "type": "tmpfs", "options": ["size=1m"]})}
    copied = {"mounts": mounts({"destination": "/work", "type": "tmpfs", "options": ["tmpcopyup", "mode=0711"]})}
    assert oci.inside("ls /work; stat -c %a /work", **empty) == "750"
    out = oci.inside("cat /work/link; stat -c '%a %u %g' /work/dir/file; stat -c %a /work; touch /work/new", **copied)
    assert out.split("\n") == ["kept604 7 8", "711"]
    assert not (stored / "new").exists()


def test_idmapped_binds(oci, tmp_path):
    if os.path.isdir("/mnt/ext4"):  # a guest's /tmp is a tmpfs, which maps owners since Linux 6.3
        tmp_path = Path("/mnt/ext4/idmapped")
        tmp_path.mkdir()
    (tmp_path / "f").write_text("x")
    tmp_path.chmod(0o755)
    os.chown(tmp_path / "f", 1000, 1000)
    maps = {
        "uidMappings": [{"containerID": 1000, "hostID": 4242, "size": 1}],
        "gidMappings": [{"containerID": 1000, "hostID": 4243, "size": 1}],
    }
    assert oci.inside("stat -c '%u %g' /mnt/f", **bind(tmp_path, "bind", "idmap", **maps)) == "4242 4243"
    own = {**spaces(*ALL, "user"), **IDS}
    os.chown(tmp_path / "f", 5, 6)
    assert oci.inside("stat -c '%u %g' /mnt/f", linux=own, **bind(tmp_path, "bind", "idmap")) == "5 6"
    assert "there is no user namespace" in oci.refused(**bind(tmp_path, "bind", "idmap"))


def test_links_of_the_image_lead_nowhere_else(oci):
    rootfs = oci.bundle / "rootfs"
    for name, target in (("out", "../../../../../../../etc"), ("nowhere", "/made/by/the/runtime")):
        (rootfs / name).unlink(missing_ok=True)
        (rootfs / name).symlink_to(target)
    try:
        made = mounts(
            {"destination": "/out/sub", "type": "tmpfs"}, {"destination": "/nowhere", "type": "tmpfs", "options": ["size=1m"]}
        )
        out = oci.inside("mount", mounts=made, root={"readonly": False})
        assert mount_line(out, "/etc/sub")
        assert mount_line(out, "/made/by/the/runtime")
        assert not os.path.exists("/etc/sub")
        assert not os.path.exists("/made/by/the/runtime")
    finally:
        for name in ("out", "nowhere"):
            (rootfs / name).unlink()


def test_mounts_that_cannot_be(oci, tmp_path):
    assert "no such file" in oci.refused(**bind(tmp_path / "none", "rbind"))
    assert "no destination" in oci.refused(mounts=[{"type": "tmpfs"}])
    assert "neither a type" in oci.refused(mounts=[{"destination": "/x"}])
    assert "mount nofs at /tmp" in oci.refused(mounts=mounts({"destination": "/tmp", "type": "nofs"}))
    assert "mount tmpfs at /tmp" in oci.refused(
        mounts=mounts({"destination": "/tmp", "type": "tmpfs", "options": ["no-such-option"]})
    )


def test_masked_and_read_only_paths(oci):
    out = oci.inside(
        "cat /proc/keys /plain; ls /work; cat /proc/sys/kernel/ostype; (echo x > /proc/sys/kernel/ostype) 2>&1; "
        "touch /tmp/x 2>&1; true",
        linux={"maskedPaths": ["/proc/keys", "/plain", "/work", "/no/such"], "readonlyPaths": ["/proc/sys", "/tmp", "/none"]},
        root={"readonly": False},
    )  # fmt: skip
    lines = out.split("\n")
    assert lines[0] == "Linux"
    assert sum("Read-only" in line for line in lines) == 2


def test_a_mask_is_the_hosts_null_device_whatever_the_image_has_there(oci):
    rootfs = oci.bundle / "rootfs"
    (rootfs / "dev" / "null").write_text("not a device")
    try:
        made = [mount for mount in config("")["mounts"] if not mount["destination"].startswith("/dev")]
        assert (
            oci.inside("cat /plain; stat -c '%F %t %T' /plain", mounts=made, linux={"maskedPaths": ["/plain"]})
            == "character special file 1 3"
        )
    finally:
        (rootfs / "dev" / "null").unlink()


def test_the_cgroup_mount_shows_the_containers_own(oci):
    out = oci.inside("cat /proc/self/cgroup; ls /sys/fs/cgroup", linux=spaces(*ALL))
    assert "0::/\n" in out + "\n"
    assert "cgroup.procs" in out


# --------------------------------------------------------------------------------------------------- seccomp


def rules(*calls, default="SCMP_ACT_ALLOW", **more):
    return {
        "linux": {
            "seccomp": {
                "defaultAction": default,
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": list(calls),
                **more,
            }
        }
    }


@pytest.mark.parametrize("nnp", [True, False])
def test_seccomp(oci, nnp):
    deny = {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
    out = oci.inside(
        "grep -E '^Seccomp:|NoNewPrivs' /proc/self/status; mkdir /tmp/x 2>&1 || true",
        process={"noNewPrivileges": nnp},
        root={"readonly": False},
        **rules(deny),
    )
    assert out.split("\n")[:2] == [f"NoNewPrivs:\t{int(nnp)}", "Seccomp:\t2"]
    assert "Function not implemented" in out


def test_seccomp_compares_arguments_and_kills(oci):
    only = {
        "names": ["kill"],
        "action": "SCMP_ACT_ERRNO",
        "errnoRet": 5,
        "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}],
    }
    out = oci.inside("kill -10 $$ 2>&1; kill -0 $$ && echo alive; true", **rules(only))
    assert ("put error" in out or "I/O error" in out, "alive" in out) == (True, True)
    out = oci.inside(
        "exec 2>/dev/null; mkdir /tmp/x; echo $?", **rules({"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_PROCESS"})
    )
    assert out.split()[-1] == "159"  # SIGSYS


def test_seccomp_errors_name_the_field(oci):
    assert "unknown action SCMP_ACT_X" in oci.refused(**rules(default="SCMP_ACT_X"))
    assert "unknown flag" in oci.refused(**rules(flags=["SECCOMP_FILTER_FLAG_X"]))
    assert "needs a listenerPath" in oci.refused(**rules({"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}))


def test_the_seccomp_agent_gets_the_listener_and_the_state(oci, tmp_path):
    where = str(tmp_path / "agent")
    got = {}

    def agent(server):
        connection, _ = server.accept()
        with connection:
            data, fds, _, _ = socket.recv_fds(connection, 65536, 4)
        got["state"], got["fds"] = json.loads(data), len(fds)
        import ctypes

        request, answer = bytearray(80), bytearray(24)
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = (ctypes.c_char * 80).from_buffer(request)
        libc.ioctl(fds[0], ctypes.c_ulong(0xC0502100), buffer)
        answer[0:8], answer[16:20] = request[0:8], (-13).to_bytes(4, "little", signed=True)
        libc.ioctl(fds[0], ctypes.c_ulong(0xC0182101), (ctypes.c_char * 24).from_buffer(answer))
        for fd in fds:
            os.close(fd)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(where)
        server.listen()
        server.settimeout(20)
        thread = threading.Thread(target=agent, args=(server,))
        thread.start()
        ask = rules({"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}, listenerPath=where, listenerMetadata="mine")
        out = oci.inside("mkdir /tmp/x 2>&1; true", **ask)
        thread.join(20)
    assert "Permission denied" in out
    assert (got["fds"], got["state"]["metadata"], got["state"]["fds"]) == (1, "mine", ["seccompFd"])
    assert (got["state"]["state"]["status"], got["state"]["pid"] > 1) == ("created", True)


# --------------------------------------------------------------------------------------------------- cgroups


def test_cgroups_path(oci):
    path = f"/{oci.id()}/below"
    name = oci.create(config("sleep 1000", linux={"cgroupsPath": path}))
    pid = oci.state(name)["pid"]
    assert f"0::{path}/init\n" in Path(f"/proc/{pid}/cgroup").read_text()
    oci.call("delete", "--force", name, check=True)
    assert "has .. in it" in oci.refused(linux={"cgroupsPath": "/x/../../y"})


@controllers
def test_resources_are_in_force(oci):
    wanted = {
        "memory": {"limit": 64 << 20, "swap": 64 << 20, "reservation": 32 << 20}, "pids": {"limit": 20},
        "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0", "mems": "0"}, "blockIO": {"weight": 500},
        "unified": {"memory.high": str(48 << 20)},
    }  # fmt: skip
    if not has_controllers("io"):
        del wanted["blockIO"]
    name = oci.create(config("sleep 1000", linux={"resources": wanted, "cgroupsPath": f"/{oci.id()}"}))
    top = Path("/sys/fs/cgroup") / Path(f"/proc/{oci.state(name)['pid']}/cgroup").read_text().split("::/")[
        1
    ].strip().removesuffix("/init")
    found = {
        file: (top / file).read_text().strip()
        for file in ("memory.max", "memory.high", "memory.low", "pids.max", "cpu.max", "cpu.weight", "cpuset.cpus")
    }
    assert found == {
        "memory.max": str(64 << 20), "memory.high": str(48 << 20), "memory.low": str(32 << 20), "pids.max": "20",
        "cpu.max": "50000 100000",
        "cpu.weight": "20", "cpuset.cpus": "0",
    }  # fmt: skip
    if (top / "memory.swap.max").exists():
        assert (top / "memory.swap.max").read_text() == "0\n"
    oci.call("update", "--memory", str(32 << 20), "--pids-limit", "-1", name, check=True)
    assert ((top / "memory.max").read_text(), (top / "pids.max").read_text()) == (f"{32 << 20}\n", "max\n")
    assert (top / "init" / "memory.max").read_text() == f"{32 << 20}\n"
    again = oci.call("update", "--resources", "-", name, check=True, stdin=None, input=json.dumps({"pids": {"limit": 9}}))
    assert (again.returncode, (top / "pids.max").read_text()) == (0, "9\n")


@controllers
def test_memory_that_is_too_much_ends_the_program(oci):
    hog = ["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"]
    limit = {"memory": {"limit": 32 << 20, "swap": 32 << 20}}
    assert oci.run(config("", process={"args": hog}, linux={"resources": limit})).returncode == 137


def test_devices_are_denied_by_the_cgroup(oci):
    deny = [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "r"}]
    node = [
        {"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11},
        {"path": "/dev/mem2", "type": "c", "major": 1, "minor": 8},
    ]
    out = oci.inside(
        "head -c 1 /dev/zero >/dev/null && echo zero; head -c 1 /dev/mem2 > /dev/null && echo random; "
        "head -c 1 /dev/kmsg 2>&1 >/dev/null; true",
        linux={"resources": {"devices": deny}, "devices": node},
    )  # fmt: skip
    assert out.split("\n")[:2] == ["zero", "random"]
    assert "not permitted" in out


def test_limits_that_nothing_enforces_are_refused_or_said(oci):
    if has_controllers("memory"):
        pytest.skip("they are enforced here")
    wanted = {"resources": {"memory": {"limit": 1 << 26}}}
    error = oci.refused(linux=wanted)
    assert "controller `memory` is not available" in error
    done = oci.run(config("echo ran", linux=wanted, annotations={"io.agentrun.best-effort": "true"}))
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "warning: controller `memory`" in done.stderr
    assert "no net_cls" in oci.refused(linux={"resources": {"network": {"classID": 5}}})


# --------------------------------------------------------------------------------------------------- the document itself


@pytest.mark.parametrize("version", ["1.0.0", "1.0.2-dev", "1.1.0", "1.2.1", "1.3.0", "1.99.0"])
def test_any_1_x_is_taken(oci, version):
    assert oci.inside("echo yes", ociVersion=version) == "yes"


@pytest.mark.parametrize(("changes", "words"), [
    ({"ociVersion": "2.0.0"}, "is no version 1.x.y"), ({"ociVersion": "one"}, "is no version"), ({"root": {"path": ""}},
    "root.path"),
    ({"process": {"args": []}}, "a program is needed"), ({"process": {"cwd": "relative"}}, "not an absolute path"),
    ({"process": {"user": {"uid": -1}}}, "is no id"), ({"linux": {"namespaces": [{"type": "none"}]}}, "unknown type"),
    ({"linux": {"namespaces": [{"type": "pid"}]}}, "a mount namespace"), ({"linux": {"intelRdt": {"closID": "x"}}},
    "intelRdt is not supported"),
    ({"linux": {"namespaces": [{"type": "mount"}, {"type": "mount"}]}}, "twice"), ({"hooks": {"prestart": [{"path": "x"}]}},
    "not an absolute path"),
    ({"linux": {"rootfsPropagation": "odd"}}, "unknown 'odd'"), ({"process": {"args": ["a\0b"]}}, "NUL"),
])  # fmt: skip
def test_what_cannot_be_is_an_error_that_names_the_field(oci, changes, words):
    assert words in oci.refused(**changes)


def test_no_json_and_no_file(oci):
    (oci.bundle / "config.json").write_text('{"ociVersion": ')
    done = oci.call("create", "--bundle", str(oci.bundle), oci.id())
    assert (done.returncode, done.stdout) == (1, "")
    assert "config.json" in done.stderr
    done = oci.call("create", "--bundle", "/no/such", oci.id())
    assert "no such file or directory" in done.stderr


def test_annotations_are_in_the_state(oci):
    name = oci.create(config("true", annotations={"org.example": 'a "quoted" ä'}))
    state = oci.state(name)
    assert state["annotations"] == {"org.example": 'a "quoted" ä'}
    assert (state["bundle"], state["ociVersion"], state["status"]) == (str(oci.bundle), "1.3.0", "created")
