# SPDX-License-Identifier: Apache-2.0
"""Seccomp profile files: what they mean, what of real ones is accepted, and one line for everything that is wrong."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from agentrun_shim.seccomp_profile import Action, Condition, Profile, ProfileError, Rule, load_profile
from agentrun_shim.syscall_table import NUMBERS
from tests.unit.seccomp_support import as_file, profile_of

PODMAN = Path("/usr/share/containers/seccomp.json")
READ, CHMOD, CLONE = NUMBERS["read"], NUMBERS["chmod"], NUMBERS["clone"]
NONE = (0,) * 6
REFUSE = {"names": ["chmod"], "action": "SCMP_ACT_ERRNO"}


def decided(profile: Profile, syscall: str, *args: int) -> str:
    """The decision, for people; arguments that are not given are 0."""
    return str(profile.decide(NUMBERS[syscall], (*args, *NONE)[:6]))


def arg(index: int, op: str, value: int, two: int = 0) -> dict[str, object]:
    return {"index": index, "op": f"SCMP_CMP_{op}", "value": value, "valueTwo": two}


# ---------------------------------------------------------------- meaning


@pytest.mark.parametrize(
    ("action", "more", "expected"),
    [
        ("SCMP_ACT_ALLOW", {}, Action("allow")),
        ("SCMP_ACT_ERRNO", {}, Action("errno", errno.EPERM)),
        ("SCMP_ACT_ERRNO", {"errnoRet": 38}, Action("errno", 38)),
        ("SCMP_ACT_ERRNO", {"errnoRet": 0}, Action("errno", 0)),
        ("SCMP_ACT_ERRNO", {"errno": "ENOTSUP"}, Action("errno", 95)),
        ("SCMP_ACT_ERRNO", {"errno": "EPERM", "errnoRet": 1}, Action("errno", 1)),
        ("SCMP_ACT_KILL", {}, Action("kill_thread")),
        ("SCMP_ACT_KILL_THREAD", {}, Action("kill_thread")),
        ("SCMP_ACT_KILL_PROCESS", {}, Action("kill_process")),
        ("SCMP_ACT_LOG", {}, Action("log")),
        ("SCMP_ACT_TRAP", {}, Action("trap")),
        ("SCMP_ACT_TRAP", {"errno": "", "errnoRet": None}, Action("trap")),
    ],
)
def test_actions(action: str, more: dict[str, object], expected: Action) -> None:
    profile = profile_of({"names": ["chmod"], "action": action, **more})
    assert profile.decide(CHMOD, NONE) == expected
    assert profile.decide(READ, NONE) == Action("allow")
    prefixed = {f"default{key[0].upper()}{key[1:]}": value for key, value in more.items()}
    assert load_profile(as_file(default=action, **prefixed)).default == expected


def test_actions_for_people() -> None:
    assert [str(action) for action in (Action("allow"), Action("errno", 1), Action("errno", 4000))] == [
        "allow", "errno EPERM", "errno 4000",
    ]  # fmt: skip


BIG = 2**64 - 1


@pytest.mark.parametrize(
    ("op", "value", "two", "yes", "no"),
    [
        ("EQ", 5, 0, [5], [4, 6, 5 | 1 << 32]),
        ("NE", 5, 0, [4, 6, 5 | 1 << 32], [5]),
        ("LT", 5, 0, [0, 4], [5, 6, BIG]),
        ("LE", 5, 0, [0, 5], [6, BIG]),
        ("GE", 5, 0, [5, 6, BIG], [4, 0]),
        ("GT", 5, 0, [6, BIG], [5, 0]),
        ("EQ", BIG, 0, [BIG], [BIG - 1, 0xFFFFFFFF]),
        ("MASKED_EQ", 0xFF, 5, [5, 0x105, BIG - 250], [4, 0x104]),
        ("MASKED_EQ", 0x7E020000, 0, [17, 1 << 40], [1 << 17, 1 << 30]),
    ],
)
def test_comparisons(op: str, value: int, two: int, yes: list[int], no: list[int]) -> None:
    for index in range(6):
        profile = profile_of(REFUSE | {"args": [arg(index, op, value, two)]})
        for given, action in [(x, "errno EPERM") for x in yes] + [(x, "allow") for x in no]:
            args = [0xABCDEF] * 6
            args[index] = given
            assert decided(profile, "chmod", *args) == action


def test_conditions_on_several_arguments_have_to_hold_all() -> None:
    profile = profile_of(REFUSE | {"args": [arg(0, "EQ", 1), arg(2, "GT", 7)]})
    assert [decided(profile, "chmod", *args) for args in ((1, 0, 8), (1, 0, 7), (2, 0, 8))] == ["errno EPERM", "allow", "allow"]


def test_conditions_on_one_argument_are_alternatives() -> None:
    """As runc and crun have it, for all conditions of such a rule."""
    profile = profile_of(REFUSE | {"args": [arg(0, "EQ", 1), arg(0, "EQ", 2), arg(1, "EQ", 9)]})
    cases = {(1, 0): "errno EPERM", (2, 0): "errno EPERM", (0, 9): "errno EPERM", (3, 3): "allow"}
    assert {args: decided(profile, "chmod", *args) for args in cases} == cases


def test_the_first_rule_that_fits_decides() -> None:
    two = {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 2}
    log = {"names": ["chmod"], "action": "SCMP_ACT_LOG", "args": [arg(0, "LT", 10)]}
    allow = {"names": ["chmod"], "action": "SCMP_ACT_ALLOW", "args": [arg(0, "EQ", 5)]}
    assert [decided(profile_of(allow, log, two), "chmod", x) for x in (5, 6, 11)] == ["allow", "log", "errno ENOENT"]
    assert [decided(profile_of(log, allow, two), "chmod", x) for x in (5, 6, 11)] == ["log", "log", "errno ENOENT"]
    assert [decided(profile_of(two, log, allow), "chmod", x) for x in (5, 6, 11)] == ["errno ENOENT"] * 3


def test_the_default_holds_for_numbers_nobody_knows() -> None:
    profile = load_profile(as_file(REFUSE, default="SCMP_ACT_TRAP"))
    assert [profile.decide(nr, NONE).kind for nr in (CHMOD, 400, 100_000, 0x3FFFFFFF, 0xFFFFFFFF)] == ["errno", *["trap"] * 4]
    assert [profile.decide(nr, NONE).kind for nr in (0x40000000 | CHMOD, 0x80000000, 0xFFFFFFFE)] == ["kill_process"] * 3


@pytest.mark.parametrize(
    ("given", "applies"),
    [
        ({}, True),
        ({"includes": {}, "excludes": None}, True),
        ({"includes": {"caps": ["CAP_SYS_ADMIN"]}}, False),
        ({"excludes": {"caps": ["CAP_SYS_ADMIN"]}}, True),
        ({"includes": {"arches": ["amd64", "x32"]}}, True),
        ({"includes": {"arches": ["arm", "arm64"]}}, False),
        ({"excludes": {"arches": ["amd64"]}}, False),
        ({"excludes": {"arches": ["s390", "s390x"]}}, True),
        ({"includes": {"minKernel": "5.10"}}, True),
        ({"includes": {"minKernel": "5.9"}}, True),
        ({"includes": {"minKernel": "5.11"}}, False),
        ({"includes": {"minKernel": "6.0"}}, False),
        ({"includes": {"minKernel": "4.19"}}, True),
        ({"includes": {"minKernel": ""}}, True),
        ({"excludes": {"minKernel": "5.10"}}, False),
        ({"excludes": {"minKernel": "5.11"}}, True),
        ({"includes": {"arches": ["amd64"], "minKernel": "4.8"}, "excludes": {"caps": ["CAP_BPF"]}}, True),
    ],
)
def test_rules_for_others_fall_away(given: dict[str, object], applies: bool) -> None:
    profile = load_profile(as_file(REFUSE | given, default="SCMP_ACT_ALLOW"), kernel=(5, 10))
    assert decided(profile, "chmod") == ("errno EPERM" if applies else "allow")


def test_the_running_kernel_is_what_min_kernel_means() -> None:
    newer = profile_of(REFUSE | {"includes": {"minKernel": "999.0"}})
    older = profile_of(REFUSE | {"includes": {"minKernel": "3.10"}})
    assert (decided(newer, "chmod"), decided(older, "chmod")) == ("allow", "errno EPERM")


def test_names_nobody_knows_are_listed() -> None:
    rules: list[dict[str, Any]] = [
        {"names": ["chmod", "chmood", "stat64", "futex_time64"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["zzz", "chmood"], "action": "SCMP_ACT_LOG"},
        {"names": ["for_arm"], "action": "SCMP_ACT_LOG", "includes": {"arches": ["arm"]}},
    ]
    profile = profile_of(*rules)
    assert profile.unknown == ("chmood", "zzz")
    assert profile.calls == {CHMOD: (Rule(Action("errno", 1)),)}


def test_what_is_not_honoured_is_noted() -> None:
    foreign = "architectures: SCMP_ARCH_X86, SCMP_ARCH_X32 are not served, their callers are killed"
    assert profile_of(architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]).notes == (foreign,)
    maps = [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
        {"architecture": "SCMP_ARCH_RISCV64", "subArchitectures": None},
    ]
    assert profile_of(archMap=maps).notes == (foreign,)
    assert profile_of(architectures=["SCMP_ARCH_NATIVE"]).notes == ()
    flags = ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG"]
    assert profile_of(flags=flags).notes == ("flags: SECCOMP_FILTER_FLAG_LOG is not passed on",)


def test_old_files_name_one_call() -> None:
    assert decided(profile_of({"name": "chmod", "action": "SCMP_ACT_ERRNO", "args": None}), "chmod") == "errno EPERM"


def test_a_file_is_what_errors_call_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(as_file(REFUSE))
    assert load_profile(path).name == str(path)
    assert load_profile(path, "mine").name == "mine"
    path.write_text("{}")
    with pytest.raises(ProfileError, match=f"^{path}: the file: {{}}: object missing required field `defaultAction`$"):
        load_profile(path)
    with pytest.raises(ProfileError, match=f"^{tmp_path}/none.json: No such file or directory$"):
        load_profile(tmp_path / "none.json")
    with pytest.raises(ProfileError, match=f"^{tmp_path}: Is a directory$"):
        load_profile(tmp_path)


def test_profiles_are_compared_by_identity() -> None:
    one, two = profile_of(REFUSE), profile_of(REFUSE)
    assert one != two
    assert len({one, two, one}) == 2
    assert one.calls[CHMOD][0] == Rule(Action("errno", 1))
    assert hash(Condition(0, "EQ", 1)) == hash(Condition(0, "EQ", 1))


# ---------------------------------------------------------------- real files


def test_podmans_profile() -> None:
    if not PODMAN.exists():
        pytest.skip(f"{PODMAN} is not installed (containers-common)")
    profile = load_profile(PODMAN)
    assert profile.unknown == ()
    assert len(profile.calls) > 300
    # Which calls it lists changes from version to version; what its rules with arguments come to does not.
    expected = {
        ("read",): "allow", ("bpf",): "errno EPERM", ("personality", 8): "allow", ("personality", 9): "errno ENOSYS",
        ("socket", 16, 3, 9): "errno EINVAL", ("socket", 16, 3, 0): "allow", ("socket", 2, 1, 9): "allow",
    }  # fmt: skip
    assert {call: decided(profile, *call) for call in expected} == expected


def test_the_constructs_of_dockers_profile() -> None:
    """Every kind of entry moby's `default.json` has, with a call or two each."""
    admin = {"caps": ["CAP_SYS_ADMIN"]}
    file = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "archMap": [
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
            {"architecture": "SCMP_ARCH_LOONGARCH64", "subArchitectures": None},
        ],
        "syscalls": [
            {"names": ["read", "chown32", "riscv_hwprobe"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 12, "op": "SCMP_CMP_LT"}]},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 17, "op": "SCMP_CMP_EQ"}]},
            {"names": ["swapcontext"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["ppc64le"]}},
            {"names": ["clone", "mount"], "action": "SCMP_ACT_ALLOW", "includes": admin},
            {
                "names": ["clone"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 2114060288, "op": "SCMP_CMP_MASKED_EQ"}],
                "excludes": {"caps": ["CAP_SYS_ADMIN"], "arches": ["s390", "s390x"]},
            },
            {
                "names": ["clone"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 1, "value": 2114060288, "op": "SCMP_CMP_MASKED_EQ"}],
                "comment": "s390 parameter ordering for clone is different",
                "includes": {"arches": ["s390", "s390x"]},
                "excludes": admin,
            },
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": admin},
        ],
    }
    profile = load_profile(json.dumps(file).encode())
    expected = {
        ("read",): "allow", ("ptrace",): "allow", ("socket", 11): "allow", ("socket", 17): "allow", ("socket", 38): "errno EPERM",
        ("clone", 17): "allow", ("clone", 0x10000011): "errno EPERM", ("clone", 0x10000011, 0): "errno EPERM",
        ("clone3",): "errno ENOSYS", ("mount",): "errno EPERM", ("write",): "errno EPERM",
    }  # fmt: skip
    assert {call: decided(profile, *call) for call in expected} == expected
    assert profile.unknown == ()


