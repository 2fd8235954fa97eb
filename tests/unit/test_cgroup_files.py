# SPDX-License-Identifier: Apache-2.0
"""Limits as files, accounts as numbers, and what is said about a write that failed."""

import fcntl
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun.cgroup.files import read_file, write_file
from agentrun.cgroup.limits import CPU_PERIOD_US, changes, plan_limits
from agentrun.cgroup.stats import parse_flat, parse_io, parse_number
from agentrun.cgroup.tree import PREFIX, Base, Tree, find_base, find_mount, remove_stale
from agentrun.errors import HostError
from agentrun.policy import GIB, Limits

LIMITS = st.builds(
    Limits,
    memory_max=st.none() | st.integers(1, 2**63 - 1),
    memory_swap_max=st.none() | st.integers(0, 2**63 - 1),
    pids_max=st.none() | st.integers(1, 4194304),
    cpus=st.none() | st.floats(0.01, 4096),
    cpu_weight=st.none() | st.integers(1, 10000),
)


# ---------------------------------------------------------------- limits


def test_the_defaults_as_files():
    assert plan_limits(Limits()) == {
        "memory.oom.group": "1",
        "memory.max": str(2 * GIB),
        "memory.swap.max": "0",
        "pids.max": "513",
    }


@given(LIMITS)
def test_every_limit_is_its_file(limits):
    files = plan_limits(limits)
    assert files.get("memory.max") == (None if limits.memory_max is None else str(limits.memory_max))
    assert ("memory.oom.group" in files) == ("memory.max" in files)
    assert files.get("memory.swap.max") == (None if limits.memory_swap_max is None else str(limits.memory_swap_max))
    assert files.get("pids.max") == (None if limits.pids_max is None else str(min(limits.pids_max + 1, 4194304)))
    assert files.get("cpu.weight") == (None if limits.cpu_weight is None else str(limits.cpu_weight))
    assert ("cpu.max" in files) == (limits.cpus is not None)
    if limits.cpus is not None:
        quota, period = map(int, files["cpu.max"].split())
        assert (period, quota >= 1000) == (CPU_PERIOD_US, True)  # the kernel takes no quota below 1 ms
        assert abs(quota - limits.cpus * period) <= 0.5
    if "memory.max" in files:  # a tool that is killed in between dies as a whole
        assert list(files).index("memory.oom.group") < list(files).index("memory.max")


@given(LIMITS)
def test_every_file_has_its_controller(limits):
    assert {name.partition(".")[0] for name in plan_limits(limits)} <= {"memory", "pids", "cpu"}


BURSTS = st.floats(0.01, 4).flatmap(
    lambda cpus: st.builds(Limits, cpus=st.just(cpus), cpu_burst=st.none() | st.floats(0, cpus / 10))
)
FRESH = {
    "memory.oom.group": "0", "memory.max": "max", "memory.high": "max", "memory.swap.max": "max", "pids.max": "max",
    "cpu.max": "max", "cpu.max.burst": "0", "io.weight": "100", "cpu.weight": "100",
}  # fmt: skip
EVERY = Limits(memory_high=1 << 20, cpus=2.0, cpu_burst=0.1, cpu_weight=7, io_weight=9)


@given(st.lists(st.one_of(LIMITS, BURSTS, st.just(EVERY)), max_size=5))
def test_a_leaf_goes_from_any_limits_to_any(sequence):
    leaf, old = dict(FRESH), {}
    for limits in sequence:
        new = plan_limits(limits)
        for name, text in changes(old, new).items():
            assert old.get(name) != text  # nothing is written for nothing
            leaf[name] = text
            quota = leaf["cpu.max"].split()[0]
            assert quota == "max" or int(leaf["cpu.max.burst"]) <= int(quota)  # cpu_max_write would refuse
        assert leaf == FRESH | new
        old = new


# ---------------------------------------------------------------- accounts


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.integers(0, 2**64 - 1)))
def test_flat_files(pairs):
    assert parse_flat("".join(f"{key} {value}\n" for key, value in pairs.items()).encode()) == pairs


