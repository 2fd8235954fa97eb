"""The image store: import, lease, remove, prune, verify.

What a mounter gets::

    with Store().lease("python:3.12") as lease:
        lease.layers    # tuple[Path, ...]: what is to be overlay's lower directories, lowest first (lowerdir= wants it last)
        lease.config    # ImageConfig: env, workdir, user, entrypoint, cmd

The directories stay as they are for as long as the lease is held; it ends with its descriptors, so with the process. Owners are
those of the archive (nothing is ever chowned for anybody: idmap the mounts), set-id bits are there (mount nosuid), whiteouts and
opaque directories are overlay's own. A layer is mounted by way of overlay only, even a single one: elsewhere its whiteouts would
be seen.

How it holds together. A layer is built in ``tmp/``, synced, and renamed to where it is used, so what is there is whole; who is
killed leaves something in ``tmp/`` that nobody has locked, and the next operation removes it. Who wants a layer that is being
built waits for its builder. What refers to a layer are images, which are read when it matters, and leases, which are locks: there
is no count that could be wrong. Between a layer and the image that needs it, the importer has a lease.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import msgspec

from agentrun.errors import HostError, UsageError
from agentrun.image import locks
from agentrun.image.config import ImageConfig, make_config, parse_config
from agentrun.image.keeper import Keeper
from agentrun.image.layers import Folder, LayerInfo, LayerSource, Packed, build
from agentrun.image.limits import ArchiveError, Limits, Report, silent
from agentrun.image.shelf import Image, Shelf, default_root, full_name
from agentrun.image.sources import Source, machine, open_source
from agentrun.image.verify import Fault, check_images, check_layer
from agentrun.tomltext import show_path


class Lease:
    """An image in use: see the module."""

    def __init__(self, image: Image, layers: tuple[Path, ...], held: list[int]) -> None:
        self.image = image
        self.layers = layers
        self.config: ImageConfig = image.config
        self._held = held

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def share(self) -> Lease:
        """Another holder of the same: the layers stay until both have let go."""
        return Lease(self.image, self.layers, [os.dup(fd) for fd in self._held])

    def close(self) -> None:
        """Let go; nothing of it may be mounted any more."""
        while self._held:
            os.close(self._held.pop())


class Pruned(msgspec.Struct, frozen=True):
    """What ``prune`` has removed."""

    images: tuple[str, ...]
    layers: tuple[str, ...]
    size: int
    """Bytes of their files."""


class Store:
    """One store. Any number of processes and threads may use it at once."""

    def __init__(self, root: Path | None = None) -> None:
        """Open it; it is made if it is not there.

        Raises:
            HostError: it cannot be made, or is somebody else's.
        """
        self.root = root or default_root()
        self._shelf = Shelf(self.root)
        self._keeper = Keeper(self._shelf)

    def import_image(
        self,
        reference: str,
        name: str | None = None,
        limits: Limits | None = None,
        report: Report = silent,
        *,
        insecure: bool = False,
    ) -> tuple[Image, tuple[str, ...]]:
        """Import what a reference means (``sources``); the image, and the names it now has because of it.

        Raises:
            ArchiveError: something in it is refused.
            UsageError: there is no such thing.
            HostError: it cannot be had, or not be written.
        """
        bounds = limits or Limits()
        if name is not None:
            full_name(name)
        with self._keeper.work() as work:
            source = open_source(reference, work, bounds, report, insecure=insecure)
            for layer in source.layers:
                if isinstance(layer, Folder) and self.root.resolve().is_relative_to(layer.path):
                    raise UsageError(f"image source {show_path(layer.path)}: the image store is in it, {self.root}")
            return self.add(source, (name,) if name is not None else source.names, bounds, report)

    def add(
        self, source: Source, names: Sequence[str], limits: Limits | None = None, report: Report = silent
    ) -> tuple[Image, tuple[str, ...]]:
        """Import a source that was opened. Until all of it is there and verified, nothing is to be seen of it.

        Raises:
            ArchiveError: something in it is refused.
            HostError: it cannot be read, or not be written.
        """
        called = tuple(full_name(name) for name in names)
        with contextlib.ExitStack() as leases, self._keeper.errors("importing"):
            infos: list[LayerInfo] = []
            for layer in source.layers:
                lowers = [self._tree(info.name) for info in infos]
                infos.append(self._add_layer(layer, lowers, leases, limits or Limits(), report))
            image = _make_image(source, infos)
            with self._keeper.locked():
                self._shelf.write_image(image)
                if called:
                    self._shelf.write_names({**self._shelf.names(), **dict.fromkeys(called, image.id)})
        return image, called

    def _add_layer(
        self, source: LayerSource, lowers: Sequence[Path], leases: contextlib.ExitStack, limits: Limits, report: Report
    ) -> LayerInfo:
        """A layer of the store for a source: the one that is there, the one that somebody else is building, or a new one."""
        diff_id = source.diff_id if isinstance(source, Packed) else None
        if diff_id is None:  # what it is called, only building it tells
            return self._build(source, lowers, leases, limits, report)
        with locks.exclusive_name(self._shelf.locks / diff_id.removeprefix("sha256:")):
            with self._keeper.locked():
                for name in self._shelf.layer_names():
                    if name.startswith(diff_id.removeprefix("sha256:")) and (info := self._shelf.layer(name)).fits(lowers):
                        self._keeper.hold(name, leases)
                        return info
            return self._build(source, lowers, leases, limits, report)

    def _build(
        self, source: LayerSource, lowers: Sequence[Path], leases: contextlib.ExitStack, limits: Limits, report: Report
    ) -> LayerInfo:
        with self._keeper.work() as work:
            new = work.path / "layer"
            new.mkdir(0o700)
            info = build(source, new, lowers, limits, report)
            locks.sync(new)
            with self._keeper.locked():
                target = self._shelf.layers / info.name
                if not target.exists():  # or somebody had the same, without knowing what it would be called
                    new.rename(target)
                    locks.sync_directory(self._shelf.layers)
                self._keeper.hold(info.name, leases)
        return info

    def images(self) -> list[tuple[Image, tuple[str, ...], int]]:
        """Every image, its names and its bytes; named ones first, by name."""
        with self._keeper.locked():
            names = self._shelf.names()
            found = []
            for image_id in self._shelf.image_ids():
                image = self._shelf.image(image_id)
                called = tuple(sorted(name for name, target in names.items() if target == image_id))
                found.append((image, called, sum(self._shelf.layer(layer).size for layer in set(image.layers))))
        return sorted(found, key=lambda row: (not row[1], row[1], row[0].id))

    def find(self, name: str) -> Image:
        """The image of a name, or of the beginning of an id.

        Raises:
            UsageError: there is none.
        """
        with self._keeper.locked():
            return self._shelf.image(self._shelf.resolve(name))

    def names(self) -> dict[str, str]:
        """Every name, and the id of its image."""
        with self._keeper.locked():
            return self._shelf.names()

    def tag(self, name: str, other: str) -> str:
        """Give an image another name as well; its id.

        Raises:
            UsageError: there is no such image, or that is no name.
        """
        called = full_name(other)
        with self._keeper.errors("naming an image"), self._keeper.locked():
            image_id = self._shelf.resolve(name)
            self._shelf.write_names({**self._shelf.names(), called: image_id})
        return image_id

    def layer(self, name: str) -> LayerInfo:
        """What is known of a layer."""
        return self._shelf.layer(name)

    def stamp(self) -> tuple[int, ...]:
        """Something that is another as soon as a name means another image."""
        return self._shelf.stamp()

    def lease(self, name: str) -> Lease:
        """An image for use.

        Raises:
            UsageError: there is none of that name.
            HostError: it is damaged.
        """
        with contextlib.ExitStack() as leases, self._keeper.locked():
            image = self._shelf.image(self._shelf.resolve(name))
            held = [self._keeper.hold(layer, leases) for layer in image.layers]
            lease = Lease(image, tuple(self._tree(layer) for layer in image.layers[image.hidden :]), held)
            leases.pop_all()
        return lease

    def remove(self, name: str) -> tuple[str, tuple[str, ...]]:
        """Remove a name, and its image if it has no other; by id, the image with all its names. Layers go with ``prune``.

        Raises:
            UsageError: there is no such image.
        """
        self._keeper.sweep()
        with self._keeper.errors("removing an image"), self._keeper.locked():
            image_id = self._shelf.resolve(name)
            names = self._shelf.names()
            known = full_name(name)
            every = tuple(sorted(key for key, target in names.items() if target == image_id))
            gone = (known,) if known in every else every
            rest = {key: target for key, target in names.items() if key not in gone}
            self._shelf.write_names(rest)
            if image_id not in rest.values():
                self._shelf.remove_image(image_id)
        return image_id, gone

    def prune(self) -> Pruned:
        """Remove images without a name, and layers that no image needs and nobody uses."""
        self._keeper.sweep()
        held: list[int] = []
        with self._keeper.errors("pruning"), self._keeper.work() as work:
            try:
                with self._keeper.locked():
                    named = set(self._shelf.names().values())
                    images = [image_id for image_id in self._shelf.image_ids() if image_id not in named]
                    for image_id in images:
                        self._shelf.remove_image(image_id)
                    needed = {layer for image_id in self._shelf.image_ids() for layer in self._shelf.image(image_id).layers}
                    layers, size = [], 0
                    for name in self._shelf.layer_names():
                        if name not in needed and (fd := locks.claim(self._shelf.layers / name)) is not None:
                            held.append(fd)
                            with contextlib.suppress(HostError):
                                size += self._shelf.layer(name).size
                            (self._shelf.layers / name).rename(work.path / name)
                            layers.append(name)
            finally:
                for fd in held:
                    os.close(fd)
        return Pruned(tuple(images), tuple(layers), size)

    def verify(self, name: str | None = None, report: Report = silent) -> list[Fault]:
        """Read everything, or one image, and compare it with what it has to be; the first difference of each layer.

        Raises:
            UsageError: there is no image of that name.
        """
        self._keeper.sweep()
        with self._keeper.locked():
            faults, layers = check_images(self._shelf, name)
        done = 0
        for layer in layers:
            report("verifying", done, None)
            try:
                with contextlib.ExitStack() as leases:
                    with self._keeper.locked():
                        if not self._tree(layer).parent.exists() and layer not in check_images(self._shelf, None)[1]:
                            continue  # it was removed since, and nothing needs it
                        held = self._keeper.hold(layer, leases)
                    faults += check_layer(self._shelf, layer, held)
                    done += self._shelf.layer(layer).size
            except HostError as error:
                faults.append(Fault(f"layer {layer}", "", str(error)))
        return faults

    def _tree(self, layer: str) -> Path:
        return self._shelf.layers / layer / "fs"


def _make_image(source: Source, infos: Sequence[LayerInfo]) -> Image:
    """The image of these layers.

    Raises:
        ArchiveError: its config is that of other ones.
    """
    diff_ids = tuple(info.diff_id for info in infos)
    document = source.document if source.document is not None else make_config(diff_ids, machine())
    config = parse_config(document, f"config of {source.what}")
    if config.diff_ids != diff_ids:
        raise ArchiveError(f"config of {source.what}", f"has {len(config.diff_ids)} layers, not the {len(diff_ids)} that came")
    hidden = max((number for number, info in enumerate(infos) if info.opaque), default=0)
    try:
        text = document.decode()
    except UnicodeDecodeError as error:
        raise ArchiveError(f"config of {source.what}", "is not UTF-8") from error
    image_id = "sha256:" + hashlib.sha256(document).hexdigest()
    return Image(image_id, text, tuple(info.name for info in infos), hidden, source.what, time.time())
