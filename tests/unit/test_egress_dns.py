# SPDX-License-Identifier: Apache-2.0
"""DNS messages: what is a query and what is not, and that answers are well formed whatever came in."""

import ipaddress
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentrun.egress import dns
from agentrun.egress.etc import hosts, resolv_conf


def wire(*labels: bytes) -> bytes:
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def query(name: bytes, kind=dns.TYPE_A, klass=1, ident=0x1234, flags=0x0100, counts=(1, 0, 0, 0), rest=b"") -> bytes:
    return struct.pack("!HHHHHH", ident, flags, *counts) + name + struct.pack("!HH", kind, klass) + rest


EDNS = b"\0" + struct.pack("!HHIH", 41, 1232, 0, 0)


def read(message: bytes):
    """An answer, read strictly: (ident, code, question, records), and nothing after it."""
    ident, flags, questions, answers, authorities, additional = struct.unpack_from("!HHHHHH", message)
    assert flags & 0x8000
    assert not flags & 0x0200
    assert (authorities, additional) == (0, 0)
    assert questions in (0, 1)
    assert answers in (0, 1)
    at = 12
    question = b""
    if questions:
        while message[at]:
            assert message[at] <= 63
            at += 1 + message[at]
        question, at = message[12 : at + 5], at + 5
    records = []
    for _ in range(answers):
        pointer, kind, klass, ttl, length = struct.unpack_from("!HHHIH", message, at)
        assert (pointer, klass, ttl) == (0xC00C, 1, dns.TTL)
        records.append((kind, message[at + 12 : at + 12 + length]))
        at += 12 + length
    assert at == len(message)
    assert len(message) <= 512
    return ident, flags & 15, question, records


def refusal(data: bytes):
    with pytest.raises(dns.BadQuery) as caught:
        dns.parse_query(data)
    return caught.value.reply


def test_a_query_and_its_answers():
    parsed = dns.parse_query(query(wire(b"PKG", b"test"), counts=(1, 0, 0, 1), rest=EDNS))
    assert (parsed.name, parsed.shown, parsed.kind, parsed.in_class) == ("pkg.test", "pkg.test", dns.TYPE_A, True)
    address = bytes([198, 18, 0, 2])
    # The case of the question is the client's, and it may check that it gets it back.
    asked = wire(b"PKG", b"test") + struct.pack("!HH", 1, 1)
    assert read(dns.reply(parsed, dns.NOERROR, (dns.TYPE_A, address))) == (0x1234, 0, asked, [(1, address)])
    assert read(dns.reply(parsed, dns.NXDOMAIN)) == (0x1234, 3, asked, [])


@pytest.mark.parametrize(
    ("labels", "name", "shown"),
    [
        ((), "", "."),
        ((b"localhost",), "localhost", "localhost"),
        ((b"a.b", b"org"), "", "a\\046b.org"),  # a dot inside a label does not make two
        ((b"evil", b"test\0", b"example", b"org"), "", "evil.test\\000.example.org"),
        ((b"b\xc3\xbccher", b"example"), "", "b\\195\\188cher.example"),
        ((b"*", b"example", b"org"), "", "\\042.example.org"),
        ((b"1", b"2", b"3", b"4"), "", "1.2.3.4"),
        ((b"-a", b"org"), "", "-a.org"),
        ((b"_dmarc", b"example", b"org"), "_dmarc.example.org", "_dmarc.example.org"),
        ((b"\x1b[2J\n", b"org"), "", "\\027\\0912j\\010.org"),
        ((b"x" * 63,) * 3 + (b"y" * 61,), ".".join(["x" * 63] * 3 + ["y" * 61]), ".".join(["x" * 63] * 3 + ["y" * 61])),
    ],
)
def test_names(labels, name, shown):
    parsed = dns.parse_query(query(wire(*labels)))
    assert (parsed.name, parsed.shown) == (name, shown)
    assert read(dns.reply(parsed, dns.NXDOMAIN))[2][:-4] == wire(*labels)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 11, query(wire(b"a"), flags=0x8100),  # nothing, half a header, an answer: silence
    ],
)  # fmt: skip
def test_what_is_not_answered_at_all(data):
    assert refusal(data) is None


