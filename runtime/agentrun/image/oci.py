"""The two formats of images as files: OCI layouts and what `docker save` writes. Every blob is verified against its digest.

A name is a member of an archive or a file below a directory: who reads it (``Get``) need not care, and neither do we.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import msgspec

from agentrun.errors import UsageError
from agentrun.image.config import DIGEST, parse_config
from agentrun.image.layers import Packed
from agentrun.image.limits import ArchiveError
from agentrun.image.streams import Blob
from agentrun.tomltext import show

Get = Callable[[str, str | None], Blob | None]
"""(name, digest) → the blob; None if there is none."""

_MOST: Final = 4 << 20
"""Bytes of a manifest or a config."""
_NESTED: Final = 3
_LAYER: Final = re.compile(
    r"application/vnd\.(?:oci\.image\.layer\.(?:nondistributable\.)?v1\.tar(?:\+gzip|\+zstd)?"
    r"|docker\.image\.rootfs\.(?:foreign\.)?diff\.tar(?:\.gzip|\.zstd)?)"
)
_INDEXES: Final = (
    "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
)  # fmt: skip
_MANIFESTS: Final = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_CONFIGS: Final = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
_REF: Final = "org.opencontainers.image.ref.name"
_FULL_REF: Final = "io.containerd.image.name"
_ARCHITECTURES: Final = {
    "x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386", "riscv64": "riscv64", "ppc64le": "ppc64le",
    "s390x": "s390x",
}  # fmt: skip
_T = TypeVar("_T")


class _Platform(msgspec.Struct):
    architecture: str = ""
    os: str = ""


class _Descriptor(msgspec.Struct, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    platform: _Platform | None = None
    annotations: dict[str, str] | None = None


class _Index(msgspec.Struct, rename="camel"):
    manifests: list[_Descriptor] | None = None


class _Manifest(msgspec.Struct, rename="camel"):
    config: _Descriptor
    layers: list[_Descriptor]
    schema_version: int = 2


class _Saved(msgspec.Struct, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class Found(msgspec.Struct, frozen=True):
    """An image in one of the formats."""

    document: bytes
    layers: tuple[Packed, ...]
    names: tuple[str, ...]


def machine() -> str:
    """This machine's architecture, as images call it."""
    name = os.uname().machine
    return _ARCHITECTURES.get(name, name)


def read_layout(get: Get, what: str, tag: str | None) -> Found:
    """The image of an OCI layout: the one with the tag, or the only one, or the only one for this machine.

    Raises:
        UsageError: it is not there, or there are several.
        ArchiveError: a blob is missing, damaged or of a kind that is not known.
    """
    index = _read(get, "index.json", None, what, _Index)
    entries = [entry for entry in index.manifests or [] if tag is None or tag in _refs(entry)]
    if not entries and tag is not None:
        known = ", ".join(sorted(ref for entry in index.manifests or [] for ref in _refs(entry))) or "none"
        raise UsageError(f"{what}: there is no image {show(tag)} in it (known: {known})")
    entry = _choose(entries, what)
    names = _names(entry)
    for _ in range(_NESTED):
        if entry.media_type not in _INDEXES:
            break
        entry = _choose(_read_blob(get, entry, what, _Index).manifests or [], what)
    if entry.media_type not in (*_MANIFESTS, ""):
        raise ArchiveError(f"{what}: {entry.digest}", f"is a {entry.media_type[:100]!r}, which is no image")
    manifest = _read_blob(get, entry, what, _Manifest)
    if manifest.schema_version != 2:
        raise ArchiveError(f"{what}: {entry.digest}", f"is a manifest of version {manifest.schema_version}; only 2 is known")
    if manifest.config.media_type not in (*_CONFIGS, ""):
        raise ArchiveError(f"{what}: {entry.digest}", f"is no image: its config is a {manifest.config.media_type[:100]!r}")
    document = _blob(get, manifest.config, what).content(_MOST)
    diff_ids = _diff_ids(document, f"{what}: {manifest.config.digest}", len(manifest.layers))
    layers = []
    for layer, diff_id in zip(manifest.layers, diff_ids, strict=True):
        if not _LAYER.fullmatch(layer.media_type):
            raise ArchiveError(f"{what}: {layer.digest}", f"is a layer of a kind that is not known, {layer.media_type[:100]!r}")
        layers.append(Packed(_blob(get, layer, what), diff_id))
    return Found(document, tuple(layers), names)


