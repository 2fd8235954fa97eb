"""Where images come from: what the user names → layers to build and a config.

::

    dir:PATH                       a directory as the root file system
    tar:PATH                       a tar of one, plain, gzip or zstd
    oci:PATH[:TAG]                 an OCI layout, a directory
    oci-archive:PATH[:TAG]         a tar of one
    docker-archive:PATH[:NAME:TAG] what `docker save` writes
    docker://REF                   a registry; by skopeo
    containers-storage:REF         what podman has; by skopeo
    recipe:NAME, recipe:PATH       built here (``build``)

A path alone is whichever of the first five it is; what it was taken for is said (``Source.what``). skopeo makes an OCI layout in
the store's scratch space, and then it is one of these.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import msgspec

from agentrun.errors import UsageError
from agentrun.image import programs
from agentrun.image.build import build_recipe
from agentrun.image.layers import Folder, LayerSource, Packed
from agentrun.image.limits import Limits, Report
from agentrun.image.locks import Work
from agentrun.image.oci import Found, Get, machine, read_layout, read_saved
from agentrun.image.recipe import find_recipe
from agentrun.image.streams import Blob
from agentrun.image.tarfiles import Members, is_container, unpack
from agentrun.tomltext import show_path

__all__ = ["Source", "machine", "open_source"]

_TRANSPORT = re.compile(r"(dir|tar|oci|oci-archive|docker-archive|containers-storage|recipe):(.+)|(docker)://(.+)", re.DOTALL)
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


class Source(msgspec.Struct, frozen=True):
    """An image that can be imported."""

    what: str
    """What the user called it; where he did not say what it is, with that in front."""
    layers: tuple[LayerSource, ...]
    """Lowest first."""
    document: bytes | None
    """Its config; None if it came without."""
    names: tuple[str, ...]
    """What it is called if the user does not say."""


def open_source(reference: str, work: Work, limits: Limits, report: Report, *, insecure: bool = False) -> Source:
    """Find out what a reference means, and read what describes it.

    Raises:
        UsageError: there is no such thing, or it is none of these.
        ArchiveError: what describes it is damaged.
        HostError: it cannot be read, or a program for it is missing or fails.
    """
    match = _TRANSPORT.fullmatch(reference)
    kind, rest = (match[1] or match[3], match[2] or match[4]) if match else ("", reference)
    if kind in ("docker", "containers-storage"):
        return _by_skopeo(reference, rest, work, report, insecure)
    if kind == "recipe":
        recipe = find_recipe(rest)
        built = build_recipe(recipe, work, report)
        return Source(reference, (built.layer,), built.document, (recipe.name,))
    path, tag = _split_tag(rest) if kind in ("oci", "oci-archive", "docker-archive") else (rest, None)
    guessed = not kind
    kind = kind or _recognise(path, limits, report)
    wanted = "directory" if kind in ("dir", "oci") else "file"
    if stat.S_ISDIR(_stat(path).st_mode) != (wanted == "directory"):
        raise UsageError(f"image source {show_path(path)}: is not a {wanted}, which is what {kind}: takes")
    name, what = _name_of(path), f"{kind}:{path}" if guessed else reference
    match kind:
        case "dir":
            return Source(what, (Folder(os.path.realpath(path)),), None, (name,))
        case "tar":
            return Source(what, (Packed(Blob(path, path)),), None, (name,))
        case "oci":
            found = read_layout(_files_of(path), path, tag)
        case _:
            members = Members(unpack(path, work.path, limits, report), limits)
            is_layout = kind == "oci-archive" or (kind == "archive" and members.blob("oci-layout") is not None)
            found = (read_layout if is_layout else read_saved)(members.blob, path, tag)
            what = f"{'oci' if is_layout else 'docker'}-archive:{path}" if guessed else reference
    return _source(what, found, found.names or (f"{name}:{tag}" if tag and ":" not in tag else name,))


def find_archive_mark(tree: Path) -> str | None:
    """A file at the top of a root file system that archives of images have there, and hardly anything else."""
    return next((name for name in ("oci-layout", "manifest.json") if os.path.lexists(tree / name)), None)


def _source(what: str, found: Found, names: tuple[str, ...]) -> Source:
    return Source(what, found.layers, found.document, names)


def _recognise(path: str, limits: Limits, report: Report) -> str:
    if stat.S_ISDIR(_stat(path).st_mode):
        is_layout = all(os.path.isfile(os.path.join(path, name)) for name in ("oci-layout", "index.json"))
        return "oci" if is_layout else "dir"
    return "archive" if is_container(path, limits, report) else "tar"


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"image source {show_path(path)}: {reason}") from error


def _split_tag(text: str) -> tuple[str, str | None]:
    """``PATH:TAG``, unless there is something of the whole name."""
    if os.path.lexists(text):
        return text, None
    path, colon, tag = text.partition(":")
    return (path, tag) if colon and tag else (text, None)


def _name_of(path: str) -> str:
    """A name made of a path's last part."""
    base = os.path.basename(os.path.realpath(path))
    base = re.sub(r"\.(?:tar|tgz|tzst)(?:\.(?:gz|zst))?$", "", base)
    return _NOT_IN_A_NAME.sub("-", base).strip("-._")[:200] or "image"


def _files_of(directory: str) -> Get:
    def get(name: str, digest: str | None) -> Blob | None:
        path = os.path.join(directory, name)
        return Blob(path, path, digest=digest) if os.path.isfile(path) else None

    return get


def _by_skopeo(reference: str, name: str, work: Work, report: Report, insecure: bool) -> Source:
    layout = work.path / "oci"
    options = ["--src-tls-verify=false"] if insecure else []
    report(reference, 0, None)
    programs.run(
        ["skopeo", "copy", "--quiet", *options, "--", reference, f"oci:{layout}:image"],
        lambda: report(reference, _size_of(layout), None),
        keep=work.lock,
    )
    found = read_layout(_files_of(str(layout)), reference, None)
    return _source(reference, found, (name,))


def _size_of(directory: Path) -> int:
    """Bytes below a directory that somebody writes to meanwhile."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_size
        except OSError:
            continue
    return total
