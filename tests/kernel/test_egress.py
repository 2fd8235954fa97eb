# SPDX-License-Identifier: Apache-2.0
"""The egress path with real programs, a real resolver and a real network, all of it in namespaces of our own.

What a test says of the world is true of ``egress_world.py``: every address that has to be refused has a server behind it
that would answer, so that a refusal is ours and no accident.
"""

import hashlib
import os
import shutil

import pytest

from tests.kernel.egress_lab import Lab
from tests.kernel.egress_world import BIG, HALF_CLOSE, RESET, SILENT, SINK, big_body
from tests.requirements import lacking
from tests.support import PYTHON

pytestmark = pytest.mark.host
WEB = ["public.test:80,8080"]
ALL = [f"public.test:80,8080,{HALF_CLOSE},{RESET},{SILENT},{SINK}"]


@pytest.fixture(scope="module")
def lab():
    if shutil.which("ip") is None:
        lacking("no ip (iproute2)")
    lab = Lab()
    yield lab
    lab.close()


def python(lab, allow, script: str, **options):
    """Run a script in a sandbox; it must end well."""
    done = lab.run(allow, PYTHON, "-c", f"import socket, sys, os, threading, time, hashlib, struct\n{script}", **options)
    assert (done["code"], done["err"]) == (0, ""), done
    return done


# ---------------------------------------------------------------- what is allowed works


@pytest.mark.parametrize(
    "command",
    [
        ["curl", "-sS", "http://public.test/x"],
        ["curl", "-sS", "-4", "http://PUBLIC.TEST:8080/x"],
        ["wget", "-qO-", "http://public.test/x"],
        ["busybox", "wget", "-qO-", "http://public.test:8080/x"],
        ["node", "-e", "fetch('http://public.test:8080/x').then(r => r.text()).then(t => process.stdout.write(t))"],
        [PYTHON, "-c", "import urllib.request as u; print(u.urlopen('http://public.test/x').read().decode(), end='')"],
    ],
    ids=lambda command: " ".join(command)[:24],
)
def test_programs_reach_an_allowed_name(lab, command):
    if shutil.which(command[0]) is None:
        lacking(f"no {command[0]} here")
    done = lab.run(WEB, *command)
    assert (done["code"], done["err"]) == (0, "")
    assert done["out"].lower().startswith("hello from public.test")
    assert done["denied"] == {}
    [(target, (connections, sent, received))] = done["granted"].items()
    assert target in ("public.test:80", "public.test:8080")
    assert connections == 1
    assert sent > 20
    assert received > 60


def test_the_system_resolver_knows_allowed_names_only(lab):
    script = (
        "getent hosts public.test; getent ahostsv4 public.test; getent hosts evil.test; echo $?; getent hosts localhost sandbox"
    )
    done = lab.run(WEB, "sh", "-c", script)
    lines = [line.split() for line in done["out"].splitlines()]
    assert lines[0] == ["198.18.0.2", "public.test"]
    assert lines[1] == ["198.18.0.2", "STREAM", "public.test"]
    assert ["2"] in lines, "evil.test"
    assert {line[0] for line in lines[-2:]} <= {"127.0.0.1", "::1"}
    assert done["denied"] == {"evil.test": "this name is not allowed"}
    assert done["asked"] == [], "a lookup alone never leaves the host"


def test_a_pinned_name_is_not_looked_up(lab):
    done = python(lab, ["files.test:8080"], CONNECT.format("files.test", 8080), hosts={"files.test": "10.99.0.2"})
    assert done["out"] == "hello\n"
    assert done["asked"] == []


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
def test_outside_it_may_be_ipv6(lab):
    done = python(lab, ["six.test:8080"], CONNECT.format("six.test", 8080), hosts={"six.test": "fd99::2"})
    assert done["out"] == "hello\n"


def test_50_megabytes_arrive_as_they_were_sent(lab):
    script = """
from urllib.request import urlopen
body = urlopen("http://public.test/big").read()
print(len(body), hashlib.sha256(body).hexdigest(), urlopen("http://public.test/", data=body).read().decode())
"""
    done = python(lab, WEB, script, seconds=60)
    digest = hashlib.sha256(big_body()).hexdigest()
    assert done["out"].split() == [str(BIG), digest, digest]
    connections, sent, received = done["granted"]["public.test:80"]
    assert connections == 2
    assert sent > BIG
    assert received > BIG


