"""``agentrun session``: a root and a workspace that stay from call to call. No daemon is asked; one that runs sees it."""

from __future__ import annotations

import argparse
import json
import sys
import time

import msgspec

from agentrun.changes.model import to_json
from agentrun.changes.patch import describe
from agentrun.cli.changes import print_report
from agentrun.cli.progress import progress
from agentrun.policy import HOST
from agentrun.session.model import Session
from agentrun.session.review import carry_over, look
from agentrun.session.store import Sessions

_ACTIONS = {
    "create": "make a session, and print its id; calls are made in it by agentrun exec --session ID",
    "ls": "every session",
    "show": "one session",
    "snapshot": "remember a session as it is now, and print what the snapshot is called",
    "fork": "make another session that begins as this one is now, or as it was at a snapshot; print its id",
    "rollback": "have a session as it was at a snapshot, or at the last one; without any, as it was made",
    "diff": "what its workspace has that the directory has not",
    "apply": "write to the directory what the workspace has; exit status 1: something was changed meanwhile, and was left",
    "rm": "remove a session",
}


def add_arguments(parser: argparse.ArgumentParser, _verb: str) -> None:
    """The actions of ``agentrun session``, each with its options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in _ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary.capitalize() + ".")
        action.add_argument("--json", action="store_true", help="print JSON")
        if name == "create":
            action.add_argument("--image", metavar="NAME", default=HOST, help="of the store; without, only the workspace is kept")
            action.add_argument(
                "--workspace", metavar="DIR", default="", help="a directory to work on, which is never written to"
            )
        elif name != "ls":
            action.add_argument("id", metavar="ID")
        if name == "snapshot":
            action.add_argument("name", metavar="NAME", nargs="?", default="", help="what to call it; else s1, s2, …")
        elif name == "apply":
            action.add_argument("--force", action="store_true", help="overwrite files that were changed meanwhile")
        elif name in ("fork", "rollback"):
            action.add_argument("snapshot", metavar="SNAPSHOT", nargs="?", default="")


def run(args: argparse.Namespace) -> int:
    """Carry out one action."""
    store = Sessions()
    match args.action:
        case "create":
            return _print(args, store.create(image=args.image, workspace=args.workspace))
        case "ls":
            return _list(store, args.json)
        case "show":
            session = store.get(args.id)
            print(json.dumps(msgspec.to_builtins(session), indent=2) if args.json else _describe(session))
            return 0
        case "snapshot":
            session, name = store.snapshot(args.id, args.name)
            return _print(args, session, name)
        case "fork":
            return _print(args, store.fork(args.id, args.snapshot))
        case "diff":
            changes = look(store, args.id)
            print(json.dumps(to_json(changes), indent=2) if args.json else "\n".join(describe(changes)))
            return 0
        case "apply":
            with progress(counts_bytes=False) as step:
                done = carry_over(store, args.id, force=args.force, step=step)
            return print_report(*done, as_json=args.json)
        case "rollback":
            _print(args, store.rollback(args.id, args.snapshot))
        case "rm":
            store.remove(args.id)
    sys.stdout.flush()  # the answer is there; what is no longer needed goes now
    store.prune()
    return 0


def _print(args: argparse.Namespace, session: Session, line: str = "") -> int:
    print(json.dumps(msgspec.to_builtins(session), indent=2) if args.json else line or session.id)
    return 0


def _list(store: Sessions, as_json: bool) -> int:
    sessions = store.all()
    if as_json:
        print(json.dumps(msgspec.to_builtins(sessions), indent=2))
        return 0
    print(f"{'ID':12}  {'CREATED':16}  {'IMAGE':12}  {'LAYERS':>6}  {'SNAPSHOTS':>9}  WORKSPACE")
    for session in sessions:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(session.created))
        image = session.image.removeprefix("sha256:")[:12]
        counts = f"{len(session.layers):>6}  {len(session.snapshots):>9}"
        print(f"{session.id:12}  {created:16}  {image:12}  {counts}  {session.workspace or '-'}")
    return 0


def _describe(session: Session) -> str:
    lines = [
        f"id         {session.id}",
        f"image      {session.image}",
        f"workspace  {session.workspace or '-'}",
        f"parent     {session.parent or '-'}",
        f"layers     {len(session.layers)}, and the one that calls write to",
    ]
    lines += [f"snapshot   {name}, of {len(layers)} layers" for name, layers in session.snapshots.items()]
    return "\n".join(lines)
