"""What Prometheus scrapes: counters, pools and the histograms of ``agentrun.latency``, in its text format 0.0.4.

One path, one method, one answer a connection. Whoever reaches the address may read, so it is off unless configured: names of
tenants are in there.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping, Sequence

import trio

from agentrun.errors import UsageError
from agentrun.executor import Executor, ExecutorStats
from agentrun.histogram import Histogram

REQUEST_MOST = 8192
"""Bytes of a request's head."""
REQUEST_SECONDS = 5.0
ANSWER_SECONDS = 10.0
CONNECTIONS = 8
"""At once; more wait."""
EDGES = tuple(float(1 << octave) for octave in range(28))
"""Upper edges of the buckets, microseconds: powers of two, which no bucket of ours lies across."""
_POOL_GAUGES = ("idle", "building", "waiting", "leased", "target")
_POOL_COUNTERS = ("hits", "misses", "built", "failed")


def parse_address(text: str) -> tuple[str, int] | None:
    """Host and port of ``127.0.0.1:9464`` or ``[::1]:9464``; None for the path of a unix socket.

    Raises:
        UsageError: it is neither.
    """
    if text.startswith("/"):
        return None
    host, colon, port = text.rpartition(":")
    try:
        if not colon or not 0 < int(port) < 65536 or not port.isascii():
            raise ValueError
        return str(ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)), int(port)
    except ValueError:
        raise UsageError(f"metrics: {text!r} is neither ADDRESS:PORT, such as 127.0.0.1:9464, nor an absolute path") from None


def open_metrics(text: str) -> trio.socket.SocketType:
    """Listen on an address.

    Raises:
        UsageError: it cannot be had.
    """
    address = parse_address(text)
    assert address is not None
    sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(CONNECTIONS)
    except OSError as error:
        sock.close()
        raise UsageError(f"metrics: {text}: {error.strerror}") from error
    return trio.socket.from_stdlib_socket(sock)


async def serve_metrics(listener: trio.socket.SocketType, executor: Executor) -> None:
    """Answer until cancelled."""
    places = trio.Semaphore(CONNECTIONS)
    async with trio.open_nursery() as nursery:
        while True:
            await places.acquire()
            try:
                connection, _ = await listener.accept()
            except OSError:
                places.release()
                await trio.sleep(0.1)  # out of descriptors
                continue
            nursery.start_soon(_handle, connection, executor, places)


async def _handle(sock: trio.socket.SocketType, executor: Executor, places: trio.Semaphore) -> None:
    try:
        with sock:
            head = b""
            with trio.move_on_after(REQUEST_SECONDS):
                head = await _head(sock)
            answer = respond(head, executor)
            with trio.move_on_after(ANSWER_SECONDS):
                while answer:
                    answer = answer[await sock.send(answer) :]
                sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it has gone
    finally:
        places.release()


async def _head(sock: trio.socket.SocketType) -> bytes:
    """A request up to its empty line; as far as it came, where that is too far."""
    data = b""
    while b"\r\n\r\n" not in data and len(data) <= REQUEST_MOST:
        chunk = await sock.recv(4096)
        if not chunk:
            break
        data += chunk
    return data


def respond(head: bytes, executor: Executor) -> bytes:
    """The whole answer to a request's head."""
    if b"\r\n\r\n" not in head:
        return _answer("431 Request Header Fields Too Large" if len(head) > REQUEST_MOST else "408 Request Timeout")
    words = head.split(b"\r\n", 1)[0].split(b" ")
    if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        return _answer("400 Bad Request")
    if words[1].split(b"?")[0] != b"/metrics":
        return _answer("404 Not Found")
    if words[0] != b"GET":
        return _answer("405 Method Not Allowed", extra="Allow: GET\r\n")
    text = "\n".join(render(executor.statistics(), lost_events=executor.memory.governor.lost)) + "\n"
    return _answer("200 OK", text, "text/plain; version=0.0.4; charset=utf-8")


def _answer(status: str, text: str = "", kind: str = "text/plain; charset=utf-8", *, extra: str = "") -> bytes:
    body = (text or f"{status}\n").encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}Connection: close\r\n\r\n"
    return head.encode() + body


def render(stats: ExecutorStats, *, lost_events: int) -> Iterator[str]:
    """The lines. ``lost_events`` are those of memory control that nobody heard."""
    yield from _family("agentrun_calls_running", "gauge", "Tool calls that run now.", [({}, stats.running)])
    yield from _family("agentrun_calls_queued", "gauge", "Tool calls that wait for their turn.", [({}, stats.queued)])
    yield from _family("agentrun_calls_total", "counter", "Tool calls that have ended.", [({}, stats.completed)])
    yield from _family("agentrun_calls_refused_total", "counter", "Tool calls refused: queue full.", [({}, stats.refused)])
    yield from _family("agentrun_sandboxes_stuck_total", "counter", "Sandboxes that could not be removed.", [({}, stats.stuck)])
    pools = stats.pools.items()
    states = [({"pool": name, "state": state}, getattr(pool, state)) for name, pool in pools for state in _POOL_GAUGES]
    yield from _family("agentrun_pool_slots", "gauge", "Warm sandboxes by state; waiting: calls; target: wanted.", states)
    for what in _POOL_COUNTERS:
        samples = [({"pool": name}, getattr(pool, what)) for name, pool in pools]
        yield from _family(f"agentrun_pool_{what}_total", "counter", f"See {what} of agentrun stats.", samples)
    latency = stats.latency
    help_text = "The programs that record phases are attached."
    yield from _family("agentrun_probes_recording", "gauge", help_text, [({}, int(latency.recording))])
    yield from _family("agentrun_sandboxes_recorded_total", "counter", "Sandboxes in the histograms.", [({}, latency.calls)])
    lost = [({"program": "phases"}, latency.lost), ({"program": "memory"}, lost_events)]
    yield from _family("agentrun_probes_lost_total", "counter", "Events that the programs in the kernel lost.", lost)
    yield from _histograms("agentrun_phase_seconds", "How long a phase of a sandbox took.", latency.histograms)


def _family(name: str, kind: str, text: str, samples: Sequence[tuple[Mapping[str, str], float]]) -> Iterator[str]:
    if samples:
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        yield f"{name}{_labels(labels)} {value}"


def _histograms(name: str, text: str, histograms: Sequence[Histogram]) -> Iterator[str]:
    if histograms:
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} histogram"
    for one in histograms:
        labels = {"phase": one.phase, "shape": one.shape, "kind": one.kind}
        for edge in EDGES:
            below = sum(number for _, high, number in one.buckets if high <= edge)
            yield f"{name}_bucket{_labels({**labels, 'le': f'{edge / 1e6:.9g}'})} {below}"
        yield f"{name}_bucket{_labels({**labels, 'le': '+Inf'})} {one.count}"
        yield f"{name}_sum{_labels(labels)} {one.sum!r}"
        yield f"{name}_count{_labels(labels)} {one.count}"


def _labels(labels: Mapping[str, str]) -> str:
    inside = ",".join(f'{name}="{escape(value)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def escape(value: str) -> str:
    """A label's value as the format wants it between its quotation marks."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
