# SPDX-License-Identifier: Apache-2.0
"""What is compiled is what a profile means: `Profile.decide` and the program agree, whatever the profile says."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrun_shim import libseccomp, seccomp
from agentrun_shim.seccomp import RUNNER, compile_profile, find_profile
from agentrun_shim.seccomp_profile import Action, Condition, Op, Profile, ProfileError, Rule, load_profile
from agentrun_shim.syscall_table import NUMBERS
from tests.unit.seccomp_support import (
    ALLOW,
    KILL,
    NOTIF,
    Instruction,
    as_file,
    check_shape,
    disassemble,
    needs_kernel,
    profile_of,
    python,
    run,
    trace,
    under,
    word,
)

PODMAN = Path("/usr/share/containers/seccomp.json")
U64 = (1 << 64) - 1
NONE = (0,) * 6
EDGES = [0, 1, 2, 5, 16, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 32) + 5, 0xFFFFFFFF00000000, U64 - 1, U64]
ACTIONS = [
    *[Action("errno", number) for number in (0, 1, 13, 38, 4094)],
    *[Action("allow"), Action("kill_process"), Action("kill_thread"), Action("log"), Action("trap")],
]
STRANGERS = [337, 423, 472, 1000, 0x3FFFFFFF, 0x40000000, 0x40000027, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
NEEDED = {NUMBERS[name]: (Rule(Action("allow")),) for name in RUNNER}

values = st.sampled_from(EDGES) | st.integers(0, U64) | st.integers(0, 63).map(lambda bit: 1 << bit)
ops: st.SearchStrategy[Op] = st.sampled_from(["NE", "LT", "LE", "EQ", "GE", "GT"])
actions = st.sampled_from(ACTIONS)


@st.composite
def conditions(draw: st.DrawFn) -> tuple[Condition, ...]:
    """On distinct arguments, as a file's are by then."""
    made = []
    for arg in draw(st.lists(st.integers(0, 5), max_size=3, unique=True)):
        if draw(st.booleans()):
            made.append(Condition(arg, draw(ops), draw(values)))
        else:
            mask = draw(values)
            made.append(Condition(arg, "MASKED_EQ", draw(values) & mask, mask))
    return tuple(made)


rules = st.builds(Rule, actions, conditions())


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    numbers = st.sampled_from(sorted(set(NUMBERS.values()) - set(NEEDED)))
    calls = draw(st.dictionaries(numbers, st.lists(rules, min_size=1, max_size=5).map(tuple), max_size=6))
    if draw(st.booleans()):  # many plain rules: enough for a tree
        plain = draw(actions)
        calls = {nr: (Rule(plain),) for nr in list(NUMBERS.values())[:: draw(st.integers(1, 9))]} | calls
    return Profile("drawn", draw(actions), calls | NEEDED)


def interesting(profile: Profile, nr: int, source: random.Random) -> list[tuple[int, ...]]:
    """Arguments at and around what the rules for a call compare with."""
    near: list[list[int]] = [[0, U64] for _ in range(6)]
    for rule in profile.calls.get(nr, ()):
        for c in rule.conditions:
            near[c.arg] += [(c.value + step) & U64 for step in (-1, 0, 1)]
            near[c.arg] += [
                c.value | ~c.mask & U64,
                c.value ^ 1 << source.randrange(64),
                c.value ^ c.mask,
                source.getrandbits(64),
            ]
    return [tuple(source.choice(column) for column in near) for _ in range(40 if any(len(x) > 2 for x in near) else 2)]


def agree(profile: Profile, numbers: Sequence[int], seed: int = 0) -> None:
    source = random.Random(seed)
    for notify in (False, True):
        program = compile_profile(profile, notify=notify)
        check_shape(program)
        code: list[Instruction] = disassemble(program)
        for nr in numbers:
            for args in interesting(profile, nr, source):
                assert trace(code, nr, args)[0] == word(profile.decide(nr, args), notify), (nr, list(map(hex, args)), notify)


@settings(max_examples=80, deadline=None)
@given(profiles(), st.integers())
def test_the_program_decides_as_the_profile_does(profile: Profile, seed: int) -> None:
    ruled = [nr for nr, rules in profile.calls.items() if any(rule.conditions for rule in rules)]
    agree(profile, [*ruled, *random.Random(seed).sample(sorted(NUMBERS.values()), 40), *STRANGERS], seed)


@settings(max_examples=150, deadline=None)
@given(st.lists(rules, min_size=1, max_size=8), actions, st.integers())
def test_rules_for_one_call_keep_their_order(drawn: list[Rule], default: Action, seed: int) -> None:
    agree(Profile("drawn", default, NEEDED | {NUMBERS["chmod"]: tuple(drawn)}), [NUMBERS["chmod"]], seed)


