# SPDX-License-Identifier: Apache-2.0
"""The nursery that does not show: what comes out of it."""

import pytest
import trio

from agentrun.nursery import open_plain_nursery


async def fail(error):
    raise error


def run(body, *args):
    async def bounded():
        with trio.fail_after(10):
            return await body(*args)

    return trio.run(bounded)


@pytest.mark.parametrize("where", ["block", "task"])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), ExceptionGroup("own", [ValueError("x")])])
def test_a_single_exception_comes_out_as_it_is(where, error):
    error.__cause__ = cause = KeyError("cause")

    async def body():
        async with open_plain_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            if where == "task":
                nursery.start_soon(fail, error)
                await trio.sleep_forever()
            raise error

    with pytest.raises(type(error)) as caught:
        run(body)
    assert str(caught.value) == str(error)
    assert caught.value.__cause__ is cause
    assert "Trio" not in str(caught.value.__context__)


def test_several_stay_a_group():
    async def body():
        async with open_plain_nursery() as nursery:
            nursery.start_soon(fail, ValueError())
            raise KeyError

    with pytest.raises(ExceptionGroup) as caught:
        run(body)
    assert {type(error) for error in caught.value.exceptions} == {ValueError, KeyError}


def test_a_cancellation_reaches_its_scope():
    async def block():
        async with open_plain_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await trio.sleep_forever()

    async def body():
        with trio.move_on_after(0.01) as scope:
            with pytest.raises(trio.Cancelled):
                await block()
            await trio.sleep_forever()
        assert scope.cancelled_caught
        async with open_plain_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.cancel_scope.cancel()

    run(body)


def test_an_exception_beside_a_cancellation_is_the_exception():
    async def body():
        with trio.CancelScope() as scope:
            async with open_plain_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                scope.cancel()
                try:
                    await trio.sleep_forever()
                finally:
                    raise ValueError

    with pytest.raises(ValueError):
        run(body)


def test_nothing_raised_is_nothing():
    async def body():
        async with open_plain_nursery() as nursery:
            nursery.start_soon(trio.sleep, 0)
        return 5

    assert run(body) == 5