def test_50_connections_at_once(lab):
    script = """
from urllib.request import urlopen
out = []
def one(n):
    out.append(urlopen(f"http://public.test/{n}").read().decode().rsplit("/")[-1].strip())
threads = [threading.Thread(target=one, args=(n,)) for n in range(50)]
[t.start() for t in threads]; [t.join() for t in threads]
print(*sorted(map(int, out)))
"""
    done = python(lab, WEB, script)
    assert done["out"].split() == [str(n) for n in range(50)]
    assert done["granted"]["public.test:80"][0] == 50
    assert done["asked"] == ["public.test", "public.test"], "A and AAAA, once for all of them"
    assert done["took"] < 4, "no query was dropped: its client would have waited"


def test_the_end_of_one_direction_is_not_the_end_of_the_other(lab):
    script = f"""
s = socket.create_connection(("public.test", {HALF_CLOSE}))
body = os.urandom(3 << 20)
s.sendall(body); s.shutdown(socket.SHUT_WR)
time.sleep(0.1)
print(s.recv(100).decode() == hashlib.sha256(body).hexdigest(), s.recv(1))
"""
    assert python(lab, ALL, script)["out"] == "True b''\n"


def test_a_reset_outside_is_a_reset_inside(lab):
    script = f"""
s = socket.create_connection(("public.test", {RESET})); s.sendall(b"0123456789")
got = b""
try:
    while chunk := s.recv(100): got += chunk
    print("end")
except ConnectionResetError: print("reset")
"""
    assert python(lab, ALL, script)["out"] == "reset\n"


def test_what_nobody_reads_is_not_taken(lab):
    """Back-pressure: a sender gets rid of what the kernel's queues hold, and no more."""
    script = f"""
s = socket.create_connection(("public.test", {HALF_CLOSE}))
r = socket.create_connection(("public.test", 80)); r.sendall(b"GET /big HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
time.sleep(1)
"""
    done = python(lab, ALL, script)
    assert done["granted"]["public.test:80"][2] < 32 << 20


def test_what_a_tool_sends_last_arrives_though_nobody_waits(lab):
    script = f"""
s = socket.create_connection(("public.test", {SINK})); s.sendall(bytes(2 << 20))
os._exit(0)
"""
    done = python(lab, ALL, script)
    assert done["sink"] == [str(2 << 20)]
    assert done["denied"] == {}


def test_a_tool_that_is_killed_ends_its_connections(lab):
    script = f'c=[socket.create_connection(("public.test", {SILENT})) for _ in range(5)]; print("x", flush=True); time.sleep(60)'
    done = lab.run(ALL, PYTHON, "-c", f"import socket, time\n{script}", seconds=1)
    assert done["code"] is None
    assert done["granted"] == {f"public.test:{SILENT}": [5, 0, 0]}
    assert done["closed"] < 1


def test_there_is_an_end_to_the_number_of_connections(lab):
    script = f"""
alive = []
for _ in range(140):
    s = socket.create_connection(("public.test", {SILENT})); s.settimeout(0.5); alive.append(s)
time.sleep(0.5)
n = 0
for s in alive:
    s.settimeout(0.001)
    try: s.recv(1)
    except TimeoutError: n += 1
    except ConnectionResetError: pass
print(n)
"""
    done = python(lab, ALL, script)
    assert done["out"] == "128\n"
    assert done["denied"] == {f"public.test:{SILENT}": "more than 128 connections at once"}
    assert done["counts"] == {f"public.test:{SILENT}": 12}


def test_a_tool_may_talk_to_itself(lab):
    script = """
socket.getaddrinfo("public.test", 80)  # our listeners for it are at its own address only
for address in ("127.0.0.1", "127.5.5.5", "::1", "198.18.0.1"):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    l = socket.socket(family); l.bind((address, 8080)); l.listen()
    s = socket.socket(family); s.connect(l.getsockname()); s.sendall(b"x"); a, peer = l.accept(); assert a.recv(1) == b"x"
    u = socket.socket(family, socket.SOCK_DGRAM); u.bind((address, 0)); u.sendto(b"y", u.getsockname()); assert u.recv(1) == b"y"
"""
    assert python(lab, WEB, script)["denied"] == {}


# ---------------------------------------------------------------- what is not allowed is refused, and reported

CONNECT = """
s = socket.socket(); s.settimeout(20)
try:
    s.connect(("{}", {})); s.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n"); print("hello" if s.recv(5) == b"HTTP/" else "end")
except OSError as error: print(type(error).__name__)
"""