@pytest.mark.parametrize("name", ["default", "strict", str(PODMAN)])
def test_shipped_and_installed_profiles(name: str) -> None:
    if "/" in name and not Path(name).exists():
        pytest.skip(f"{name} is not installed (containers-common)")
    agree(find_profile(name), [*range(601), *STRANGERS])


def same(*rules: dict[str, object], default: str = "SCMP_ACT_ALLOW") -> Profile:
    profile = profile_of(*rules, default=default)
    agree(profile, list(profile.calls) or [0])
    return profile


def test_what_libseccomp_refuses_or_merges() -> None:
    """A rule equal to the default, one rule twice, no rule at all, one that is always or never true, one for everything."""
    chmod = {"names": ["chmod"], "action": "SCMP_ACT_ERRNO"}
    always = {"index": 0, "op": "SCMP_CMP_GE", "value": 0}
    never = {"index": 0, "op": "SCMP_CMP_GT", "value": U64}
    nothing = {"index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": 0, "valueTwo": 0}
    same()
    same({"names": ["chmod"], "action": "SCMP_ACT_ALLOW"})
    same(chmod, chmod)
    for arg in (always, never, nothing):
        same(chmod | {"args": [arg]}, chmod | {"args": [arg]})
        same(chmod | {"args": [arg]}, {"names": ["chmod"], "action": "SCMP_ACT_LOG"})
        same({"names": ["chmod"], "action": "SCMP_ACT_LOG", "args": [arg]}, chmod)
    everything = {"names": sorted(NUMBERS.keys() - RUNNER.keys()), "action": "SCMP_ACT_KILL"}
    same(everything)


HARD = [
    # One program of these is wrong for every third call; libseccomp 2.5.4.
    [[(3, "LT", 1 << 32)], [(3, "LT", 0)], [(3, "LT", 1 << 31)]],
    [[(5, "LE", 1)], [(5, "LT", 2)], [(5, "GT", U64 - 1)], [(5, "EQ", 0xFFFFFFFF00000000)]],
    # Of these it makes no end.
    [
        [(0, "GT", 0x10D5FE140BF3D0A7), (1, "GE", 5), (2, "EQ", U64 - 1)],
        [(0, "LT", 0), (2, "NE", U64)],
        [(0, "NE", U64), (1, "MASKED_EQ", 0x7FFFFFFF), (2, "LE", 0x10)],
        [(0, "LE", (1 << 32) + 5), (1, "GE", 0x10)],
        [(0, "NE", U64), (1, "NE", U64 - 1), (2, "NE", 5)],
        [(0, "EQ", 5), (1, "LE", 0), (2, "NE", 1)],
    ],
]


@pytest.mark.parametrize("hard", HARD)
def test_rules_libseccomp_cannot_join(hard: list[list[tuple[int, str, int]]]) -> None:
    rules = [
        {
            "names": ["chmod"],
            "action": "SCMP_ACT_ERRNO",
            "args": [{"index": index, "op": f"SCMP_CMP_{op}", "value": value} for index, op, value in conditions],
        }
        for conditions in hard
    ]
    same(*rules)


def test_numbers_that_look_like_an_action() -> None:
    for value in (seccomp._NEXT, NOTIF, ALLOW):
        for more in ({"op": "SCMP_CMP_EQ", "value": value}, {"op": "SCMP_CMP_MASKED_EQ", "value": value, "valueTwo": 0}):
            same({"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0} | more]})


def test_a_rule_with_arguments_before_one_without() -> None:
    """For libseccomp alone the second would be all there is."""
    rules = [
        {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "op": "SCMP_CMP_EQ", "value": 0o4755}]},
        {"names": ["chmod"], "action": "SCMP_ACT_ALLOW"},
    ]
    program = compile_profile(same(*rules))
    assert [run(program, NUMBERS["chmod"], [0, mode]) for mode in (0o4755, 0o755)] == [0x50001, ALLOW]


