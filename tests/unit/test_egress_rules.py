# SPDX-License-Identifier: Apache-2.0
"""Egress rules as people write them, and the addresses a name may lead to."""

import ipaddress
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun.egress.addresses import embedded, forbidden, never
from agentrun.egress.rules import MOST_PORTS, MOST_RULES, Rule, canonical_name, parse_rule, parse_rules
from agentrun.errors import UsageError


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("pkg.test:443", Rule("pkg.test", (443,))),
        ("PKG.test.:443", Rule("pkg.test", (443,))),
        ("*.example.org:80,443", Rule("example.org", (80, 443), wildcard=True)),
        ("*.example.org:443,80,443", Rule("example.org", (80, 443), wildcard=True)),
        (" git.corp.example:22  private ", Rule("git.corp.example", (22,), private=True)),
        ("db:5432 private", Rule("db", (5432,), private=True)),
        ("bücher.example:443", Rule("xn--bcher-kva.example", (443,))),
        ("STRASSE.example:443", Rule("strasse.example", (443,))),
        ("straße.example:443", Rule("xn--strae-oqa.example", (443,))),  # IDNA 2008: not strasse
        ("*.xn--bcher-kva.example:1", Rule("xn--bcher-kva.example", (1,), wildcard=True)),
        ("\u4f8b\u3048\u3002test:443", Rule("xn--r8jz45g.test", (443,))),  # an ideographic full stop
        ("my_bucket.example:443", Rule("my_bucket.example", (443,))),
        ("x.127:65535.example:443", None),
        ("3com.example:443", Rule("3com.example", (443,))),
    ],
)
def test_rules(text, rule):
    if rule is None:
        with pytest.raises(UsageError):
            parse_rule(text, "net.allow")
    else:
        assert parse_rule(text, "net.allow") == rule


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a rule"), ("  ", "is not a rule"), ("a:1 b:2", "is not a rule"), ("a:1 private x", "is not a rule"),
        ("pkg.test", "has no port"), ("pkg.test:", "'' is not a port"), (":443", "name is empty"), (".:443", "name is empty"),
        ("pkg.test:0", "'0' is not a port"), ("pkg.test:65536", "is not a port"), ("pkg.test:-1", "is not a port"),
        ("pkg.test:443,", "'' is not a port"), ("pkg.test:https", "'https' is not a port"), ("pkg.test:80-90", "is not a port"),
        ("pkg.test:٤٤٣", "is not a port"), ("pkg.test:53", "port 53 would let DNS out"), ("pkg.test:*", "is not a port"),
        ("https://pkg.test:443", "is a URL"), ("*:443", "a wildcard is the whole first label"),
        ("a.*.org:443", "a wildcard is"), ("*a.org:443", "a wildcard is"), ("*.*.org:443", "a wildcard is"),
        ("10.0.0.1:443", "rules name hosts, not addresses"), ("127.1:443", "not addresses"), ("2130706433:80", "not addr"),
        ("0x7f.0x1:80", "not addresses"), ("0x7f000001:80", "not addresses"), ("\uff11.\uff12.\uff13.\uff14:80", "not addresses"),
        ("*.1:80", "not addresses"), ("[::1]:443", "not addresses"), ("::1", "not addresses"), ("2001:db8::1:443", "not addr"),
        ("10.0.0.0/8:443", "is not a label"), ("user@pkg.test:443", "is not a label"), ("a..b:1", "'' is not a label"),
        ("-a.org:1", "is not a label"), ("a-.org:1", "is not a label"), ("a\\b:1", "is not a label"),
        ("x" * 64 + ".org:1", "is not a label"), ("x." * 127 + "org:1", "DNS takes 253"), ("ab\x00c:1", "not a label"),
        ("\u2764.\u202e.org:1", "not an internationalized name"), ("localhost:80", "needs no rule"),
        ("*.localhost:80", "needs no rule"), ("app.localhost:80", "needs no rule"),
        (f"a:{','.join(map(str, range(1000, 1000 + MOST_PORTS + 1)))}", "ports are more than"),
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused_in_one_line_that_says_why(text, why):
    with pytest.raises(UsageError) as caught:
        parse_rule(text, "policy web: net.allow")
    message = str(caught.value)
    assert message.startswith(f"policy web: net.allow: {text!r}")
    assert why in message
    assert "\n" not in message


