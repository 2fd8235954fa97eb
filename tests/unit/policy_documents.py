# SPDX-License-Identifier: Apache-2.0
"""Policy files made by hypothesis: valid ones, ones whose types are right, and ways to spoil a valid one.

A document is the tree that tomllib makes of the file; ``text`` writes it down.
"""

import datetime
import math

from hypothesis import strategies as st

from agentrun.tomltext import write_document

WHERE = "policies/x.toml"
MIB = 1 << 20


def text(tree) -> bytes:
    return write_document(tree).encode()


def megabytes(least: int, most: int):
    """Sizes in MB, as people write them."""
    return st.builds(lambda n, unit: f"{n}{unit}", st.integers(least, most), st.sampled_from(["M", "MB", "MiB", " m"]))


words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="@"), min_size=1, max_size=20)
names = st.from_regex(r"\A[A-Z_][A-Z0-9_]{0,10}\Z")
segment = st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,8}\Z")
paths = st.lists(segment, min_size=1, max_size=3).map(lambda parts: "/data/" + "/".join(parts))
rlimits = st.integers(1 << 20, 1 << 53) | st.just("none")
ordered_pairs = st.tuples(st.integers(1 << 20, 1 << 40), st.integers(1 << 20, 1 << 40)).map(sorted)
any_number = st.integers(0, 1 << 53) | st.just("none")
any_rlimit = any_number | st.lists(any_number, min_size=2, max_size=2)
RLIMIT_NAMES = ("as", "core", "data", "locks", "memlock", "msgqueue", "nice", "nofile", "rss", "rtprio", "rttime", "sigpending",
                "stack")  # fmt: skip


def table(required=None, **optional):
    return st.fixed_dictionaries(required or {}, optional=optional)


@st.composite
def memory(draw):
    """Numbers that fit into each other."""
    top = draw(st.integers(8, 1 << 20) | st.none())
    tree = {"max": "none" if top is None else f"{top}M"}
    room = top or 1 << 20
    if draw(st.booleans()):
        high = draw(st.integers(1, room - 1))
        tree["high"] = f"{high}M"
        if draw(st.booleans()):
            tree |= {"burst": f"{draw(st.integers(1, room - high))}M", "burst_seconds": draw(st.floats(0.001, 1e6))}
    if draw(st.booleans()):
        tree |= {
            "swap": draw(st.sampled_from(["0", "none", "1G", "0M"])),
            "on_exhausted": draw(st.sampled_from(["kill", "stop", "throttle", "notify"])),
            "throttle_seconds": draw(st.floats(0, 3600)),
            "freeze_seconds": draw(st.integers(0, 3600)),
        }
    return tree


@st.composite
def cpu(draw):
    cpus = draw(st.floats(0.02, 4096))
    tree = draw(table(weight=st.integers(1, 10000) | st.just("none"))) | {"max": cpus}
    return tree | draw(table(burst=st.floats(1e-6, cpus * 0.09) | st.just("none")))


@st.composite
def net(draw):
    if draw(st.booleans()):
        return draw(table(mode=st.sampled_from(["none", "host"]), allow=st.just([]), hosts=st.just({})))
    rules = st.lists(st.sampled_from(["pkg.test:443", "*.example.org:80,443", "git.corp.example:22"]), min_size=1, max_size=3)
    addresses = st.sampled_from(["192.0.2.1", "2001:db8::1"])
    return {"mode": "egress", "allow": draw(rules)} | draw(table(hosts=st.dictionaries(st.just("pkg.test"), addresses)))


@st.composite
def binds(draw):
    targets = draw(st.lists(segment, unique=True, max_size=3))
    return [{"source": draw(paths), "target": f"/t/{t}"} | draw(table(mode=st.sampled_from(["ro", "rw"]))) for t in targets]


@st.composite
def hints(draw):
    low, medium, high = sorted(draw(st.lists(st.integers(1, 1 << 20), min_size=3, max_size=3)))
    return {"low": f"{low}M", "medium": f"{medium}M", "high": f"{high}M"}


fs = table(
    image=st.sampled_from(["host", "app", "team/app:1.2"]), root=st.sampled_from(["ro", "scratch"]),
    workspace=st.sampled_from(["rw", "ro", "none"]), binds=binds(), masked=st.lists(paths, max_size=3),
    read_only=st.lists(paths, max_size=3), scratch=megabytes(1, 4096), file_size=megabytes(1, 4096) | st.just("none"),
    landlock=st.booleans(),
)  # fmt: skip
process = table(
    user=st.integers(1, 65535), group=st.integers(1, 65535), groups=st.lists(st.integers(0, 65535), max_size=5),
    hostname=st.from_regex(r"\A[a-z0-9]{1,20}\Z"), umask=st.from_regex(r"\A0?[0-7]{3}\Z"), oom_score_adj=st.integers(0, 1000),
    rlimits=st.dictionaries(st.sampled_from(RLIMIT_NAMES), rlimits | ordered_pairs, max_size=3),
    env=table({}, **{"pass": st.lists(names, max_size=3), "set": st.dictionaries(names, words, max_size=3),
                     "forbid": st.lists(names.map(lambda name: f"{name}*") | names | st.just("*"), max_size=3)}),
)  # fmt: skip

