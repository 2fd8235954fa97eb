"""``agentrun changes``, ``diff``, ``apply`` and ``discard``: what calls changed in copy-on-write workspaces."""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import sys
import time
from typing import Any

from agentrun.changes.apply import Report, apply
from agentrun.changes.beneath import open_plainly
from agentrun.changes.client import Source, find_source
from agentrun.changes.model import ChangeSet, path_to_json, to_json
from agentrun.changes.patch import describe, make_patch
from agentrun.changes.store import Store
from agentrun.cli.progress import progress
from agentrun.config import DEFAULT_SOCKET
from agentrun.errors import HostError, UsageError
from agentrun.tomltext import show_path

CONFLICT = 1
"""Exit status of an apply that left something alone which is not as it was."""


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Options of the four verbs."""
    parser.add_argument("--socket", metavar="PATH", default=os.environ.get("AGENTRUN_SOCKET", DEFAULT_SOCKET))
    parser.add_argument("--json", action="store_true", help="print JSON")
    if verb == "changes":
        parser.add_argument("--verify", action="store_true", help="compare what is kept with what it has to be")
        return
    parser.add_argument("id", metavar="ID", help="as the call's result names it (changes.id), or its first letters")
    if verb == "diff":
        parser.add_argument("--patch", action="store_true", help="print text files as a unified diff")
    elif verb == "apply":
        parser.add_argument("--force", action="store_true", help="overwrite files that were changed meanwhile")
        parser.epilog = "Exit status 1: something was changed meanwhile; it is listed, and was left as it is."
    else:
        parser.add_argument("--force", action="store_true", help="though its applying was begun")


def run(args: argparse.Namespace) -> int:
    """Carry out one verb."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have letters that the terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    if args.verb == "changes" and args.verify:
        return _verify(as_json=args.json)
    source = find_source(args.socket)
    if args.verb == "changes":
        return _list(source.summaries(), as_json=args.json)
    if args.verb == "diff":
        return _diff(source, args)
    if args.verb == "apply":
        return _apply(source, args)
    name = source.discard(args.id, force=args.force)
    print(json.dumps({"id": name}) if args.json else f"discarded {name}")
    return 0


def _list(rows: list[dict[str, Any]], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'ID':<12}  {'MADE':<16}  {'CHANGES':>7}  {'BYTES':>10}  WORKSPACE")
    for row in rows:
        number = sum(row[kind] for kind in ("added", "modified", "deleted", "type", "mode", "time"))
        made = time.strftime("%F %R", time.localtime(row["created"]))
        begun = "  (apply was begun)" if row["begun"] else ""
        print(f"{row['id']:<12}  {made}  {number:>7}  {row['bytes']:>10}  {show_path(row['workspace'])}{begun}")
    return 0


def _verify(*, as_json: bool) -> int:
    if os.geteuid() != 0:
        raise UsageError("verify: the store is root's")
    faults = [{"id": name, "problem": problem} for name, problem in Store().verify()]
    lines = [f"{fault['id']}: {fault['problem']}" for fault in faults]
    print(json.dumps(faults, indent=2) if as_json else "\n".join(lines or ["the store is as it should be"]))
    return 125 if faults else 0


def _diff(source: Source, args: argparse.Namespace) -> int:
    opened = source.open(args.id)
    try:
        if args.json:
            print(json.dumps(to_json(opened.changes), indent=2))
        elif args.patch:
            base = _open_workspace(opened.changes)
            try:
                for line in make_patch(opened.changes, opened.upper, base):
                    sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            finally:
                os.close(base)
        else:
            print("\n".join(describe(opened.changes)))
    finally:
        opened.close()
    return 0


def _open_workspace(changes: ChangeSet) -> int:
    """The directory that a change set is for.

    Raises:
        UsageError: it is not there any more.
    """
    try:
        fd = open_plainly(os.fsencode(changes.workspace))
    except OSError as error:
        raise UsageError(f"workspace {changes.workspace}: {error.strerror}") from error
    if os.fstat(fd).st_ino != changes.inode:
        os.close(fd)
        raise UsageError(f"workspace {changes.workspace}: another directory is there now")
    return fd


def _apply(source: Source, args: argparse.Namespace) -> int:
    opened = source.open(args.id, take=True)
    try:
        changes = opened.changes
        root = _open_workspace(changes)
        try:
            begin = functools.partial(source.begin_applying, changes.id)
            with progress(counts_bytes=False) as step:
                report = apply(changes.changes, [opened.upper], root, name=changes.id, force=args.force, begin=begin, step=step)
        except OSError as error:
            where = f" ({show_path(error.filename)})" if error.filename else ""
            raise HostError(f"change set {changes.id}: {error.strerror}{where}; apply it again to finish") from error
        finally:
            os.close(root)
    finally:
        opened.close()
    if report.complete:
        source.discard(changes.id, force=True)
    return print_report(changes, report, as_json=args.json)


def print_report(changes: ChangeSet, report: Report, *, as_json: bool) -> int:
    """Say what came of applying; the exit status for it."""
    if as_json:
        conflicts = [{**path_to_json(conflict.path), "reason": conflict.reason} for conflict in report.conflicts]
        value = {"id": changes.id, "complete": report.complete, "applied": report.applied, "already": report.already}
        print(json.dumps({**value, "conflicts": conflicts}, indent=2))
    elif report.complete:
        print(f"applied {changes.id}: {len(changes.changes)} changes to {show_path(changes.workspace)}")
    else:
        for conflict in report.conflicts:
            print(f"{show_path(os.fsdecode(conflict.path) or '.')}: {conflict.reason}", file=sys.stderr)
        done = "the rest was applied" if report.begun else "nothing was applied"
        print(f"agentrun: {changes.id}: {len(report.conflicts)} conflicts; {done}, and it is kept", file=sys.stderr)
    return 0 if report.complete else CONFLICT
