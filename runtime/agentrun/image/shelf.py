"""What is on disk: layers, images and names, each read and written as a whole. Nothing here decides who may remove what.

::

    images/                     0700: set-id programs lie in there, so nobody but its owner walks it
      layers/<name>/            fs/, manifest, layer.json: see ``layers``
      images/<sha256>.json      an ``Image``; named after the digest of its config, as docker and podman name it
      names.json                name:tag → digest
      lock  locks/  tmp/        see ``locks``

A file is replaced by renaming another one over it, which is on the disk before, and the rename after.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from agentrun.errors import HostError, UsageError
from agentrun.image.config import ImageConfig, parse_config
from agentrun.image.layers import LayerInfo
from agentrun.image.locks import sync_directory
from agentrun.tomltext import show

SESSION_TAG: Final = "agentrun-session/"
"""How names begin that keep an image for a session."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,250}")
_DIGITS: Final = 64
"""Of a whole id."""
_ID: Final = re.compile(r"(?:sha256:)?([0-9a-f]{8,64})")


class Image(msgspec.Struct, frozen=True):
    """``images/<sha256>.json``."""

    id: str
    """``sha256:…``, of ``document``."""
    document: str
    """The config, byte for byte."""
    layers: tuple[str, ...]
    """Names of its layers, lowest first."""
    hidden: int = 0
    """So many of the lowest have nothing in the image: a layer above them hides all that is below it."""
    source: str = ""
    """What it was imported from."""
    imported: float = 0.0
    """When, in seconds since 1970."""

    @property
    def config(self) -> ImageConfig:
        """What it says about how its programs are run."""
        return parse_config(self.document.encode(), f"config of {self.id}")


def full_name(name: str) -> str:
    """A name with its tag: ``latest`` if it has none.

    Raises:
        UsageError: it cannot be one.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"image: {show(name)} is not a name (letters, digits, . _ / : @ + -, at most 251)")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def default_root(env: Mapping[str, str] | None = None) -> Path:
    """Where the store is: ``$AGENTRUN_IMAGES``, the machine's, or for who is not root his own.

    Raises:
        UsageError: there is no such place.
    """
    variables = os.environ if env is None else env
    if given := variables.get("AGENTRUN_IMAGES"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/agentrun/images")
    data = variables.get("XDG_DATA_HOME") or (f"{home}/.local/share" if (home := variables.get("HOME")) else "")
    if not data.startswith("/"):
        raise UsageError("image store: there is no home directory for it; set AGENTRUN_IMAGES")
    return Path(data, "agentrun/images")


class Shelf:
    """The files of one store."""

    def __init__(self, root: Path) -> None:
        """Make the directories that are missing.

        Raises:
            HostError: they cannot be made, or are not ours alone.
        """
        self.root = root
        self.layers, self.images, self.locks, self.tmp = (root / name for name in ("layers", "images", "locks", "tmp"))
        try:
            root.mkdir(0o700, parents=True, exist_ok=True)
            found = root.stat()
            if found.st_uid != os.geteuid():
                raise HostError(
                    f"image store {root}: belongs to user {found.st_uid}; set AGENTRUN_IMAGES to a directory of your own"
                )
            if found.st_mode & 0o077:
                root.chmod(0o700)
            for directory in (self.layers, self.images, self.locks, self.tmp):
                directory.mkdir(0o700, exist_ok=True)
        except OSError as error:
            raise HostError(f"image store {root}: {error.strerror} ({error.filename}); set AGENTRUN_IMAGES") from error

    def layer(self, name: str) -> LayerInfo:
        """What is known of a layer.

        Raises:
            HostError: nothing, or nothing that can be read.
        """
        path = self.layers / name / "layer.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=LayerInfo)
        except FileNotFoundError:
            raise HostError(
                f"image store {self.root}: layer {name} is missing; agentrun image verify says what needs it"
            ) from None
        except (OSError, msgspec.MsgspecError) as error:
            raise HostError(f"image store {self.root}: {path} is damaged: {error}") from error

    def layer_names(self) -> list[str]:
        """Every layer."""
        return sorted(path.name for path in self.layers.iterdir())

    def names(self) -> dict[str, str]:
        """Every name, and the id of its image.

        Raises:
            HostError: the file is damaged.
        """
        path = self.root / "names.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return {}
        except msgspec.MsgspecError as error:
            raise HostError(f"image store {self.root}: {path} is damaged: {error}") from error

    def stamp(self) -> tuple[int, ...]:
        """Changes with the names: the file is always replaced."""
        try:
            found = os.stat(self.root / "names.json")
        except FileNotFoundError:
            return ()
        return found.st_ino, found.st_mtime_ns

    def write_names(self, names: dict[str, str]) -> None:
        """Replace all names."""
        self._write(self.root / "names.json", msgspec.json.encode(names, order="sorted"))

    def image_ids(self) -> list[str]:
        """Every image."""
        return sorted(f"sha256:{path.stem}" for path in self.images.glob("*.json"))

    def image(self, image_id: str) -> Image:
        """One image.

        Raises:
            HostError: it is not there, or damaged: its config is not the one that its id names.
        """
        path = self._image_path(image_id)
        try:
            image = msgspec.json.decode(path.read_bytes(), type=Image)
        except (OSError, msgspec.MsgspecError) as error:
            raise HostError(f"image store {self.root}: image {image_id} is missing or damaged: {error}") from error
        found = "sha256:" + hashlib.sha256(image.document.encode()).hexdigest()
        if not image_id == image.id == found:
            raise HostError(f"image store {self.root}: {path} is damaged: its config has the digest {found}")
        return image

    def write_image(self, image: Image) -> None:
        """Add an image, or replace it by the same one."""
        self._write(self._image_path(image.id), msgspec.json.encode(image))

    def remove_image(self, image_id: str) -> None:
        """Remove an image; its layers stay."""
        self._image_path(image_id).unlink(missing_ok=True)
        sync_directory(self.images)

    def resolve(self, name: str) -> str:
        """The id of the image that a name means: a name, or the beginning of an id.

        Raises:
            UsageError: none or several.
        """
        names, match = self.names(), _ID.fullmatch(name)
        if match and len(match[1]) == _DIGITS and self._image_path(name).exists():
            return f"sha256:{match[1]}"  # though there may be a name that looks like it
        if (found := names.get(full_name(name))) is not None:
            return found
        if match:
            ids = [known for known in self.image_ids() if known.startswith(f"sha256:{match[1]}")]
            if len(ids) == 1:
                return ids[0]
            if ids:
                raise UsageError(f"image: {show(name)} is the beginning of {len(ids)} ids")
        known = ", ".join(sorted(known for known in names if not known.startswith(SESSION_TAG))) or "none"
        raise UsageError(f"image: there is no image {show(name)} (known: {known})")

    def _image_path(self, image_id: str) -> Path:
        return self.images / f"{image_id.removeprefix('sha256:')}.json"

    def _write(self, path: Path, data: bytes) -> None:
        """Replace a file. Called with the store locked, so the other name is nobody else's."""
        new = path.with_name(f".{path.name}.new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        new.rename(path)
        sync_directory(path.parent)