@pytest.mark.parametrize(
    ("host", "port", "target", "reason", "seen"),
    [
        ("8.8.4.4", 80, "8.8.4.4:80", "an address, not a name", "ConnectionRefusedError"),
        ("10.99.0.1", 80, "10.99.0.1:80", "an address, not a name", "ConnectionRefusedError"),
        ("169.254.169.254", 80, "169.254.169.254:80", "a cloud metadata address", "ConnectionRefusedError"),
        ("198.18.0.77", 80, "198.18.0.77:80", "no name has this address", "ConnectionRefusedError"),
        ("8.8.8.8", 53, "8.8.8.8:53", "DNS to 8.8.8.8", "ConnectionRefusedError"),
        ("9.9.9.9", 853, "9.9.9.9:853", "DNS to 9.9.9.9", "ConnectionRefusedError"),
        ("public.test", 22, "public.test:22", "this name is allowed at ports 80, 8080 only", "ConnectionRefusedError"),
        ("evil.test", 80, "evil.test", "this name is not allowed", "gaierror"),
        ("sub.public.test", 80, "sub.public.test", "this name is not allowed", "gaierror"),
        ("metadata.google.internal", 80, "metadata.google.internal", "this name is not allowed", "gaierror"),
    ],
)
def test_refused_inside(lab, host, port, target, reason, seen):
    done = python(lab, WEB, CONNECT.format(host, port))
    assert done["out"] == f"{seen}\n"
    assert list(done["denied"]) == [target]
    assert reason in done["denied"][target]
    assert done["granted"] == {}
    assert done["asked"] == []
    assert done["took"] < 3, "a refusal is no timeout"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("metadata.test", "resolves to 169.254.169.254, a cloud metadata address"),
        ("alibaba.test", "resolves to 100.100.100.200, a cloud metadata address"),
        ("loop.test", "resolves to 127.0.0.1, an address of the host itself"),
        ("host.test", "resolves to 10.99.0.1, an address of the host itself"),
        ("private.test", "resolves to 10.99.0.2, a private address"),
        ("nothing.test", "the host cannot resolve it"),
        ("inhosts.test", "the host cannot resolve it"),  # it is in the host's /etc/hosts, which is not DNS
    ],
)
def test_where_an_allowed_name_leads_is_judged(lab, name, reason):
    done = python(lab, [f"{name}:80"], CONNECT.format(name, 80))
    assert done["out"] == "ConnectionResetError\n"
    assert list(done["denied"]) == [f"{name}:80"]
    assert reason in done["denied"][f"{name}:80"]
    assert done["granted"] == {}
    assert not any(name.endswith("corp.test") for name in done["asked"]), "the host's search list is not tried"


def test_the_word_private_opens_private_addresses_and_no_others(lab):
    for name, seen in (
        ("private.test", "hello"),
        ("host.test", "ConnectionResetError"),
        ("metadata.test", "ConnectionResetError"),
    ):
        assert python(lab, [f"{name}:80 private"], CONNECT.format(name, 80))["out"] == f"{seen}\n"


def test_a_pin_may_name_the_host_itself(lab):
    done = python(lab, ["devpi.test:8080"], CONNECT.format("devpi.test", 8080), hosts={"devpi.test": "127.0.0.1"})
    assert done["out"] == "hello\n"


def test_one_good_address_is_enough_and_the_others_are_not_tried(lab):
    done = python(lab, ["mixed.test:80"], CONNECT.format("mixed.test", 80))
    assert done["out"] == "hello\n"
    assert done["denied"] == {}


def test_the_next_address_is_tried_if_one_does_not_answer(lab):
    done = python(lab, ["gone.test:80"], CONNECT.format("gone.test", 80))
    assert done["out"] == "hello\n"


def test_a_name_that_changes_its_mind_does_not_lead_to_the_host(lab):
    outs = [python(lab, ["rebind.test:80"], CONNECT.format("rebind.test", 80) * 2) for _ in range(4)]
    assert sorted(done["out"] for done in outs) == ["ConnectionResetError\n" * 2] * 2 + ["hello\nhello\n"] * 2
    assert {reason for done in outs for reason in done["denied"].values()} == {
        "resolves to 127.0.0.1, an address of the host itself (only a pin in hosts may name one)"
    }