@pytest.mark.parametrize(
    "data",
    [
        query(wire(b"a"))[:-1],  # cut off
        query(wire(b"a"))[:12],
        query(b"\x05ab"),
        query(b"\xc0\x0c"),  # a name that is itself
        query(b"\x01a\xc0\x0c"),
        query(b"\xc0\xff"),
        query(b"\x40" + b"a" * 64 + b"\0"),  # the other reserved lengths
        query(b"\x80" + b"a" * 64 + b"\0"),
        query((b"\x3f" + b"a" * 63) * 4 + b"\0"),  # 257 bytes
        query(wire(b"x" * 63, b"x" * 63, b"x" * 63, b"y" * 62)),  # 256
        query(wire(b"a"), counts=(0, 0, 0, 0)),
        query(wire(b"a"), counts=(2, 0, 0, 0), rest=wire(b"b") + b"\0\1\0\1"),
        query(wire(b"a"), counts=(1, 1, 0, 0)),
        query(wire(b"a"), counts=(1, 0, 1, 0)),
        query(wire(b"a"), flags=0x0300),  # "truncated", by whom?
    ],
)
def test_a_malformed_query_is_told_so(data):
    assert read(refusal(data)) == (0x1234, dns.FORMERR, b"", [])


@pytest.mark.parametrize("opcode", range(1, 16))
def test_other_operations_are_not_implemented(opcode):
    assert read(refusal(query(wire(b"a"), flags=opcode << 11)))[1] == dns.NOTIMP


def test_reverse_queries():
    def reverse(*labels, kind=dns.TYPE_PTR):
        return dns.parse_query(query(wire(*labels, b"in-addr", b"arpa"), kind)).reverse

    assert reverse(b"2", b"0", b"18", b"198") == ipaddress.IPv4Address("198.18.0.2")
    assert reverse(b"2", b"0", b"18", b"198", kind=dns.TYPE_A) is None
    assert reverse(b"0", b"18", b"198") is None
    assert reverse(b"256", b"0", b"18", b"198") is None
    assert reverse() is None
    assert dns.parse_query(query(wire(b"in-addr", b"arpa"), dns.TYPE_PTR)).reverse is None


def check(data: bytes) -> None:
    try:
        parsed = dns.parse_query(data)
    except dns.BadQuery as error:
        if error.reply is not None:
            ident, code, _, records = read(error.reply)
            assert ident == int.from_bytes(data[:2], "big")
            assert code in (dns.FORMERR, dns.NOTIMP)
            assert records == []
        return
    assert parsed.shown.isprintable()
    assert len(parsed.shown) <= 255
    for code in (dns.NOERROR, dns.NXDOMAIN, dns.REFUSED, dns.SERVFAIL):
        assert read(dns.reply(parsed, code))[:2] == (parsed.ident, code)
    assert read(dns.reply(parsed, 0, (1, b"\1\2\3\4")))[3] == [(1, b"\1\2\3\4")]
    longest = dns.encode_name(".".join(["x" * 63] * 3 + ["y" * 61]))
    read(dns.reply(parsed, 0, (dns.TYPE_PTR, longest))) if parsed.reverse else None


@given(st.binary(max_size=600))
@example(query(b"\xc0\x0c"))
def test_any_bytes_are_a_query_or_a_refusal(data):
    check(data)


HEADERS = st.tuples(
    st.integers(0, 65535), st.sampled_from([0, 0x0100, 0x0120]) | st.integers(0, 65535), st.sampled_from([1, 1, 1, 0, 2, 65535]),
    st.sampled_from([0, 0, 1]), st.sampled_from([0, 0, 1]), st.sampled_from([0, 1, 65535]),
)  # fmt: skip
LABEL = st.binary(min_size=1, max_size=63).map(lambda label: bytes([len(label)]) + label)
PIECE = LABEL | st.sampled_from([b"\0", b"\xc0\x0c", b"\xc0\x00", b"\xff\xff", b"\x40", b"\x3f"])


@given(HEADERS, st.lists(PIECE, max_size=8), st.binary(max_size=40))
def test_almost_queries(header, pieces, rest):
    check(struct.pack("!HHHHHH", *header) + b"".join(pieces) + rest)


@given(
    st.lists(st.binary(min_size=1, max_size=20), max_size=10),
    st.integers(0, 65535),
    st.integers(0, 65535),
    st.binary(max_size=60),
)
def test_every_well_formed_query_is_read(labels, kind, klass, rest):
    parsed = dns.parse_query(query(wire(*labels), kind, klass, counts=(1, 0, 0, 1), rest=rest))
    assert (parsed.kind, parsed.in_class) == (kind, klass == 1)
    assert parsed.question == wire(*labels) + struct.pack("!HH", kind, klass)


@given(st.binary(max_size=80), st.integers(0, 79), st.integers(0, 255))
def test_damaged_queries(tail, at, value):
    data = bytearray(query(wire(b"files", b"example", b"org"), rest=tail))
    data[at % len(data)] = value
    check(bytes(data))
    check(bytes(data[: at % len(data)]))


def test_the_files_of_the_sandbox():
    assert b"nameserver 127.0.0.1\n" in resolv_conf()
    assert b"search" not in resolv_conf()
    assert hosts("box").splitlines()[0] == b"127.0.0.1 localhost box"
