"""The command line, all of it but ``exec``, whose fast path is native (shim/native/client.c).

One module a verb; each has ``add_arguments(parser)`` and ``run(args) -> int``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from agentrun.errors import AgentrunError

VERBS = {
    "exec": ("exec_help", "run one command in a fresh sandbox"),
    "daemon": ("daemon", "serve tool calls on a unix socket"),
    "status": ("query", "is the daemon there, and where"),
    "ps": ("query", "the calls that run now"),
    "kill": ("query", "end a call, or signal it"),
    "stats": ("query", "pools and counters"),
    "lat": ("lat", "how long the phases of sandboxes take, as histograms"),
    "top": ("top", "the calls that run, with their memory, processor time and pressure"),
    "bursts": ("bursts", "what memory control sees and does, as it happens"),
    "policy": ("policy", "list, show, check and compare policies"),
    "setup": ("setup", "make container engines know agentrun: setup oci"),
    "image": ("image", "import, pull, list, remove and verify root file systems"),
    "session": ("session", "keep a root and a workspace from call to call: snapshot, fork, roll back"),
    "changes": ("changes", "what is kept of calls in copy-on-write workspaces"),
    "diff": ("changes", "what a call changed in its copy of the workspace"),
    "apply": ("changes", "carry a call's changes over to the workspace"),
    "discard": ("changes", "throw a call's changes away"),
    "doctor": ("doctor", "try what agentrun needs of this host, feature by feature"),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of every verb."""
    parser = argparse.ArgumentParser(prog="agentrun", description="Run the tools of AI agents, each call in its own sandbox.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, (module, summary) in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary.capitalize() + ".")
        importlib.import_module(f"agentrun.cli.{module}").add_arguments(verb, name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point ``agentrun-cli``; the native ``agentrun`` execs it for every verb but ``exec``."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["serve-one"]:  # the native client's private runtime; not for people
        from agentrun.cli.daemon import serve_one

        return serve_one(int(words[1]))
    parser = make_parser()
    args = parser.parse_args(words)
    if args.version:
        from agentrun import __version__

        print(f"agentrun {__version__}")
        return 0
    if args.verb is None:
        parser.print_help()
        return 2
    try:
        code: int = importlib.import_module(f"agentrun.cli.{VERBS[args.verb][0]}").run(args)
    except AgentrunError as error:
        print(f"agentrun: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:  # a full disk, most likely, which takes no more of what is printed
        if args.verb == "daemon":
            raise  # whoever reads its log wants to know where
        print(f"agentrun: {error.filename or args.verb}: {error.strerror or error}", file=sys.stderr)
        return 125
    return code


if __name__ == "__main__":
    sys.exit(main())
