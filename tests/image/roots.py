# SPDX-License-Identifier: Apache-2.0
"""Small root file systems of busybox, and images made of them."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

APPLETS = "cat chmod dd echo env false grep head id ln ls mkdir mv pwd rm sh sleep stat test touch true wc".split()  # noqa: SIM905


def write_root(root: Path, **files: str) -> None:
    """A root file system of busybox, with more files: their paths with ``__`` for ``/``."""
    (root / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", root / "bin/busybox")
    for name in APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc").mkdir()
    for name, content in {
        "etc__passwd": "root:x:0:0::/root:/bin/sh\napp:x:33:44::/srv/app:/bin/sh\n",
        "etc__group": "root:x:0:\napp:x:44:\nmore:x:55:app\n",
        **files,
    }.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def archive(directory: Path, name: str, config: dict, *roots: Path) -> Path:
    """A docker archive of these layers, lowest first."""
    layers = []
    for number, root in enumerate(roots):
        path = directory / f"{name}-{number}.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(root, arcname=".")
        layers.append(path)
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(p.read_bytes()).hexdigest() for p in layers]},
    }
    (directory / "config.json").write_text(json.dumps(document))
    (directory / "manifest.json").write_text(
        json.dumps([{"Config": "config.json", "RepoTags": [f"{name}:latest"], "Layers": [p.name for p in layers]}])
    )
    result = directory / f"{name}.tar"
    with tarfile.open(result, "w") as tar:
        for path in (directory / "manifest.json", directory / "config.json", *layers):
            tar.add(path, arcname=path.name)
    return result
