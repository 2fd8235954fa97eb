"""The files that make container engines know agentrun (``shim/config``), with the paths of this installation: text in, text out.

``plan`` says what would be written where; ``carry_out`` writes it. docs/oci.md has what the files mean.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from agentrun.errors import HostError, UsageError
from agentrun_shim.data import data_path
from agentrun_shim.hook_static import DEFAULT_CACHE

ENGINES = {"podman": "podman", "docker": "dockerd", "containerd": "containerd", "cri-o": "crio", "kubernetes": "kubelet"}
"""Name → the program by which it is found."""
_RUNTIME = "/usr/bin/agentrun-oci"
STAGES = ("createRuntime", "poststart", "poststop")
_HOOKS = {stage: f"/etc/containers/oci/hooks.d/agentrun-{stage}.json" for stage in STAGES}
"""A file for each stage, because an engine passes a hook no word of its own, and runc says `created` to poststart as well."""
_IMPORT = "/etc/containerd/conf.d/*.toml"


class Paths(msgspec.Struct, frozen=True, kw_only=True):
    """What the files name."""

    runtime: str
    """``agentrun-oci``."""
    python: str
    """The interpreter of the hook: absolute, because an engine's hook has no PATH."""
    hook: str
    """The hook's script, ``hook.py``."""
    socket: str
    cache: str
    """Where the hook finds policies when there is no daemon."""
    systemd: bool
    """Cgroups are made by systemd here: containerd's SystemdCgroup."""
    containerd: int = 2
    """Its major version."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One file."""

    path: str
    text: str | None
    """``None``: it is removed."""
    what: str
    """For people."""


def installed() -> list[str]:
    """The engines of this machine."""
    return [name for name, program in ENGINES.items() if shutil.which(program)]


def shipped(name: str) -> str:
    """A file of ``shim/config``."""
    return data_path(f"shim/config/{name}").read_text()


def plan(engines: Iterable[str], paths: Paths, root: Path) -> tuple[list[Change], list[str]]:
    """What to write for these engines below ``root``, and what is left for whoever reads it.

    Raises:
        UsageError: a file that has to be merged with ours is not what it should be.
    """
    changes: dict[str, Change] = {}
    notes: list[str] = []
    for engine in engines:
        for change in _PLANS[engine](paths, root, notes):
            changes[change.path] = change
    return list(changes.values()), notes


def plan_removal(root: Path) -> list[Change]:
    """What there is of ours below ``root``, of all engines."""
    gone = [path for path in (*_OWN, _CONTAINERD, DEFAULT_CACHE) if (root / path.lstrip("/")).exists()]
    main = root / _CONTAINERD_MAIN.lstrip("/")
    if main.exists() and main.read_text() in {_containerd_main(version) for version in _CONFIG_VERSIONS.values()}:
        gone.append(_CONTAINERD_MAIN)  # there was none, and nobody has written anything into it
    changes = [Change(path=path, text=None, what="agentrun's own") for path in gone]
    document = _read_docker(root)
    runtimes = document.get("runtimes")
    if isinstance(runtimes, dict) and runtimes.pop("agentrun", None) is not None:
        if not runtimes:
            del document["runtimes"]
        changes.append(Change(path=_DOCKER, text=_dump(document) if document else None, what="docker, without agentrun"))
    return changes


def carry_out(changes: Iterable[Change], root: Path) -> list[str]:
    """Write, each file whole or not at all; returns a line about each.

    Raises:
        HostError: one could not be written.
    """
    said = []
    for change in changes:
        path = root / change.path.lstrip("/")
        try:
            if change.text is None:
                path.unlink(missing_ok=True)
                said.append(f"{change.path}: removed")
            elif path.exists() and path.read_text() == change.text:
                said.append(f"{change.path}: as it was")
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{path.name}.{os.getpid()}")
                temporary.write_text(change.text)
                temporary.chmod(path.stat().st_mode & 0o7777 if path.exists() else 0o644)
                temporary.replace(path)
                said.append(f"{change.path}: written ({change.what})")
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}") from error
    return said


# ------------------------------------------------------------------ one function an engine

