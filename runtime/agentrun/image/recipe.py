"""A recipe: what an image that is built here consists of. ``images/<name>/image.toml`` is one; docs/images.md has every key.

What is wrong with one is said in one line: the file, the key, the value, and what would be right.
"""

from __future__ import annotations

import datetime
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from agentrun.errors import UsageError
from agentrun.tomltext import printable, show, show_key, show_path
from agentrun_shim.data import data_path

FILE: Final = "image.toml"
LARGEST: Final = 64 << 10
"""Bytes of a recipe; the shipped ones have 1500."""
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SUITE: Final = re.compile(r"[a-z][a-z0-9.-]{0,40}")
_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9+.-]{1,99}(?:=[A-Za-z0-9.+~:-]{1,99})?(?:/[a-z][a-z0-9-]{0,40})?")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATTERN: Final = re.compile(r"/[A-Za-z0-9._+*?\[\]@:~/-]{1,400}")
_PROBLEM: Final = re.compile(r"(?P<text>.*?)(?: - at `(?P<where>.*)`)?", re.DOTALL)


class Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How programs of the image are run: what ``docker run`` would take from its config."""

    env: dict[str, str] = {}
    workdir: str = "/"
    user: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    labels: dict[str, str] = {}


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``image.toml``."""

    name: str
    description: str
    suite: str
    """The release of Debian, by its codename."""
    date: datetime.date
    """Nothing in the image is younger: the SOURCE_DATE_EPOCH of its files, unless the environment has one."""
    variant: Literal["essential", "apt", "minbase", "buildd", "important", "standard"] = "minbase"
    """What is there before any package is named; mmdebstrap's word."""
    packages: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    """Paths that dpkg does not unpack; ``*`` matches slashes too."""
    include: tuple[str, ...] = ()
    """Of those, the ones that it does."""
    run: tuple[str, ...] = ()
    """Shell commands, run as root in the tree when its packages are there."""
    sources: tuple[str, ...] = ()
    """Lines of a sources.list, instead of the machine's own."""
    config: Run = Run()


def directories(env: Mapping[str, str] | None = None) -> list[Path]:
    """Where names are looked up, first to last: the user's, the machine's, what is shipped."""
    variables = os.environ if env is None else env
    config = variables.get("XDG_CONFIG_HOME") or (f"{home}/.config" if (home := variables.get("HOME")) else "")
    own = [Path(config, "agentrun/images")] if config.startswith("/") else []
    return [*own, Path("/etc/agentrun/images"), data_path("images")]


def find_recipe(reference: str, where: list[Path] | None = None) -> Recipe:
    """The recipe of a name; or of a path (which has a slash, or ends in .toml) of a file, or of a directory with an image.toml.

    Raises:
        UsageError: there is none, or something is wrong with it.
    """
    if "/" in reference or reference.endswith(".toml"):
        path = Path(reference)
        return load(path / FILE if path.is_dir() else path)
    places = directories() if where is None else where
    for directory in places:
        path = directory / reference / FILE
        if _NAME.fullmatch(reference) and os.path.lexists(path):
            return load(path)
    known = ", ".join(sorted(recipe_files(places))) or "none"
    raise UsageError(f"recipe: there is no {show(reference)} (known: {known}; a path has a slash in it)")


def recipe_files(where: list[Path] | None = None) -> dict[str, Path]:
    """Every name, and the file it stands for."""
    found: dict[str, Path] = {}
    for directory in directories() if where is None else where:
        for path in sorted(directory.glob(f"*/{FILE}")):
            found.setdefault(path.parent.name, path)
    return found


def load(path: Path) -> Recipe:
    """Read one file.

    Raises:
        UsageError: naming the file, the key, the value and what would be right.
    """
    where = show_path(path)
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {error.strerror if isinstance(error, OSError) else error}") from error
    if len(data) > LARGEST:
        raise UsageError(f"{where}: larger than a recipe can be ({LARGEST >> 10} kB)")
    return parse(data, where)


