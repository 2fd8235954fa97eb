"""``agentrun image``: get root file systems into the store, look at them, take them out again. No daemon is asked."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from typing import Any

import msgspec

from agentrun.cli.progress import progress
from agentrun.image.limits import Limits
from agentrun.image.recipe import load, recipe_files
from agentrun.image.shelf import Image
from agentrun.image.sources import find_archive_mark
from agentrun.image.store import Store
from agentrun.tomltext import show_path
from agentrun.units import parse_number, parse_size

_ACTIONS = {
    "import": "take in a directory, a tar, an OCI layout, an archive of docker's or podman's",
    "pull": "take in an image of a registry, or one that podman has; by skopeo",
    "build": "build an image from a recipe; by mmdebstrap",
    "ls": "every image in the store",
    "show": "one image: its config and layers",
    "rm": "remove a name, and its image if it has no other",
    "prune": "remove images without a name, and layers that nothing needs",
    "verify": "compare every file with what it has to be; exit status 125, and a line for each layer that differs",
}
_LIMITS = Limits()


def add_arguments(parser: argparse.ArgumentParser, _verb: str) -> None:
    """The actions of ``agentrun image``, each with its options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in _ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary.capitalize() + ".")
        action.add_argument("--json", action="store_true", help="print JSON")
        if name == "import":
            action.add_argument("source", metavar="SOURCE", help="a path; or dir:PATH, tar:, oci:, oci-archive:, docker-archive:")
        elif name == "pull":
            action.add_argument("source", metavar="REF", help="as of docker pull; or containers-storage: and one")
            action.add_argument("--insecure", action="store_true", help="plain HTTP, or a certificate nobody knows, is enough")
        elif name == "build":
            action.add_argument("source", metavar="RECIPE", nargs="?", help="its name, or a path; none: list them")
        if name in ("import", "pull", "build"):
            action.add_argument("name", metavar="NAME", nargs="?", help="what to call it; else it is called what it is there")
        if name in ("import", "pull"):
            action.add_argument("--max-size", metavar="SIZE", help="refuse a layer of more; 64G")
            action.add_argument("--max-entries", metavar="N", help=f"refuse a layer of more files; {_LIMITS.entries}")
            action.add_argument("--max-ratio", metavar="N", help=f"refuse a layer compressed to less than 1/N; {_LIMITS.ratio}")
            action.add_argument("--skip-special", action="store_true", help="leave devices, FIFOs and sockets out")
        elif name in ("show", "rm"):
            action.add_argument("name", metavar="NAME", help="or the beginning of an id")
        elif name == "verify":
            action.add_argument("name", metavar="NAME", nargs="?", help="or the beginning of an id; none: the whole store")