def test_what_a_supervisor_is_asked() -> None:
    source = [
        {"names": ["chmod"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["chown"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0},
        {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        {"names": ["link"], "action": "SCMP_ACT_LOG"},
        {"names": ["bpf"], "action": "SCMP_ACT_KILL_PROCESS"},
        {"names": ["acct"], "action": "SCMP_ACT_TRAP"},
    ]
    program = compile_profile(profile_of(*source), notify=True)
    found = {name: run(program, NUMBERS[name]) for rule in source for name in rule["names"]}
    assert found == {"chmod": NOTIF, "chown": NOTIF, "link": NOTIF, "mount": 0x50026, "bpf": KILL, "acct": 0x30000}
    assert run(program, NUMBERS["read"]) == ALLOW
    assert run(compile_profile(load_profile(everything_but_the_runner("SCMP_ACT_ERRNO")), notify=True), 400) == NOTIF


# ---------------------------------------------------------------- what the runner needs


def everything_but_the_runner(default: str, *without: str) -> bytes:
    return as_file({"names": sorted(RUNNER.keys() - set(without)), "action": "SCMP_ACT_ALLOW"}, default=default)


@pytest.mark.parametrize("name", sorted(RUNNER))
def test_a_profile_has_to_allow_what_the_runner_uses(name: str) -> None:
    for source in (
        everything_but_the_runner("SCMP_ACT_ERRNO", name),
        as_file({"names": [name], "action": "SCMP_ACT_KILL"}, default="SCMP_ACT_ALLOW"),
    ):
        with pytest.raises(ProfileError) as caught:
            compile_profile(load_profile(source, "mine.json"))
        assert str(caught.value) == f"mine.json: syscalls: the profile must allow {name}: the runner uses them"


def test_all_that_is_missing_is_named() -> None:
    with pytest.raises(ProfileError, match=r"must allow chdir, clock_gettime, close, .*, umask: the runner"):
        compile_profile(load_profile(as_file()))


def test_to_log_what_the_runner_uses_does_where_nobody_has_to_answer() -> None:
    profile = profile_of(default="SCMP_ACT_LOG")
    assert run(compile_profile(profile), NUMBERS["read"]) == 0x7FFC0000
    with pytest.raises(ProfileError, match="must allow"):
        compile_profile(profile, notify=True)
    allowed = load_profile(everything_but_the_runner("SCMP_ACT_LOG"))
    assert run(compile_profile(allowed, notify=True), NUMBERS["chmod"]) == NOTIF


def test_arguments_the_runner_always_uses() -> None:
    tiocsctty = {"names": ["ioctl"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "op": "SCMP_CMP_EQ", "value": 0x540E}]}
    with pytest.raises(ProfileError, match="must allow ioctl"):
        compile_profile(profile_of(tiocsctty))
    tcgets = tiocsctty | {"args": [{"index": 1, "op": "SCMP_CMP_EQ", "value": 0x5401}]}
    executable = {
        "names": ["mmap"],
        "action": "SCMP_ACT_ERRNO",
        "args": [{"index": 2, "op": "SCMP_CMP_MASKED_EQ", "value": 4, "valueTwo": 4}],
    }
    compile_profile(profile_of(tcgets, executable))


# ---------------------------------------------------------------- limits and failures


def wide(count: int) -> list[dict[str, object]]:
    args = [{"index": 0, "op": "SCMP_CMP_EQ", "value": value << 32 | value} for value in range(count)]
    return [{"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "args": args}]


@needs_kernel
def test_the_kernel_takes_a_long_program() -> None:
    program = compile_profile(profile_of(*wide(700)))
    assert 2000 < len(disassemble(program)) <= seccomp.BPF_MAXINSNS
    result = python(
        program, "import os\ntry:\n os.chmod('/dev/null', 0o666)\nexcept OSError as e: print(e.errno)\nelse: print(0)"
    )
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr
    assert under(program, "echo", "hi").stdout == "hi\n"


def test_a_program_too_long_for_the_kernel_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"^test.json: syscalls: \d{5} instructions, the kernel takes 4096$"):
        compile_profile(profile_of(*wide(3000)))


def test_a_library_that_is_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    libseccomp._library.cache_clear()
    monkeypatch.setattr(libseccomp, "LIBRARY", "libseccomp.so.99")
    with pytest.raises(FileNotFoundError, match=r"apt-get install libseccomp2.*libseccomp\.so\.99"):
        compile_profile(find_profile("default"))
    monkeypatch.setattr(libseccomp, "LIBRARY", "libseccomp.so.2")
    monkeypatch.setattr(libseccomp, "LEAST", (2, 99))
    with pytest.raises(OSError, match=r"version 2\.\d+\.\d+ is too old \(2\.99 or newer is needed\): 'libseccomp\.so\.2'"):
        compile_profile(find_profile("default"))
    libseccomp._library.cache_clear()


def test_a_rule_libseccomp_refuses_is_named() -> None:
    with pytest.raises(OSError, match=r"seccomp_rule_add, system call 90"):
        libseccomp.export(ALLOW, KILL, [(ALLOW, 90, ())])
    with pytest.raises(OSError, match="refuses default action 0x123"):
        libseccomp.export(0x123, KILL, [])