def test_wildcards_cover_every_depth_and_not_the_name_itself():
    rules = parse_rules(["*.example.org:443"])
    assert rules.match("a.example.org", 443)
    assert rules.match("c.b.a.example.org", 443)
    assert rules.match("A.EXAMPLE.ORG.", 443)
    for name in (
        "example.org",
        "badexample.org",
        "example.org.evil.test",
        "a.example.orgs",
        "",
        ".example.org",
        "a..example.org",
    ):
        assert rules.match(name, 443) is None, name


def test_a_name_has_all_the_ports_of_its_rules():
    rules = parse_rules(["a.example.org:22", "*.example.org:80,443", "b.example.org:1 private", "*.b.example.org:2"])
    assert rules.ports("a.example.org") == (22, 80, 443)
    assert rules.ports("b.example.org") == (1, 80, 443)
    assert rules.ports("x.b.example.org") == (2, 80, 443)
    assert rules.ports("example.org") == ()
    assert rules.match("a.example.org", 23) is None


def test_private_is_a_property_of_the_rule_that_matches():
    rules = parse_rules(["*.corp.test:443", "git.corp.test:443,22 private"])
    assert rules.match("git.corp.test", 443).private
    assert not rules.match("www.corp.test", 443).private


def test_equal_rules_are_one_shape_in_whatever_order_they_are_written():
    one = parse_rules(["b.test:80,443", "A.test:1", "a.test:1"], {"x.test": "10.0.0.1", "Y.test": "FD00::0001"})
    two = parse_rules(["a.test.:1", "b.test:443,80"], [("y.test", "fd00::1"), ("x.test", "10.0.0.1")])
    assert one == two
    assert hash(one) == hash(two)


def test_pins():
    rules = parse_rules(["files.test:80"], {"Files.test.": "10.99.0.2", "six.test": "2001:DB8::1"})
    assert rules.pinned("files.test") == ipaddress.ip_address("10.99.0.2")
    assert rules.pinned("six.test") == ipaddress.ip_address("2001:db8::1")
    assert rules.pinned("other.test") is None


@pytest.mark.parametrize(
    ("name", "address", "why"),
    [
        ("*.a.test", "10.0.0.1", "is not a label"), ("", "10.0.0.1", "the name is empty"), ("1.2.3.4", "10.0.0.1", "not addr"),
        ("a.test", "b.test", "not an IPv4 or IPv6 address"), ("a.test", "10.0.0", "not an IPv4"), ("a.test", "", "not an IPv4"),
        ("a.test", "169.254.169.254", "a cloud metadata address"), ("a.test", "fd00:ec2::254", "a cloud metadata address"),
        ("a.test", "::ffff:169.254.169.254", "a cloud metadata address"), ("a.test", "0.0.0.0", "the unspecified address"),
        ("a.test", "224.0.0.1", "a multicast"), ("a.test", "fe80::1", "a link-local"), ("a.test", "fe80::1%eth0", "has a zone"),
    ],
)  # fmt: skip
def test_a_pin_that_can_be_none(name, address, why):
    with pytest.raises(UsageError) as caught:
        parse_rules(["a.test:80"], {name: address}, "net.allow")
    assert str(caught.value).startswith("net.allow: hosts: ")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_is_an_end_to_the_number_of_rules():
    parse_rules([f"h{n}.test:1" for n in range(MOST_RULES)])
    with pytest.raises(UsageError, match="rules are more than"):
        parse_rules([f"h{n}.test:1" for n in range(MOST_RULES + 1)])


LABELS = st.text(string.ascii_lowercase + string.digits + "-_", min_size=1, max_size=20).filter(
    lambda text: text[0] != "-" and text[-1] != "-"
)
NAMES = st.lists(LABELS, min_size=1, max_size=5).map(".".join).map(lambda name: f"{name}.test")
PORTS = st.integers(1, 65535).filter(lambda port: port != 53)


@given(NAMES, st.lists(PORTS, min_size=1, max_size=8), st.booleans(), st.booleans())
def test_a_rule_written_out_is_the_rule(name, ports, wildcard, private):
    rule = Rule(name, tuple(sorted(set(ports))), wildcard, private)
    assert parse_rule(str(rule), "x") == rule


@given(st.text(max_size=40))
def test_any_text_is_a_rule_or_a_usage_error(text):
    try:
        rule = parse_rule(text, "x")
    except UsageError:
        return
    assert parse_rule(str(rule), "x") == rule
    assert canonical_name(rule.name) == rule.name