def run(args: argparse.Namespace) -> int:
    """Carry out one action."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a config may have letters that the terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    limits = _limits(args) if args.action in ("import", "pull") else _LIMITS
    if args.action == "build" and args.source is None:
        return _recipes(args.json)
    store = Store()
    match args.action:
        case "import" | "pull" | "build":
            return _import(store, args, limits)
        case "ls":
            return _list(store, args.json)
        case "show":
            return _show(store, args.name, args.json)
        case "rm":
            image_id, names = store.remove(args.name)
            return _print(args.json, {"id": image_id, "names": names}, [f"removed {name}" for name in names or (image_id,)])
        case "prune":
            pruned = store.prune()
            line = f"removed {len(pruned.images)} images, {len(pruned.layers)} layers, {_size(pruned.size)}"
            return _print(args.json, msgspec.to_builtins(pruned), [line])
    return _verify(store, args.name, args.json)


def _limits(args: argparse.Namespace) -> Limits:
    """The bounds of one import.

    Raises:
        UsageError: one is no number.
    """
    changes: dict[str, Any] = {"skip_special": args.skip_special}
    if args.max_size is not None:
        changes["size"] = parse_size(args.max_size, "--max-size")
    for name in ("entries", "ratio"):
        if (text := getattr(args, f"max_{name}")) is not None:
            changes[name] = int(parse_number(text, f"--max-{name}", least=1, most=1 << 40, whole=True))
    return msgspec.structs.replace(_LIMITS, **changes)


def _print(as_json: bool, value: object, lines: list[str]) -> int:
    print(json.dumps(value, indent=2) if as_json else "\n".join(lines))
    return 0


def _import(store: Store, args: argparse.Namespace, limits: Limits) -> int:
    reference, name = args.source, args.name
    insecure = args.action == "pull" and args.insecure
    if args.action == "pull" and not reference.startswith(("docker://", "containers-storage:")):
        reference = f"docker://{reference}"
    if args.action == "build":
        reference = f"recipe:{reference}"
    with progress() as report:
        image, names = store.import_image(reference, name, limits, report, insecure=insecure)
    if image.source != reference:
        _warn_of_archive(store, image, reference)
    lines = [f"{called}  {_short(image.id)}  {show_path(image.source)}" for called in names or ("-",)]
    return _print(args.json, {"id": image.id, "names": names, "source": image.source}, lines)


def _warn_of_archive(store: Store, image: Image, path: str) -> None:
    """Of what was taken for a root file system, say that it looks like an archive of images."""
    kind = image.source.partition(":")[0]
    if kind not in ("dir", "tar"):
        return
    with store.lease(image.id) as lease:
        mark = find_archive_mark(lease.layers[-1])
    if mark is not None:
        kinds = "oci:PATH" if kind == "dir" else "docker-archive:PATH, oci-archive:PATH"
        taken = f"{show_path(path)}: taken as a root file system, though it has {mark} at its top"
        print(f"agentrun: {taken}; if there are images in it, say so ({kinds})", file=sys.stderr)


def _recipes(as_json: bool) -> int:
    """Every recipe that has a name."""
    found = {name: load(path) for name, path in recipe_files().items()}
    rows = [{"name": name, "description": recipe.description, "suite": recipe.suite} for name, recipe in found.items()]
    width = max((len(name) for name in found), default=0)
    return _print(as_json, rows, [f"{name:<{width}}  {found[name].description}" for name in sorted(found)])


def _list(store: Store, as_json: bool) -> int:
    found = store.images()
    if as_json:
        rows = [
            {"id": image.id, "names": names, "layers": len(image.layers), "size": size, "imported": image.imported}
            for image, names, size in found
        ]
        return _print(True, rows, [])
    table = [("NAME", "ID", "LAYERS", "SIZE", "IMPORTED")] + [
        (name, _short(image.id), str(len(image.layers)), _size(size), time.strftime("%F %R", time.localtime(image.imported)))
        for image, names, size in found
        for name in names or ("-",)
    ]
    width = max(len(row[0]) for row in table)
    for row in table:
        print(f"{row[0]:<{width}}  {row[1]:<12}  {row[2]:>6}  {row[3]:>10}  {row[4]}")
    return 0


def _show(store: Store, name: str, as_json: bool) -> int:
    image = store.find(name)
    layers = [{"name": layer, **msgspec.to_builtins(store.layer(layer))} for layer in image.layers]
    config = msgspec.to_builtins(image.config)
    value = {"id": image.id, "source": image.source, "imported": image.imported, "config": config, "layers": layers}
    return _print(as_json, value, _described(image, layers))


def _described(image: Image, layers: list[dict[str, Any]]) -> list[str]:
    config = image.config
    lines = [
        f"id          {image.id}",
        f"source      {show_path(image.source)}",
        f"platform    {config.os}/{config.architecture}",
    ]
    for key, value in (("entrypoint", config.entrypoint), ("cmd", config.cmd)):
        lines += [f"{key:<11} {json.dumps(value)}"] if value else []
    lines += [f"workdir     {show_path(config.workdir)}", f"user        {show_path(config.user or 'root')}"]
    lines += [f"env         {show_path(setting)}" for setting in config.env]
    for layer in layers:
        dropped = ", ".join(f"{key} ({count})" for key, count in layer["dropped"].items())
        lines.append(
            f"layer       {layer['name'][:12]}  {_size(layer['size']):>9}  {layer['entries']} entries"
            + (f"  not taken: {show_path(dropped)}" if dropped else "")
        )
    return lines


def _verify(store: Store, name: str | None, as_json: bool) -> int:
    with progress() as report:
        faults = store.verify(name, report)
    lines = [f"{fault.what}: {fault.path + ': ' if fault.path else ''}{fault.problem}" for fault in faults]
    _print(as_json, msgspec.to_builtins(faults), lines or ["the store is as it should be" if name is None else f"{name}: ok"])
    return 125 if faults else 0


def _short(image_id: str) -> str:
    return image_id.removeprefix("sha256:")[:12]


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
