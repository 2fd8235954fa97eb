"""Is the store what it has to be? Images against their ids, layers against their manifests, entry by entry."""

from __future__ import annotations

import hashlib
import os

import msgspec

from agentrun.errors import HostError
from agentrun.image.manifest import decode, difference, scan
from agentrun.image.shelf import Shelf
from agentrun.tomltext import show_path


class Fault(msgspec.Struct, frozen=True):
    """Something in the store is not as it should be."""

    what: str
    """A layer, an image, a name."""
    path: str
    """The first entry of a layer that differs; empty for what is no entry."""
    problem: str


def check_images(shelf: Shelf, name: str | None) -> tuple[list[Fault], list[str]]:
    """What is wrong with one image, or with all images and names; and the layers to look at: all, or those of the one.

    Raises:
        UsageError: there is no image of that name.
    """
    faults: list[Fault] = []
    layers: set[str] = set() if name else set(shelf.layer_names())
    known = shelf.image_ids()
    for image_id in [shelf.resolve(name)] if name else known:
        try:
            layers.update(shelf.image(image_id).layers)
        except HostError as error:
            faults.append(Fault(f"image {image_id}", "", str(error)))
    for called, target in {} if name else shelf.names().items():
        if target not in known:
            faults.append(Fault(f"name {called}", "", f"its image {target} is missing"))
    return faults, sorted(layers)


def check_layer(shelf: Shelf, name: str, held: int) -> list[Fault]:
    """What is wrong with a layer. ``held`` is a descriptor of its directory, with a lease on it.

    Raises:
        HostError: what describes it is damaged.
    """
    what = f"layer {name}"
    info = shelf.layer(name)
    try:
        data = (shelf.layers / name / "manifest").read_bytes()
        if name != info.name or info.manifest != "sha256:" + hashlib.sha256(data).hexdigest():
            return [Fault(what, "", "its layer.json and manifest do not belong together, or not to its name")]
        fd = os.open("fs", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=held)
        try:
            found = difference(decode(data), scan(fd))
        finally:
            os.close(fd)
    except (OSError, msgspec.MsgspecError) as error:
        return [Fault(what, "", f"cannot be read: {error}")]
    return [Fault(what, show_path(os.fsdecode(found[0]) or "."), found[1])] if found else []
