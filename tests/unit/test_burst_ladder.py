# SPDX-License-Identifier: Apache-2.0
"""The ladder and the bucket are pure: every situation can be tried."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun.burst.headroom import LEAST, STEP, Claim, available, worth_it
from agentrun.burst.ladder import Bucket, Rung, Situation, climb
from agentrun.policy import Limits

MIB = 1 << 20
STEADY, BURST = 64 * MIB, 32 * MIB
ACTIONS = ("kill", "stop", "throttle", "notify")
ALIVE = tuple(rung for rung in Rung if rung is not Rung.KILLED)


def limits(on_exhausted="kill", **more):
    given = {"memory_high": STEADY, "memory_burst": BURST, "burst_seconds": 2.0, "throttle_seconds": 1.0, "freeze_seconds": 3.0}
    return Limits(on_exhausted=on_exhausted, **{**given, **more})


def situation(rung, *, usage=STEADY + MIB, credit=1.0, headroom=True, can_throttle=True, now=100.0, until=None):
    return Situation(rung, usage, credit, headroom, can_throttle, now, until)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("rung", ALIVE)
def test_below_the_budget_everything_is_well(rung, action):
    step = climb(situation(rung, usage=STEADY // 2, credit=0.0, headroom=False), limits(action))
    assert (step.rung if step else Rung.WITHIN) is Rung.WITHIN


def test_the_dead_stay_dead():
    assert climb(situation(Rung.KILLED), limits()) is None


def test_a_burst_is_granted_while_there_is_credit_and_memory():
    assert climb(situation(Rung.WITHIN), limits()).rung is Rung.GRANTED
    assert climb(situation(Rung.GRANTED), limits()) is None


@pytest.mark.parametrize(
    ("action", "can_throttle", "expected"),
    [
        ("kill", True, Rung.KILLED),
        ("stop", True, Rung.FROZEN),
        ("throttle", True, Rung.THROTTLED),
        ("throttle", False, Rung.FROZEN),
        ("notify", True, Rung.NOTICED),
    ],
)
def test_what_a_used_up_allowance_leads_to(action, can_throttle, expected):
    for rung in (Rung.WITHIN, Rung.GRANTED):
        assert climb(situation(rung, credit=0.0, can_throttle=can_throttle), limits(action)).rung is expected


@pytest.mark.parametrize("action", ACTIONS)
def test_without_memory_nobody_is_killed_at_once(action):
    """The allowance is there, it is the host that has nothing: others may give back what they have."""
    step = climb(situation(Rung.WITHIN, headroom=False), limits(action))
    assert step.rung is Rung.THROTTLED
    assert step.until == 101.0
    assert climb(situation(Rung.WITHIN, headroom=False, can_throttle=False), limits(action)).rung is Rung.FROZEN
    for rung in (Rung.THROTTLED, Rung.FROZEN):
        assert climb(situation(rung, until=200.0), limits(action)).rung is Rung.GRANTED  # there is memory again


def test_a_braked_call_goes_on_only_clearly_below_its_budget():
    for rung in (Rung.THROTTLED, Rung.FROZEN):
        assert climb(situation(rung, usage=STEADY - 1, credit=0.0, until=200.0), limits("throttle")) is None
    assert climb(situation(Rung.GRANTED, usage=STEADY - 1), limits()).rung is Rung.WITHIN


def test_no_seconds_are_no_rung():
    assert climb(situation(Rung.GRANTED, credit=0.0), limits("throttle", throttle_seconds=0.0)).rung is Rung.FROZEN
    assert climb(situation(Rung.GRANTED, credit=0.0), limits("stop", freeze_seconds=0.0)).rung is Rung.KILLED


@pytest.mark.parametrize(("action", "headroom", "can_throttle"), [*itertools.product(ACTIONS, (True, False), (True, False))])
def test_every_way_up_ends_within_the_policys_time(action, headroom, can_throttle):
    """A call that never gives anything back is granted, braked and killed, each for as long as its policy says and no longer."""
    policy, now, state, until, seen = limits(action), 0.0, Rung.WITHIN, None, []
    while now < 60 and state is not Rung.KILLED:
        credit = max(0.0, 5.0 - now)
        step = climb(situation(state, credit=credit, headroom=headroom, can_throttle=can_throttle, now=now, until=until), policy)
        if step is not None:
            state, until = step.rung, step.until
            seen.append(state)
        now += 0.1
    if action == "notify" and headroom:
        assert seen == [Rung.GRANTED, Rung.NOTICED]
        return
    assert state is Rung.KILLED, seen
    assert now < 5.0 + 1.0 + 3.0 + 1.0


# ---------------------------------------------------------------- the bucket


def test_an_allowance_lasts_as_long_as_it_says():
    bucket = Bucket(STEADY, BURST, 2.0, 0.0)
    bucket.look(STEADY + BURST, 0.0)
    assert bucket.look(STEADY + BURST, 1.9) > 0
    assert bucket.look(STEADY + BURST, 2.0) == 0


def test_half_a_burst_lasts_twice_as_long():
    bucket = Bucket(STEADY, BURST, 2.0, 0.0)
    bucket.look(STEADY + BURST // 2, 0.0)
    assert bucket.look(STEADY, 3.9) > 0
    bucket = Bucket(STEADY, BURST, 2.0, 0.0)
    bucket.look(STEADY + BURST // 2, 0.0)
    assert bucket.look(STEADY, 4.0) == 0


def test_it_comes_back_below_the_budget():
    bucket = Bucket(STEADY, BURST, 2.0, 0.0)
    bucket.empty()
    bucket.look(0, 0.0)
    assert bucket.look(0, 1.0) == pytest.approx(bucket.capacity / 2)
    assert bucket.look(0, 99.0) == bucket.capacity


@given(st.lists(st.tuples(st.integers(0, 4 * STEADY), st.floats(0.001, 1.0)), max_size=50))
def test_nobody_gets_more_than_the_allowance_and_what_came_back(path):
    """However usage moves: what was used above the budget is at most what was there and what was given since."""
    bucket, now, used, usage, below = Bucket(STEADY, BURST, 2.0, 0.0), 0.0, 0.0, 0, 0.0
    for following, seconds in path:
        above = max(0, usage - STEADY)
        if above:
            used += min(above * seconds, bucket.credit)
        else:
            below += seconds
        now += seconds
        credit = bucket.look(following, now)
        usage = following
        assert 0 <= credit <= bucket.capacity
        assert used <= bucket.capacity + BURST * below + 1


# ---------------------------------------------------------------- who may have it


def claim(priority=0, since=1.0, usage=100 * MIB, limit=400 * MIB):
    return Claim(priority, since, usage, limit)


def test_the_first_in_line_may_take_what_there_is():
    first, second = claim(priority=10), claim(since=2.0)
    assert available(first, [second], free=50 * MIB) == 50 * MIB
    assert available(first, [second], free=900 * MIB) == 300 * MIB
    assert available(second, [first], free=300 * MIB) == 0
    assert available(second, [first], free=350 * MIB) == 50 * MIB


def test_among_equals_the_earlier_burst_is_ahead():
    early, late, none = claim(since=1.0), claim(since=2.0), claim(since=float("inf"))
    assert late.is_behind(early)
    assert not early.is_behind(late)
    assert none.is_behind(late)
    assert available(early, [late, none], free=100 * MIB) == 100 * MIB
    assert available(late, [early, none], free=300 * MIB) == 0


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10), st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=8),
    st.integers(0, 800),
)
def test_whoever_is_first_can_finish(raw, free):
    """If everybody takes what he is told he may, nobody takes what the first in line may still need."""
    claims = [
        Claim(priority, float(since + number / 100), used, used + more)
        for number, (priority, since, used, more) in enumerate(raw)
    ]
    first = next(one for one in claims if not any(one.is_behind(other) for other in claims))
    for one in claims:
        others = [other for other in claims if other is not one]
        taken = max(0, available(one, others, free))
        if one is not first:
            assert free - taken >= min(free, first.limit - first.usage)


def test_a_grant_begins_with_something_and_ends_later():
    one = claim()
    assert not worth_it(one, STEP - 1, granted=False)
    assert worth_it(one, LEAST, granted=True)
    assert not worth_it(one, LEAST - 1, granted=True)
    assert worth_it(claim(usage=400 * MIB), 0, granted=False)
