# SPDX-License-Identifier: Apache-2.0
"""What Prometheus gets: the text format, and a server that answers one thing."""

import re
import socket
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from agentrun import metrics
from agentrun.errors import UsageError
from agentrun.executor import ExecutorStats
from agentrun.histogram import Histogram
from agentrun.latency import Report
from agentrun.metrics import escape, open_metrics, parse_address, render, respond, serve_metrics
from agentrun.pool import PoolStats
from tests.unit.test_histogram import histogram

POOL = PoolStats(idle=4, building=1, waiting=0, leased=2, target=6, hits=100, misses=3, built=110, failed=1)
SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)')


def stats(*histograms: Histogram) -> ExecutorStats:
    latency = Report(recording=True, calls=12, lost=5, histograms=list(histograms))
    return ExecutorStats(running=2, queued=1, completed=99, refused=7, stuck=0, pools={"default/none": POOL}, latency=latency)


def lines(*histograms: Histogram) -> list[str]:
    return list(render(stats(*histograms), lost_events=3))


class Executor:
    memory = SimpleNamespace(governor=SimpleNamespace(lost=0))

    def statistics(self) -> ExecutorStats:
        return stats(histogram(2000))


def test_the_counters():
    found = lines()
    for line in (
        "agentrun_calls_running 2", "agentrun_calls_queued 1", "agentrun_calls_total 99", "agentrun_calls_refused_total 7",
        'agentrun_pool_slots{pool="default/none",state="idle"} 4', 'agentrun_pool_hits_total{pool="default/none"} 100',
        "agentrun_probes_recording 1", "agentrun_sandboxes_recorded_total 12", 'agentrun_probes_lost_total{program="phases"} 5',
        'agentrun_probes_lost_total{program="memory"} 3',
    ):  # fmt: skip
        assert line in found


def test_every_family_has_its_type_once_and_every_line_is_a_sample():
    found = lines(histogram(2000), histogram(3000, phase="run"))
    types = [line.split()[2] for line in found if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    for line in found:
        if not line.startswith("#"):
            sample = SAMPLE.fullmatch(line)
            assert sample, line
            assert any(sample[1].removesuffix(end) in types for end in ("", "_bucket", "_sum", "_count"))


def test_buckets_are_cumulative_and_end_with_all():
    found = lines(histogram(500, 1500, 3000, 3000, 9_000_000_000_000))
    buckets = [line for line in found if line.startswith("agentrun_phase_seconds_bucket")]
    assert len(buckets) == 29
    edges = [re.search(r'le="([^"]+)"', line)[1] for line in buckets]
    counts = [int(line.rsplit(" ", 1)[1]) for line in buckets]
    assert edges[:4] == ["1e-06", "2e-06", "4e-06", "8e-06"]
    assert [float(edge) for edge in edges] == sorted(float(edge) for edge in edges)
    assert counts[:4] == [1, 2, 4, 4]
    assert counts == sorted(counts)
    assert (edges[-1], counts[-1]) == ("+Inf", 5)
    labels = '{phase="exec",shape="none/default",kind="warm"}'
    assert f"agentrun_phase_seconds_count{labels} 5" in found
    assert f"agentrun_phase_seconds_sum{labels} 9000.000008" in found


def test_labels_cannot_break_out_of_their_quotation_marks():
    assert escape('a"b\\c\nd') == 'a\\"b\\\\c\\nd'
    found = [line for line in lines(histogram(1000, shape='x"} 1\n# evil\\')) if "evil" in line]
    assert len(found) == 31
    assert all(SAMPLE.fullmatch(line) for line in found)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /metrics?a=b HTTP/1.0\r\n\r\n", 200),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../x HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics\r\n\r\n", 400),
        (b"\x16\x03\x01\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n", 408),
        (b"", 408),
        (b"x" * (metrics.REQUEST_MOST + 1), 431),
    ],
)
def test_only_one_thing_is_answered(head, status):
    answer = respond(head, Executor())
    top, body = answer.split(b"\r\n\r\n", 1)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert f"Content-Length: {len(body)}".encode() in top
    if status == 200:
        assert body.endswith(b"\n")
        assert b"text/plain; version=0.0.4" in top


async def exchange(address, data: bytes, *, end: bool = False) -> bytes:
    async with await trio.open_tcp_stream(*address) as stream:
        await stream.send_all(data)
        if end:
            await stream.send_eof()
        answer = b""
        with trio.fail_after(10):
            async for chunk in stream:
                answer += chunk
        return answer


def serving(test):
    async def main():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        listener = open_metrics(f"127.0.0.1:{port}")
        with listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_metrics, listener, Executor())
                await test(("127.0.0.1", port))
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_over_tcp():
    async def test(address):
        answer = await exchange(address, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"agentrun_calls_running 2\n" in answer
        assert (await exchange(address, b"GET /met", end=True)).startswith(b"HTTP/1.1 408 ")

    serving(test)


def test_who_says_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr(metrics, "REQUEST_SECONDS", 0.05)

    async def test(address):
        # More of them than places: each gives its own back.
        async with trio.open_nursery() as nursery:
            for _ in range(metrics.CONNECTIONS + 2):
                nursery.start_soon(exchange, address, b"G")
        assert b" 200 OK" in await exchange(address, b"GET /metrics HTTP/1.1\r\n\r\n")

    serving(test)


def test_addresses():
    assert parse_address("127.0.0.1:9464") == ("127.0.0.1", 9464)
    assert parse_address("[::1]:9464") == ("::1", 9464)
    assert parse_address("/run/agentrun/metrics") is None
    for wrong in ("", "9464", "localhost:9464", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:70000", "127.0.0.1:x", "run/metrics"):
        with pytest.raises(UsageError, match="neither ADDRESS:PORT"):
            parse_address(wrong)


def test_an_address_that_is_taken_is_a_usage_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="Address already in use"):
            open_metrics(f"127.0.0.1:{taken.getsockname()[1]}")