def test_flat_files_of_a_strange_kernel():
    assert parse_flat(b"usage_usec 5\n\nmax max\nneg -1\n") == {"usage_usec": 5}
    assert parse_flat(b"") == {}


@given(st.lists(st.tuples(st.integers(0, 2**60), st.integers(0, 2**60))))
def test_io_is_summed_over_devices(devices):
    text = "".join(f"8:{n} rbytes={r} wbytes={w} rios=1 wios=2 dbytes=3 dios=4\n" for n, (r, w) in enumerate(devices))
    assert parse_io(text.encode()) == (sum(r for r, _ in devices), sum(w for _, w in devices))


def test_a_device_without_numbers():
    assert parse_io(b"8:0\n8:16 rbytes=4 wbytes=5\n254:0 \n") == (4, 5)


@pytest.mark.parametrize(
    ("text", "number"), [(b"0\n", 0), (b"4096\n", 4096), (b"max\n", None), (b"", None), (None, None), (b"-1\n", None)]
)
def test_single_values(text, number):
    assert parse_number(text) == number


# ---------------------------------------------------------------- reading and writing


@pytest.fixture
def directory(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_a_file_is_written_and_read(directory, tmp_path):
    (tmp_path / "pids.max").write_text("")
    write_file(directory, "pids.max", "7", "here")
    assert read_file(directory, "pids.max") == b"7"
    assert read_file(directory, "pids.peak") is None


def refusal(directory: int, name: str, text: str = "1") -> str:
    with pytest.raises(HostError) as caught:
        write_file(directory, name, text, "/sys/x")
    assert isinstance(caught.value.__cause__, OSError)
    return str(caught.value)


def test_a_missing_controller_is_named(directory, tmp_path):
    assert refusal(directory, "memory.max", "5\n") == (
        "writing '5' to /sys/x/memory.max: controller 'memory' is not enabled there (it has: none)")  # fmt: skip
    (tmp_path / "cgroup.controllers").write_text("cpu pids\n")
    assert refusal(directory, "memory.max").endswith("controller 'memory' is not enabled there (it has: cpu pids)")
    (tmp_path / "cgroup.controllers").write_text("memory\n")  # the controller is there, this file is not
    assert refusal(directory, "memory.max") == "writing '1' to /sys/x/memory.max: No such file or directory"
    assert refusal(directory, "cgroup.kill") == "writing '1' to /sys/x/cgroup.kill: No such file or directory"


def test_a_write_that_the_kernel_refuses(directory, tmp_path):
    (tmp_path / "cpu.max").symlink_to("/dev/full")
    assert refusal(directory, "cpu.max") == "writing '1' to /sys/x/cpu.max: No space left on device"
    (tmp_path / "io.max").mkdir()
    assert refusal(directory, "io.max") == "writing '1' to /sys/x/io.max: Is a directory"


@pytest.mark.host
def test_a_cgroup_that_is_not_ours(directory, tmp_path):
    (tmp_path / "cpu.weight").touch()
    subprocess.run(["chattr", "+i", tmp_path / "cpu.weight"], check=True)
    try:
        assert refusal(directory, "cpu.weight").endswith(": this cgroup is not delegated to us")
    finally:
        subprocess.run(["chattr", "-i", tmp_path / "cpu.weight"], check=True)


@pytest.mark.host
def test_a_value_a_real_cgroup_refuses():
    base = find_base().path
    path = base / f"test-files-{os.getpid()}"
    path.mkdir()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert refusal(fd, "cgroup.kill", "2") == "writing '2' to /sys/x/cgroup.kill: Numerical result out of range"
        assert refusal(fd, "cgroup.nonsense").startswith("writing")
        write_file(fd, "cgroup.kill", "1", "x")
        assert parse_flat(read_file(fd, "cgroup.events"))["populated"] == 0
    finally:
        path.rmdir()
    try:
        assert read_file(fd, "cgroup.procs") is None  # its cgroup is gone
    finally:
        os.close(fd)


# ---------------------------------------------------------------- where the tree is

LINE = "36 25 0:30 / {} rw,nosuid shared:9 - {} cgroup rw\n"


def test_the_first_cgroup2_mount(tmp_path):
    info = tmp_path / "mountinfo"
    info.write_text(
        LINE.format("/sys/fs/cgroup/memory", "cgroup")
        + LINE.format("/sys/fs/cgroup/unified", "cgroup2")
        + LINE.format("/x", "cgroup2")
    )
    assert find_mount(str(info)) == Path("/sys/fs/cgroup/unified")
    info.write_text(LINE.format("/a\\040b", "cgroup2"))
    assert find_mount(str(info)) == Path("/a b")
    info.write_text(LINE.format("/cgroup2", "tmpfs"))
    assert find_mount(str(info)) is None


def test_a_mount_point_with_an_umlaut(tmp_path):
    info = tmp_path / "mountinfo"
    info.write_text(LINE.format("/größe", "cgroup2"))
    assert find_mount(str(info)) == Path("/größe")


def test_a_named_base_has_to_be_a_cgroup(tmp_path):
    with pytest.raises(HostError, match=f"AGENTRUN_CGROUP={tmp_path} is not a cgroup2 directory"):
        find_base({"AGENTRUN_CGROUP": str(tmp_path)})
    (tmp_path / "cgroup.procs").touch()
    assert find_base({"AGENTRUN_CGROUP": str(tmp_path)}) == Base(tmp_path, "AGENTRUN_CGROUP")


# ---------------------------------------------------------------- what a dead owner left


@pytest.fixture
def base():
    """A cgroup of the test's own, so that no other agentrun on this machine is in the way."""
    path = find_base().path / f"test-stale-{os.getpid()}"
    path.mkdir()
    yield Base(path, "AGENTRUN_CGROUP")
    for directory, _, _ in os.walk(path, topdown=False):
        os.rmdir(directory)


@pytest.mark.host
def test_what_is_locked_stays_and_what_is_not_goes(base):
    live, dead, other = (base.path / name for name in (PREFIX + "live", PREFIX + "dead", "somebody-else"))
    for path in (live, dead / "tenant-a" / "call-1", other):
        path.mkdir(parents=True)
    held = os.open(live, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    sleeper = subprocess.Popen(["sleep", "60"])
    (dead / "tenant-a" / "call-1" / "cgroup.procs").write_text(str(sleeper.pid))
    try:
        assert remove_stale(base.path) == [PREFIX + "dead"]
        assert sleeper.wait(10) == -9
        assert (live.exists(), dead.exists(), other.exists()) == (True, False, True)
        assert remove_stale(base.path) == []
    finally:
        sleeper.kill()
        sleeper.wait()
        os.close(held)
    assert remove_stale(base.path) == [PREFIX + "live"]


@pytest.mark.host
def test_two_owners_of_one_name(base):
    tree = Tree(base, "x")
    with pytest.raises(HostError, match=f"{base.path}/agentrun-x belongs to an agentrun that is running"):
        Tree(base, "x")
    assert remove_stale(base.path) == []
    tree.tenant("t", {})
    leaf = tree.leaf("t", "call-1", {})
    assert leaf.pids() == []
    assert leaf.remove_nowait()
    assert leaf.fd == -1
    tree.close()
    assert not tree.path.exists()


@pytest.mark.host
def test_a_tree_says_what_it_cannot_enforce(base):
    tree = Tree(base, "y")
    try:
        _, files, missing = tree.plan(Limits(cpus=1.0, cpu_weight=5))
        assert {*files, *(item.limit for item in missing)} >= {"memory.max", "cpu.max", "cpu.weight"}
        assert not {*files} & {item.limit for item in missing}
        assert {*files} <= tree.files
        for item in missing:
            assert item.limit.partition(".")[0] in item.reason or "this kernel has no" in item.reason
    finally:
        tree.close()
