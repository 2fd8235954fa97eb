# SPDX-License-Identifier: Apache-2.0
"""``async with executor.start(...)``: streams both ways, signals, and the end of the block."""

import signal

import pytest
import trio

from agentrun import PIPE, Outcome, Overloaded, UsageError, open_executor
from tests.support import own_config, pids_below, run_async, with_executor

pytestmark = pytest.mark.host

TREE = "for i in 1 2 3 4 5; do (sleep 60 & setsid sleep 60 &) ; done; sleep 60"


def test_streams_both_ways():
    async def body(executor):
        async with executor.start(["sh", "-c", "while read x; do echo got $x; echo e >&2; done; exit 4"], stdin=PIPE) as call:
            for word in (b"one", b"two"):
                await call.stdin.send_all(word + b"\n")
                assert await call.stdout.receive_some() == b"got " + word + b"\n"
                assert await call.stderr.receive_some() == b"e\n"
            await call.stdin.aclose()
            result = await call.wait()
            assert await call.stdout.receive_some() == b""
        assert (result.outcome, result.exit_code, result.stdout) == (Outcome.EXITED, 4, None)

    with_executor(body)


def test_much_through_a_stream():
    async def body(executor):
        async with executor.start(["cat"], stdin=PIPE) as call, trio.open_nursery() as nursery:

            async def feed():
                for _ in range(160):
                    await call.stdin.send_all(bytes(65536))
                await call.stdin.aclose()

            nursery.start_soon(feed)
            total = 0
            async for chunk in call.stdout:
                total += len(chunk)
            assert total == 160 * 65536
            assert (await call.wait()).ok

    with_executor(body)


def test_a_signal_reaches_the_whole_group():
    async def body(executor):
        wait = "while :; do sleep 0.01; done"
        child = f"(trap 'echo child; exit' USR1; echo r; {wait}) &"
        script = f"trap 'echo caught; exit 7' USR1; {child} echo r; {wait}"
        async with executor.start(["sh", "-c", script]) as call:
            text = b""
            while text.count(b"r\n") < 2:
                text += await call.stdout.receive_some()
            call.send_signal(signal.SIGUSR1)
            result = await call.wait()
            call.send_signal(signal.SIGUSR1)  # after the end: nothing
            async for chunk in call.stdout:
                text += chunk
        assert b"caught\n" in text
        assert result.exit_code == 7

    with_executor(body)


def test_kill_makes_it_cancelled():
    async def body(executor):
        async with executor.start(["sh", "-c", TREE]) as call:
            call.kill()
            result = await call.wait()
        assert (result.outcome, result.signal, result.verdict.reason) == (Outcome.CANCELLED, 9, "cancelled")

    with_executor(body)


def test_leaving_the_block_kills():
    async def body(executor):
        async with executor.start(["sh", "-c", TREE]) as call:
            leaf = executor.tree.path / "tenant-default" / f"call-{call.id}"
        assert pids_below(leaf) == []
        assert (await call.wait()).outcome is Outcome.CANCELLED

    with_executor(body)


def test_a_stream_that_cannot_start_says_so():
    async def body(executor):
        async with executor.start(["no-such-command"]) as call:
            result = await call.wait()
        assert (result.outcome, result.returncode) == (Outcome.FAILED_TO_START, 127)
        with pytest.raises(UsageError):
            async with executor.start([]):
                pass

    with_executor(body)


def test_an_error_in_the_block_kills_and_goes_on():
    async def body(executor):
        error = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError) as caught:
            async with executor.start(["sleep", "60"]):
                raise error from KeyError("cause")
        assert caught.value is error
        assert isinstance(error.__cause__, KeyError)
        assert executor.calls() == {}

    with_executor(body)


def test_an_error_as_the_block_is_cancelled_is_the_error():
    async def body(executor):
        async def block(scope, error=None):
            async with executor.start(["sleep", "60"]):
                scope.cancel()
                try:
                    await trio.sleep_forever()
                finally:
                    if error is not None:
                        raise error

        with trio.CancelScope() as scope:
            with pytest.raises(trio.Cancelled):
                await block(scope)
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        with trio.CancelScope() as scope, pytest.raises(ZeroDivisionError):
            await block(scope, ZeroDivisionError())
        assert not scope.cancelled_caught
        assert executor.calls() == {}

    with_executor(body)


def test_what_start_refuses_is_no_group():
    async def body(executor):
        async with executor.start(["sleep", "60"]):
            with pytest.raises(Overloaded):
                async with executor.start(["true"]):
                    pass

    with_executor(body, max_running=1, max_queued=0)


def test_an_error_in_the_executors_block_comes_out_as_it_is():
    async def body():
        async with open_executor(own_config()) as executor:
            assert (await executor.run(["true"])).ok
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_async(body)
