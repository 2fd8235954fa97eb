# SPDX-License-Identifier: Apache-2.0
"""Where policies are found, what extends what, and that no file of any kind can do worse than be refused; the shipped ones."""

import os
import signal
import socket
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from agentrun.errors import UsageError
from agentrun.policy import DEFAULT
from agentrun.policyfile import LARGEST
from agentrun.policystore import PolicyStore, directories
from agentrun.units import GIB, MIB

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "policies"


@pytest.fixture
def places(tmp_path):
    """Three directories, searched in this order; ``write`` puts a policy into one."""
    return Places(tmp_path)


class Places:
    def __init__(self, root: Path) -> None:
        self.where = [root / name for name in ("own", "etc", "shipped")]
        for directory in self.where:
            directory.mkdir()
        self.store = PolicyStore(self.where)

    def write(self, place: int, name: str, more: str = "") -> Path:
        path = self.where[place] / f"{name}.toml"
        path.write_text(f'name = "{name}"\ndescription = "number {place}"\n{more}')
        return path

    def refused(self, name: object) -> str:
        with pytest.raises(UsageError) as caught:
            self.store.find(str(name))
        message = str(caught.value)
        assert message.isprintable()
        return message


# ---------------------------------------------------------------- search


def test_where_names_are_looked_up():
    system = [Path("/etc/agentrun/policies"), SHIPPED]
    assert directories({"HOME": "/h"}) == [Path("/h/.config/agentrun/policies"), *system]
    assert directories({"HOME": "/h", "XDG_CONFIG_HOME": "/c"}) == [Path("/c/agentrun/policies"), *system]
    assert directories({}) == system
    assert directories({"XDG_CONFIG_HOME": "relative"}) == system


def test_the_first_place_wins(places):
    for place in (2, 1, 0):
        path = places.write(place, "a")
        places.store.reload()
        assert places.store.find("a").description == f"number {place}"
        assert places.store.locate("a") == path
    assert places.store.files() == {"a": [directory / "a.toml" for directory in places.where]}


def test_a_place_that_is_not_there(tmp_path):
    store = PolicyStore([tmp_path / "no"])
    assert store.names() == {}
    with pytest.raises(UsageError, match=r'^policy: there is no policy "a" \(known: none\)$'):
        store.find("a")


@pytest.mark.parametrize("name", ["", "nope", "A", "a b", "..", "-a", "a\n", "a\0", "\x1b[2J", "é", "x" * 100_000])
def test_a_name_that_is_none(places, name):
    places.write(0, "a")
    assert places.refused(name).startswith("policy: there is no policy ")
    assert places.refused(name).endswith(" (known: a)")
    assert len(places.refused(name)) < 200


def test_a_path_is_a_file(places, tmp_path, monkeypatch):
    path = places.write(0, "elsewhere").rename(tmp_path / "elsewhere.toml")
    monkeypatch.chdir(tmp_path)
    for name in (str(path), "./elsewhere.toml", "elsewhere.toml"):
        assert places.store.find(name).name == "elsewhere"
    monkeypatch.chdir("/")
    assert "No such file" in places.refused("elsewhere.toml"), "a relative path was remembered"


def test_a_policy_is_read_once_until_it_is_read_anew(places):
    path = places.write(0, "a", "time.timeout = 1")
    first = places.store.find("a")
    places.write(0, "a", "time.timeout = 2")
    assert places.store.find("a") is first
    assert places.store.reload() == 1
    assert places.store.find("a").timeout == 2
    path.write_text("nonsense")
    with pytest.raises(UsageError, match="not TOML"):
        places.store.reload()
    assert places.store.find("a").timeout == 2, "what it had is lost"


def test_what_editors_leave_is_no_policy(places):
    places.write(0, "a")
    (places.where[0] / ".#a.toml").symlink_to("nowhere")
    (places.where[0] / "a.toml~").write_text("x")
    assert list(places.store.names()) == ["a"]
    assert places.store.reload() == 1


def test_a_name_is_that_of_its_file(places):
    path = places.write(0, "a").rename(places.where[0] / "b.toml")
    assert places.refused("b") == f'{path.with_name("b.toml")}: name: "a" is not that of the file; say "b"'


@pytest.mark.parametrize("kind", ["broken", "link", "directory", "empty"])
def test_a_policy_that_does_not_load_is_not_another_one(places, kind):
    """Not the one of its name in the next place."""
    places.write(2, "a")
    path = places.where[0] / "a.toml"
    if kind == "link":
        path.symlink_to("nowhere")
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_text("" if kind == "empty" else "x = [")
    assert places.refused("a").startswith(f"{path}: ")


