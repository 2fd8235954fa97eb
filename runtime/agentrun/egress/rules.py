"""Egress rules: the names and ports a tool may reach. Parsing and matching only; nothing here touches the host.

A rule is ``name:port[,port…]``, with one word after it if the name may be an address of a private network::

    pkg.test:443
    *.example.org:80,443        every name below example.org, however deep; not example.org itself
    git.corp.example:22 private

Names are compared in the form DNS has them on the wire: lower case, IDNA 2008 (UTS 46) labels, no trailing dot.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping

import idna
import msgspec

from agentrun.egress.addresses import IpAddress, never
from agentrun.errors import UsageError

MOST_PORTS = 32
"""Ports of one rule: each is a listening socket in the sandbox once the name has been looked up."""
MOST_RULES = 1024

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""A last label like this makes a name an address to inet_aton(3) and to browsers: 127.1, 0x7f.1, 2130706433."""
_PORT = re.compile(r"[0-9]{1,5}")
_SAMPLE = "say pkg.test:443 or *.example.org:80,443"
_PRIVATE = "private"
_NOT_ADDRESSES = "rules name hosts, not addresses; give it a name and pin the address in hosts"


class Rule(msgspec.Struct, frozen=True):
    """One name, or every name below one, and its ports."""

    name: str
    """In canonical form; of a wildcard, what follows ``*.``."""
    ports: tuple[int, ...]
    """Ascending, each once."""
    wildcard: bool = False
    private: bool = False
    """The name may resolve to an address of a private network (``addresses.forbidden``)."""

    def covers(self, name: str) -> bool:
        """Whether a canonical name is meant by this rule."""
        return name.endswith(f".{self.name}") if self.wildcard else name == self.name

    def __str__(self) -> str:
        text = f"{'*.' if self.wildcard else ''}{self.name}:{','.join(map(str, self.ports))}"
        return f"{text} {_PRIVATE}" if self.private else text


class Rules(msgspec.Struct, frozen=True):
    """What one policy lets out. Equal rules are equal and hash alike, in whatever order they were written."""

    allow: tuple[Rule, ...] = ()
    hosts: tuple[tuple[str, str], ...] = ()
    """Canonical name and address, sorted: names whose address the policy has pinned."""

    def match(self, name: str, port: int) -> Rule | None:
        """The rule that lets ``name`` out at ``port``; of several, one that says ``private``. Any spelling of a name will do."""
        try:
            wanted = canonical_name(name)
        except ValueError:
            return None
        found = [rule for rule in self.allow if port in rule.ports and rule.covers(wanted)]
        return max(found, key=lambda rule: rule.private, default=None)

    def ports(self, name: str) -> tuple[int, ...]:
        """Every port a canonical name may be reached at, ascending; none if the name is not allowed at all."""
        return tuple(sorted({port for rule in self.allow if rule.covers(name) for port in rule.ports}))

    def pinned(self, name: str) -> IpAddress | None:
        """The address the policy gives a canonical name; DNS is not asked then."""
        return next((ipaddress.ip_address(address) for pinned, address in self.hosts if pinned == name), None)


def parse_rules(
    allow: Iterable[str], hosts: Mapping[str, str] | Iterable[tuple[str, str]] = (), where: str = "net.allow"
) -> Rules:
    """The rules and the host table of a policy. ``where`` begins every complaint, say ``policy web: net.allow``.

    Raises:
        UsageError: a rule is none, or an address in ``hosts`` can be no destination; one line.
    """
    rules = {parse_rule(text, where) for text in allow}
    if len(rules) > MOST_RULES:
        raise UsageError(f"{where}: {len(rules)} rules are more than {MOST_RULES}; use wildcards")
    pins = dict(_parse_pin(name, address, where) for name, address in dict(hosts).items())
    return Rules(tuple(sorted(rules, key=lambda rule: (rule.name, str(rule)))), tuple(sorted(pins.items())))


def parse_rule(text: str, where: str) -> Rule:
    """One rule from its text.

    Raises:
        UsageError: it is none; the message begins with ``where``, shows the text and says why.
    """
    words = text.split()
    if not words or len(words) > 2 or (len(words) == 2 and words[1] != _PRIVATE):
        raise UsageError(f"{where}: {text!r} is not a rule ({_SAMPLE}, with the word private after it if need be)")
    if "://" in words[0]:
        raise UsageError(f"{where}: {text!r} is a URL; a rule is a name and its ports ({_SAMPLE})")
    if _is_address(words[0]) or words[0].startswith("["):
        raise UsageError(f"{where}: {text!r}: {_NOT_ADDRESSES}")
    name, colon, listed = words[0].rpartition(":")
    if not colon:
        raise UsageError(f"{where}: {text!r} has no port ({_SAMPLE})")
    wildcard = name.startswith("*.")
    if "*" in name.removeprefix("*."):
        raise UsageError(f"{where}: {text!r}: a wildcard is the whole first label and stands for one or more ({_SAMPLE})")
    try:
        canonical = canonical_name(name.removeprefix("*."))
    except ValueError as error:
        raise UsageError(f"{where}: {text!r}: {error}") from error
    if canonical == "localhost" or canonical.endswith(".localhost"):
        raise UsageError(f"{where}: {text!r}: localhost is the sandbox itself and needs no rule")
    return Rule(canonical, _parse_ports(listed, text, where), wildcard, len(words) == 2)


def _parse_ports(listed: str, text: str, where: str) -> tuple[int, ...]:
    ports = set()
    for item in listed.split(","):
        if not _PORT.fullmatch(item) or not 1 <= int(item) <= 65535:
            raise UsageError(f"{where}: {text!r}: {item!r} is not a port (1 to 65535, several with commas)")
        ports.add(int(item))
    if 53 in ports:
        raise UsageError(f"{where}: {text!r}: port 53 would let DNS out; the sandbox has a resolver of its own")
    if len(ports) > MOST_PORTS:
        raise UsageError(f"{where}: {text!r}: {len(ports)} ports are more than {MOST_PORTS}")
    return tuple(sorted(ports))


def _parse_pin(name: str, address: str, where: str) -> tuple[str, str]:
    try:
        canonical = canonical_name(name)
    except ValueError as error:
        raise UsageError(f"{where}: hosts: {name!r}: {error}") from error
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise UsageError(f"{where}: hosts: {name}: {address!r} is not an IPv4 or IPv6 address") from None
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.scope_id is not None:
        raise UsageError(f"{where}: hosts: {name}: {address!r} has a zone; link-local addresses cannot be reached")
    if reason := never(parsed):
        raise UsageError(f"{where}: hosts: {name}: {address} is {reason}, which no tool may reach")
    return canonical, str(parsed)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def canonical_name(text: str) -> str:
    """A host name as DNS compares it: lower case, A-labels, no trailing dot.

    Underscores are let through, for names in use have them; everything else that is not a letter, digit or hyphen is not.

    Raises:
        ValueError: it is no host name, or an address; the message says why.
    """
    name = text
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode()
        except idna.IDNAError as error:
            raise ValueError(f"not an internationalized name: {str(error).splitlines()[0]}") from error
    name = name.lower().removesuffix(".")
    if not name:
        raise ValueError("the name is empty")
    if len(name) > 253:
        raise ValueError(f"the name has {len(name)} characters; DNS takes 253")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        raise ValueError(_NOT_ADDRESSES)
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise ValueError(f"{label!r} is not a label of a host name")
    return name
