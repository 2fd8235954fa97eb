"""An image from a recipe: mmdebstrap makes a tree of Debian packages, and the tar of it is the one layer.

The same recipe gives the same layer, bit for bit, for as long as the archive has the same packages: nothing in it is younger than
the recipe's date, names are sorted, and what a build leaves behind by accident (logs, caches, ids of a machine, the host's
resolver) is taken out. Device nodes as well: an image has none.

It runs in mount and pid namespaces of its own, so whatever it mounts or starts is gone when it ends, however it ends; and it ends
when we do.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from agentrun.errors import HostError, UsageError
from agentrun.image import programs
from agentrun.image.aptsources import acquire_settings, debian_sources
from agentrun.image.layers import Packed
from agentrun.image.limits import Report
from agentrun.image.locks import Work
from agentrun.image.oci import machine
from agentrun.image.recipe import Recipe
from agentrun.image.streams import Blob
from agentrun.tomltext import printable

_ALONE: Final = (
    "setpriv", "--pdeathsig", "KILL",
    "unshare", "--mount", "--propagation", "private", "--pid", "--mount-proc", "--fork", "--kill-child",
)  # fmt: skip
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PASSED: Final = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_TAIL: Final = 1600
"""Characters of what a failed build said that the error repeats."""

# What a build leaves behind. Logs have times in them; caches, and the second copies that dpkg, debconf and passwd keep, the order
# of things. machine-id is empty, as in every image: whoever boots one gets an id of his own.
_SCRIPT: Final = r"""
set -eu
root=$1 tar=$2
shift 2
"$@"
echo "I: packing"
cd "$root"
rm -f etc/resolv.conf etc/hostname etc/apt/apt.conf.d/99mmdebstrap etc/apt/sources.list etc/apt/sources.list.d/*
rm -f etc/passwd- etc/group- etc/shadow- etc/gshadow- etc/subuid- etc/subgid- etc/.pwd.lock
rm -f var/lib/dpkg/*-old var/lib/dpkg/lock* var/lib/dpkg/triggers/Lock var/cache/debconf/*-old var/lib/dbus/machine-id
rm -rf var/cache/ldconfig var/cache/man var/cache/apt var/lib/apt/lists root/.cache
mkdir -p var/lib/apt/lists/partial var/cache/apt/archives/partial
find var/log -type f -delete
find run tmp var/tmp -mindepth 1 ! -path run/lock -delete
if [ -e etc/dpkg/dpkg.cfg.d/99mmdebstrap ]; then mv etc/dpkg/dpkg.cfg.d/99mmdebstrap etc/dpkg/dpkg.cfg.d/image; fi
: > etc/machine-id
exec tar -c --format=pax --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime --sort=name --numeric-owner \
    --one-file-system --clamp-mtime --mtime="@$SOURCE_DATE_EPOCH" --exclude="./dev/*" -f "$tar" .
"""


class Built(msgspec.Struct, frozen=True):
    """What came of a recipe."""

    layer: Packed
    document: bytes
    """The image's config."""


def build_recipe(recipe: Recipe, work: Work, report: Report) -> Built:
    """Build it in a directory of the store's scratch space.

    Raises:
        HostError: a program for it is missing or fails, the machine's apt has no Debian archive, or we are not root.
        UsageError: SOURCE_DATE_EPOCH is no number.
    """
    if os.geteuid() != 0:
        raise HostError(f"building {recipe.name}: only root can make files of other owners; sudo agentrun image build")
    programs.find("mmdebstrap")
    epoch = _epoch(recipe)
    root, tar, log, sources, settings = (work.path / name for name in ("root", "root.tar", "log", "sources.list", "apt.conf"))
    sources.write_text("".join(f"{line}\n" for line in recipe.sources or debian_sources(recipe.suite)))
    settings.write_text("".join(f"{line}\n" for line in acquire_settings(programs.run(["apt-config", "dump"]))))
    words = [
        "mmdebstrap", "--mode=root", "--format=directory", f"--variant={recipe.variant}", f"--aptopt={settings}",
        *([f"--include={','.join(recipe.packages)}"] if recipe.packages else []),
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.exclude),
        *(f"--dpkgopt=path-include={pattern}" for pattern in recipe.include),
        *(f"--customize-hook={_in_root(command)}" for command in recipe.run),
        recipe.suite, str(root), str(sources),
    ]  # fmt: skip
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    variables = {
        "PATH": _PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", "TMPDIR": str(work.path), "SOURCE_DATE_EPOCH": str(epoch), **passed,
    }  # fmt: skip
    settled = [f"{name}={value}" for name, value in variables.items()]
    try:
        programs.run(
            [
                *_ALONE,
                "env",
                "-i",
                *settled,
                "sh",
                "-c",
                f"exec >{shlex.quote(str(log))} 2>&1\n{_SCRIPT}",
                "build",
                str(root),
                str(tar),
                *words,
            ],
            _progress(log, report),
            keep=work.lock,
        )
    except HostError as error:
        raise HostError(f"building {recipe.name}: {_reason(log) or error}") from error
    report("packing", 0, 0)
    digest = _digest(tar, recipe, report)
    return Built(Packed(Blob(str(tar), recipe.name), digest), _document(recipe, digest, epoch))


def _epoch(recipe: Recipe) -> int:
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if text is None:
        epoch = int(datetime.datetime.combine(recipe.date, datetime.time(), datetime.UTC).timestamp())
        if epoch > time.time():  # what is made now would be older than that, and of another time in each build
            raise UsageError(f"recipe {recipe.name}: date: {recipe.date} is after today, by this machine's clock")
        return epoch
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise UsageError(f"SOURCE_DATE_EPOCH: {text[:80]!r} is not a number of seconds")
    return int(text)


def _in_root(command: str) -> str:
    return f'chroot "$1" sh -euc {shlex.quote(command)}'


def _progress(log: Path, report: Report) -> Callable[[], None]:
    """Tells of the step that mmdebstrap is at, by its log."""
    said = ""

    def look() -> None:
        nonlocal said
        steps = [line.removeprefix("I: ").rstrip(".") for line in _read(log).splitlines() if line.startswith("I: ")]
        if steps and steps[-1] != said:
            if said:
                report(said, 0, 0)
            said = steps[-1]
            report(said, 0, None)

    return look


def _read(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""


def _reason(log: Path) -> str:
    """What failed: apt's or mmdebstrap's errors and what was said just before the first, else the end of what was said."""
    lines = [line for line in _read(log).splitlines() if line.strip() and not line.startswith(("I: ", "W: Download"))]
    first = next((number for number, line in enumerate(lines) if line.startswith("E: ")), len(lines) - 5)
    return printable(" | ".join(lines[max(0, first - 3) :]))[:_TAIL]


def _digest(tar: Path, recipe: Recipe, report: Report) -> str:
    what = f"{recipe.name}: its digest"
    digest = hashlib.sha256()
    total, done = tar.stat().st_size, 0
    with tar.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            done += len(chunk)
            report(what, done, total)
    return f"sha256:{digest.hexdigest()}"


def _document(recipe: Recipe, digest: str, epoch: int) -> bytes:
    """The config, as docker and podman would write it; the same for the same layer and recipe."""
    run = recipe.config
    config = {
        "Env": [f"{name}={value}" for name, value in {"PATH": _PATH, **run.env}.items()],
        "WorkingDir": run.workdir,
        "User": run.user,
        "Entrypoint": run.entrypoint,
        "Cmd": run.cmd,
        "Labels": {"org.opencontainers.image.description": recipe.description, **run.labels},
    }
    document = {
        "architecture": machine(),
        "config": config,
        "created": datetime.datetime.fromtimestamp(epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "os": "linux",
        "rootfs": {"diff_ids": [digest], "type": "layers"},
    }
    return msgspec.json.encode(document)
