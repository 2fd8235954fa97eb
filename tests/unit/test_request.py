# SPDX-License-Identifier: Apache-2.0
"""A tool call before it is one: its command, its environment, its tenant, its limits."""

import os
import string
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun.cgroup.limits import Plan
from agentrun.environment import BASE_ENV
from agentrun.errors import LimitError, UsageError
from agentrun.policy import DEFAULT, Limits
from agentrun.request import check_tenant, encode_argv
from agentrun.terms import LIMIT_FIELDS, Terms, check_enforced
from agentrun.types import Unenforced

BASE = tuple(key + b"=" + value for key, value in BASE_ENV.items())
TERMS = Terms(
    policy=DEFAULT, plan=Plan(DEFAULT.limits, {}, ()), pool=None, unenforced=(), nproc=0, owner=(0, 0), env=BASE_ENV,
    entries=BASE, forbidden=(),
)  # fmt: skip
encode_env = TERMS.environment


def test_arguments_of_every_kind():
    assert encode_argv(["ls", b"\xff", Path("/tmp"), "\udcff", "", "é"]) == (b"ls", b"\xff", b"/tmp", b"\xff", b"", "é".encode())


@pytest.mark.parametrize("argv", ["ls -l", b"ls", ""])
def test_one_string_is_no_command(argv):
    with pytest.raises(UsageError, match="argv is a list of arguments, not one string"):
        encode_argv(argv)


@pytest.mark.parametrize("argv", [[], [""], [b"", "x"], ()])
def test_no_command(argv):
    with pytest.raises(UsageError, match="there is no command to run"):
        encode_argv(argv)


@pytest.mark.parametrize("argv", [["a", "\ud800"], [5], ["a", None], 5, None, [["a"]]])
def test_what_is_no_command(argv):
    with pytest.raises(UsageError, match=r"^argv is a list of texts, bytes or paths: "):
        encode_argv(argv)


@pytest.mark.parametrize("env", [{"A": "\ud800"}, {"\ud800": "x"}, {"A": 5}, {5: "x"}])
def test_a_variable_that_is_no_text(env):
    with pytest.raises(UsageError, match=r"^env: .* is no text$"):
        encode_env(env)


def test_a_nul_is_named_by_its_place():
    with pytest.raises(UsageError, match=r"argument 2 contains a NUL byte: b'a\\x00b'"):
        encode_argv(["sh", "-c", "a\0b"])


@given(st.lists(st.binary(min_size=1), min_size=1))
def test_arguments_pass_unchanged_or_not_at_all(argv):
    if any(b"\0" in argument for argument in argv):
        with pytest.raises(UsageError, match="NUL"):
            encode_argv(argv)
    else:
        assert encode_argv(argv) == tuple(argv)


def test_nothing_of_ours_is_in_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("PATH", "/ours")
    assert encode_env(None) == encode_env({}) == encode_env([]) == BASE
    assert set(BASE_ENV) == {b"PATH", b"HOME", b"USER", b"LOGNAME", b"SHELL", b"LANG"}


def test_variables_are_laid_over_the_base():
    env = encode_env({"HOME": "/h", "A": "1=2", "B": ""})
    assert dict(entry.split(b"=", 1) for entry in env) == {**BASE_ENV, b"HOME": b"/h", b"A": b"1=2", b"B": b""}
    assert encode_env([b"HOME=/h", b"A=1=2", b"B="]) == env
    assert len(env) == len({entry.split(b"=", 1)[0] for entry in env})


def test_the_last_of_a_repeated_variable_counts():
    assert b"A=2" in encode_env([b"A=1", b"A=2"])
    assert b"A=1" not in encode_env([b"A=1", b"A=2"])


@pytest.mark.parametrize("env", [{"": "x"}, {"A=B": "x"}, {"A\0": "x"}, {"A": "x\0"}, [b"=x"], [b""], [b"A\0=x"], [b"A=\0"]])
def test_a_bad_variable_is_named(env):
    with pytest.raises(UsageError, match=r"^environment variable b'"):
        encode_env(env)


@given(st.dictionaries(st.text(string.ascii_letters, min_size=1), st.binary().filter(lambda value: b"\0" not in value)))
def test_any_environment(env):
    encoded = encode_env([key.encode() + b"=" + value for key, value in env.items()])
    seen = dict(entry.split(b"=", 1) for entry in encoded)
    assert seen == {**BASE_ENV, **{key.encode(): value for key, value in env.items()}}
    assert encode_env({key: os.fsdecode(value) for key, value in env.items()}) == encoded


@pytest.mark.parametrize("name", ["a", "default", "uid-1000", "A.b_c-9", "x" * 64, "-", "_"])
def test_tenants(name):
    assert check_tenant(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "x" * 65, "é", "a\n", "a\0", "٣", "ª"])
def test_what_is_no_tenant(name):
    with pytest.raises(UsageError) as caught:
        check_tenant(name)
    assert str(caught.value).startswith(f"tenant: {name!r} is no name")


@given(st.text())
def test_a_tenant_is_one_directory_name(name):
    try:
        check_tenant(name)
    except UsageError:
        return
    assert Path("/cgroup", f"tenant-{name}").parent == Path("/cgroup")
    assert name.isascii()
    assert name not in (".", "..")


# ---------------------------------------------------------------- limits that cannot be had


def asks(**limits: object):
    return msgspec.structs.replace(DEFAULT, limits=msgspec.structs.replace(DEFAULT.limits, **limits))


MISSING = (Unenforced("cpu.max", "no cpu controller"), Unenforced("memory.max", "no memory controller"))


def test_a_default_that_is_not_enforced_is_no_refusal():
    check_enforced(MISSING, DEFAULT, DEFAULT)
    check_enforced((), asks(cpus=1.0, memory_max=5), DEFAULT)
    check_enforced(MISSING, asks(pids_max=5), DEFAULT)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"cpus": 1.0}, "cpu.max cannot be enforced here: no cpu controller; --best-effort runs without it"),
        ({"memory_max": 5}, "memory.max cannot be enforced here: no memory controller; --best-effort runs without it"),
    ],
)
def test_a_limit_that_was_asked_for_is(limits, text):
    with pytest.raises(LimitError) as caught:
        check_enforced(MISSING, asks(**limits), DEFAULT)
    assert str(caught.value) == text
    check_enforced(MISSING, msgspec.structs.replace(asks(**limits), best_effort=True), DEFAULT)


def test_the_callers_best_effort_takes_back_what_he_asked_for():
    policy = msgspec.structs.replace(asks(memory_max=5), insist=("memory.max",), best_effort=True)
    with pytest.raises(LimitError):  # it is the policy's: it does not speak for the caller
        check_enforced(MISSING, policy, DEFAULT)
    check_enforced(MISSING, msgspec.structs.replace(policy, lenient=True), DEFAULT)


def test_every_limit_file_stands_for_a_field():
    assert set(LIMIT_FIELDS.values()) <= {field.name for field in msgspec.structs.fields(Limits)}
