# SPDX-License-Identifier: Apache-2.0
"""Changes as a patch: what a name is, and what is a line."""

import os
import shutil
import subprocess

import pytest

from agentrun.changes.beneath import DIRECTORY
from agentrun.changes.model import Change, ChangeSet
from agentrun.changes.nodes import read_node
from agentrun.changes.patch import make_patch


@pytest.mark.parametrize(
    "name", [b"plain", b"two words", b"x\n--- a/f\n+++ b/f", b'say "so"', b"back\\slash\t\x01\x7f", b"\xc3\xa4\xff"]
)
def test_a_name_is_one_whatever_is_in_it(tmp_path, name):
    """Who reads a patch to decide must not be shown other files than those that are changed; patch(1) makes the very same one."""
    for where in ("upper", "base"):
        (tmp_path / where).mkdir()
    path = os.path.join(os.fsencode(tmp_path), b"upper", name.replace(b"/", b"_"))
    name = os.path.basename(path)
    with open(path, "wb") as file:
        file.write(b"line\n")
    upper, base = (os.open(tmp_path / where, DIRECTORY) for where in ("upper", "base"))
    try:
        change = Change(name, "added", read_node(upper, name, os.stat(path)))
        changes = ChangeSet(
            id="x", workspace="/w", inode=0, uid=0, gid=0, created=0.0, call="", argv=(), size=0, changes=(change,)
        )
        patch = b"".join(make_patch(changes, upper, base))
    finally:
        os.close(upper)
        os.close(base)
    assert len(patch.split(b"\n")) == 5, patch
    if shutil.which("patch"):
        subprocess.run(["patch", "-p1", "-s"], input=patch, cwd=tmp_path / "base", check=True)
        assert os.listdir(os.fsencode(tmp_path / "base")) == [name]