_PODMAN = "/etc/containers/containers.conf.d/agentrun.conf"
_DOCKER = "/etc/docker/daemon.json"
_CONTAINERD = "/etc/containerd/conf.d/agentrun.toml"
_CONTAINERD_MAIN = "/etc/containerd/config.toml"
_CONFIG_VERSIONS = {False: 2, True: 3}
"""Of containerd's configuration: is it containerd 2?"""
_CRIO = "/etc/crio/crio.conf.d/10-agentrun.conf"
_OWN = (_PODMAN, *_HOOKS.values(), _CRIO)


def _hooks(paths: Paths) -> list[Change]:
    changes = []
    for stage, path in _HOOKS.items():
        document = json.loads(shipped(f"hooks.d/agentrun-{stage}.json"))
        # The interpreter itself: a launcher in between would have to find it, and -S spares the search for packages.
        document["hook"]["path"] = paths.python
        document["hook"]["args"] = [
            "agentrun-hook", "-I", "-S", "-E", paths.hook, f"--socket={paths.socket}", f"--policies={paths.cache}", stage,
        ]  # fmt: skip
        changes.append(Change(path=path, text=_dump(document), what="the hook, for podman and CRI-O"))
    return changes


def _podman(paths: Paths, _root: Path, _notes: list[str]) -> list[Change]:
    text = shipped("podman/agentrun.conf").replace(_RUNTIME, paths.runtime)
    return [Change(path=_PODMAN, text=text, what="podman: --runtime agentrun"), *_hooks(paths)]


def _docker(paths: Paths, root: Path, notes: list[str]) -> list[Change]:
    document, ours = _read_docker(root), json.loads(shipped("docker/daemon.json"))
    ours["runtimes"]["agentrun"]["path"] = paths.runtime
    runtimes = document.setdefault("runtimes", {})
    if not isinstance(runtimes, dict):
        raise UsageError(f"{_DOCKER}: runtimes: not an object")
    runtimes.update(ours["runtimes"])
    notes.append("docker: systemctl reload docker, then docker run --runtime agentrun; it has no directory of hooks")
    return [Change(path=_DOCKER, text=_dump(document), what="docker, merged with what was there")]


def _read_docker(root: Path) -> dict[str, object]:
    path = root / _DOCKER.lstrip("/")
    try:
        document = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path}: not an object")
    return document


def _containerd(paths: Paths, root: Path, notes: list[str]) -> list[Change]:
    text = shipped(f"containerd/agentrun-{'1' if paths.containerd < 2 else '2'}.toml").replace(_RUNTIME, paths.runtime)
    text = text.replace("SystemdCgroup = true", f"SystemdCgroup = {'true' if paths.systemd else 'false'}")
    main = root / _CONTAINERD_MAIN.lstrip("/")
    changes = [Change(path=_CONTAINERD, text=text, what=f"containerd {paths.containerd}.x: runtime handler agentrun")]
    if not main.exists():
        head = _containerd_main(_CONFIG_VERSIONS[paths.containerd >= 2])
        changes.append(Change(path=_CONTAINERD_MAIN, text=head, what="containerd: import of conf.d"))
    elif _IMPORT not in main.read_text():
        notes.append(f'containerd: /etc/containerd/config.toml does not import it; add: imports = ["{_IMPORT}"]')
    notes.append("containerd: systemctl restart containerd; ctr takes --runc-binary instead")
    return changes


def _containerd_main(version: int) -> str:
    return f'version = {version}\nimports = ["{_IMPORT}"]\n'


def _crio(paths: Paths, _root: Path, notes: list[str]) -> list[Change]:
    notes.append("cri-o: systemctl reload crio")
    text = shipped("crio/10-agentrun.conf").replace(_RUNTIME, paths.runtime)
    return [Change(path=_CRIO, text=text, what="CRI-O: runtime handler agentrun"), *_hooks(paths)]


def _kubernetes(_paths: Paths, _root: Path, notes: list[str]) -> list[Change]:
    notes.append(f"kubernetes, once for the cluster: kubectl apply -f {data_path('shim/config/kubernetes/runtimeclass.yaml')}")
    return []


_PLANS: dict[str, Callable[[Paths, Path, list[str]], list[Change]]] = {
    "podman": _podman, "docker": _docker, "containerd": _containerd, "cri-o": _crio, "kubernetes": _kubernetes,
}  # fmt: skip


def _dump(document: object) -> str:
    return json.dumps(document, indent=2) + "\n"
