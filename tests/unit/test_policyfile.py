# SPDX-License-Identifier: Apache-2.0
"""A policy as a file: what every key comes to, and that whatever is wrong is said in one line with its key and its value."""

import random
import re
import time
import tomllib
from pathlib import Path

import jsonschema
import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from agentrun.cgroup.limits import plan_limits
from agentrun.errors import UsageError
from agentrun.policy import DEFAULT, Bind, Rlimit
from agentrun.policyfile import LARGEST, key_paths, merge, read_tables
from agentrun.policyresolve import resolve
from agentrun.policystore import PolicyStore
from agentrun.policytables import PolicyTables, schema
from agentrun.policywrite import differences, tables_of, write_policy
from agentrun.tomltext import show, write_key, write_value
from agentrun.units import GIB, MIB
from tests.unit.policy_documents import STRANGE, UNKNOWN, WHERE, changed, lookup, loose, places, tables, text, valid

HEAD = b'name = "x"\ndescription = "d"\n'
JUDGE = jsonschema.Draft202012Validator(schema())
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "policies.md"
some = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def load(data: bytes):
    return resolve(read_tables(data, WHERE), WHERE)


def complaint(data: bytes) -> str | None:
    try:
        load(data)
    except UsageError as error:
        return str(error)
    return None


def key_of(path) -> str:
    """A place as messages name it."""
    key = ""
    for part in path:
        name = part if isinstance(part, int) else write_key(part if len(part) <= 60 else part[:60] + "…")
        key += f"[{name}]" if isinstance(part, int) else f".{name}" if key else name
    return key


def refused(data: bytes, key: str, value: object = None) -> str:
    """The one line that says what is wrong with a file; it begins with the file and the key, and shows the value."""
    with pytest.raises(UsageError) as caught:
        load(data)
    message = str(caught.value)
    assert message.isprintable(), message
    assert message.startswith(f"{WHERE}: {key}"), message
    assert message.removeprefix(f"{WHERE}: {key}")[0] in ":.[", message
    assert len(message) < 600
    if value is not None:
        inner = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
        assert any(shown in message for shown in map(show, [value, *inner])), message
    return message


# ---------------------------------------------------------------- what keys mean

LIMITS = ("as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "rss", "rtprio", "rttime",
          "sigpending", "stack")  # fmt: skip


def rlimit(name: str):
    return f"process.rlimits.{name} = [8000000, 9000000]", "process.rlimits", (Rlimit(name, 8000000, 9000000),)


