# SPDX-License-Identifier: Apache-2.0
"""An egress path's life in this process: what it takes, what it gives back, how it fails; and a real sandbox behind one."""

import contextlib
import ctypes
import ipaddress
import logging
import os
import socket
import threading

import pytest
import trio

from agentrun import PIPE
from agentrun.egress import path as path_module
from agentrun.egress import rtnl
from agentrun.egress.path import EgressPath
from agentrun.egress.rules import parse_rules
from agentrun.errors import HostError
from tests.support import PYTHON, eventually, run_async, with_executor

pytestmark = pytest.mark.host
RULES = parse_rules(["files.test:8080"], {"files.test": "127.0.0.1"})
CLONE_NEWNET = 0x40000000


def in_namespace(fd: int | None, function=lambda: None):
    """Call a function in a thread that has entered a network namespace (None: a new one); its result and the namespace's fd."""
    out = []

    def main() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert (libc.unshare(CLONE_NEWNET) if fd is None else libc.setns(fd, CLONE_NEWNET)) == 0
        out.append((function(), os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)))

    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    return out[0]


@pytest.fixture
def netns():
    _, fd = in_namespace(None)
    yield fd
    os.close(fd)


@pytest.fixture(autouse=True)
def nothing_left():
    fds, home = len(os.listdir("/proc/self/fd")), os.readlink("/proc/self/ns/net")
    yield
    assert len(os.listdir("/proc/self/fd")) == fds
    eventually(lambda: where_threads_are() == {home}, "no thread is elsewhere")


def where_threads_are():
    found = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.add(os.readlink(f"/proc/self/task/{task}/ns/net"))
    return found


def test_a_cancelled_nursery_takes_the_path_with_it(netns):
    async def body():
        before = len(os.listdir("/proc/self/fd"))
        async with trio.open_nursery() as nursery:
            path = await EgressPath.open(netns, RULES, nursery)
            assert len(os.listdir("/proc/self/fd")) == before + 4
            nursery.cancel_scope.cancel()
        assert len(os.listdir("/proc/self/fd")) == before
        await path.aclose()
        assert (path.denied(), path.granted()) == ((), ())

    run_async(body)


def test_a_nursery_that_is_closed_gets_none(netns):
    async def body():
        async with trio.open_nursery() as nursery:
            pass
        with pytest.raises(RuntimeError, match="Nursery is closed"):
            await EgressPath.open(netns, RULES, nursery)

    run_async(body)


def test_many_at_once():
    async def body():
        spaces = [in_namespace(None)[1] for _ in range(30)]
        paths = []

        async def one(fd):
            paths.append(await EgressPath.open(fd, RULES, nursery))

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as opening:
                for fd in spaces:
                    opening.start_soon(one, fd)
            async with trio.open_nursery() as closing:
                for path in paths:
                    closing.start_soon(path.aclose)
                    closing.start_soon(path.aclose)
        for fd in spaces:
            os.close(fd)

    run_async(body)


def test_what_is_no_fresh_namespace_is_an_error_that_names_the_step(netns):
    async def body():
        async with trio.open_nursery() as nursery:
            with (
                open("/dev/null") as file,
                pytest.raises(HostError, match="entering the sandbox's network namespace: Invalid arg"),
            ):
                await EgressPath.open(file.fileno(), RULES, nursery)
            path = await EgressPath.open(netns, RULES, nursery)
            with pytest.raises(HostError, match=r"egress: giving lo 198\.18\.0\.1: File exists$"):
                await EgressPath.open(netns, RULES, nursery)
            await path.aclose()

    run_async(body)


def test_a_path_that_fails_takes_nothing_with_it(netns, caplog):
    def knock():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("8.8.8.8", 1))

    async def body():
        async with trio.open_nursery() as nursery:
            path = await EgressPath.open(netns, RULES, nursery)
            path._handlers.clear()  # as a bug of ours might
            _, fd = in_namespace(netns, knock)
            os.close(fd)
            with trio.fail_after(5):
                await path._closed.wait()
            assert [denial.target for denial in path.denied()] == ["(everything)"]
            await path.aclose()
        assert "a sandbox's egress path failed" in caplog.text

    with caplog.at_level(logging.ERROR):
        run_async(body)


def test_the_kernel_knows_which_addresses_are_ours(netns):
    def ask(*texts):
        return [rtnl.route_kind(ipaddress.ip_address(text)) for text in texts]

    assert ask("127.0.0.1", "127.9.9.9", "::1") == [rtnl.RTN_LOCAL] * 3

    def inside():
        before = ask("8.8.8.8", "127.0.0.1", "2001:db8::1")
        rtnl.make_everything_local()
        return before, ask("8.8.8.8", "198.18.0.1", "2001:db8::1")

    (before, after), fd = in_namespace(netns, inside)
    os.close(fd)
    assert before == [0, 0, 0], "lo is down, and there is nothing else"
    assert after == [rtnl.RTN_LOCAL] * 3