# ---------------------------------------------------------------- files of every kind


def make(kind: str, path: Path) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "terminal":
        path.symlink_to("/dev/tty")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "long":
        path.write_bytes(b"#" * (LARGEST + 1))
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(10 << 30)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "No such file or directory"), ("directory", "not a regular file"), ("fifo", "not a regular file"),
        ("socket", "not a regular file"), ("device", "not a regular file"), ("terminal", "not a regular file"),
        ("loop", "Too many levels of symbolic links"), ("long", "larger than a policy can be"),
        ("large", "larger than a policy can be"),
    ],
)  # fmt: skip
def test_a_path_that_is_no_policy(places, kind, words):
    """Refused, and at once: nothing waits for a FIFO's writer or reads a device."""
    path = places.where[0] / "a.toml"
    make(kind, path)
    alarm = threading.Timer(10, signal.raise_signal, [signal.SIGALRM])
    alarm.start()
    try:
        assert words in places.refused(path)
    finally:
        alarm.cancel()
    assert places.refused(path).startswith(f"{path}: ")


def test_a_file_that_may_not_be_read(places):
    path = places.write(0, "a")
    path.chmod(0)
    pid = os.fork()
    if pid == 0:  # as nobody, for root reads everything
        status = 2
        try:
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 65534)
            status = 0 if places.refused(path) == f"{path}: Permission denied" else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_path_of_any_bytes(places):
    """A newline, an escape sequence, bytes that are not UTF-8, a NUL, too many: one printable line."""
    for name in ("a\nb.toml", "\x1b[2J.toml", "\udcff.toml", "a\0.toml", "x" * 300 + ".toml", "/" * 5000 + "a.toml"):
        assert places.refused(f"{places.where[0]}/{name}")
    path = places.where[0] / "\x1b[2J.toml"
    path.write_text('name = "a"\ndescription = "d"\n')
    assert '\\u001b[2J.toml": name: "a" is not that of the file' in places.refused(path)


def test_a_file_of_the_largest_size(places):
    path = places.write(0, "a")
    path.write_bytes(path.read_bytes().ljust(LARGEST, b"#"))
    assert places.store.find("a").name == "a"


# ---------------------------------------------------------------- extends


def test_what_is_not_said_is_the_others(places):
    places.write(2, "base", 'memory.max = "1G"\npids.max = 5\nprocess.env.pass = ["A"]\nprocess.rlimits.nofile = 70')
    places.write(0, "mine", 'extends = "base"\npids.max = 6\nprocess.env.pass = ["B"]\nprocess.rlimits.stack = 80000')
    policy = places.store.find("mine")
    assert (policy.name, policy.description) == ("mine", "number 0")
    assert (policy.limits.memory_max, policy.limits.pids_max) == (GIB, 6)
    assert policy.process.env_pass == ("B",)
    assert [limit.name for limit in policy.process.rlimits] == ["nofile", "stack"]


def test_a_limit_is_taken_back_with_none(places):
    places.write(2, "base", 'memory = { high = "1G", burst = "1G", burst_seconds = 5 }\ncpu = { max = 1, burst = 0.05 }')
    places.write(0, "mine", 'extends = "base"\nmemory.burst = "none"\ncpu = { max = "none", burst = "none" }')
    limits = places.store.find("mine").limits
    assert (limits.memory_high, limits.memory_burst, limits.burst_seconds) == (GIB, None, None)
    assert (limits.cpus, limits.cpu_burst) == (None, None)


def test_a_contradiction_of_both_is_the_extending_ones(places):
    places.write(2, "base", 'memory.high = "1G"')
    path = places.write(0, "mine", 'extends = "base"\nmemory.max = "512M"')
    assert places.refused("mine").startswith(f'{path}: memory.high: "1G" is above memory.max, "512M"')


def test_a_base_with_a_fault_is_named(places):
    path = places.write(2, "base", 'memory.high = "3G"')
    places.write(0, "mine", 'extends = "base"\nmemory.high = "1G"')
    assert places.refused("mine").startswith(f'{path}: memory.high: "3G" is above')


def test_ones_own_default_extends_the_next_one(places):
    places.write(2, "default", "pids.max = 1\ntime.timeout = 1\ncpu.max = 1")
    places.write(1, "default", 'extends = "default"\ntime.timeout = 2\ncpu.max = 2')
    places.write(0, "default", 'extends = "default"\ncpu.max = 3')
    places.write(0, "other", 'extends = "default"\n')
    for name in ("default", "other"):
        policy = places.store.find(name)
        assert (policy.limits.pids_max, policy.timeout, policy.limits.cpus) == (1, 2, 3)