MEANINGS = {
    "name": ('name = "x"', "name", "x"),
    "description": ('description = "what"', "description", "what"),
    "best_effort": ("best_effort = true", "best_effort", True),
    "memory.max": ('memory.max = "3G"', "limits.memory_max", 3 * GIB),
    "memory.high": ('memory.high = "1.5G"', "limits.memory_high", 3 * GIB // 2),
    "memory.swap": ('memory.swap = "64M"', "limits.memory_swap_max", 64 * MIB),
    "memory.burst": ('memory = { high = "1G", burst = "1G", burst_seconds = 5 }', "limits.memory_burst", GIB),
    "memory.burst_seconds": ('memory = { high = "1G", burst = "1G", burst_seconds = 5 }', "limits.burst_seconds", 5.0),
    "memory.on_exhausted": ('memory.on_exhausted = "stop"', "limits.on_exhausted", "stop"),
    "memory.throttle_seconds": ("memory.throttle_seconds = 0", "limits.throttle_seconds", 0.0),
    "memory.freeze_seconds": ("memory.freeze_seconds = 1.5", "limits.freeze_seconds", 1.5),
    "cpu.max": ("cpu.max = 1.5", "limits.cpus", 1.5),
    "cpu.burst": ("cpu = { max = 1, burst = 0.1 }", "limits.cpu_burst", 0.1),
    "cpu.weight": ("cpu.weight = 50", "limits.cpu_weight", 50),
    "io.weight": ("io.weight = 50", "limits.io_weight", 50),
    "pids.max": ("pids.max = 7", "limits.pids_max", 7),
    "time.timeout": ("time.timeout = 2", "timeout", 2.0),
    "time.cpu": ("time.cpu = 3", "process.cpu_seconds", 3),
    "fs.image": ('fs.image = "python:3.12"', "fs.image", "python:3.12"),
    "fs.root": ('fs.root = "scratch"', "fs.root", "scratch"),
    "fs.workspace": ('fs.workspace = "ro"', "fs.workspace", "ro"),
    "fs.binds": ('fs.binds = [{ source = "/srv/a" }]', "fs.binds", (Bind("/srv/a", "/srv/a", "ro"),)),
    "fs.masked": ('fs.masked = ["/etc/x"]', "fs.masked", ("/etc/x",)),
    "fs.read_only": ('fs.read_only = ["/proc/sys"]', "fs.read_only", ("/proc/sys",)),
    "fs.scratch": ('fs.scratch = "1M"', "scratch_size", MIB),
    "fs.file_size": ('fs.file_size = "4096"', "fs.file_size", 4096),
    "fs.landlock": ("fs.landlock = false", "fs.landlock", False),
    "net.mode": ('net.mode = "host"', "net", "host"),
    "net.allow": ('net = { mode = "egress", allow = ["a.example:1"] }', "egress.allow", ("a.example:1",)),
    "net.hosts": (
        'net = { mode = "egress", allow = ["a.example:1"], hosts = { "a.example" = "192.0.2.1" } }',
        "egress.hosts", (("a.example", "192.0.2.1"),),
    ),
    "process.user": ("process.user = 5", "process.uid", 5),
    "process.group": ("process.group = 6", "process.gid", 6),
    "process.groups": ("process.groups = [7, 8]", "process.groups", (7, 8)),
    "process.hostname": ('process.hostname = "h.example"', "process.hostname", "h.example"),
    "process.umask": ('process.umask = "0077"', "process.umask", 0o077),
    "process.oom_score_adj": ("process.oom_score_adj = 0", "process.oom_score_adj", 0),
    "process.env.pass": ('process.env.pass = ["LANG"]', "process.env_pass", ("LANG",)),
    "process.env.set": ('process.env.set = { B = "2", A = "1" }', "process.env_set", (("A", "1"), ("B", "2"))),
    "process.env.forbid": ('process.env.forbid = ["LD_*", "*"]', "process.env_forbid", ("LD_*", "*")),
    "seccomp.profile": ('seccomp.profile = "strict"', "seccomp", "strict"),
    "hints.low": ('hints.low = "1M"', "hints.low", MIB),
    "hints.medium": ('hints.medium = "512M"', "hints.medium", 512 * MIB),
    "hints.high": ('hints.high = "2G"', "hints.high", 2 * GIB),
    **{f"process.rlimits.{name}": rlimit(name)
       for name in LIMITS},
}  # fmt: skip


@pytest.mark.parametrize("key", MEANINGS)
def test_what_a_key_comes_to(key):
    line, attribute, value = MEANINGS[key]
    head = "" if key == "name" else 'name = "x"\n'
    head += "" if key == "description" else 'description = "d"\n'
    found = load((head + line).encode())
    for name in attribute.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_every_key_is_tried():
    assert {*MEANINGS, "extends"} == set(key_paths())


def test_what_is_not_said_is_the_built_in_default():
    assert load(HEAD) == msgspec.structs.replace(DEFAULT, name="x", description="d")


@pytest.mark.parametrize(
    ("line", "attribute"),
    [
        ('memory.max = "none"', "limits.memory_max"),
        ('memory.swap = "none"', "limits.memory_swap_max"),
        ('pids.max = "none"', "limits.pids_max"),
        ('cpu = { max = 1, burst = "none" }', "limits.cpu_burst"),
        ('time.timeout = "none"', "timeout"),
        ('fs.file_size = "none"', "fs.file_size"),
        ('memory = { burst = "none", burst_seconds = 5 }', "limits.burst_seconds"),
    ],
)
def test_none_is_no_limit(line, attribute):
    found = load(HEAD + line.encode())
    for name in attribute.split("."):
        found = getattr(found, name)
    assert found is None


def test_one_rlimit_is_both():
    found = load(HEAD + b'process.rlimits = { nofile = 50, stack = ["none", "none"], as = "none" }').process.rlimits
    assert found == (Rlimit("as", None, None), Rlimit("nofile", 50, 50), Rlimit("stack", None, None))


def test_a_burst_of_exactly_the_quota_is_none_too_many():
    """In microseconds, as the kernel compares them; a tenth of 0.7 is not 0.07 in binary."""
    limits = load(HEAD + b"cpu = { max = 0.7, burst = 0.07 }").limits
    files = plan_limits(limits)
    assert files["cpu.max"].split()[0] == files["cpu.max.burst"]
    assert "0.07001" in refused(HEAD + b"cpu = { max = 0.7, burst = 0.07001 }", "cpu.burst", 0.07001)


# ---------------------------------------------------------------- what is wrong


@given(valid, st.data())
@many
def test_a_value_of_the_wrong_kind(tree, data):
    """Any place of any valid document, with something there that the schema (a judge of its own) refuses."""
    path = data.draw(st.sampled_from([*places(tree)]))
    value = data.draw(st.sampled_from([value for value in STRANGE if value != lookup(tree, path)]))
    spoiled = changed(tree, path, value)
    assume(not JUDGE.is_valid(spoiled))
    refused(text_of(spoiled), key_of(path), value)


def text_of(tree) -> bytes:
    """``text``, for values too that TOML has but we never write; no word of a document has an @."""
    return re.sub(rb'"@([^"]+)"', rb"\1", text(_with_dates_marked(tree)))


def _with_dates_marked(tree):
    if isinstance(tree, dict):
        return {key: _with_dates_marked(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_dates_marked(value) for value in tree]
    return f"@{tree.isoformat()}" if hasattr(tree, "isoformat") else tree


@given(valid, st.data())
@many
def test_an_unknown_key(tree, data):
    path = data.draw(st.sampled_from(tables(tree)))
    name = data.draw(st.sampled_from(UNKNOWN))
    value = data.draw(st.sampled_from([value for value in STRANGE if value != {}]))
    message = refused(text_of(changed(tree, (*path, name), value)), key_of((*path, name)), value)
    assert ": unknown key, with " in message
    assert message.endswith(")")


@given(valid, st.sampled_from(["name", "description"]))
def test_a_key_that_must_be_there(tree, key):
    message = refused(text({name: value for name, value in tree.items() if name != key}), key)
    assert ": is missing; it is " in message


@pytest.mark.parametrize(
    ("line", "key", "advice"),
    [
        ('memroy.max = "2G"', "memroy", "did you mean memory?"),
        ('memory.maxx = "2G"', "memory.maxx", "did you mean memory.max?"),
        ("timeout = 5", "timeout", "did you mean time.timeout?"),
        ("pids.limit = 5", "pids.limit", "known: max"),
        ("process.rlimits.nproc = 5", "process.rlimits.nproc", "say pids.max"),
        ("memory.max = 536870912", "memory.max", 'is not a size such as "512M", or "none"'),
        ('memory.max = "12 parsecs"', "memory.max", '"12 parsecs" is not a size such as "512M"'),
        ('time.timeout = "10m"', "time.timeout", '"10m" is not a number of seconds (0.001 to 1000000000), or "none"'),
        ("time.timeout = nan", "time.timeout", "nan is not a number"),
        ("time.timeout = inf", "time.timeout", "inf is not a number"),
        ("pids.max = 5.0", "pids.max", "5.0 is not a whole number"),
        ("pids.max = 0", "pids.max", "0 is not a whole number from 1 to 4194304"),
        ("pids.max = true", "pids.max", "true is not a whole number"),
        ("cpu.max = 0.001", "cpu.max", "0.001 is not a number of processors (0.01 to 4096)"),
        ('net.mode = "bridge"', "net.mode", '"bridge" is not "none", "host" or "egress"'),
        ('process.umask = "999"', "process.umask", '"999" is not three octal digits such as "022"'),
        ("process.umask = 0o22", "process.umask", "18 is not three octal digits"),
        ("process.groups = [1, 2, 99999]", "process.groups[2]", "99999 is not a whole number from 0 to 65535"),
        ('process.rlimits.nofile = [1, "x"]', "process.rlimits.nofile[1]", '"x" is not a whole number up to 2^53, or "none"'),
        ("process.rlimits.nofile = [1]", "process.rlimits.nofile", "[1] is not a whole number"),
        ("process.env.set = { A = 1 }", "process.env.set.A", "1 is not text in quotes"),
        ("net.hosts = { 'a b' = 1 }", 'net.hosts."a b"', "1 is not text in quotes"),
        ('fs.binds = [{ source = "/a" }, { source = 3 }]', "fs.binds[1].source", "3 is not text in quotes"),
        ('fs.binds = [{ target = "/a" }]', "fs.binds[0].source", "is missing; it is text in quotes"),
        ("process.user = 0", "process.user", "0 is not a whole number from 1 to 65535; no tool is root"),
        ("process.rlimits.stack = 9223372036854775807", "process.rlimits.stack", "is not a whole number up to 2^53"),
        ("process.user = 0x" + "f" * 20000, "process.user", "a number of 80000 bits is not"),
        ("best_effort = 1979-05-27", "best_effort", "1979-05-27 is not true or false"),
    ],
)
def test_the_advice(line, key, advice):
    assert advice in refused(HEAD + line.encode(), key)


FAR = "/" + "x" * 1100
CONTRADICTIONS = [
    # (tables that replace the document's, the key that is named, the value that is shown)
    ({"memory": {"max": "0"}}, "memory.max", "0"),
    ({"memory": {"max": "9999999T"}}, "memory.max", "9999999T"),
    ({"memory": {"max": "100K"}}, "memory.max", "100K"),
    ({"memory": {"high": "100K"}}, "memory.high", "100K"),
    ({"memory": {"max": "1.5G", "high": "3G"}}, "memory.high", "3G"),
    ({"memory": {"high": "3G"}}, "memory.high", "3G"),
    ({"memory": {"max": "1G", "high": "512M", "burst": "600M", "burst_seconds": 5}}, "memory.burst", "600M"),
    ({"memory": {"burst": "600M", "burst_seconds": 5}}, "memory.burst", "600M"),
    ({"memory": {"high": "512M", "burst": "600M"}}, "memory.burst", "600M"),
    ({"memory": {"burst_seconds": 7}}, "memory.burst_seconds", 7),
    ({"memory": {"swap": "9999999T"}}, "memory.swap", "9999999T"),
    ({"cpu": {"burst": 0.05}}, "cpu.burst", 0.05),
    ({"cpu": {"max": "none", "burst": 0.05}}, "cpu.burst", 0.05),
    ({"cpu": {"max": 0.5, "burst": 0.06}}, "cpu.burst", 0.06),
    ({"fs": {"scratch": "0"}}, "fs.scratch", "0"),
    ({"fs": {"scratch": "512K"}}, "fs.scratch", "512K"),
    ({"fs": {"file_size": "0"}}, "fs.file_size", "0"),
    *(({"fs": {"masked": ["/etc/x", path]}}, "fs.masked[1]", path) for path in (
        "", "/", "x", "/a/../b", "//x", "/a/", "/a//b", "/a/.", "/a\0", FAR, "/proc", "/sys", "/dev", "/run", "/run/agentrun",
        "/run/agentrun/scratch")),
    *(({"fs": {"read_only": [path]}}, "fs.read_only[0]", path) for path in ("/run", "/run/agentrun", "/run/agentrun/etc", "/")),
    *(({"fs": {"binds": [{"source": path}]}}, "fs.binds[0].source", path) for path in (
        "/proc", "/proc/self", "/sys/fs", "/dev/null", "/run", "/run/docker.sock", "/var/run/docker.sock", "/boot", "/etc/shadow",
        "/etc", "/etc/ssl", "/root", "/root/.ssh", "/root/.ssh/id", "relative", "/", "//proc", "/srv/../proc", "/a\0", FAR)),
    *(({"fs": {"binds": [{"source": path, "mode": "rw"}]}}, "fs.binds[0].source", path) for path in (
        "/usr", "/usr/local/lib", "/lib", "/etc/apt", "/sbin")),
    *(({"fs": {"binds": [{"source": "/srv/a", "target": path}]}}, "fs.binds[0].target", path) for path in (
        "/", "/proc", "/proc/self", "/sys", "/sys/fs/cgroup", "/dev", "/dev/shm", "/run", "/run/agentrun/x", "x", "/a/")),
    *(({"fs": {"binds": [{"source": "/srv/a", "target": path}, {"source": "/x"}]}}, "fs.binds[1].target", "/x") for path in (
        "/x", "/x/y")),
    ({"net": {"allow": ["a.example:1"]}}, "net.allow", ["a.example:1"]),
    ({"net": {"mode": "host", "allow": ["a.example:1"]}}, "net.allow", ["a.example:1"]),
    ({"net": {"hosts": {"a.example": "192.0.2.1"}}}, "net.hosts", {"a.example": "192.0.2.1"}),
    ({"net": {"mode": "egress"}}, "net.allow", []),
    ({"net": {"mode": "egress", "allow": ["a.example:1", "nonsense"]}}, "net.allow[1]", "nonsense"),
    ({"net": {"mode": "egress", "allow": ["192.0.2.1:80"]}}, "net.allow[0]", "192.0.2.1:80"),
    ({"net": {"mode": "egress", "allow": ["a" * 600 + ":1"]}}, "net.allow[0]", "a" * 600 + ":1"),
    ({"net": {"mode": "egress", "allow": ["a.b:1"], "hosts": {"a\u00ad.b": "::1%x"}}}, 'net.hosts."a\\u00ad.b"', "::1%x"),
    ({"net": {"mode": "egress", "allow": ["a.b:1"], "hosts": {"a" * 600: "::1"}}}, f"net.hosts.\"{'a' * 60}…\"", "::1"),
    ({"net": {"mode": "egress", "allow": ["a.example:1"], "hosts": {"a.b": "nowhere"}}}, 'net.hosts."a.b"', "nowhere"),
    *(({"process": {"env": {"pass": ["LANG", name]}}}, "process.env.pass[1]", name) for name in ("", "A=B", "A*", "*", "A\0")),
    *(({"process": {"env": {"forbid": [name]}}}, "process.env.forbid[0]", name) for name in ("", "A=B", "*A", "A**", "A\0")),
    *(({"process": {"env": {"set": {name: "v"}}}}, "process.env.set", name) for name in ("", "A=B", "A*", "A\0")),
    ({"process": {"env": {"set": {"A": "x\0"}}}}, "process.env.set.A", "x\0"),
    *(({"process": {"hostname": name}}, "process.hostname", name) for name in (
        "", "-a", "a-", "a..b", ".a", "a_b", "a b", "a\n", "é", "x" * 64 + ".y", "x" * 65)),
    ({"process": {"rlimits": {"nofile": [50, 40]}}}, "process.rlimits.nofile", [50, 40]),
    ({"process": {"rlimits": {"nofile": 15}}}, "process.rlimits.nofile", 15),
    ({"process": {"rlimits": {"nofile": [0, 40]}}}, "process.rlimits.nofile", [0, 40]),
    ({"process": {"rlimits": {"as": 4096}}}, "process.rlimits.as", 4096),
    ({"process": {"rlimits": {"stack": 4096}}}, "process.rlimits.stack", 4096),
    ({"process": {"rlimits": {"as": ["none", 5000000]}}}, "process.rlimits.as", ["none", 5000000]),
    ({"process": {"rlimits": {"fsize": 5}}, "fs": {"file_size": "1M"}}, "process.rlimits.fsize", 5),
    ({"process": {"rlimits": {"cpu": 5}}, "time": {"cpu": 6}}, "process.rlimits.cpu", 5),
    *(({"seccomp": {"profile": path}}, "seccomp.profile", path) for path in ("/a//b", "/../p", "/a/", "//a")),
    ({"hints": {"low": "2G"}}, "hints.low", "2G"),
    ({"hints": {"high": "512M"}}, "hints.high", "512M"),
    ({"hints": {"low": "2M", "medium": "1M"}}, "hints.low", "2M"),
    ({"hints": {"medium": "9G"}}, "hints.medium", "9G"),
    ({"hints": {"low": "0"}}, "hints.low", "0"),
]  # fmt: skip


@pytest.mark.parametrize("contradiction", CONTRADICTIONS, ids=lambda item: f"{item[1]}={show(item[2])[:30]}")
@given(valid)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_contradiction(contradiction, tree):
    """In whatever document it stands."""
    patch, key, value = contradiction
    spoiled = {**{name: value for name, value in tree.items() if name not in ("fs", "process", "time")}, **patch}
    assert JUDGE.is_valid(spoiled), "the types already refuse this"
    message = refused(text(spoiled), key)
    # A size is shown as a command line shows it, in the other quotes.
    assert show(value) in message or repr(value) in message
    assert len(message.removeprefix(f"{WHERE}: {key}: ").removeprefix(show(value))) > 10, "there is no advice"


def test_a_host_name_of_many_labels_is_no_deep_key():
    name = ".".join("0123456789abcdef" * 2) + ".ip6.arpa:443"
    assert load(HEAD + f'net = {{ mode = "egress", allow = ["{name}"] }}'.encode()).egress.allow == (name,)


# ---------------------------------------------------------------- the schema


def structure(data: bytes) -> bool:
    try:
        read_tables(data, WHERE)
    except UsageError:
        return False
    return True


@given(valid)
@many
def test_a_valid_document_is_valid_by_the_schema(tree):
    data = text(tree)
    assert tomllib.loads(data.decode()) == tree, "the writer of TOML and the reader do not agree"
    JUDGE.validate(tree)
    load(data)


@given(valid | loose, st.data())
@many
def test_the_schema_and_the_loader_agree(tree, data):
    path = data.draw(st.sampled_from([*places(tree), *((*path, name) for path in tables(tree) for name in UNKNOWN[:3])]))
    spoiled = text_of(changed(tree, path, data.draw(st.sampled_from(STRANGE))))
    assert structure(spoiled) == JUDGE.is_valid(tomllib.loads(spoiled.decode()))


@pytest.mark.parametrize("line", [b"pids.max = 5.0", b"time.timeout = nan"])
def test_where_they_do_not(line):
    """JSON has one kind of number, and no nan. There is no other difference that we know of."""
    assert not structure(HEAD + line)
    assert JUDGE.is_valid(tomllib.loads((HEAD + line).decode()))


BESIDES = {
    "memory.max", "memory.high", "memory.swap", "memory.burst", "memory.burst_seconds", "cpu.burst", "fs.scratch", "fs.file_size",
    "fs.masked", "fs.read_only", "fs.binds.source", "fs.binds.target", "net.allow", "net.hosts", "process.env.pass",
    "process.env.set", "process.env.forbid", "process.hostname", "process.rlimits", "seccomp.profile", "hints.low",
    "hints.medium", "hints.high",
}  # fmt: skip
"""The keys that more is asked of than the schema says; docs/policies.md lists what."""


def besides(message: str) -> str:
    """The key a message is about, without numbers and free keys."""
    key = re.sub(r"\[\d+\]", "", message.removeprefix(f"{WHERE}: ").split(": ")[0])
    return next((known for known in BESIDES if key == known or key.startswith(known + ".")), key)


@given(loose)
@many
def test_what_the_schema_lets_through_is_refused_for_a_listed_reason(tree):
    JUDGE.validate(tree)
    message = complaint(text(tree))
    assert message is None or besides(message) in BESIDES, message


def test_every_listed_reason_happens():
    found = {re.sub(r"\[\d+\]", "", key) for _, key, _ in CONTRADICTIONS}
    assert {besides(f"{WHERE}: {key}: ") for key in found} == BESIDES


def documented() -> dict[str, list[str]]:
    """Key → the other cells of its row in docs/policies.md."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCUMENTATION.read_text().splitlines()]
    return {row[0].strip("`"): row[1:] for row in rows if len(row) == 5 and row[0].startswith("`")}


def test_the_documentation_has_every_key_with_its_default():
    rows = documented()
    assert {re.sub(r"(process\.rlimits)\..*", r"\1", key) for key in key_paths()} == set(rows)
    for name in ("as", *(key.rpartition(".")[2] for key in key_paths() if key.startswith("process.rlimits."))):
        assert f"{name}," in rows["process.rlimits"][2] or f"{name}:" in rows["process.rlimits"][2]
    defaults = dict(differences_from_nothing())
    for key, (_, default, _, _) in rows.items():
        if default.startswith("`"):
            assert default == f"`{defaults[key]}`", key
        else:
            assert key in ("fs.masked", "fs.read_only") or key not in defaults, key


def differences_from_nothing():
    """Key and value, as TOML, of the built-in default."""
    for key in key_paths():
        value = tomllib.loads(write_policy(DEFAULT))
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value not in (None, {}) and key not in ("name", "description"):
            yield key, write_value(value)


def test_the_documentation_has_every_reason():
    listed = DOCUMENTATION.read_text().partition("### What is checked besides")[2].partition("\n## ")[0]
    words = set(re.findall(r"`([a-z_.]+)`", listed))
    assert {"fs.binds" if key.startswith("fs.binds") else key for key in BESIDES} - {"fs.file_size"} <= words


def test_the_documented_examples_load():
    examples = re.findall(r"```toml\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    assert len(examples) == 3
    shipped = PolicyStore([Path(__file__).parents[2] / "policies"])
    for example in examples:
        tables = read_tables(example.encode(), WHERE)
        base = read_tables(shipped.locate(tables.extends).read_bytes(), WHERE)
        resolve(merge(base, tables), WHERE)


def test_the_documented_complaint_is_what_is_said():
    assert refused(HEAD + b'memory.high = "3G"', "memory.high").removeprefix(WHERE) in DOCUMENTATION.read_text()


# ---------------------------------------------------------------- bytes


def slow(unit: bytes, head: bytes = b"") -> bytes:
    return head + unit * ((LARGEST - len(head)) // len(unit))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff", b"\0", b"\xef\xbb\xbf" + HEAD, HEAD + b"\r", HEAD + b'name = "y"', HEAD + b"x = [", HEAD + b'x = "\\q"',
        HEAD + b"x = 1979-13-01", HEAD + b'x = "\\ud800"', HEAD + b'"\\u001b[2J\\n" = 1', bytes(range(256)), b"x" * (LARGEST + 1),
        slow(b"["), slow(b"[", b"x="), slow(b"{x=", b"x="), slow(b"[[x]]\n"), slow(b"x."), slow(b'"x".'), slow(b"x . "),
        slow(b"9", b"x="), slow(b"f", b"x=0x"), slow(b"1_", b"x="), slow(b"9", b"x=1e"), slow(b"x"), slow(b"x", b'x="""'),
        slow(b'"'), slow(b"\\", b'x="'), slow(b" ", b"x="), slow(b"\n"), slow(b"- "), slow(b"'x"),
        b"\n".join(b"x%d.%s=1" % (number, b".".join([b"x"] * 120)) for number in range(260)),
        b"x={" + b",".join(b"x%d.x.x.x=1" % number for number in range(4000)) + b"}",
    ],
    ids=lambda data: repr(data[:12]),
)  # fmt: skip
def test_bytes_that_are_no_policy(data):
    """One line, and soon: tomllib alone needs minutes for some of these."""
    begun = time.process_time()
    with pytest.raises(UsageError) as caught:
        load(data)
    assert time.process_time() - begun < 5
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ")
    assert message.isprintable()
    assert len(message) < 600


