"""``agentrun policy``: look at policies, check them, compare them. No daemon is asked; the files are read.

A NAME may everywhere be the path of a file (it contains a slash or ends in ``.toml``).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from agentrun.cgroup.tree import Tree, find_base
from agentrun.errors import UsageError
from agentrun.policy import DEFAULT, Policy
from agentrun.policystore import PolicyStore
from agentrun.policytables import schema
from agentrun.policywrite import differences, write_policy
from agentrun.terms import LIMIT_FIELDS
from agentrun.tomltext import printable, show_path
from agentrun_shim.seccomp import find_profile
from agentrun_shim.seccomp_profile import ProfileError

_ACTIONS = {
    "list": "every policy there is, its file, and what that overrides",
    "show": "a policy with all that it extends, as a file that means the same",
    "check": "do policies load; exit status 2, and a line for each that does not",
    "diff": "what differs between two policies; exit status 1 if anything does",
    "schema": "the JSON Schema of a policy file, for editors",
}


def add_arguments(parser: argparse.ArgumentParser, _verb: str) -> None:
    """The actions of ``agentrun policy``, each with its options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in _ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if name == "show":
            action.add_argument("name", metavar="NAME")
        elif name == "diff":
            action.add_argument("old", metavar="A")
            action.add_argument("new", metavar="B")
        elif name == "check":
            action.add_argument("names", metavar="NAME", nargs="*", help="a name or a file; none: every policy there is")
            action.add_argument("--host", action="store_true", help="also say what this host cannot enforce (as root)")
        if name in ("list", "show", "diff"):
            action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Carry out one action."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a description may have letters that the terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    store = PolicyStore()
    match args.action:
        case "list":
            return _list(store, args.json)
        case "show":
            return _show(store, args.name, args.json)
        case "check":
            return _check(store, args.names, args.host)
        case "diff":
            return _diff(store, args.old, args.new, args.json)
    return _print_json(schema())


def _print_json(value: object) -> int:
    print(json.dumps(value, indent=2))
    return 0


def _list(store: PolicyStore, as_json: bool) -> int:
    rows = [_describe(store, name, paths) for name, paths in store.files().items()]
    if as_json:
        return _print_json(rows)
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['error'] or row['description']}")
        print(f"{'':<{width}}  {row['file']}" + "".join(f", overrides {other}" for other in row["overrides"]))
    return 0


def _describe(store: PolicyStore, name: str, paths: list[Path]) -> dict[str, Any]:
    description, error = None, None
    try:
        description = store.load(paths[0]).description
    except UsageError as problem:
        error = f"does not load: {problem}"
    first, *others = (show_path(path) for path in paths)
    return {"name": show_path(name), "file": first, "description": description, "overrides": others, "error": error}


def _show(store: PolicyStore, name: str, as_json: bool) -> int:
    path = store.path(name)
    policy = store.load(path)
    if as_json:
        return _print_json(msgspec.to_builtins(policy))
    sys.stdout.write(f"# {policy.name}, as {show_path(path)} resolves\n{write_policy(policy)}")
    return 0


def _check(store: PolicyStore, names: list[str], host: bool) -> int:
    loaded: dict[str, Policy] = {}
    failed = False
    for name in names or store.names():
        try:
            path = store.path(name)
            policy = store.load(path)
            _check_profile(policy, show_path(path))
            loaded[show_path(path)] = policy
        except UsageError as error:
            failed = True
            print(error, file=sys.stderr)
    missing = _unenforced(loaded) if host else {}
    for where in loaded:
        print(f"{where}: ok")
        for line in missing.get(where, ()):
            print(f"{where}: {line}")
    return 2 if failed else 0


def _check_profile(policy: Policy, where: str) -> None:
    """Load the seccomp profile, which a call would do only when its sandbox is built.

    Raises:
        UsageError: there is none, or it does not load.
    """
    try:
        find_profile(policy.seccomp)
    except (ProfileError, OSError) as error:
        raise UsageError(printable(f"{where}: seccomp.profile: {error}")) from None


def _unenforced(policies: dict[str, Policy]) -> dict[str, list[str]]:
    """What nothing on this host holds a call to, for each policy.

    Raises:
        HostError: the cgroup tree, which is asked, cannot be had.
    """
    tree = Tree(find_base(), f"check-{os.getpid()}")
    try:
        found = {}
        for where, policy in policies.items():
            # The built-in limits are no promise: they are listed in results, and refuse nothing.
            asked = {name for name, field in LIMIT_FIELDS.items() if _of(policy, field) != _of(DEFAULT, field)}
            found[where] = [
                f"{item.limit} is not enforced here, calls"
                f" {'are refused' if item.limit in asked and not policy.best_effort else 'run without it'}: {item.reason}"
                for item in tree.plan(policy.limits).missing
            ]
        return found
    finally:
        tree.close()


def _of(policy: Policy, limit: str) -> object:
    return getattr(policy.limits, limit)


def _diff(store: PolicyStore, old: str, new: str, as_json: bool) -> int:
    found = differences(store.find(old), store.find(new))
    if as_json:
        _print_json([{"key": key, "old": before, "new": after} for key, before, after in found])
    else:
        for key, before, after in found:
            print(f"{key}: {_or_absent(before)} → {_or_absent(after)}")
    return 1 if found else 0


def _or_absent(value: str | None) -> str:
    return "(not set)" if value is None else value