def read_saved(get: Get, what: str, tag: str | None) -> Found:
    """The image of an archive of `docker save`: the one with the tag, or the only one.

    Its layers have no digests but those in its config, and the config one only by its name, which old archives do not have.

    Raises:
        UsageError: it is not there, or there are several.
        ArchiveError: a member is missing or damaged.
    """
    images = [
        image for image in _read(get, "manifest.json", None, what, list[_Saved]) if tag is None or tag in (image.repo_tags or ())
    ]
    if len(images) != 1:
        known = "there are several images" if images else "there is no such image"
        raise UsageError(f"{what}: {known} in it; name one (docker-archive:PATH:NAME:TAG)")
    [image] = images
    stem = os.path.basename(image.config).removesuffix(".json")
    digest = f"sha256:{stem}" if DIGEST.fullmatch(f"sha256:{stem}") else None
    document = _member(get, image.config, digest, what).content(_MOST)
    diff_ids = _diff_ids(document, f"{what}: {image.config}", len(image.layers))
    layers = [Packed(_member(get, name, None, what), diff_id) for name, diff_id in zip(image.layers, diff_ids, strict=True)]
    return Found(document, tuple(layers), tuple(image.repo_tags or ()))


def _diff_ids(document: bytes, what: str, count: int) -> tuple[str, ...]:
    diff_ids = parse_config(document, what).diff_ids
    if len(diff_ids) != count:
        raise ArchiveError(what, f"is the config of an image of {len(diff_ids)} layers, and the manifest has {count}")
    return diff_ids


def _choose(entries: Sequence[_Descriptor], what: str) -> _Descriptor:
    """The one entry, or the one for this machine."""
    if len(entries) == 1:
        return entries[0]
    mine = [
        entry for entry in entries if entry.platform and (entry.platform.os, entry.platform.architecture) == ("linux", machine())
    ]
    if len(mine) != 1:
        found = ", ".join(sorted(map(_platform, entries)))
        known = ", ".join(sorted(ref for entry in entries for ref in _refs(entry)))
        raise UsageError(
            f"{what}: {len(mine)} images in it are for linux/{machine()} (platforms: {found}; tags: {known or 'none'})"
        )
    return mine[0]


def _platform(entry: _Descriptor) -> str:
    return f"{entry.platform.os}/{entry.platform.architecture}" if entry.platform else "?"


def _refs(entry: _Descriptor) -> tuple[str, ...]:
    annotations = entry.annotations or {}
    return tuple(annotations[key] for key in (_REF, _FULL_REF) if key in annotations)


def _names(entry: _Descriptor) -> tuple[str, ...]:
    """What it is called in its layout, if that says more than a tag."""
    annotations = entry.annotations or {}
    name = annotations.get(_FULL_REF) or annotations.get(_REF, "")
    return (name,) if ":" in name or "/" in name else ()


def _blob(get: Get, descriptor: _Descriptor, what: str) -> Blob:
    if not DIGEST.fullmatch(descriptor.digest):
        raise ArchiveError(f"{what}: {descriptor.digest[:100]}", "is not a digest that is known (sha256:…)")
    blob = get(f"blobs/sha256/{descriptor.digest.removeprefix('sha256:')}", descriptor.digest)
    if blob is None:
        raise ArchiveError(f"{what}: {descriptor.digest}", "is missing")
    with blob.open() as reader:
        if reader.size != descriptor.size:
            raise ArchiveError(
                f"{what}: {descriptor.digest}", f"has {reader.size} bytes and should have {descriptor.size} (truncated?)"
            )
    return blob


def _member(get: Get, name: str, digest: str | None, what: str) -> Blob:
    blob = get(name, digest)
    if blob is None:
        raise ArchiveError(f"{what}: {name[:200]}", "is missing")
    return blob


def _read_blob(get: Get, descriptor: _Descriptor, what: str, kind: type[_T]) -> _T:
    return _decode(_blob(get, descriptor, what), kind)


def _read(get: Get, name: str, digest: str | None, what: str, kind: type[_T]) -> _T:
    return _decode(_member(get, name, digest, what), kind)


def _decode(blob: Blob, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(blob.content(_MOST), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ArchiveError(blob.what, f"cannot be read: {error}") from error