@given(st.text(max_size=40) | NAMES)
def test_a_canonical_name_stays_what_it_is(text):
    try:
        name = canonical_name(text)
    except ValueError:
        return
    assert canonical_name(name) == name
    assert name.isascii()
    assert set(name) <= set(string.ascii_lowercase + string.digits + "-_.")
    with pytest.raises(ValueError):
        ipaddress.ip_address(name)


@given(NAMES, NAMES, PORTS, PORTS)
def test_nothing_but_what_is_named_matches(rule, name, port, other):
    rules = parse_rules([f"{rule}:{port}"])
    assert (rules.match(name, other) is not None) == (name == rule and port == other)


# ---------------------------------------------------------------- addresses


NEVER = ["169.254.169.254", "169.254.170.2", "169.254.0.1", "fe80::1", "fd00:ec2::254", "fd20:ce::254", "100.100.100.200",
         "168.63.129.16", "0.0.0.0", "0.1.2.3", "::", "224.0.0.1", "239.1.1.1", "ff02::1", "255.255.255.255"]  # fmt: skip
HOST = ["127.0.0.1", "127.8.8.8", "::1"]
PRIVATE = ["10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "198.18.0.5", "192.0.2.1", "240.0.0.1", "fd12::1", "fec0::1",
           "2001:db8::1", "100::1", "64:ff9b:1::808:808"]  # fmt: skip
GLOBAL = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450::1"]


def judge(text, *, of_host=False, pinned=False, private=False):
    return forbidden(ipaddress.ip_address(text), of_host=of_host, pinned=pinned, private=private)


@pytest.mark.parametrize("text", NEVER)
def test_what_nothing_makes_reachable(text):
    assert never(ipaddress.ip_address(text))
    assert judge(text, pinned=True, private=True)


@pytest.mark.parametrize("text", HOST)
def test_the_host_is_reached_by_a_pin_only(text):
    assert "of the host itself" in judge(text, private=True)
    assert judge(text, pinned=True) is None


@pytest.mark.parametrize("text", [*PRIVATE, *GLOBAL])
def test_an_address_the_host_has_is_the_host(text):
    assert "of the host itself" in judge(text, of_host=True, private=True)
    assert judge(text, of_host=True, pinned=True) is None


@pytest.mark.parametrize("text", PRIVATE)
def test_private_addresses_need_a_word(text):
    assert "a private address" in judge(text)
    assert judge(text, private=True) is None
    assert judge(text, pinned=True) is None


@pytest.mark.parametrize("text", GLOBAL)
def test_global_addresses_are_reached(text):
    assert judge(text) is None


FORMS = {
    "mapped": lambda v4: (0xFFFF << 32) | v4,
    "compatible": lambda v4: v4,
    "translated": lambda v4: (0xFFFF << 48) | v4,
    "NAT64": lambda v4: (0x64FF9B << 96) | v4,
    "NAT64, local use": lambda v4: (0x64FF9B0001 << 80) | v4,
    "6to4": lambda v4: (0x2002 << 112) | (v4 << 80),
    "Teredo server": lambda v4: (0x20010000 << 96) | (v4 << 64),
    "Teredo client": lambda v4: (0x20010000 << 96) | (v4 ^ 0xFFFFFFFF),
}


@pytest.mark.parametrize("form", FORMS)
@given(v4=st.sampled_from([text for text in [*NEVER, *HOST] if "." in text]) | st.ip_addresses(v=4).map(str))
def test_an_ipv4_address_inside_an_ipv6_one_is_seen(form, v4):
    inner = ipaddress.IPv4Address(v4)
    outer = ipaddress.IPv6Address(FORMS[form](int(inner)))
    if int(outer) < 2:
        return  # :: and ::1 are themselves
    assert inner in set(embedded(outer))
    for options in ({}, {"private": True}):
        if judge(v4, **options):
            assert judge(str(outer), **options)


@given(st.ip_addresses())
def test_every_address_has_a_verdict_and_a_wider_permission_never_takes_away(address):
    strict = forbidden(address, of_host=False, pinned=False, private=False)
    private = forbidden(address, of_host=False, pinned=False, private=True)
    pinned = forbidden(address, of_host=False, pinned=True, private=False)
    assert not (private and not strict)
    assert not (pinned and not private)
    assert bool(pinned) == bool(never(address))