valid = table(
    {"name": st.just("x"), "description": words},
    best_effort=st.booleans(), memory=memory(), cpu=cpu(), io=table(weight=st.integers(1, 10000) | st.just("none")),
    pids=table(max=st.integers(1, 4194304) | st.just("none")),
    time=table(timeout=st.floats(0.001, 1e9) | st.integers(1, 10**9) | st.just("none"), cpu=st.integers(1, 10**9)),
    fs=fs, net=net(), process=process, hints=hints(),
    seccomp=table(profile=st.sampled_from(["default", "strict", "/etc/p.json"])),
)  # fmt: skip
"""Files that load."""

_any_path = paths | st.sampled_from(["", "/", "//x", "/a/../b", "a", "/proc", "/run", "/etc/shadow", "/a/", "/dev/null", "/a\0b"])
_any_size = st.sampled_from(["1", "0", "1K", "1M", "64M", "2G", "9999999T", "0.5K"])
_maybe_none = _any_size | st.just("none")
_any_name = names | st.sampled_from(["", "*", "A=B", "A*", "a*b", "A\0"])
loose = table(
    {"name": st.just("x"), "description": st.just("d")},
    memory=table(max=_maybe_none, high=_maybe_none, swap=_maybe_none, burst=_maybe_none, burst_seconds=st.just(5)),
    cpu=table(max=st.just(0.5) | st.just("none"), burst=st.sampled_from([0.01, 0.05, 0.051, 5, "none"])),
    time=table(cpu=st.just(5) | st.just("none")),
    fs=table(binds=st.lists(table({"source": _any_path}, target=_any_path, mode=st.sampled_from(["ro", "rw"])), max_size=2),
             masked=st.lists(_any_path, max_size=2), read_only=st.lists(_any_path, max_size=2), scratch=_any_size,
             file_size=_maybe_none),
    net=table(mode=st.sampled_from(["none", "host", "egress"]), allow=st.lists(words | st.just("pkg.test:443"), max_size=2),
              hosts=st.dictionaries(words, st.sampled_from(["192.0.2.1", "nowhere"]), max_size=1)),
    process=table(hostname=words | st.just("ok"), rlimits=st.dictionaries(
        st.sampled_from([*RLIMIT_NAMES, "fsize", "cpu"]), any_rlimit, max_size=2),
        env=table({}, **{"pass": st.lists(_any_name, max_size=2), "forbid": st.lists(_any_name, max_size=2),
                         "set": st.dictionaries(_any_name, st.sampled_from(["v", "v\0"]), max_size=2)})),
    seccomp=table(profile=st.sampled_from(["strict", "/a", "/a//b", "/../p"])),
    hints=table(low=_any_size, medium=_any_size, high=_any_size),
)  # fmt: skip
"""Files whose structure is right, whatever they mean."""


# ---------------------------------------------------------------- spoiling

STRANGE = [
    True, False, 0, -1, 7, 1 << 70, 0.5, -1.5, math.inf, "", "12 parsecs", "512MiBs", "10m", "-1M", "1e9", "NONE", "a\nb",
    "é\x7f", "x" * 300, [], ["x"], [1, 2, 3], [[]], {}, {"zz": 1}, datetime.datetime(1979, 5, 27, 7, 32),
    datetime.date(1979, 5, 27), datetime.time(7, 32),
]  # fmt: skip
"""Values that hardly any key takes."""
UNKNOWN = ["zz", "maximum", "timeout_s", "Memory", "a b", "", "ключ", "\x1b[2J", "x" * 200, "nproc"]


def places(tree, path=()):
    """Every place of a document: tables, values, list items."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def tables(tree):
    """Every table of a document that has keys of its own, not free ones."""
    free = {("net", "hosts"), ("process", "env", "set")}
    return [(), *(path for path in places(tree) if isinstance(lookup(tree, path), dict) and path not in free)]


def lookup(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def changed(tree, path, value):
    """A copy with another value at a place."""
    if not path:
        return value
    copy = list(tree) if isinstance(tree, list) else dict(tree)
    copy[path[0]] = changed(copy.get(path[0], {}) if isinstance(copy, dict) else copy[path[0]], path[1:], value)
    return copy
