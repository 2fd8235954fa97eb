# SPDX-License-Identifier: Apache-2.0
"""The rest of the world, for test_egress.py: web servers and a DNS server, in a network namespace of their own.

Run as ``python egress_world.py ADDRESS…`` it serves HTTP and more at every address, and DNS at those given; it says READY.
Standard library only: it does not know agentrun.
"""

import contextlib
import hashlib
import http.server
import os
import socket
import struct
import sys
import threading

BIG = 50 << 20
PORTS = (80, 8080)
HALF_CLOSE, RESET, SILENT, SINK = 7001, 7002, 7003, 7004
"""Ports: answers with a digest once it has seen the end; resets in the middle; never answers; counts to the end."""


def big_body() -> bytes:
    return (b"".join(hashlib.sha256(struct.pack("I", n)).digest() for n in range(1 << 15)) * 50)[:BIG]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    body = b""

    def do_GET(self) -> None:
        self.answer(self.body if self.path.startswith("/big") else f"hello from {self.headers['Host']}{self.path}\n".encode())

    def do_POST(self) -> None:
        digest, left = hashlib.sha256(), int(self.headers["Content-Length"])
        while left:
            chunk = self.rfile.read(min(left, 1 << 16))
            digest.update(chunk)
            left -= len(chunk)
        self.answer(digest.hexdigest().encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512
    address_family = socket.AF_INET6 if os.path.exists("/proc/net/if_inet6") else socket.AF_INET  # of both, where there is IPv6

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what some tests are about."""


def half_close(sock: socket.socket) -> None:
    digest = hashlib.sha256()
    while chunk := sock.recv(1 << 16):
        digest.update(chunk)
    sock.sendall(digest.hexdigest().encode())


def reset(sock: socket.socket) -> None:
    sock.recv(10)
    sock.sendall(b"half of it")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def silent(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass


def sink(sock: socket.socket) -> None:
    """Notes how much came up to the end, for a sender who does not wait for an answer."""
    total = 0
    while chunk := sock.recv(1 << 16):
        total += len(chunk)
    note("EGRESS_SINK", str(total))


def note(variable: str, text: str) -> None:
    with open(os.environ[variable], "a") as file:
        file.write(f"{text}\n")


def serve(port: int, handler) -> None:
    listener = socket.create_server(("0.0.0.0", port), backlog=512)

    def one(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            handler(sock)

    def loop() -> None:
        while True:
            threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()


ZONE = {
    "public.test": ["8.8.4.4"],
    "loop.test": ["127.0.0.1"],
    "host.test": ["10.99.0.1"],
    "metadata.test": ["169.254.169.254"],
    "alibaba.test": ["100.100.100.200"],
    "private.test": ["10.99.0.2"],
    "mixed.test": ["127.0.0.1", "8.8.4.4"],
    "gone.test": ["203.0.113.99", "8.8.4.4"],
}


def dns(address: str) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 53))
    turns = 0
    while True:
        data, client = sock.recvfrom(4096)
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode())
            at += 1 + data[at]
        name, (kind,) = ".".join(labels).lower(), struct.unpack_from("!H", data, at + 1)
        note("EGRESS_ASKED", name)
        if name == "silent.test":
            continue
        if name == "rebind.test":  # another answer each time: first where it may go, then where it may not
            turns += kind == 1
            found = ["8.8.4.4"] if turns % 2 else ["127.0.0.1"]
        else:
            found = ["8.8.4.4"] if name.endswith(".wild.test") else ZONE.get(name, [])
        records = found if kind == 1 else []
        answer = data[:2] + struct.pack("!HHHHH", 0x8180 if found else 0x8183, 1, len(records), 0, 0) + data[12 : at + 5]
        for record in records:
            answer += struct.pack("!HHHIH", 0xC00C, 1, 1, 1, 4) + socket.inet_aton(record)
        sock.sendto(answer, client)


def main() -> None:
    Handler.body = big_body()
    for port in PORTS:
        server = Server(("", port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    for port, handler in {HALF_CLOSE: half_close, RESET: reset, SILENT: silent, SINK: sink}.items():
        serve(port, handler)
    for address in sys.argv[1:]:
        threading.Thread(target=dns, args=(address,), daemon=True).start()
    print("READY", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