INSIDE = r"""
import ctypes, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)

def refused(what, function, *args):
    try:
        function(*args)
    except OSError as error:
        return
    print("not refused:", what)

def call(name, *args):
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)

def netlink(kind, body):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as s:
        s.send(struct.pack("=IHHII", 16 + len(body), kind, 0x605, 0, 0) + body)
        answer = -struct.unpack_from("=i", s.recv(4096), 16)[0]
        if answer: raise OSError(answer, "netlink")

route = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 255, 4, 254, 2, 0) + struct.pack("=HHI", 8, 4, 1)
veth = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + struct.pack("=HH", 16, 18) + struct.pack("=HH", 8, 1) + b"veth" + bytes(4)
tcp = socket.socket()
refused("packet socket", socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM)
refused("vsock", socket.socket, 40, socket.SOCK_STREAM)
for protocol in (socket.IPPROTO_ICMP, socket.IPPROTO_TCP, 255):
    refused(f"raw socket {protocol}", socket.socket, socket.AF_INET, socket.SOCK_RAW, protocol)
refused("ping socket", socket.socket, socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
refused("deleting the route", netlink, 25, route)
refused("another route", netlink, 24, route)
refused("a device", netlink, 16, veth)
refused("lo down", netlink, 16, struct.pack("=BxHiII", 0, 0, 1, 0, 1))
refused("unshare", call, "unshare", 0x40000000)
refused("unshare with a user namespace", call, "unshare", 0x50000000)
refused("setns", lambda: call("setns", os.open("/proc/self/ns/net", 0), 0x40000000))
refused("SO_MARK", tcp.setsockopt, socket.SOL_SOCKET, 36, 1)
refused("IP_TRANSPARENT", tcp.setsockopt, socket.IPPROTO_IP, 19, 1)
refused("port 53", socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind, ("127.0.0.2", 53))
refused("a sysctl", open, "/proc/sys/net/ipv4/ip_unprivileged_port_start", "w")
refused("an address", tcp.connect, ("127.0.0.1", int(sys.argv[1])))

query = b"ab\1\0\0\1\0\0\0\0\0\0\5files\4test\0\0\1\0\1"
dns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
dns.sendto(query, ("127.0.0.1", 53))
address = socket.inet_ntoa(dns.recv(512)[-4:])
print(address, socket.create_connection((address, int(sys.argv[1]))).recv(100).decode())
refused("another port", socket.create_connection, (address, 1))
"""


def test_a_real_sandbox_has_this_way_out_and_can_make_no_other():
    """The whole wall: the slot's namespaces, credentials and filter, and a path behind them."""
    server = socket.create_server(("127.0.0.1", 0))  # on this machine's own loopback, which a pin may name
    port = server.getsockname()[1]
    rules = parse_rules([f"files.test:{port}"], {"files.test": "127.0.0.1"})

    def greet():
        with server.accept()[0] as sock:
            sock.sendall(b"hello from the host")

    async def body(executor):
        command = ["sh", "-c", 'read go; exec "$0" -c "$1" "$2"', PYTHON, INSIDE, str(port)]
        async with executor.start(command, stdin=PIPE) as call, trio.open_nursery() as nursery:
            pid = executor.calls()[call.id].slot.leaf.pids()[0]
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            path = await EgressPath.open(fd, rules, nursery)
            os.close(fd)
            nursery.start_soon(trio.to_thread.run_sync, greet)
            await call.stdin.send_all(b"go\n")
            text = b"".join([chunk async for chunk in call.stdout])
            errors = b"".join([chunk async for chunk in call.stderr])
            result = await call.wait()
            denied, granted = path.denied(), path.granted()
            await path.aclose()
        assert (result.exit_code, text.decode(), errors) == (0, "198.18.0.2 hello from the host\n", b"")
        assert [denial.target for denial in denied] == ["files.test:1"]
        assert [(grant.target, grant.received) for grant in granted] == [(f"files.test:{port}", 19)]

    try:
        with_executor(body)
    finally:
        server.close()


def test_the_wait_for_what_was_sent_last_has_an_end(netns, monkeypatch):
    """Somebody may be alive in there, and never end."""
    monkeypatch.setattr(path_module, "LINGER", 0.2)
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    rules = parse_rules([f"files.test:{port}"], {"files.test": "127.0.0.1"})

    def client():
        ask = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ask.sendto(b"ab\1\0\0\1\0\0\0\0\0\0\5files\4test\0\0\1\0\1", ("127.0.0.1", 53))
        address = socket.inet_ntoa(ask.recv(512)[-4:])
        ask.close()
        return socket.create_connection((address, port))

    async def body():
        async with trio.open_nursery() as nursery:
            path = await EgressPath.open(netns, rules, nursery)
            sock, fd = await trio.to_thread.run_sync(in_namespace, netns, client)
            with (await trio.to_thread.run_sync(server.accept))[0] as outside:
                begun = trio.current_time()
                await path.aclose()
                assert 0.2 <= trio.current_time() - begun < 1.5
                for end in (sock, outside):  # cut off, and so both are told
                    end.settimeout(5)
                    with pytest.raises(ConnectionResetError):
                        end.recv(1)
            sock.close()
            os.close(fd)

    run_async(body)
    server.close()
