# SPDX-License-Identifier: Apache-2.0
"""Sizes, numbers and options as people type them."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun.admission import apply_options
from agentrun.errors import UsageError
from agentrun.hints import check_budget
from agentrun.policy import DEFAULT, Egress, Limits, parse_net
from agentrun.protocol import Options
from agentrun.units import GIB, MIB, parse_number, parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1), ("4096", 4096), ("4096b", 4096), ("64M", 64 * MIB), ("64m", 64 * MIB), ("64MB", 64 * MIB), ("64MiB", 64 * MIB),
        ("1.5g", 3 * GIB // 2), (" 2 G ", 2 * GIB), ("1k", 1024), ("1T", 1 << 40), ("0.5K", 512), ("8388607T", 8388607 << 40),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "0", "0.1", "-1", "+1", "1e9", "M", "1.M", ".5M", "1 2", "1MM", "inf", "nan", "0x1", "8388608T", "9" * 30, "٣M"],
)
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises(UsageError) as caught:
        parse_size(text, "--memory")
    assert str(caught.value) == f"--memory: {text!r} is not a size (say 512M or 2G)"


def test_a_size_of_hundreds_of_digits_is_refused_like_any_other():
    with pytest.raises(UsageError, match="--memory"):
        parse_size("9" * 400, "--memory")


@given(st.integers(1, (1 << 53) - 1))
def test_bytes_are_exact(size):
    assert parse_size(str(size), "x") == size


@given(st.integers(1, 1 << 20), st.sampled_from("kmg"), st.sampled_from(["", "b", "ib", "B", "iB"]))
def test_units(number, unit, suffix):
    assert parse_size(f"{number}{unit}{suffix}", "x") == number << {"k": 10, "m": 20, "g": 30}[unit]


@given(st.integers(1, (1 << 63) - 1) | st.integers(1, 1 << 22).map(lambda number: number << 20))
def test_a_size_that_is_shown_is_the_same_size(size):
    assert parse_size(show_size(size), "x") == size


@given(st.text(max_size=12))
def test_a_size_is_a_size_or_an_error(text):
    try:
        size = parse_size(text, "what")
    except UsageError as error:
        size, message = None, str(error)
    assert message.startswith("what: ") if size is None else 1 <= size < 1 << 63


@given(st.one_of(st.text(max_size=8), st.floats().map(repr), st.integers().map(str)), st.booleans())
def test_a_number_is_within_its_bounds_or_an_error(text, whole):
    try:
        value = parse_number(text, "what", least=1, most=100, whole=whole)
    except UsageError as error:
        value, message = None, str(error)
    if value is None:
        assert message.startswith(f"what: {text!r} is not a ")
    else:
        assert 1 <= value <= 100
        assert not whole or value == int(value)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400", "0", "101", "", "one", "1_0", "٣"])
def test_numbers_out_of_bounds(text):
    with pytest.raises(UsageError) as caught:
        parse_number(text, "--cpus", least=1, most=100)
    assert str(caught.value) == f"--cpus: {text!r} is not a number from 1 to 100"


def test_whole_numbers():
    assert parse_number("7", "--pids", least=1, most=9, whole=True) == 7
    with pytest.raises(UsageError, match=r"--pids: '7\.5' is not a whole number from 1 to 9"):
        parse_number("7.5", "--pids", least=1, most=9, whole=True)


def test_net():
    assert (parse_net("none"), parse_net("host")) == ("none", "host")
    with pytest.raises(UsageError, match=r"net: 'None' is not known \(none, host or egress\)"):
        parse_net("None")


def test_options_are_laid_over_the_policy():
    assert apply_options(DEFAULT, Options()) == DEFAULT
    policy = apply_options(DEFAULT, Options(memory="64M", cpus="1.5", pids="10", timeout="2.5", net="host", best_effort="1"))
    limits = msgspec.structs.replace(DEFAULT.limits, memory_max=64 * MIB, cpus=1.5, pids_max=10)
    insist = ("memory.max", "cpu.max", "pids.max")
    given = {"limits": limits, "timeout": 2.5, "net": "host", "best_effort": True, "insist": insist, "lenient": True}
    assert policy == msgspec.structs.replace(DEFAULT, **given)
    assert isinstance(policy.limits.pids_max, int)


def test_egress_needs_a_policy_that_names_hosts():
    with pytest.raises(UsageError, match=r"^--net: policy default names no hosts for egress to reach \(net\.allow\)$"):
        apply_options(DEFAULT, Options(net="egress"))
    fetch = msgspec.structs.replace(DEFAULT, egress=Egress(allow=("pkg.test:443",)))
    assert apply_options(fetch, Options(net="egress")).net == "egress"


@pytest.mark.parametrize("best_effort", ["", "1"])
@pytest.mark.parametrize(("memory", "fits"), [(None, True), ("1G", True), ("2G", False), ("2048M", False), ("3G", False)])
def test_what_is_asked_for_by_name_has_to_fit_the_budget(memory, fits, best_effort):
    """Also if it is the built-in default's own number, which by itself asks for nothing."""
    policy = apply_options(DEFAULT, Options(memory=memory, pids="9", best_effort=best_effort))
    if fits:
        check_budget(policy, DEFAULT, GIB, "small")
    else:
        with pytest.raises(UsageError, match=r"memory\.max: [23]G is above the budget of tenant 'small', 1G$"):
            check_budget(policy, DEFAULT, GIB, "small")
    check_budget(policy, DEFAULT, None, "other")


def test_one_limit_keeps_the_others():
    assert apply_options(DEFAULT, Options(cpus="2")).limits == msgspec.structs.replace(Limits(), cpus=2.0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("memory", ["", "0", "-1", "many", "1e3"]),
        ("cpus", ["", "0", "0.001", "4097", "nan", "inf", "two"]),
        ("pids", ["", "0", "1.5", "4194305", "nan"]),
        ("timeout", ["", "0", "0.0001", "-1", "inf", "nan", "1e10", "soon"]),
        ("net", ["", "bridge", "HOST"]),
    ],
)
def test_a_bad_option_is_named(name, values):
    for value in values:
        with pytest.raises(UsageError, match=f"^(--)?{name}: {value!r} is not "):
            apply_options(DEFAULT, Options(**{name: value}))


TYPED = st.text(max_size=6) | st.floats().map(str)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("memory", "cpus", "pids", "timeout", "net"), TYPED)))
def test_options_never_end_in_anything_but_a_policy_or_an_error(options):
    try:
        policy = apply_options(DEFAULT, Options(**options))
    except UsageError:
        return
    assert policy.timeout is None or math.isfinite(policy.timeout)
    assert policy.limits.pids_max >= 1
