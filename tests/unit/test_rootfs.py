# SPDX-License-Identifier: Apache-2.0
"""The host's root as an image: which entries are taken, and the user that is written into it."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun.errors import HostError
from agentrun.rootfs import DEVICES, HIDDEN, ON_DEMAND, PRIVATE, open_host_root, replace_entry

ENTRY = b"tool:x:1000:1000:a tool:/home/tool:/bin/sh"
WORD = st.text("abz019_", max_size=6).map(str.encode)
LINE = st.one_of(
    st.lists(WORD, min_size=1, max_size=7).map(b":".join),
    st.sampled_from(
        [b"tool:x:5:5::/:/x", b"me:x:1000:5::/:", b"x:1000:1:::", b"# comment", b"", b"+::::::", b"tool", b"toolx:x:10000:1"]
    ),
)


@given(st.lists(LINE))
def test_the_entry_replaces_those_it_would_contradict(lines):
    result = replace_entry(b"".join(line + b"\n" for line in lines), ENTRY)
    assert result.endswith(b"\n")
    kept = result[:-1].split(b"\n")
    assert kept.pop() == ENTRY
    assert kept == [line for line in lines if line.split(b":")[0] != b"tool" and line.split(b":")[2:3] != [b"1000"]]


@given(st.lists(LINE))
def test_replacing_twice_is_replacing_once(lines):
    once = replace_entry(b"\n".join(lines), ENTRY)
    assert replace_entry(once, ENTRY) == once


def test_a_last_line_without_an_end():
    assert replace_entry(b"root:x:0:0::/root:/bin/sh", ENTRY) == b"root:x:0:0::/root:/bin/sh\n" + ENTRY + b"\n"
    assert replace_entry(b"", ENTRY) == ENTRY + b"\n"


def test_a_group_entry_has_its_id_in_the_same_place():
    assert replace_entry(b"users:x:100:\nme:x:1000:me\n", b"tool:x:1000:") == b"users:x:100:\ntool:x:1000:\n"


@pytest.fixture
def host(tmp_path):
    """A small host."""
    for name in ("usr/bin", "etc", "proc", "opt", "srv/data", "home/me", "root", "dev", "boot", "var/tmp", "empty"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("usr/bin/ls", "opt/x", "etc/hosts", "home/me/secret", "boot/vmlinuz", "swapfile"):
        (tmp_path / name).write_text(name)
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n")
    (tmp_path / "bin").symlink_to("usr/bin")
    return tmp_path


def names(mount: int) -> set[str]:
    """What is at the root of a detached mount; its own descriptor is a mere path."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=mount)
    try:
        return set(os.listdir(fd))
    finally:
        os.close(fd)


@pytest.mark.host
def test_what_is_taken_and_what_is_left_out(host):
    before = len(os.listdir("/proc/self/fd"))
    root = open_host_root(str(host))
    try:
        base = root.fds[0]
        made = names(base)
        assert made == {"usr", "etc", "opt", "srv", "var", "empty", "bin", "proc", "dev", "run", "sys", *PRIVATE, *ON_DEMAND}
        assert os.readlink("bin", dir_fd=base) == "usr/bin"
        assert {path for _, path in root.moves} >= {"usr", "etc", "opt", "srv", "var", "proc"}
        assert not {path.split("/")[0] for _, path in root.moves} & (HIDDEN - {"proc", "dev"})
        assert "empty" in {path for _, path in root.moves}  # what is made there later is to be seen
        assert {index for index, _ in root.moves} == set(range(1, len(root.fds)))
        taken = {path: root.fds[index] for index, path in root.moves}
        assert names(taken["usr"]) == {"bin"}
        with pytest.raises(OSError, match="Read-only file system"):
            os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=taken["opt"])
        flags = os.fstatvfs(taken["usr"]).f_flag
        assert flags & os.ST_RDONLY
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NODEV
        assert root.binds == [("run/agentrun/etc/passwd", "etc/passwd")]
        assert root.has_var_tmp
        with open(os.open("run/agentrun/etc/passwd", os.O_RDONLY, dir_fd=base)) as file:
            assert [line.split(":")[0] for line in file] == ["root", "tool"]
    finally:
        root.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.host
def test_devices_and_their_links(host):
    root = open_host_root(str(host))
    try:
        taken = {path: root.fds[index] for index, path in root.moves}
        for name, (major, minor) in DEVICES.items():
            if f"dev/{name}" in taken:
                continue  # a container around us refuses device nodes
            status = os.stat(f"dev/{name}", dir_fd=root.fds[0])
            assert stat.S_ISCHR(status.st_mode)
            assert (os.major(status.st_rdev), os.minor(status.st_rdev), stat.S_IMODE(status.st_mode)) == (major, minor, 0o666)
        links = {name: os.readlink(f"dev/{name}", dir_fd=root.fds[0]) for name in ("fd", "stdin", "stderr", "ptmx")}
        assert links == {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx"}
    finally:
        root.close()


@pytest.mark.host
def test_a_host_without_passwd_and_var(tmp_path):
    (tmp_path / "proc").mkdir()
    root = open_host_root(str(tmp_path))
    assert (root.binds, root.has_var_tmp) == ([], False)
    root.close()
    root.close()  # and nothing of somebody else's


@pytest.mark.host
def test_a_failure_names_the_call_and_leaves_no_descriptor(host):
    (host / "proc").rmdir()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        HostError, match=f"preparing the host's root as an image: open_tree {host}/proc: No such file or directory"
    ):
        open_host_root(str(host))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.host
def test_many_users(host):
    (host / "etc/passwd").write_text(
        "".join(f"user{n}:x:{n}:{n}:a user of this host:/home/user{n}:/bin/sh\n" for n in range(2000, 32000))
    )
    try:
        root = open_host_root(str(host))
    except HostError:
        return  # said so
    try:
        with open(os.open("run/agentrun/etc/passwd", os.O_RDONLY, dir_fd=root.fds[0])) as file:
            assert file.read().splitlines()[-1].startswith("tool:")
    finally:
        root.close()
