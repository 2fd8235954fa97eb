# SPDX-License-Identifier: Apache-2.0
"""Turns: who runs, who waits and in which order, who is refused; and what closing does to each of them."""

import pytest
import trio
import trio.testing

from agentrun.errors import HostError, Overloaded
from agentrun.turns import Turns


async def call(turns: Turns, ended: list[str], name: str, end: trio.Event) -> None:
    """As the executor does it."""
    try:
        if turns.running < turns.most:
            turns.running += 1
        else:
            await turns.wait()
    except (HostError, Overloaded) as error:
        ended.append(f"{name}: {type(error).__name__}")
        return
    try:
        await end.wait()
        ended.append(name)
    finally:
        turns.leave()


def counts(turns: Turns) -> tuple[int, int, int, int]:
    return turns.running, turns.waiting, turns.completed, turns.refused


async def start(nursery: trio.Nursery, turns: Turns, ended: list[str], names: str) -> dict[str, trio.Event]:
    events = {name: trio.Event() for name in names}
    for name, event in events.items():
        nursery.start_soon(call, turns, ended, name, event)
        await trio.testing.wait_all_tasks_blocked()
    return events


def test_a_place_goes_to_whoever_has_waited_longest():
    async def main():
        turns, ended = Turns(1, 3), []
        async with trio.open_nursery() as nursery:
            events = await start(nursery, turns, ended, "abcde")
            assert ended == ["e: Overloaded"]
            assert counts(turns) == (1, 3, 0, 1)
            for name in "dcb":  # they have not begun: their end is no news
                events[name].set()
            events["a"].set()
        assert ended == ["e: Overloaded", "a", "b", "c", "d"]
        assert counts(turns) == (0, 0, 4, 1)

    trio.run(main)


def test_who_is_cancelled_while_he_waits_takes_no_place():
    async def main():
        turns, ended = Turns(1, 3), []
        async with trio.open_nursery() as nursery:
            events = await start(nursery, turns, ended, "a")
            async with trio.open_nursery() as waiting:
                await start(waiting, turns, ended, "b")
                assert counts(turns) == (1, 1, 0, 0)
                waiting.cancel_scope.cancel()
            assert counts(turns) == (1, 0, 0, 0)
            events["a"].set()
        assert ended == ["a"]
        assert counts(turns) == (0, 0, 1, 0)

    trio.run(main)


def test_closing_refuses_who_comes_and_who_waits_and_waits_for_who_runs():
    async def main():
        turns, ended = Turns(2, 3), []
        async with trio.open_nursery() as nursery:
            events = await start(nursery, turns, ended, "abcd")
            turns.close()
            await start(nursery, turns, ended, "e")
            assert ended == ["e: HostError"]
            with pytest.raises(trio.TooSlowError), trio.fail_after(0.01):
                await turns.wait_none()
            events["a"].set()
            await trio.testing.wait_all_tasks_blocked()
            assert ended[1:] == ["a", "c: HostError", "d: HostError"]
            assert turns.running == 1
            events["b"].set()
            await turns.wait_none()
            await turns.wait_none()  # and again, when nobody has a place
        assert turns.running == turns.waiting == 0

    trio.run(main)


def test_closing_when_nobody_runs_waits_for_nothing():
    async def main():
        turns = Turns(1, 1)
        turns.close()
        with trio.fail_after(1):
            await turns.wait_none()

    trio.run(main)
