"""What an image says about how its programs are run, from the config of OCI and of docker (they are the same here)."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from agentrun.image.limits import ArchiveError

DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


class ImageConfig(msgspec.Struct, frozen=True):
    """As ``docker run`` applies it."""

    env: tuple[str, ...] = ()
    """``NAME=value`` each."""
    workdir: str = "/"
    user: str = ""
    """``name``, ``uid``, ``name:group``, ``uid:gid``: names are those of the image's own /etc/passwd. Empty: root."""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    architecture: str = ""
    os: str = ""
    diff_ids: tuple[str, ...] = ()
    """Digests of the uncompressed layers, lowest first."""

    def command(self, args: tuple[str, ...] = ()) -> tuple[str, ...]:
        """What runs for these arguments: the entry point, then they, or what is there for when there are none."""
        return self.entrypoint + (args or self.cmd)


class _Run(msgspec.Struct, rename="pascal"):
    env: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None
    entrypoint: list[str] | str | None = None
    cmd: list[str] | str | None = None
    labels: dict[str, str] | None = None


class _RootFs(msgspec.Struct):
    diff_ids: list[str] | None = None


class _Document(msgspec.Struct):
    config: _Run | None = None
    rootfs: _RootFs | None = None
    architecture: str | None = None
    os: str | None = None


def parse_config(raw: bytes, what: str) -> ImageConfig:
    """Read a config.

    Raises:
        ArchiveError: it is none.
    """
    try:
        document = msgspec.json.decode(raw, type=_Document)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ArchiveError(what, f"is not an image config: {error}") from error
    run = document.config or _Run()
    config = ImageConfig(
        tuple(run.env or ()),
        run.working_dir or "/",
        run.user or "",
        _words(run.entrypoint),
        _words(run.cmd),
        run.labels or {},
        document.architecture or "",
        document.os or "",
        tuple(document.rootfs.diff_ids or () if document.rootfs else ()),
    )
    _check(config, what)
    return config


def _words(value: list[str] | str | None) -> tuple[str, ...]:
    if isinstance(value, str):  # docker's shell form, in configs of very old images
        return ("/bin/sh", "-c", value)
    return tuple(value or ())


def _check(config: ImageConfig, what: str) -> None:
    if any("\0" in text for text in (*config.env, config.workdir, config.user, *config.entrypoint, *config.cmd)):
        raise ArchiveError(what, "has a NUL in what it runs")
    for setting in config.env:
        if "=" not in setting[1:]:
            raise ArchiveError(what, f"Env: {setting[:80]!r} is not NAME=value")
    if not config.workdir.startswith("/") or ".." in config.workdir.split("/"):
        raise ArchiveError(what, f"WorkingDir: {config.workdir[:80]!r} is not an absolute path without ..")
    for diff_id in config.diff_ids:
        if not DIGEST.fullmatch(diff_id):
            raise ArchiveError(what, f"rootfs.diff_ids: {diff_id[:80]!r} is not sha256: and 64 digits")


def make_config(diff_ids: tuple[str, ...], architecture: str) -> bytes:
    """The config of an image that came without one. It is the same for the same layers, and so is the image's id."""
    document = {"architecture": architecture, "config": {}, "os": "linux", "rootfs": {"diff_ids": diff_ids, "type": "layers"}}
    return msgspec.json.encode(document)