def test_what_cannot_be_connected_to_is_said(lab):
    done = python(
        lab, ["public.test:81", "silent.test:80"], CONNECT.format("public.test", 81) + CONNECT.format("silent.test", 80)
    )
    assert done["out"] == "ConnectionResetError\n" * 2
    assert done["denied"]["public.test:81"] == "could not connect to 8.8.4.4: Connection refused"
    assert done["denied"]["silent.test:80"].startswith("the host cannot resolve it: ")


@pytest.mark.parametrize(
    ("script", "target", "reason"),
    [
        ('tcp(10).connect(("2001:4860:4860::8844", 80))', "[2001:4860:4860::8844]:80", "IPv6 is not relayed"),
        ('tcp(10).connect(("fd00:ec2::254", 80))', "[fd00:ec2::254]:80", "a cloud metadata address"),
        ('tcp(10).connect(("::ffff:8.8.4.4", 80))', "8.8.4.4:80", "an address, not a name"),
        ('s = tcp(2); s.bind(("1.2.3.4", 0)); s.connect(("8.8.4.4", 80))', "8.8.4.4:80", "an address, not a name"),
        ('ask(2, "8.8.4.4", 123)', "8.8.4.4:123/udp", "UDP is not relayed"),
        ('ask(2, "8.8.4.4", 123, 60000)', "8.8.4.4:123/udp", "UDP is not relayed"),
        ('ask(2, "public.test", 443)', "public.test:443/udp", "UDP is not relayed"),
        ('ask(10, "2001:db8::1", 53)', "[2001:db8::1]:53/udp", "DNS to 2001:db8::1"),
        ('tell("255.255.255.255", 9)', "255.255.255.255:9/udp", "a multicast or broadcast address"),
        ('tell("224.0.0.251", 5353)', "224.0.0.251:5353/udp", "a multicast or broadcast address"),
    ],
)
def test_other_ways_are_refused_and_reported(lab, script, target, reason):
    words = """
def tcp(family): return socket.socket(family)
def ask(family, host, port, size=1):
    s = socket.socket(family, socket.SOCK_DGRAM); s.connect((host, port)); s.send(bytes(size)); s.recv(1)
def tell(host, port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    s.sendto(b"x", (host, port)); raise OSError
"""
    done = python(lab, WEB, f"{words}\ntry: {script}\nexcept OSError: print('refused')")
    assert done["out"] == "refused\n"
    assert list(done["denied"]) == [target]
    assert reason in done["denied"][target]
    assert done["took"] < 3


def test_a_ping_is_reported_where_one_can_be_sent(lab):
    # A tool cannot: raw sockets need a capability, and ping_group_range of a new namespace is empty.
    script = """
for kind in (socket.SOCK_RAW, socket.SOCK_DGRAM):
    try: socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP)
    except PermissionError: print("refused")
"""
    assert python(lab, WEB, script)["out"] == "refused\nrefused\n"
    script = """
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
s.sendto(b"\\x08\\0\\xf7\\xff" + bytes(4), ("8.8.4.4", 0))
socket.socket(socket.AF_INET, socket.SOCK_RAW, 47).sendto(b"tunnel", ("8.8.4.4", 0))
"""
    done = python(lab, WEB, script, privileged=True)
    assert done["denied"] == {"8.8.4.4": "ping is not relayed, only TCP to allowed names"} | done["denied"]
    assert done["counts"]["8.8.4.4"] == 1


ASK = """
def ask(name, kind=1, server="127.0.0.1", sock=None):
    wire = b"".join(bytes([len(l)]) + l for l in name.encode().split(b".")) + b"\\0"
    s = sock or socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
    s.sendto(b"ab\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0" + wire + struct.pack("!HH", kind, 1), (server, 53))
    data, sender = s.recvfrom(512); assert sender == (server, 53), sender
    return data[3] & 15, socket.inet_ntoa(data[-4:]) if data[7] and kind == 1 else data[7]
"""


def test_dns_to_other_resolvers_is_answered_for_them(lab):
    """Unconnected sockets, as musl's are, never hear of an ICMP error: they would wait."""
    done = python(lab, WEB, f'{ASK}\nprint(ask("public.test", server="8.8.8.8"), ask("evil.test", server="10.1.2.3"))')
    assert done["out"] == "(5, 0) (5, 0)\n"
    assert done["denied"] == {
        f"{ip}:53/udp": f"DNS to {ip}: only the sandbox's own resolver answers" for ip in ("8.8.8.8", "10.1.2.3")
    }


