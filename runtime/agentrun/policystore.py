"""Where policies are found: a path, the user's and the machine's directories, the shipped ones.

A policy that does not load is an error for whoever asked for it, and never becomes the default one: neither another file of
its name further down the search path, nor what is built in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from msgspec import UNSET

from agentrun.errors import UsageError
from agentrun.policy import DEFAULT, Policy
from agentrun.policyfile import merge, read_file, read_tables
from agentrun.policyresolve import resolve
from agentrun.policytables import PolicyTables
from agentrun.tomltext import show, show_path
from agentrun_shim.data import data_path

SUFFIX = ".toml"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_DEEPEST = 8
"""Files one policy may come to, each extending the next."""


def directories(env: Mapping[str, str] | None = None) -> list[Path]:
    """Where names are looked up, first to last."""
    variables = os.environ if env is None else env
    config = variables.get("XDG_CONFIG_HOME") or (f"{home}/.config" if (home := variables.get("HOME")) else "")
    own = [Path(config, "agentrun/policies")] if config.startswith("/") else []
    return [*own, Path("/etc/agentrun/policies"), data_path("policies")]


def is_path(name: str) -> bool:
    """It names a file, not a policy: it contains a slash or ends in ``.toml``."""
    return "/" in name or name.endswith(SUFFIX)


class PolicyStore:
    """Policies by name. Each is read once; ``reload`` reads them all anew, and keeps what it had if one does not load."""

    def __init__(self, where: list[Path] | None = None) -> None:
        self._where = directories() if where is None else where
        self._known: dict[str, Policy] = {}

    def find(self, name: str) -> Policy:
        """The policy of a name, or of a path to a file (``is_path``).

        Raises:
            UsageError: there is none, or it does not load.
        """
        policy = self._known.get(name)
        if policy is None:
            policy = self.load(path := self.path(name))
            if _NAME.fullmatch(name) or path.is_absolute():  # a relative path is another one in another directory
                self._known[name] = policy
        return policy

    def path(self, name: str) -> Path:
        """The file that a name or a path means.

        Raises:
            UsageError: no file has the name.
        """
        return Path(name) if is_path(name) else self.locate(name)

    def locate(self, name: str) -> Path:
        """The file of a name: the first that is there, even if it does not load.

        Raises:
            UsageError: there is none.
        """
        found = self._candidates(name)
        if not found:
            raise UsageError(f"policy: {self._unknown(name)}")
        return found[0]

    def _candidates(self, name: str) -> list[Path]:
        """Every file of a name, in the order of search. A dangling link is there, and will not load."""
        if not _NAME.fullmatch(name):
            return []
        return [path for directory in self._where if os.path.lexists(path := directory / f"{name}{SUFFIX}")]

    def _unknown(self, name: str) -> str:
        return f"there is no policy {show(name)} (known: {', '.join(map(show_path, self.names())) or 'none'})"

    def files(self) -> dict[str, list[Path]]:
        """Every name, sorted, with its files: the one it stands for, then those it overrides."""
        found: dict[str, list[Path]] = {}
        for directory in self._where:
            for path in sorted(directory.glob(f"*{SUFFIX}")):
                if not path.name.startswith("."):  # what an editor leaves: .#default.toml
                    found.setdefault(path.stem, []).append(path)
        return dict(sorted(found.items()))

    def names(self) -> dict[str, Path]:
        """Every name with the file it stands for."""
        return {name: paths[0] for name, paths in self.files().items()}

    def load(self, path: Path) -> Policy:
        """Read one file and what it extends.

        Raises:
            UsageError: naming the file, the key, the value and what would be right.
        """
        _, policy = self._load(path, [])
        # The one built into the program and the one in the file are the same object when they say the same: it keys the pools.
        return DEFAULT if policy == DEFAULT else policy

    def _load(self, path: Path, above: list[Path]) -> tuple[PolicyTables, Policy]:
        where = show_path(path)
        tables = read_tables(read_file(path), where)
        if path.stem != tables.name:
            raise UsageError(f"{where}: name: {show(tables.name)} is not that of the file; say {show(path.stem)}")
        if tables.extends is not UNSET:
            chain = [*above, path]
            inherited, _ = self._load(self._base(path, tables.extends, chain), chain)
            tables = merge(inherited, tables)
        return tables, resolve(tables, where)

    def _base(self, path: Path, name: str, chain: list[Path]) -> Path:
        """The file that ``path`` extends. One that extends its own name means the next of that name: /etc's, the shipped one."""
        where = f"{show_path(path)}: extends"
        found = self._candidates(name)
        if not found:
            raise UsageError(f"{where}: {self._unknown(name)}")
        if name == path.stem:
            own = [number for number, file in enumerate(found) if _same(file, path)]
            found = found[own[0] + 1 :] if own else found
            if not found:
                raise UsageError(f"{where}: {show(name)} is this file itself, and there is no other of that name to extend")
        if any(_same(found[0], file) for file in chain):
            circle = " → ".join(show_path(file) for file in [*chain, found[0]])
            raise UsageError(f"{where}: {show(name)} closes a circle ({circle}); take it out of one")
        if len(chain) >= _DEEPEST:
            raise UsageError(f"{where}: {show(name)} is one file too many: a policy may come to {_DEEPEST}")
        return found[0]

    def load_all(self) -> dict[str, Policy]:
        """Every policy there is.

        Raises:
            UsageError: one does not load.
        """
        return {name: self.load(path) for name, path in self.names().items()}

    def reload(self) -> int:
        """Read everything anew; how many there are.

        Raises:
            UsageError: one does not load; then nothing has changed.
        """
        loaded = self.load_all()
        self._known = dict(loaded)
        return len(loaded)


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