def parse(data: bytes, where: str) -> Recipe:
    """Read the bytes of one.

    Raises:
        UsageError: as ``load``.
    """
    try:
        tree = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{where}: not TOML: {printable(str(error))[:200]}") from None
    for key, unknown, value, known in _unknown(tree):
        close = get_close_matches(unknown, known, 1) if len(unknown) <= 60 else []
        advice = f"did you mean {key}{close[0]}?" if close else f"known: {', '.join(known)}"
        raise UsageError(f"{where}: {key}{show_key(unknown)}: unknown key, with {show(value)} ({advice})")
    try:
        recipe = msgspec.convert(tree, Recipe)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: {_in_words(str(error), tree)}") from None
    for key, shown, right in _faults(recipe):
        raise UsageError(f"{where}: {key}: {show(shown)} is not {right}")
    return recipe


def _unknown(tree: Mapping[str, Any]) -> Iterator[tuple[str, str, object, list[str]]]:
    config = tree.get("config")
    for prefix, table, kind in (("", tree, Recipe), ("config.", config if isinstance(config, dict) else {}, Run)):
        known = list(kind.__struct_fields__)
        for name, value in table.items():
            if name not in known:
                yield prefix, name, value, known


def _in_words(text: str, tree: object) -> str:
    """msgspec's message, with the key and its value before it."""
    match = _PROBLEM.fullmatch(text)
    assert match is not None  # it matches anything
    place = (match["where"] or "$").removeprefix("$").removeprefix(".")
    value = tree
    for name, number in re.findall(r"([A-Za-z_]\w*)|\[(\d+)\]", place):
        try:
            value = value[int(number)] if number else value[name]  # type: ignore[index]
        except (LookupError, TypeError):
            break
    missing = "missing required" in match["text"]
    shown = f" ({show(value)})" if place and not missing else ""
    return f"{place + ': ' if place else ''}{match['text']}{shown}"


def _faults(recipe: Recipe) -> Iterator[tuple[str, object, str]]:
    """(key, value, what would be right) of whatever has the right type and is wrong all the same."""
    if not _NAME.fullmatch(recipe.name):
        yield "name", recipe.name, "a name of a-z, 0-9, . _ and -, at most 64"
    if not recipe.description.isprintable() or not 0 < len(recipe.description) <= 200:
        yield "description", recipe.description, "one line of text, at most 200 characters"
    if not _SUITE.fullmatch(recipe.suite):
        yield "suite", recipe.suite, 'a release of Debian, such as "bookworm"'
    if not 1970 < recipe.date.year < 2100:
        yield "date", recipe.date, "a day between 1971 and 2099"
    for number, package in enumerate(recipe.packages):
        if not _PACKAGE.fullmatch(package):
            yield f"packages[{number}]", package, "the name of a package, or package=version"
    for key in ("exclude", "include"):
        for number, pattern in enumerate(getattr(recipe, key)):
            if not _PATTERN.fullmatch(pattern):
                yield f"{key}[{number}]", pattern, 'an absolute path, or pattern of one, such as "/usr/share/man/*"'
    for number, line in enumerate(recipe.sources):
        if not line.startswith(("deb ", "deb\t")) or not line.isprintable():
            yield f"sources[{number}]", line, 'a line "deb [options] URI suite component…"'
    for number, command in enumerate(recipe.run):
        if not command.strip() or "\0" in command:
            yield f"run[{number}]", command, "a shell command"
    yield from _run_faults(recipe.config)


def _run_faults(config: Run) -> Iterator[tuple[str, object, str]]:
    for name, value in config.env.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            yield f"config.env.{show_key(name)}", value, "the value of a variable (A-Z, a-z, 0-9 and _, no NUL)"
    if not config.workdir.startswith("/") or ".." in config.workdir.split("/") or "\0" in config.workdir:
        yield "config.workdir", config.workdir, "an absolute path without .."
    if not re.fullmatch(r"[A-Za-z0-9._-]*(?::[A-Za-z0-9._-]+)?", config.user):
        yield "config.user", config.user, "a user, or user:group, each a name or a number"
    for key in ("entrypoint", "cmd"):
        for number, word in enumerate(getattr(config, key)):
            if "\0" in word:
                yield f"config.{key}[{number}]", word, "an argument (no NUL)"
