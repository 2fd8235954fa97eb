"""``agentrun setup oci``: make the container engines of this machine know agentrun's runtime and hook."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

from agentrun import engines
from agentrun.config import DEFAULT_SOCKET
from agentrun.errors import HostError, UsageError
from agentrun.hookpolicy import write_cache
from agentrun.image import programs
from agentrun_shim import hook
from agentrun_shim.hook_static import DEFAULT_CACHE


def add_arguments(parser: argparse.ArgumentParser, _verb: str) -> None:
    """Options of ``agentrun setup oci``."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    oci = what.add_parser(
        "oci", help="podman, docker, containerd, CRI-O and Kubernetes", description="Make container engines know agentrun."
    )
    oci.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")
    oci.add_argument(
        "--engine", action="append", choices=[*engines.ENGINES, "all"], help="only this; repeatable (default: those installed)"
    )
    oci.add_argument("--remove", action="store_true", help="take back what was written")
    oci.add_argument("--runtime", metavar="PATH", help="agentrun-oci, if it is not beside this program")
    oci.add_argument("--socket", metavar="PATH", default=DEFAULT_SOCKET, help="where the hook finds the daemon")
    oci.add_argument(
        "--root", metavar="DIR", type=Path, default=Path("/"), help="write below this directory, for an image of a machine"
    )


def run(args: argparse.Namespace) -> int:
    """Print, write or remove."""
    if not args.root.is_dir():
        raise UsageError(f"--root: {args.root} is no directory")
    notes: list[str] = []
    if args.remove:
        changes = engines.plan_removal(args.root)
    else:
        chosen = list(engines.ENGINES) if "all" in (args.engine or ()) else args.engine or engines.installed()
        if not chosen:
            raise UsageError(f"--engine: none is installed here; name one: {', '.join(engines.ENGINES)} or all")
        changes, notes = engines.plan(chosen, _paths(args), args.root)
    if args.dry_run:
        for change in changes:
            print(f"# {change.path}: {'would be removed' if change.text is None else change.what}")
            print(change.text or "")
    else:
        for line in engines.carry_out(changes, args.root):
            print(line)
        if not args.remove:
            print(_compile(args.root))
    for note in notes:
        print(f"# {note}" if args.dry_run else note)
    return 0


def _compile(root: Path) -> str:
    """The policies for hooks that find no daemon."""
    try:
        count = write_cache(root / DEFAULT_CACHE.lstrip("/"))
    except OSError as error:
        raise HostError(f"{error.filename or DEFAULT_CACHE}: {error.strerror}") from error
    return f"{DEFAULT_CACHE}: {count} policies, for the hook where no daemon is"


def _paths(args: argparse.Namespace) -> engines.Paths:
    runtime = args.runtime or _find_runtime()
    for name, path in (("--runtime", runtime), ("--socket", args.socket)):
        if not os.path.isabs(path):
            raise UsageError(f"{name}: {path} is not an absolute path")
    return engines.Paths(
        runtime=runtime, python=sys.executable, hook=os.path.abspath(hook.__file__), socket=args.socket, cache=DEFAULT_CACHE,
        systemd=Path("/run/systemd/system").is_dir(), containerd=_containerd_version(),
    )  # fmt: skip


def _find_runtime() -> str:
    beside = Path(sys.executable).parent / "agentrun-oci"
    found = str(beside) if beside.exists() else shutil.which("agentrun-oci")
    if found is None:
        raise UsageError(f"--runtime: there is no agentrun-oci beside {sys.executable} or on PATH; say where it is")
    return os.path.abspath(found)


def _containerd_version() -> int:
    """Its major version; where there is none, today's."""
    program = shutil.which("containerd")
    if program is None:
        return 2
    found = re.search(r"\bv?(\d+)\.\d+\.\d+", programs.run([program, "--version"]))
    return int(found[1]) if found else 2