def test_a_file_outside_extends_the_first_of_its_name(places, tmp_path, monkeypatch):
    places.write(1, "default", "pids.max = 4")
    path = places.write(0, "default", 'extends = "default"').rename(tmp_path / "default.toml")
    assert places.store.find(str(path)).limits.pids_max == 4
    places.write(0, "default", 'extends = "default"\ncpu.max = 3')
    monkeypatch.chdir(places.where[0])
    policy = places.store.find("./default.toml")
    assert (policy.limits.pids_max, policy.limits.cpus) == (4, 3), "the same file by another path extends itself"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": "a"}, 'extends: "a" is this file itself, and there is no other of that name'),
        ({"a": "b", "b": "a"}, 'b.toml: extends: "a" closes a circle'),
        ({"a": "b", "b": "c", "c": "b"}, 'c.toml: extends: "b" closes a circle'),
        ({"a": "nope"}, 'extends: there is no policy "nope" (known: a)'),
        ({"a": "A"}, 'extends: "A" is not a name of a-z'),
        ({"a": "../a"}, 'extends: "../a" is not a name of a-z'),
    ],
)
def test_what_cannot_be_extended(places, files, words):
    for name, base in files.items():
        places.write(0, name, f'extends = "{base}"')
    assert words in places.refused("a")


def test_a_chain_has_an_end(places):
    for number in range(8):
        places.write(0, f"n{number}", f'extends = "n{number + 1}"')
    places.write(0, "n8")
    assert places.store.find("n1").name == "n1"
    assert 'n7.toml: extends: "n8" is one file too many' in places.refused("n0")


# ---------------------------------------------------------------- what comes with agentrun


@pytest.fixture(scope="module")
def shipped():
    return PolicyStore([SHIPPED])


NAMES = ["build", "default", "host-tools", "readonly", "strict", "test"]


def test_the_shipped_ones(shipped):
    assert list(shipped.names()) == NAMES
    assert shipped.reload() == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_file(shipped, name):
    lines = (SHIPPED / f"{name}.toml").read_text().splitlines()
    assert lines[0] == f'name = "{name}"'
    assert lines[1].startswith('description = "')
    assert not any(line.startswith("extends") for line in lines), "overriding one must not change another"
    assert stat.S_IMODE((SHIPPED / f"{name}.toml").stat().st_mode) & 0o133 == 0
    assert len(shipped.find(name).description) < 120
    assert f"| `{name}` |" in (SHIPPED / "README.md").read_text()


def test_the_default_is_the_one_that_is_built_in(shipped):
    assert shipped.find("default") is DEFAULT


def test_nothing_shipped_opens_the_wall_but_the_one_that_says_so(shipped):
    for name in NAMES:
        policy = shipped.find(name)
        assert policy.net == ("host" if name == "host-tools" else "none")
        assert policy.fs.binds == ()
        assert policy.fs.landlock
        assert set(DEFAULT.fs.masked) <= set(policy.fs.masked)
        assert set(DEFAULT.fs.read_only) <= set(policy.fs.read_only)
        assert (policy.process.uid, policy.process.gid, policy.process.groups) == (1000, 1000, ())
        assert policy.seccomp == ("strict" if name == "strict" else "default")
        assert policy.fs.workspace == ("ro" if name in ("readonly", "strict") else "rw")
        assert policy.limits.memory_max is not None
        assert policy.limits.pids_max is not None
        assert policy.timeout is not None
        assert policy.scratch_size <= policy.limits.memory_max, "scratch is memory"


def test_strict_is_stricter_in_everything(shipped):
    strict = shipped.find("strict")
    assert not strict.best_effort
    for name in NAMES:
        other = shipped.find(name)
        if name != "strict":
            assert strict.limits.memory_max < other.limits.memory_max
            assert strict.limits.pids_max < other.limits.pids_max
            assert strict.scratch_size < other.scratch_size
            assert strict.timeout < other.timeout
    assert strict.hints.high == strict.limits.memory_max, "a hint must not make more of it"


def test_a_test_run_may_burst(shipped):
    limits = shipped.find("test").limits
    assert limits.memory_high + limits.memory_burst == limits.memory_max
    assert limits.memory_max > 3795 * 1000_000, "the largest recorded rise"
    assert msgspec.structs.astuple(shipped.find("readonly").hints) == (128 * MIB, 256 * MIB, 512 * MIB)