@given(valid, st.integers(0, 1 << 32), st.integers(1, 4))
@many
def test_spoiled_bytes_are_a_policy_or_one_line(tree, seed, count):
    chance = random.Random(seed)
    data = bytearray(text(tree))
    spoils = [b"", b'"', b"[", b"\n", b"\xff", b".", b"=", b"{", b"9", b"\\", b"'"]
    for _ in range(count):
        at = chance.randrange(len(data))
        data[at : at + chance.randrange(3)] = chance.choice(spoils)
    message = complaint(bytes(data))
    assert message is None or (message.startswith(f"{WHERE}: ") and message.isprintable())


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@many
def test_any_bytes(data):
    with pytest.raises(UsageError) as caught:
        load(data)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert str(caught.value).isprintable()


# ---------------------------------------------------------------- back, and over one another


@given(valid)
@many
def test_what_is_shown_loads_to_the_same(tree):
    policy = load(text(tree))
    shown = write_policy(policy)
    assert load(shown.encode()) == policy
    assert resolve(tables_of(policy), WHERE) == policy
    assert set(read_keys(tomllib.loads(shown))) >= {key for key in key_paths() if not optional(key)}


def optional(key: str) -> bool:
    """Keys that ``show`` may leave out: what it resolves is no part of it, and limits that are not set have no word."""
    return key in ("extends", "memory.burst_seconds") or key.startswith("process.rlimits.")


