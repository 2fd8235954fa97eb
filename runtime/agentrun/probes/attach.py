"""Which programs to attach, and what they have to be told of this kernel. Everything is chosen by trying."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agentrun.probes.btf import Btf
from agentrun.probes.loader import ProbesError, load
from agentrun.probes.tracefs import gfp_flag

CONTROLLER_HOOKS = ("charge_fentry", "charge_kprobe")
"""Where the memory controller charges; the first that attaches is taken."""
PAGE_HOOKS = ("pages",)
"""Where there is no controller."""
MAPS = ("slots", "leaves", "settings", "counters", "events")
_SLACK_PAGES = 128
"""Most pages that all CPUs together may keep out of a leaf's account: 512 KiB."""


class Attached(NamedTuple):
    """Programs that run, for as long as this is held."""

    hook: str
    maps: Mapping[str, int]
    """Name → descriptor."""
    seconds: float
    """Compiling, loading and attaching took."""
    refused: Mapping[str, str]
    """Hook → why it was not taken."""
    program: Any
    """BCC's object, which detaches when it goes."""


def attach_burst(hooks: Sequence[str]) -> Attached:
    """Attach the first of ``hooks`` that this kernel takes.

    Raises:
        ProbesError: none; the message has every reason.
    """
    refused: dict[str, str] = {}
    for hook in hooks:
        begun = time.monotonic()
        try:
            program = load(hook, page_defines() if hook in PAGE_HOOKS else charge_defines())
        except (ProbesError, OSError, LookupError, ValueError) as error:
            refused[hook] = str(error)
            continue
        maps = {name: program[name.encode()].map_fd for name in MAPS}
        return Attached(hook, maps, time.monotonic() - begun, refused, program)
    raise ProbesError("; ".join(f"{hook}: {why}" for hook, why in refused.items()))


def charge_defines() -> dict[str, int]:
    """Where the charge programs find a leaf's id and usage.

    Raises:
        LookupError: this kernel has no such struct member, or no page_counter_try_charge.
        OSError: it has no BTF.
    """
    wanted = {
        "mem_cgroup": ["memory"], "cgroup_subsys_state": ["cgroup"], "cgroup": ["kn"], "kernfs_node": ["id"],
        "page_counter": ["usage"],
    }  # fmt: skip
    btf = Btf(wanted, ["page_counter_try_charge"])
    if "page_counter_try_charge" not in btf.functions:
        raise LookupError("this kernel has no page_counter_try_charge (CONFIG_MEMCG)")
    names = {"MEMORY": "mem_cgroup.memory", "CGROUP": "cgroup_subsys_state.cgroup", "KN": "cgroup.kn", "ID": "kernfs_node.id",
             "USAGE": "page_counter.usage"}  # fmt: skip
    return {f"OFF_{name}": btf.offsets[member] for name, member in names.items()}


def page_defines() -> dict[str, int]:
    """What the page account has to know: flags, how many page numbers there are, how many pages a CPU may keep back.

    Raises:
        LookupError: a flag, or pages that are described otherwise than by 64 bytes each.
        OSError: no tracefs, or no BTF.
    """
    if (size := Btf({"page": ["flags"]}, ()).sizes.get("page")) != 64:
        raise LookupError(f"struct page has {size} bytes here, not 64")
    pages = 1 << (_last_page()).bit_length()
    return {
        "GFP_MOVABLE": gfp_flag("__GFP_MOVABLE"), "GFP_ACCOUNT": gfp_flag("__GFP_ACCOUNT"), "PAGES": pages,
        "BATCH": max(1, min(32, _SLACK_PAGES // (os.cpu_count() or 1))),
    }  # fmt: skip


def _last_page(zoneinfo: Path = Path("/proc/zoneinfo")) -> int:
    """The highest page frame number, from proc_zoneinfo: each zone's ``spanned``, then its ``start_pfn``."""
    spanned = last = 0
    for line in zoneinfo.read_text().splitlines():
        words = line.replace(":", " ").split()
        if words[:1] == ["spanned"]:
            spanned = int(words[1])
        elif words[:1] == ["start_pfn"]:
            last = max(last, int(words[1]) + spanned)
    return last