# ---------------------------------------------------------------- what is wrong


def rule(**more: Any) -> bytes:
    """A file whose one rule is changed."""
    return as_file({"names": ["chmod"], "action": "SCMP_ACT_ERRNO"} | more)


def compared(**more: Any) -> bytes:
    """A file whose one comparison is changed."""
    return rule(args=[{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"} | more])


WRONG: list[tuple[bytes, str]] = [
    # no object
    (b"", "Input data was truncated (a seccomp profile is a JSON object, such as Docker's default.json)"),
    (b"[", "truncated"),
    (b"[1", "truncated"),
    (b"[]", "the file: []: expected `object`, got `array`"),
    (b"null", "the file: null: expected `object`, got `null`"),
    (b'"SCMP_ACT_ALLOW"', "expected `object`, got `str`"),
    (b'{"defaultAction": "SCMP_ACT_ALLOW",}', "JSON is malformed"),
    (b"defaultAction = 'SCMP_ACT_ALLOW'", "JSON is malformed"),
    (b'{"defaultAction": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
    (b"[" * 100_000, "recursion"),
    (b'{"defaultAction": ' + b"1" * 5000 + b"}", "Integer value out of range"),
    # the top
    (b"{}", "the file: {}: object missing required field `defaultAction`"),
    (b'{"defaultAction": null}', "defaultAction: null: expected `str`, got `null`"),
    (as_file(default="ALLOW"), 'defaultAction: "ALLOW": no action (known: SCMP_ACT_ALLOW, '),
    (as_file(default="SCMP_ACT_NOTIFY"), 'defaultAction: "SCMP_ACT_NOTIFY": another supervisor cannot be had'),
    (as_file(default="SCMP_ACT_TRACE"), 'defaultAction: "SCMP_ACT_TRACE": nothing traces a tool'),
    (as_file(default="SCMP_ACT_ALLOW", defaultErrnoRet=1), "defaultErrnoRet: 1: SCMP_ACT_ALLOW takes no errno"),
    (as_file(default="SCMP_ACT_KILL", defaultErrno="EPERM"), 'defaultErrno: "EPERM": SCMP_ACT_KILL takes no errno'),
    (as_file(defaultErrnoRet=4095), "defaultErrnoRet: 4095: no errno (0 to 4094)"),
    (as_file(defaultErrnoRet=-1), "defaultErrnoRet: -1: no errno"),
    (as_file(defaultErrnoRet="EPERM"), 'defaultErrnoRet: "EPERM": expected `int | null`, got `str`'),
    (as_file(defaultErrno="EPREM"), 'defaultErrno: "EPREM": no errno\'s name (such as EPERM)'),
    (as_file(defaultErrno="errorcode"), 'defaultErrno: "errorcode": no errno\'s name'),
    (as_file(defaultErrno="EPERM", defaultErrnoRet=38), 'defaultErrno: "EPERM": it is 1, but defaultErrnoRet says 38'),
    (as_file(defaultaction="SCMP_ACT_ALLOW"), 'defaultaction: "SCMP_ACT_ALLOW": no such key (known: archMap, architectures, '),
    (as_file(linux={"seccomp": {}}), 'linux: {"seccomp":{}}: no such key'),
    (as_file(**{"a\nb": 1}), "a?b: 1: no such key"),
    (as_file(**{"a` - at `$.d": 1}), 'the file: {"defaultAction":'),
    (as_file(**{"a` - at `$.syscalls": 1}), 'the file: {"defaultAction":'),
    (as_file({"a` - at `$": 1, "action": ""}), 'the file: {"defaultAction":'),
    (as_file(listenerPath="/run/agent.sock"), 'listenerPath: "/run/agent.sock": another supervisor cannot be had'),
    (as_file(listenerMetadata="x"), 'listenerMetadata: "x": nothing would read it'),
    (as_file(flags=["SECCOMP_FILTER_FLAG_NEW_LISTENER"]), 'flags[0]: "SECCOMP_FILTER_FLAG_NEW_LISTENER": no flag (known: '),
    (as_file(flags=["LOG"]), 'flags[0]: "LOG": no flag'),
    (as_file(flags="LOG"), 'flags: "LOG": expected `array | null`, got `str`'),
    (
        as_file(architectures=["SCMP_ARCH_X86_64", "amd64"]),
        'architectures[1]: "amd64": no architecture (such as SCMP_ARCH_X86_64)',
    ),
    (as_file(architectures=["X86"]), 'architectures[0]: "X86": no architecture'),
    (
        as_file(architectures=["SCMP_ARCH_X86"], archMap=[{"architecture": "SCMP_ARCH_X86_64"}]),
        'architectures: ["SCMP_ARCH_X86"]: there is an archMap as well (use one of them)',
    ),
    (as_file(archMap=[{"architecture": "SCMP_ARCH_Z80"}]), 'archMap[0].architecture: "SCMP_ARCH_Z80": no architecture'),
    (
        as_file(archMap=[{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_Z80"]}]),
        'archMap[0].subArchitectures[0]: "SCMP_ARCH_Z80": no architecture',
    ),
    (as_file(archMap=[{"arch": "x"}]), 'archMap[0].arch: "x": no such key (known: architecture, subArchitectures)'),
    # a rule
    (as_file({}), "syscalls[0]: {}: object missing required field `action`"),
    (as_file("chmod"), 'syscalls[0]: "chmod": expected `object`, got `str`'),
    (b'{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": {}}', "syscalls: {}: expected `array | null`, got `object`"),
    (rule(action="SCMP_ACT_DENY"), 'syscalls[0].action: "SCMP_ACT_DENY": no action'),
    (rule(action="scmp_act_errno"), 'syscalls[0].action: "scmp_act_errno": no action'),
    (rule(action="SCMP_ACT_NOTIFY"), 'syscalls[0].action: "SCMP_ACT_NOTIFY": another supervisor cannot be had'),
    (rule(action="SCMP_ACT_TRACE"), 'syscalls[0].action: "SCMP_ACT_TRACE": nothing traces a tool'),
    (rule(action=5), "syscalls[0].action: 5: expected `str`, got `int`"),
    (rule(names=[]), "syscalls[0].names: []: a rule is about at least one system call"),
    (rule(names=None), "syscalls[0].names: null: a rule is about at least one system call"),
    (rule(names=["read", ""]), 'syscalls[0].names: ["read",""]: an empty name is no system call'),
    (rule(names="read"), 'syscalls[0].names: "read": expected `array | null`, got `str`'),
    (rule(names=[90]), "syscalls[0].names[0]: 90: expected `str`, got `int`"),
    (rule(name="read"), 'syscalls[0].name: "read": there are names as well'),
    (rule(arguments=[]), "syscalls[0].arguments: []: no such key (known: action, args, "),
    (rule(errnoRet=5000), "syscalls[0].errnoRet: 5000: no errno (0 to 4094)"),
    (rule(errnoRet=1.5), "syscalls[0].errnoRet: 1.5: expected `int | null`, got `float`"),
    (rule(errno="EWHAT"), 'syscalls[0].errno: "EWHAT": no errno\'s name'),
    (rule(errno="EPERM", errnoRet=2), 'syscalls[0].errno: "EPERM": it is 1, but errnoRet says 2 (make them agree)'),
    (rule(action="SCMP_ACT_ALLOW", errnoRet=1), "syscalls[0].errnoRet: 1: SCMP_ACT_ALLOW takes no errno"),
    (rule(action="SCMP_ACT_TRAP", errnoRet=0), "syscalls[0].errnoRet: 0: SCMP_ACT_TRAP takes no errno"),
    # when it applies
    (rule(includes=[]), "syscalls[0].includes: []: expected `object | null`, got `array`"),
    (rule(includes={"cap": []}), "syscalls[0].includes.cap: []: no such key (known: arches, caps, minKernel)"),
    (rule(includes={"caps": ["SYS_ADMIN"]}), 'syscalls[0].includes.caps[0]: "SYS_ADMIN": no capability (such as CAP_SYS_ADMIN)'),
    (rule(excludes={"arches": ["amd64", "x86_64"]}), 'syscalls[0].excludes.arches[1]: "x86_64": no architecture (such as amd64'),
    (rule(excludes={"minKernel": "5"}), 'syscalls[0].excludes.minKernel: "5": no kernel version (such as 4.8)'),
    (rule(includes={"minKernel": "5.10.3"}), 'syscalls[0].includes.minKernel: "5.10.3": no kernel version'),
    (rule(includes={"minKernel": 5.10}), "syscalls[0].includes.minKernel: 5.1: expected `str | null`, got `float`"),
    # comparisons
    (rule(args=[{}]), "syscalls[0].args[0]: {}: object missing required field `index`"),
    (rule(args={"index": 0}), 'syscalls[0].args: {"index":0}: expected `array | null`, got `object`'),
    (compared(index=6), "syscalls[0].args[0].index: 6: a system call has arguments 0 to 5"),
    (compared(index=-1), "syscalls[0].args[0].index: -1: a system call has arguments 0 to 5"),
    (compared(index=True), "syscalls[0].args[0].index: true: expected `int`, got `bool`"),
    (compared(value=-1), "syscalls[0].args[0].value: -1: not an unsigned number of 64 bits"),
    (compared(value=1 << 64), "syscalls[0].args[0].value: 18446744073709551616: not an unsigned number of 64 bits"),
    (compared(value="0x10"), 'syscalls[0].args[0].value: "0x10": expected `int`, got `str`'),
    (compared(valueTwo=1 << 64), "syscalls[0].args[0].valueTwo: 18446744073709551616: not an unsigned number"),
    (compared(op="EQ"), 'syscalls[0].args[0].op: "EQ": no comparison (known: SCMP_CMP_NE, SCMP_CMP_LT, '),
    (compared(op="SCMP_CMP_MASKED_NE"), 'syscalls[0].args[0].op: "SCMP_CMP_MASKED_NE": no comparison'),
    (
        compared(op="SCMP_CMP_MASKED_EQ", value=0xF0, valueTwo=0x11),
        "syscalls[0].args[0].valueTwo: 17: has bits outside the mask, value 240 (it could never be equal)",
    ),
    (compared(mask=1), "syscalls[0].args[0].mask: 1: no such key (known: index, op, value, valueTwo)"),
]


@pytest.mark.parametrize(("data", "expected"), WRONG, ids=[text[:40] for _, text in WRONG])
def test_one_line_for_everything_that_is_wrong(data: bytes, expected: str) -> None:
    with pytest.raises(ProfileError) as caught:
        load_profile(data, "mine.json")
    text = str(caught.value)
    assert text.startswith("mine.json: ")
    assert expected in text
    assert text.isprintable(), "more than one line"
    assert len(text) < 400


def test_a_wrong_rule_is_an_error_even_where_it_does_not_apply() -> None:
    with pytest.raises(ProfileError, match="no comparison"):
        profile_of(json.loads(compared(op="x"))["syscalls"][0] | {"includes": {"arches": ["arm"]}})


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ProfileError) as caught:
        load_profile(as_file(default="SCMP_ACT_" + "X" * 1000))
    assert "XXX…: no action" in str(caught.value)
    assert len(str(caught.value)) < 300
