"""Where this machine gets Debian packages from, said for another release; and how its apt reaches them.

No recipe and no code names a host: what builds an image is the machine's own archive, as its sources say it, in either of
their two formats. Of other archives there (a vendor's, a language's) nothing is taken.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from agentrun.errors import HostError

_SUFFIXES: Final = ("-updates", "-security")
_STANZA_OPTIONS: Final = {"signed-by": "signed-by", "trusted": "trusted", "check-valid-until": "check-valid-until"}
_LINE: Final = re.compile(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.+)")
_ACQUIRE: Final = re.compile(r'Acquire::(?:Check-[A-Za-z-]+|Retries|https?::[A-Za-z0-9:._-]+) ".*";')


class AptSource(msgspec.Struct, frozen=True):
    """One archive, one suite."""

    uri: str
    suite: str
    components: tuple[str, ...]
    options: dict[str, str]

    def line(self) -> str:
        """As a line of a sources.list."""
        options = " ".join(f"{key}={value}" for key, value in self.options.items())
        return f"deb {f'[{options}] ' if options else ''}{self.uri} {self.suite} {' '.join(self.components)}"


def debian_sources(suite: str, etc: Path = Path("/etc")) -> list[str]:
    """Lines of a sources.list for a release of Debian, from the machine's own.

    Raises:
        HostError: it has no Debian archive.
    """
    own = _codename(etc)  # of another distribution the archive has no Debian, whatever its suites are called
    found: list[AptSource] = []
    for source in _read_all(etc / "apt"):
        base, suffix = _split_suite(source.suite)
        if own and base in (own, suite) and "main" in source.components:
            other = msgspec.structs.replace(source, suite=suite + suffix)
            if other not in found:
                found.append(other)
    if not any(_split_suite(source.suite)[1] == "" for source in found):
        raise HostError(
            f"apt of this machine ({etc}/apt/sources.list*) has no archive of {f'Debian {own}' if own else 'Debian'};"
            ' give the recipe lines of one: sources = ["deb URI suite main"]'
        )
    return [source.line() for source in found]


def acquire_settings(dumped: str) -> list[str]:
    """Of what ``apt-config dump`` prints, how archives are reached: proxies, certificates, what is checked."""
    return [line for line in dumped.splitlines() if _ACQUIRE.fullmatch(line)]


def _codename(etc: Path) -> str:
    """The machine's release of Debian; empty if it is no Debian."""
    try:
        words = shlex.split((etc / "os-release").read_text(), comments=True)
    except (OSError, ValueError):
        return ""
    known = dict(word.partition("=")[::2] for word in words)
    return known.get("VERSION_CODENAME", "") if known.get("ID") == "debian" else ""


def _split_suite(suite: str) -> tuple[str, str]:
    """A release, and which part of it; another part (backports, say) is another release, which nobody asks for."""
    for suffix in _SUFFIXES:
        if suite.endswith(suffix):
            return suite.removesuffix(suffix), suffix
    return suite, ""


def _read_all(apt: Path) -> Iterator[AptSource]:
    for path in [apt / "sources.list", *sorted(apt.glob("sources.list.d/*"))]:
        try:
            text = path.read_text() if path.suffix in (".list", ".sources") else ""
        except (OSError, UnicodeDecodeError):
            continue
        yield from _read_stanzas(text) if path.suffix == ".sources" else _read_lines(text)


def _read_lines(text: str) -> Iterator[AptSource]:
    for line in text.splitlines():
        match = _LINE.fullmatch(line.partition("#")[0].strip())
        if match:
            options = dict(option.partition("=")[::2] for option in (match["options"] or "").split())
            yield AptSource(match["uri"], match["suite"], tuple(match["components"].split()), options)


def _read_stanzas(text: str) -> Iterator[AptSource]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1].isspace():
                fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
            else:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() not in ("no", "false", "0"):
            yield from _of_stanza(fields)


def _of_stanza(fields: dict[str, str]) -> Iterator[AptSource]:
    options = {key: fields[field] for field, key in _STANZA_OPTIONS.items() if field in fields}
    if "BEGIN PGP" in options.get("signed-by", ""):  # a key in the file itself: apt's own keys have to do
        del options["signed-by"]
    if "signed-by" in options:
        options["signed-by"] = ",".join(options["signed-by"].split())
    for uri in fields.get("uris", "").split():
        for suite in fields.get("suites", "").split():
            yield AptSource(uri, suite, tuple(fields.get("components", "").split()), options)