def test_questions_that_have_no_answer(lab):
    done = python(lab, WEB, f'{ASK}\nprint([ask("public.test", kind) for kind in (28, 16, 65, 15, 255)], ask("a.localhost"))')
    assert done["out"] == "[(0, 0), (0, 0), (0, 0), (0, 0), (0, 1)] (0, '127.0.0.1')\n"
    assert done["denied"] == {}


def test_dns_over_tcp(lab):
    script = """
s = socket.create_connection(("127.0.0.1", 53)); s.settimeout(5)
def message(name):
    wire = b"".join(bytes([len(label)]) + label for label in name.split(b"."))
    return b"ab\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0" + wire + b"\\0\\0\\1\\0\\1"
two = b"".join(len(m).to_bytes(2, "big") + m for m in (message(b"public.test"), message(b"evil.test")))
for byte in two: s.send(bytes([byte]))
f = s.makefile("rb")
for _ in range(2):
    answer = f.read(int.from_bytes(f.read(2), "big")); print(answer[3] & 15, answer[7])
s.sendall(b"\\0\\1x"); print(s.recv(1))
"""
    done = python(lab, WEB, script)
    assert done["out"].splitlines() == ["0 1", "3 0", "b''"]


def test_a_tunnel_through_names_that_are_not_allowed_goes_nowhere(lab):
    script = f"""{ASK}
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print({{ask(os.urandom(30).hex() + "." + os.urandom(30).hex() + ".evil.test", sock=s)[0] for _ in range(300)}})
"""
    done = python(lab, WEB, script)
    assert done["out"] == "{3}\n"
    assert done["asked"] == []
    assert len(done["denied"]) == 65
    assert done["counts"]["(others)"] == 300 - 64


def test_through_a_wildcard_a_name_leaves_the_host_when_it_is_connected_to(lab):
    script = f"""{ASK}
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
answers = [ask(f"{{n}}-{{os.urandom(20).hex()}}.wild.test", sock=s) for n in range(300)]
print(sum(code == 0 for code, _ in answers), len({{address for code, address in answers if code == 0}}))
print(ask("secret.wild.test"))
"""
    done = python(lab, ["*.wild.test:80"], script)
    assert done["out"] == "256 256\n(2, 0)\n"
    assert done["asked"] == []
    assert len(done["denied"]) == 45
    done = python(lab, ["*.wild.test:80"], CONNECT.format("secret.wild.test", 80))
    assert done["out"] == "hello\n"
    assert done["asked"] == ["secret.wild.test"] * 2


def test_a_flood_costs_the_daemon_little_and_the_tool_its_report(lab):
    script = """
end = time.monotonic() + 2
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); n = 0
d = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); d.setblocking(False)
while time.monotonic() < end:
    n += 1
    try: s.sendto(b"x", ("8.8.4.4", 1000 + n % 60000))
    except ConnectionRefusedError: pass
    try: d.sendto(b"ab\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\4evil\\0\\0\\1\\0\\1", ("127.0.0.1", 53))
    except OSError: pass
time.sleep(0.5)
s = socket.create_connection(("public.test", 80))
"""
    done = python(lab, WEB, script)
    assert done["cpu"] < 0.3 * done["took"]
    assert done["counts"]["(others)"] > 1000
    assert len(done["denied"]) == 65
    assert done["granted"], "what is allowed still works"


def test_a_name_that_cannot_be_made_room_for_is_a_failure_and_not_a_lie(lab):
    script = f"""{ASK}
for port in (80, 8080):
    l = socket.socket(); l.bind(("0.0.0.0", port)); l.listen(); globals()[f"l{{port}}"] = l
print({{ask("public.test")[0] for _ in range(100)}})
"""
    done = python(lab, WEB, script, privileged=True)
    assert done["out"] == "{2}\n"
    assert set(done["denied"]) == {"public.test:80", "public.test:8080"}
    assert done["cpu"] < 0.5


def test_a_port_the_tool_has_taken_for_itself_is_reported(lab):
    done = python(lab, WEB, 'l = socket.socket(); l.bind(("0.0.0.0", 8080)); l.listen()' + CONNECT.format("public.test", 80))
    assert done["out"] == "hello\n"
    assert done["denied"] == {"public.test:8080": "the sandbox itself listens at this port of every address"}


def test_an_idle_path_is_four_descriptors(lab):
    done = python(lab, WEB, "")
    assert done["idle_fds"] == 4
    assert (done["denied"], done["granted"], done["asked"]) == ({}, {}, [])