def read_keys(tree, path=()):
    for key, value in tree.items():
        yield ".".join((*path, key))
        if isinstance(value, dict):
            yield from read_keys(value, (*path, key))


@given(valid, valid)
@some
def test_differences_are_what_differs(one, other):
    first, second = load(text(one)), load(text(other))
    found = differences(first, second)
    same = msgspec.structs.replace(first, name=second.name, description=second.description) == second
    assert (found == []) == same
    assert differences(first, first) == []
    assert {(key, after, before) for key, before, after in differences(second, first)} == set(found)


def test_differences_by_key():
    one = load(HEAD + b'memory.max = "1G"\nprocess.env.set = { A = "1", "b c" = "2" }')
    other = load(HEAD + b'memory.max = "none"\nprocess.env.set = { A = "3" }\nprocess.rlimits.nofile = 50')
    assert differences(one, other) == [
        ("memory.max", '"1G"', '"none"'),
        ("process.env.set.A", '"1"', '"3"'),
        ('process.env.set."b c"', '"2"', None),
        ("process.rlimits.nofile", None, "50"),
    ]


@given(valid, valid)
@some
def test_a_policy_laid_over_another(base, over):
    """Key by key; a list, and a table of free keys, as a whole. Judged by the trees, not by the tables."""
    merged = merge(read_tables(text(base), WHERE), read_tables(text(over), WHERE))

    def lay(under, upon, path=()):
        free = path in (("net", "hosts"), ("process", "env", "set"))
        if not isinstance(under, dict) or not isinstance(upon, dict) or free:
            return upon
        return {**under, **{key: lay(under[key], value, (*path, key)) if key in under else value for key, value in upon.items()}}

    assert merged == msgspec.convert(lay(base, over), PolicyTables)
